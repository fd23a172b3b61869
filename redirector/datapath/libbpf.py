"""A small typed wrapper over the stable functions of libbpf, the library that bcc stands on.

Everything here works from pins: no compiler, no bcc. Errors are `OSError` with the kernel's errno;
the rooms above say what it means for a pod.
"""

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Collection, Iterator, Mapping
from enum import IntEnum, StrEnum
from functools import cache
from pathlib import Path
from typing import NamedTuple


class AttachType(IntEnum):
    """enum bpf_attach_type, linux/bpf.h."""

    CGROUP_SOCK_OPS = 3
    SK_SKB_STREAM_VERDICT = 5
    SK_MSG_VERDICT = 7
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_GETSOCKOPT = 21
    CGROUP_SETSOCKOPT = 22
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    SK_LOOKUP = 36
    LSM_CGROUP = 43


BPF_ANY = 0
BPF_NOEXIST = 1
BPF_F_ALLOW_MULTI = 2
_BPF_F_SLEEPABLE = 16


@cache
def _lib() -> ctypes.CDLL:
    return ctypes.CDLL("libbpf.so.1", use_errno=True)


def _check(result: int, what: str) -> int:
    """libbpf 1.x functions answer -errno and set errno."""
    if result < 0:
        code = ctypes.get_errno() or -result
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def obj_get(path: Path) -> int:
    """A descriptor of the pinned object (bpf_obj_get)."""
    return _check(_lib().bpf_obj_get(os.fsencode(path)), f"bpf_obj_get {path}")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """`obj_get`, closed on leaving."""
    fd = obj_get(path)
    try:
        yield fd
    finally:
        os.close(fd)


def obj_pin(fd: int, path: Path) -> None:
    """Pins a map, program or link (bpf_obj_pin)."""
    _check(_lib().bpf_obj_pin(fd, os.fsencode(path)), f"bpf_obj_pin {path}")


def prog_attach(prog: int, target: int, kind: AttachType) -> None:
    """Attaches without a link: sockhash verdicts have links only from Linux 6.10 on."""
    _check(_lib().bpf_prog_attach(prog, target, int(kind), 0), f"bpf_prog_attach {kind.name}")


def prog_query(target: int, kind: AttachType) -> tuple[int, int]:
    """How many programs are attached right here, not above, and by which flags."""
    flags, count = ctypes.c_uint32(), ctypes.c_uint32()
    _check(
        _lib().bpf_prog_query(target, int(kind), 0, ctypes.byref(flags), None, ctypes.byref(count)),
        f"bpf_prog_query {kind.name}",
    )
    return count.value, flags.value


def link_create(prog: int, target: int, kind: AttachType) -> int:
    """A link's descriptor; cgroup links always allow others beside them (bpf_link_create)."""
    return _check(_lib().bpf_link_create(prog, target, int(kind), None), f"attach {kind.name}")


def link_detach(fd: int) -> None:
    """Detaches at once (BPF_LINK_DETACH); unpinning alone leaves it to a work queue."""
    _check(_lib().bpf_link_detach(fd), "bpf_link_detach")


class _CgroupLinkInfo(ctypes.Structure):
    """struct bpf_link_info of a cgroup or netns link, linux/bpf.h."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("target", ctypes.c_uint64),
        ("rest", ctypes.c_uint8 * 64),
    )


_BPF_LINK_TYPE_NETNS = 5


class LinkInfo(NamedTuple):
    """What a link runs, and on what."""

    program: int
    """The program's id."""
    target: int
    """Inode number of the cgroup or network namespace; 0 when it is gone."""


def link_info(fd: int) -> LinkInfo:
    """What the kernel says of a link (bpf_obj_get_info_by_fd)."""
    info = _CgroupLinkInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _check(_lib().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)), "link info")
    # A namespace's number has 32 bits; what follows is the attach type.
    target = info.target & 0xFFFFFFFF if info.type == _BPF_LINK_TYPE_NETNS else info.target
    return LinkInfo(int(info.prog_id), int(target))


def link_update(link: int, prog: int) -> None:
    """Makes the link run another program from now on; at no moment none or both (BPF_LINK_UPDATE).

    Linux 5.7 for cgroups, 5.9 for network namespaces.
    """
    _check(_lib().bpf_link_update(link, prog, None), "bpf_link_update")


class Kind(StrEnum):
    """What a descriptor of the bpf syscall is; the values are the kernel's own names for them."""

    MAP = "bpf-map"
    PROGRAM = "bpf-prog"
    LINK = "bpf-link"


class ObjectId(NamedTuple):
    """A kernel object while it lives: each kind counts its own ids, none is used twice."""

    kind: Kind
    id: int


class _ObjectInfo(ctypes.Structure):
    """How bpf_map_info, bpf_prog_info and bpf_link_info all begin, linux/bpf.h."""

    _fields_ = (("type", ctypes.c_uint32), ("id", ctypes.c_uint32))


def object_id(fd: int) -> ObjectId:
    """The kind and id of what a descriptor refers to (bpf_obj_get_info_by_fd)."""
    info = _ObjectInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _check(_lib().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)), "info")
    # "anon_inode:bpf-map"; links are "bpf-link" or "bpf_link", by who made the descriptor.
    name = os.readlink(f"/proc/self/fd/{fd}").rpartition(":")[2].replace("_", "-")
    return ObjectId(Kind(name), info.id)


class _ProgramInfo(ctypes.Structure):
    """The beginning of struct bpf_prog_info, linux/bpf.h."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("skipped", ctypes.c_uint8 * 44),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


class ProgramInfo(NamedTuple):
    """What the kernel knows of a loaded program."""

    name: str
    maps: frozenset[int]
    """Ids of those that it uses."""


def program_info(program: int) -> ProgramInfo:
    """Of the program of this id (bpf_prog_get_fd_by_id, bpf_obj_get_info_by_fd)."""
    fd = _check(_lib().bpf_prog_get_fd_by_id(program), f"program {program}")
    try:
        room = (ctypes.c_uint32 * 64)()
        info = _ProgramInfo(nr_map_ids=len(room), map_ids=ctypes.addressof(room))
        size = ctypes.c_uint32(ctypes.sizeof(info))
        failed = _lib().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
        _check(failed, "program info")
        return ProgramInfo(info.name.decode(), frozenset(room[: info.nr_map_ids]))
    finally:
        os.close(fd)


class _LoadOptions(ctypes.Structure):
    """The beginning of struct bpf_prog_load_opts, bpf/bpf.h."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
    )


def prog_load(
    name: str, kind: int, attach: AttachType | None, code: bytes, function: str = ""
) -> int:
    """A descriptor of the program; `name` has 15 letters at most (bpf_prog_load).

    `function` is the security hook that it is for, where `attach` asks for one. Without `attach` it
    is run by `prog_run`, and may sleep, as such programs must say.
    """
    options = _LoadOptions(sz=ctypes.sizeof(_LoadOptions))
    if attach is None:
        options.prog_flags = _BPF_F_SLEEPABLE
    else:
        options.expected_attach_type = int(attach)
    if attach is not None and function:
        found = _lib().libbpf_find_vmlinux_btf_id(function.encode(), int(attach))
        options.attach_btf_id = _check(found, f"BTF of {function}")
    count = ctypes.c_size_t(len(code) // 8)
    loaded = _lib().bpf_prog_load(kind, name.encode(), b"GPL", code, count, ctypes.byref(options))
    return _check(loaded, f"bpf_prog_load {name}")


class _RunOptions(ctypes.Structure):
    """The beginning of struct bpf_test_run_opts, bpf/bpf.h."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_char_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
    )


def prog_run(fd: int, context: bytes) -> int:
    """Run a program of type BPF_PROG_TYPE_SYSCALL once; what it answers (bpf_prog_test_run_opts).

    Linux 5.14.
    """
    options = _RunOptions(sz=ctypes.sizeof(_RunOptions), ctx_in=context, ctx_size_in=len(context))
    _check(_lib().bpf_prog_test_run_opts(fd, ctypes.byref(options)), "bpf_prog_test_run")
    return int(options.retval)


def map_create_array(name: str, value: bytes) -> int:
    """A descriptor of a map that keeps one value (bpf_map_create, BPF_MAP_TYPE_ARRAY)."""
    array = 2
    fd = _check(_lib().bpf_map_create(array, name.encode(), 4, len(value), 1, None), f"map {name}")
    try:
        map_update(fd, bytes(4), value)
    except OSError:
        os.close(fd)
        raise
    return fd


def is_alive(identity: ObjectId) -> bool:
    """Whether the kernel still has this object (bpf_*_get_fd_by_id)."""
    by_id = {
        Kind.MAP: _lib().bpf_map_get_fd_by_id,
        Kind.PROGRAM: _lib().bpf_prog_get_fd_by_id,
        Kind.LINK: _lib().bpf_link_get_fd_by_id,
    }[identity.kind]
    try:
        os.close(_check(by_id(identity.id), f"{identity.kind} {identity.id}"))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


#: How long the kernel may take to refill the reserve that maps take their entries from, seconds.
_REFILL_S, _REFILLS = 0.01, 200


def map_update(fd: int, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
    """bpf_map_update_elem; OSError E2BIG when the map is full.

    A map without preallocation takes memory from a reserve that a worker refills (mm/percpu.c,
    kernel/bpf/memalloc.c): ENOMEM in a rush of entries passes by itself.
    """
    for attempt in range(_REFILLS):
        result = _lib().bpf_map_update_elem(fd, key, value, ctypes.c_uint64(flags))
        if result != -errno.ENOMEM or attempt == _REFILLS - 1:
            break
        time.sleep(_REFILL_S)
    _check(result, "map update")


def map_add(fd: int, key: bytes, value: bytes) -> bool:
    """The same for a new key only; False when it is there."""
    try:
        map_update(fd, key, value, BPF_NOEXIST)
    except OSError as error:
        if error.errno == errno.EEXIST:
            return False
        raise
    return True


def map_delete(fd: int, key: bytes) -> bool:
    """bpf_map_delete_elem; False when there was no such key."""
    try:
        _check(_lib().bpf_map_delete_elem(fd, key), "map delete")
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def map_update_many(fd: int, entries: Mapping[bytes, bytes]) -> None:
    """bpf_map_update_batch, for keys and values of one size each.

    OSError when the map is full: a part of them has been put then.
    """
    if entries:
        count = ctypes.c_uint32(len(entries))
        keys, values = b"".join(entries), b"".join(entries.values())
        done = _lib().bpf_map_update_batch(fd, keys, values, ctypes.byref(count), None)
        _check(done, "map update")


def map_delete_many(fd: int, keys: Collection[bytes]) -> None:
    """bpf_map_delete_batch, for keys of one size; those that are not there are no error."""
    data = ctypes.create_string_buffer(b"".join(keys))
    done = 0
    while done < len(keys):
        count = ctypes.c_uint32(len(keys) - done)
        left = ctypes.byref(data, done * (len(data) // len(keys)))
        try:
            _check(_lib().bpf_map_delete_batch(fd, left, ctypes.byref(count), None), "map delete")
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        # It stops at one that is absent.
        done += count.value + 1


def map_lookup(fd: int, key: bytes, size: int) -> bytes | None:
    """The value's `size` bytes (per-CPU maps: 8-aligned times possible CPUs), None if absent."""
    value = ctypes.create_string_buffer(size)
    try:
        _check(_lib().bpf_map_lookup_elem(fd, key, value), "map lookup")
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def map_keys(fd: int, size: int) -> Iterator[bytes]:
    """All keys of `size` bytes; safe against deletion of what it has answered (get_next_key)."""
    keys: list[bytes] = []
    key: bytes | None = None
    following = ctypes.create_string_buffer(size)
    while _lib().bpf_map_get_next_key(fd, key, following) == 0:
        key = following.raw
        keys.append(key)
    return iter(keys)


@contextlib.contextmanager
def timing_programs() -> Iterator[None]:
    """Let the kernel time every run of every program until leaving (bpf_enable_stats)."""
    fd = _check(_lib().bpf_enable_stats(0), "bpf_enable_stats")
    try:
        yield
    finally:
        os.close(fd)


def run_time_ns(program: int) -> int:
    """How long a program's runs took in all while they were timed (bpf_prog_show_fdinfo)."""
    rows = Path(f"/proc/self/fdinfo/{program}").read_text().splitlines()
    return next((int(row.split()[1]) for row in rows if row.startswith("run_time_ns")), 0)


#: Entries a call; a hash map wants room for all of a bucket.
_BATCH = 4096


def map_entries(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes]]:
    """All keys and values, those of a batch one behind the other (bpf_map_lookup_batch).

    An entry that comes or goes meanwhile may be missed or seen twice.
    """
    token_in: ctypes.Array[ctypes.c_char] | None = None
    while True:
        token = ctypes.create_string_buffer(max(key_size, 8))
        keys = ctypes.create_string_buffer(_BATCH * key_size)
        values = ctypes.create_string_buffer(_BATCH * value_size)
        count = ctypes.c_uint32(_BATCH)
        done = False
        try:
            _check(
                _lib().bpf_map_lookup_batch(
                    fd, token_in, token, keys, values, ctypes.byref(count), None
                ),
                "map lookup",
            )
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            done = True
        if count.value:
            yield keys.raw[: count.value * key_size], values.raw[: count.value * value_size]
        if done:
            return
        token_in = token


class MapInfo(ctypes.Structure):
    """The beginning of struct bpf_map_info, linux/bpf.h."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


@contextlib.contextmanager
def opened_map(identity: int) -> Iterator[int]:
    """A descriptor of the map of this id, closed on leaving (bpf_map_get_fd_by_id)."""
    fd = _check(_lib().bpf_map_get_fd_by_id(identity), f"map {identity}")
    try:
        yield fd
    finally:
        os.close(fd)


def map_info(fd: int) -> MapInfo:
    """What a map is (bpf_obj_get_info_by_fd)."""
    info = MapInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _check(_lib().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)), "map info")
    return info


_BPF_MAP_TYPE_RINGBUF = 27


def ring_buffer_create(size: int) -> int:
    """A descriptor of a new ring buffer of so many bytes (bpf_map_create)."""
    return _check(
        _lib().bpf_map_create(_BPF_MAP_TYPE_RINGBUF, b"events", 0, 0, size, None), "ring buffer"
    )


@cache
def possible_cpus() -> int:
    """libbpf_num_possible_cpus: how many values a per-CPU map holds for each key."""
    return _check(_lib().libbpf_num_possible_cpus(), "libbpf_num_possible_cpus")
