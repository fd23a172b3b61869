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
from redirector.datapath.generation import Generation
from redirector.datapath.hooks import (
    DECIDING_HOOKS,
    DNS_QUERY_HOOKS,
    INBOUND_HOOK,
    PER_POD,
    PINNED,
    SPLICE_HOOK,
)
from redirector.datapath.instructions import for_pod
from redirector.datapath.layout import Defect
from redirector.datapath.libbpf import AttachType, Kind, LinkInfo
from redirector.datapath.loading import run_loader
from redirector.datapath.maps import Maps
from redirector.datapath.mending import lacking, pin_again
from redirector.datapath.neighbours import require_room
from redirector.datapath.source import SIZES, build_id, layout_id
from redirector.errors import DatapathError

_SK_LOOKUP = 30  # enum bpf_prog_type, linux/bpf.h
#: What moves from version to version: at any moment of one of them.
_MOVING = frozenset(hook for hook, _ in (*DECIDING_HOOKS, *DNS_QUERY_HOOKS))


class Datapath:
    """Programs and maps pinned under one directory of a bpffs.

    Every method may raise DatapathError, which names what the kernel refused.
    """

    def __init__(self, root: Path, sizes: Mapping[str, int] = SIZES) -> None:
        self.root = root
        self._sizes = sizes
        self._ids: tuple[tuple[int, int], Mapping[str, int]] = ((0, 0), {})

    # -- as a whole

    @cached_property
    def generation(self) -> Generation:
        """That of this version's layout, whether it is loaded or not."""
        return Generation(self.root / layout_id(self._sizes))

    @property
    def maps(self) -> Maps:
        """The maps of this version's layout."""
        return self.generation.maps

    # Once a process: what it has in memory stays the same when the installation changes.
    @cached_property
    def _build(self) -> bytes:
        return build_id(self._sizes)

    @property
    def programs(self) -> Path:
        """Where this version's programs are pinned."""
        return self.generation.directory / "programs" / self._build.hex()

    def others(self) -> list[Generation]:
        """Generations of other layouts, which may still serve connections."""
        if not self.root.is_dir():
            return []
        directories = (self.root / name for name in sorted(os.listdir(self.root)))
        found = (Generation(path) for path in directories if path != self.generation.directory)
        return [each for each in found if "-loading-" not in each.directory.name and each.exists()]

    def is_loaded(self) -> bool:
        """Whether maps of this version's layout are pinned."""
        return self.generation.exists()

    def is_current(self) -> bool:
        """Whether the programs that are pinned are this version's, and all that belongs to them."""
        return (
            self.programs.is_dir()
            and PINNED.issubset(os.listdir(self.programs))
            and not lacking(self.generation.directory)
            and bytes(self.maps.about().sha256) == self._build
        )

    def mend(self) -> None:
        """Pin again what somebody has removed of this layout's maps; load anew what is lost.

        A program's pin can wait until a pod is attached to it: `ensure` looks, too.
        """
        directory = self.generation.directory
        if not directory.is_dir() or not lacking(directory):
            return
        with _told(f"{directory}/maps"):
            pin_again(directory)
        if lacking(directory):
            self.ensure()

    def ensure(self) -> None:
        """Load this version's programs unless they are pinned already.

        Pods that run an older version's go on with them until they are attached to these.
        """
        if self.is_loaded() and self.is_current():
            return
        with self._alone() as lock:
            if self.root.is_dir():
                for left in self.root.glob("*-loading-*"):
                    shutil.rmtree(left, ignore_errors=True)
            if not (self.is_loaded() and self.is_current()):
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

    def defects(self) -> Defect:
        """What the running kernel does wrong with redirected bytes."""
        return Defect(self.maps.about().defects)

    def refuses_splice(self) -> bool:
        """Whether pods that are short-circuited need the hook for that, and the kernel has it."""
        return self.is_loaded() and (self.programs / SPLICE_HOOK[0]).exists()

    def _load(self, lock: int) -> None:
        sizes = json.dumps(dict(self._sizes))
        run_loader(str(self.root), sizes, self._build.hex(), inherited=(lock,))

    def followers(self) -> Followers | None:
        """Who follows the events of the programs that are loaded; None while none are."""
        try:
            identity = (self.generation.directory / "maps").stat().st_ino
        except FileNotFoundError:
            return None
        return Followers(self.generation.directory / "maps", identity)

    def unload(self) -> None:
        """Forget every pin, whatever version made it: links detach, the rest goes with its users.

        Open sockets of a sockhash are such users: each holds the verdict program, and that the
        map. So nothing that is queued for them is lost; what they hold goes when they close.
        """
        with self._alone():
            if not self.root.is_dir():
                return
            links = (path for path in self.root.rglob("*") if not path.is_dir())
            # What decides first, so that no connection is steered when its way stands no more.
            for pin in sorted(links, key=lambda path: path.name not in _MOVING):
                self._detach(pin, f"{pin}")
            shutil.rmtree(self.root, ignore_errors=True)

    # -- links

    def pods(self) -> list[str]:
        """Pin directories of pods that programs of any version are attached to."""
        if not self.root.is_dir():
            return []
        return sorted({path.name for path in self.root.glob("**/pods/*")})

    def attach(self, pod: str, hook: str, kind: AttachType, target: Path) -> None:
        """Make this version's program run on a cgroup, by a pinned link.

        In the place of an older program, if one of this hook stands: at no moment none or both.
        """
        if self.is_own(pod, hook, target):
            return
        with (
            _told(f"pod {pod}: {hook} on {target}"),
            libbpf.opened(self.programs / hook) as program,
        ):
            self._place(pod, hook, kind, target, program)

    def attach_inbound(self, pod: str, netns: int, target: Path) -> None:
        """The same for the inbound hook of a network namespace, whose cookie `netns` is.

        Its program is loaded for this pod alone.
        """
        hook, kind = INBOUND_HOOK
        if self.is_own(pod, hook, target):
            return
        with _told(f"pod {pod}: {hook} on {target}"), contextlib.ExitStack() as opened:
            maps = self.generation.directory / "maps"

            def descriptor(name: str) -> int:
                return opened.enter_context(libbpf.opened(maps / name))

            code = for_pod(self._kept_code(hook), netns, descriptor)
            program = libbpf.prog_load(self._program_name, _SK_LOOKUP, kind, code)
            opened.callback(os.close, program)
            self._place(pod, hook, kind, target, program)

    def _kept_code(self, hook: str) -> bytes:
        with libbpf.opened(self.programs / hook) as fd:
            return libbpf.map_lookup(fd, bytes(4), libbpf.map_info(fd).value_size) or b""

    @property
    def _program_name(self) -> str:
        return f"in_{self._build.hex()[:12]}"

    def _place(self, pod: str, hook: str, kind: AttachType, target: Path, program: int) -> None:
        pin = self._pin(pod, hook)
        before = _link(pin)
        if before is not None and before.target == target.stat().st_ino:
            with libbpf.opened(pin) as link:
                libbpf.link_update(link, program)
        else:
            self.detach(pod, hook)
            pin.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if kind not in (AttachType.SK_LOOKUP, AttachType.LSM_CGROUP):  # of which flags are told
                require_room(f"pod {pod}: {hook} on {target}", kind, target)
            _pin_new_link(program, kind, target, pin)

    def holds(self, pod: str, hook: str, target: Path) -> bool:
        """Whether the pod's pinned link is attached to this very cgroup or netns."""
        found = _link(self._pin(pod, hook))
        with contextlib.suppress(OSError):
            return found is not None and found.target == target.stat().st_ino
        return False

    def is_own(self, pod: str, hook: str, target: Path | None = None) -> bool:
        """Whether the pod's link runs the program that this version would attach, and to `target`.

        Without `target` it may be attached to anything.
        """
        found = _link(self._pin(pod, hook))
        try:
            if found is None or (target is not None and found.target != target.stat().st_ino):
                return False
            if hook == PER_POD:
                return libbpf.program_info(found.program).name == self._program_name
            return found.program == self._own_ids().get(hook)
        except OSError:
            return False

    def _own_ids(self) -> Mapping[str, int]:
        """This version's programs, looked up once for each load, and when a pin has gone."""
        found = self.programs.stat()
        load = (found.st_ino, found.st_mtime_ns)
        if self._ids[0] != load:
            ids: dict[str, int] = {}
            for pin in self.programs.iterdir():
                with libbpf.opened(pin) as program:
                    ids[pin.name] = libbpf.object_id(program).id
            self._ids = (load, ids)
        return self._ids[1]

    def decides(self, pod: str) -> bool:
        """Whether all that decides on the pod's connections works on this version's maps."""
        if not self.is_loaded():
            return False
        own = self.generation.pods_map().id
        links = [_link(self._pin(pod, hook)) for hook, _ in DECIDING_HOOKS]
        try:
            return all(
                link is not None and own in libbpf.program_info(link.program).maps for link in links
            )
        except OSError as error:
            raise DatapathError(f"pod {pod}: {error.strerror}") from error

    def detach(self, pod: str, hook: str) -> None:
        """Detach a link and unpin it: when this returns, the program runs no more."""
        self._detach(self._pin(pod, hook), f"pod {pod}: {hook}")

    def forget(self, pod: str) -> None:
        """Remove the pod's links, of whatever version."""
        for hook, _ in (*DECIDING_HOOKS, *DNS_QUERY_HOOKS):
            self.detach(pod, hook)
        shutil.rmtree(self.root / "pods" / pod, ignore_errors=True)
        for generation in (self.generation, *self.others()):
            self.forget_in(generation, pod)

    def forget_in(self, generation: Generation, pod: str) -> None:
        """Remove the links that answer for connections of one generation."""
        directory = generation.directory / "pods" / pod
        if directory.is_dir():
            for pin in directory.iterdir():
                self._detach(pin, f"pod {pod}: {pin.name}")
            shutil.rmtree(directory, ignore_errors=True)

    def _detach(self, pin: Path, what: str) -> None:
        try:
            with libbpf.opened(pin) as fd:
                if libbpf.object_id(fd).kind is Kind.LINK:
                    libbpf.link_detach(fd)
                    pin.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise DatapathError(f"{what}: {error.strerror}") from error

    def _pin(self, pod: str, hook: str) -> Path:
        # What answers for open connections stays with its maps; what decides on new ones moves.
        base = self.root if hook in _MOVING else self.generation.directory
        return base / "pods" / pod / hook


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatapathError(f"{what}: {error.strerror}") from error


def _link(pin: Path) -> LinkInfo | None:
    try:
        with libbpf.opened(pin) as fd:
            return libbpf.link_info(fd)
    except OSError:
        return None


def _pin_new_link(program: int, kind: AttachType, target: Path, pin: Path) -> None:
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        link = libbpf.link_create(program, fd, kind)
        try:
            libbpf.obj_pin(link, pin)
        finally:
            os.close(link)
    finally:
        os.close(fd)
