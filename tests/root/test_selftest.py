"""The kernel's self-test: what the loader tries before any pod depends on it."""

import ctypes
import io
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from redirector import check
from redirector.datapath import libbpf, selftest
from redirector.datapath.layout import Defect
from redirector.datapath.loading import run_self_test
from redirector.datapath.pins import Datapath
from redirector.datapath.source import SIZES
from redirector.datapath.trial import TrialMaps, enter_scratch_namespace
from redirector.machine import ensure_bpffs

pytestmark = pytest.mark.root


@pytest.fixture
def own() -> Iterator[Datapath]:
    """A datapath of the test's own, to be spoilt."""
    root = ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}"
    made = Datapath(root, {name: min(size, 64) for name, size in SIZES.items()})
    made.ensure()
    yield made
    made.unload()


def tried(datapath: Datapath) -> Defect:
    """What the self-test finds on pinned maps."""
    found: list[Defect] = []

    def run() -> None:
        enter_scratch_namespace()
        with ExitStack() as stack:
            maps = TrialMaps(
                *(
                    stack.enter_context(
                        libbpf.opened(datapath.generation.directory / "maps" / name)
                    )
                    for name in ("states", "flows", "sockets", "arrived")
                )
            )
            found.append(selftest.run(maps))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def detach(datapath: Datapath, program: str, kind: libbpf.AttachType) -> None:
    with (
        libbpf.opened(datapath.programs / program) as fd,
        libbpf.opened(datapath.generation.directory / "maps/sockets") as sockhash,
    ):
        assert ctypes.CDLL("libbpf.so.1").bpf_prog_detach2(fd, sockhash, int(kind)) == 0


def test_the_same_defects_at_load_and_when_asked(own: Datapath) -> None:
    found = run_self_test()
    assert found == Defect(own.maps.about().defects)
    assert own.defects() == found


def test_every_defect_is_a_line(own: Datapath) -> None:
    assert sorted(line.defect for line in selftest.LINES) == sorted(Defect)
    known = tried(own) & ~Defect.ZEROCOPY  # kept out by the programs
    assert known == Defect(own.maps.about().defects)


def test_two_queues_are_told(own: Datapath) -> None:
    """Without the program that TCP's bytes pass, recv() answers less than there is."""
    detach(own, "arrive", libbpf.AttachType.SK_SKB_STREAM_VERDICT)
    assert tried(own) & Defect.SEAM


def test_a_kernel_that_does_not_redirect_is_told(own: Datapath) -> None:
    detach(own, "redirect", libbpf.AttachType.SK_MSG_VERDICT)
    assert tried(own) & Defect.REDIRECT


def test_check_says_it_in_lines(datapath: Datapath) -> None:
    datapath.ensure()
    out = io.StringIO()
    assert check.run(out) == 0
    said = {line.name: text for line in selftest.LINES for text in out.getvalue().splitlines()
            if line.name in text}  # fmt: skip
    assert said.keys() == {line.name for line in selftest.LINES}
    found = Defect(datapath.maps.about().defects)
    for line in selftest.LINES:
        status = "FAILED" if found & line.defect else "ok"
        assert said[line.name].startswith(status), said[line.name]
