"""One generation of the datapath: maps of one layout, and the programs that use them.

Versions whose layouts differ stand side by side while connections of the older one are open. Of a
generation of another layout only this is known: the first bytes of its `about` map, which tell
where a flow keeps what matters here; that `pods` and `counters` have netns cookies as keys; and the
two first bits of enum flow_flag.

    DIRECTORY/maps/NAME   DIRECTORY/programs/BUILD/NAME   DIRECTORY/pods/POD/HOOK
"""

import contextlib
import ctypes
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.forgetting import forgetting
from redirector.datapath.layout import About, Address, Flow, FlowFlag, FlowKey
from redirector.datapath.maps import Maps
from redirector.errors import DatapathError
from redirector.model import Pod


@dataclass(frozen=True)
class Standing:
    """Whose connections a flows map holds, in one pass over it."""

    #: netns cookies of pods that opened some or have some within.
    netns: frozenset[bytes]
    #: Addresses (struct address) that some lead to.
    servers: frozenset[bytes]
    #: netns cookies of those whose sidecar has not asked yet for an original destination.
    unanswered: frozenset[bytes]

    def holds(self, pod: Pod) -> bool:
        """Whether an end of one of them is in the pod."""
        return _key(pod) in self.netns or any(
            bytes(Address.of(ip)) in self.servers for ip in pod.node_wide
        )

    def waits(self, pod: Pod) -> bool:
        """Whether the pod's sidecar has not asked yet for one's original destination."""
        return _key(pod) in self.unanswered


class Generation:
    """The pins in one directory of a bpffs. Methods may raise DatapathError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.maps = Maps(directory / "maps")

    def exists(self) -> bool:
        """Whether its maps are pinned: it appears whole."""
        return (self.directory / "maps").is_dir()

    def pods(self) -> list[str]:
        """The pin directories of pods that some of its programs are attached to."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.name for path in (self.directory / "pods").iterdir())
        return []

    def pods_map(self) -> libbpf.ObjectId:
        """What tells its programs from those of other generations: all use it."""
        with self._opened("pods") as fd:
            return libbpf.object_id(fd)

    def standing(self) -> Standing:
        """Whose connections it still serves."""
        about = self.maps.about()
        netns: set[bytes] = set()
        servers: set[bytes] = set()
        unanswered: set[bytes] = set()
        for key, flow in self._flows():
            opener = flow[about.flow_client_netns :][:8]
            netns |= {opener, key[about.flow_key_netns :][:8]}
            servers.add(key[about.flow_key_server :][: ctypes.sizeof(Address)])
            flags = int.from_bytes(flow[about.flow_flags :][:4], "little")
            if flags & FlowFlag.STEERED and not flags & FlowFlag.ANSWERED:
                unanswered.add(opener)
        return Standing(frozenset(netns), frozenset(servers), frozenset(unanswered))

    def withdraw(self, pod: Pod) -> None:
        """Take the pod, its counters and open flows out of the maps; its lists stay with them."""
        about = self.maps.about()
        for name in ("pods", "counters"):
            with self._opened(name) as fd:
                libbpf.map_delete(fd, _key(pod))
        with self._opened("flows") as fd, forgetting(self.directory, fd) as forget:
            for key, flow in self._flows():
                opener = flow[about.flow_client_netns :][:8]
                if _key(pod) in (opener, key[about.flow_key_netns :][:8]):
                    forget(key, flow[about.flow_id :][:8])

    def unpin(self) -> None:
        """Forget it; what open sockets use of it goes with them."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _flows(self) -> Iterator[tuple[bytes, bytes]]:
        with self._opened("flows") as fd:
            info = libbpf.map_info(fd)
            for keys, values in libbpf.map_entries(fd, info.key_size, info.value_size):
                for number in range(len(keys) // info.key_size):
                    at, to = number * info.key_size, number * info.value_size
                    yield keys[at : at + info.key_size], values[to : to + info.value_size]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        try:
            with libbpf.opened(self.directory / "maps" / name) as fd:
                yield fd
        except OSError as error:
            raise DatapathError(
                f"{self.directory}/maps/{name}: {error.strerror or error}"
            ) from error


def about(build: bytes, defects: int) -> About:
    """What this version tells other versions of its maps."""
    return About(
        sha256=(ctypes.c_uint8 * len(build))(*build),
        defects=defects,
        flow_key_netns=FlowKey.netns.offset,
        flow_key_server=FlowKey.server.offset,
        flow_client_netns=Flow.client_netns.offset,
        flow_flags=Flow.flags.offset,
        flow_id=Flow.id.offset,
    )


def _key(pod: Pod) -> bytes:
    return pod.netns_cookie.to_bytes(8, "little")
