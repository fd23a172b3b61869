"""The datapath as it stands under bpffs: load it if it is not there, attach it to pods."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.followers import Followers
from redirector.datapath.layout import LIMITS, Defect
from redirector.datapath.libbpf import AttachType
from redirector.datapath.loading import run_loader
from redirector.datapath.maps import Maps
from redirector.datapath.source import SIZES, build_id
from redirector.errors import DatapathError

#: Hooks of a pod, in the order in which they are attached: who answers before who asks, and the
#: connect hooks last, so that no connection is steered before all of its way stands.
CGROUP_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("getsockopt", AttachType.CGROUP_GETSOCKOPT),
    ("setsockopt", AttachType.CGROUP_SETSOCKOPT),
    ("getpeername4", AttachType.CGROUP_INET4_GETPEERNAME),
    ("getpeername6", AttachType.CGROUP_INET6_GETPEERNAME),
    ("sockops", AttachType.CGROUP_SOCK_OPS),
)
INBOUND_HOOK = ("inbound", AttachType.SK_LOOKUP)
CONNECT_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("connect4", AttachType.CGROUP_INET4_CONNECT),
    ("connect6", AttachType.CGROUP_INET6_CONNECT),
)
ALL_HOOKS = (*CGROUP_HOOKS, INBOUND_HOOK, *CONNECT_HOOKS)


class Datapath:
    """Programs and maps pinned under one directory of a bpffs.

    Every method may raise DatapathError, which names what the kernel refused.
    """

    def __init__(self, root: Path, sizes: Mapping[str, int] = SIZES) -> None:
        self.root = root
        self.maps = Maps(root / "maps")
        self._sizes = sizes

    # -- as a whole

    def is_loaded(self) -> bool:
        """Whether programs and maps are pinned."""
        return (self.root / "programs").is_dir()

    def ensure(self) -> None:
        """Load the shipped programs unless they are pinned already."""
        if self.is_loaded() and self.is_current():
            return
        with self._alone() as lock:
            if self.is_loaded() and not self.is_current():
                if self.pods():
                    raise DatapathError(
                        f"{self.root}: another version of the programs is in use by "
                        f"{len(self.pods())} pods; move to this one: redirector uninstall, then "
                        "enroll the pods again"
                    )
                self._forget_all()
            if not self.is_loaded():
                self._load(lock)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """Keep other loads and unloads out until leaving.

        A loader inherits the descriptor: it keeps them out also when whoever started it was killed.
        """
        fd = os.open(self.root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    @cached_property
    def _build(self) -> bytes:
        return build_id(self._sizes)

    def is_current(self) -> bool:
        """Whether what is pinned was compiled from the shipped source with the same constants."""
        return bytes(self.maps.about().sha256) == self._build

    def defects(self) -> Defect:
        """What the running kernel does wrong with redirected bytes; mere limits left out."""
        return Defect(self.maps.about().defects) & ~LIMITS

    def _load(self, lock: int) -> None:
        run_loader(str(self.root), json.dumps(dict(self._sizes)), inherited=(lock,))

    def followers(self) -> Followers | None:
        """Who follows the events of the programs that are loaded; None while none are."""
        try:
            identity = (self.root / "maps").stat().st_ino
        except FileNotFoundError:
            return None
        return Followers(self.root / "maps", identity)

    def unload(self) -> None:
        """Forget every pin: links detach, programs and maps go with their last user.

        Open sockets of the sockhash are such users: each holds the verdict program, and that the
        map. So nothing that is queued for them is lost; what they hold goes when they close.
        """
        with self._alone():
            self._forget_all()

    def _forget_all(self) -> None:
        for pod in self.pods():
            self.forget(pod)
        shutil.rmtree(self.root, ignore_errors=True)
        for left in self.root.parent.glob(f"{self.root.name}-loading-*"):
            shutil.rmtree(left, ignore_errors=True)

    # -- links

    def pods(self) -> list[str]:
        """Pin directories of pods that have links."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(p.name for p in (self.root / "pods").iterdir())
        return []

    def attach(self, pod: str, hook: str, kind: AttachType, target: Path) -> None:
        """Attach a program to a cgroup or netns by a pinned link; one that holds is left alone."""
        pin = self._pin(pod, hook)
        if self.holds(pod, hook, target):
            return
        self.detach(pod, hook)
        pin.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with libbpf.opened(self.root / "programs" / hook) as program:
                link = libbpf.link_create(program, fd, kind)
            try:
                libbpf.obj_pin(link, pin)
            finally:
                os.close(link)
        except OSError as error:
            raise DatapathError(f"pod {pod}: {hook} on {target}: {error.strerror}") from error
        finally:
            os.close(fd)

    def holds(self, pod: str, hook: str, target: Path) -> bool:
        """Whether the pod's pinned link is attached to this very cgroup or netns."""
        try:
            with libbpf.opened(self._pin(pod, hook)) as fd:
                return libbpf.link_target(fd) == target.stat().st_ino
        except OSError:
            return False

    def detach(self, pod: str, hook: str) -> None:
        """Detach a link and unpin it: when this returns, the program runs no more."""
        pin = self._pin(pod, hook)
        try:
            with libbpf.opened(pin) as link:
                libbpf.link_detach(link)
                pin.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise DatapathError(f"pod {pod}: {hook}: {error.strerror}") from error

    def forget(self, pod: str) -> None:
        """Remove the pod's pin directory and whatever links are left in it."""
        for hook, _ in reversed(ALL_HOOKS):
            self.detach(pod, hook)
        shutil.rmtree(self.root / "pods" / pod, ignore_errors=True)

    def _pin(self, pod: str, hook: str) -> Path:
        return self.root / "pods" / pod / hook
