"""What the demo's claims stand on: no failure may go unnoticed, no wrong share may pass."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from redirector.demo import route
from redirector.demo.client import Kind, Outcome, Request, Sender, ask
from redirector.demo.console import Console, Step
from redirector.demo.show import check_split
from redirector.demo.traffic import Tally, Traffic
from redirector.demo.world import WEB_V1, WEB_V2
from redirector.errors import InputError

MANIFEST = Path(__file__).parents[3] / "manifests" / "demo" / route.FILE
_BODY = json.dumps({"name": WEB_V1}).encode()
_GOOD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(_BODY),
    _BODY,
)


@contextmanager
def answering(*answers: bytes) -> Iterator[int]:
    """A server that gives each connection one of the answers and closes it; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_the_applications_answer_is_told_from_anothers() -> None:
    denial = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 6\r\n\r\ndenied"
    with answering(_GOOD, denial) as port:
        good, denied = ask(Request("127.0.0.1", port)), ask(Request("127.0.0.1", port))
    assert (good.status, good.name, good.peer) == (200, WEB_V1, f"127.0.0.1:{port}")
    assert (denied.status, denied.name, denied.text) == (403, "", "denied")


def test_no_answer_is_an_answer_with_an_error() -> None:
    with answering(b"") as port:
        closed = ask(Request("127.0.0.1", port))
    refused = ask(Request("127.0.0.1", port))
    assert (closed.status, refused.status) == (0, 0)
    assert closed.error
    assert "refused" in refused.error


def test_a_kept_connection_that_was_closed_is_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    traffic = Traffic(log, stop=lambda: None)
    with answering(_GOOD, _GOOD) as port:
        sender = Sender(Request("127.0.0.1", port), log, pause=0.0)
        worker = threading.Thread(target=sender.work, args=(Kind.KEPT, 0))
        worker.start()
        # Answered, found closed, answered on another connection.
        tally = traffic.wait_for(3, since=0.0)
        sender.stop.set()
    worker.join()
    assert [outcome.failed for outcome in tally.outcomes[:3]] == [False, True, False]
    assert tally.kept_open() == 0


def _outcomes(kind: Kind, names: list[str], status: int = 200) -> list[Outcome]:
    return [Outcome(float(n), kind, 0, status, name, "") for n, name in enumerate(names)]


def test_a_tally_counts_answers_and_says_why_others_failed() -> None:
    good = _outcomes(Kind.FRESH, [WEB_V1, WEB_V2, WEB_V1])
    bad = [*_outcomes(Kind.KEPT, [""], 503), Outcome(9.0, Kind.KEPT, 1, 0, "", "reset")]
    tally = Tally([*good, *bad])
    assert tally.split() == {WEB_V1: 2, WEB_V2: 1}
    assert tally.failures == bad
    assert (tally.kept, tally.kept_open()) == (2, 0)
    assert tally.why() == "1 x status 503, 1 x reset"


def test_a_half_written_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = json.dumps(
        {"at": 1.0, "kind": "kept", "worker": 0, "status": 200, "name": WEB_V1, "error": ""}
    )
    log.write_text(line[:20])
    traffic = Traffic(log, stop=lambda: None)
    assert traffic.now() == 0
    log.write_text(f"{line}\n")
    assert traffic.now() == 1


@pytest.mark.parametrize(
    ("to_v2", "passes"), [(100, True), (130, True), (20, False), (200, False), (0, False)]
)
def test_a_share_far_from_its_weight_does_not_pass(to_v2: int, passes: bool) -> None:
    console, step = Console(io.StringIO()), Step(1, "split")
    names = [WEB_V2] * to_v2 + [WEB_V1] * (1000 - to_v2)
    with console.step(step):
        check_split(console, Tally(_outcomes(Kind.FRESH, names)), {WEB_V1: 90, WEB_V2: 10})
    assert (not step.failed) is passes


def test_new_weights_are_in_the_file_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / route.FILE
    path.write_text(MANIFEST.read_text())
    before = path.stat().st_ino
    route.reweigh(path, {WEB_V1: 20, WEB_V2: 80})
    assert route.weights(path) == {WEB_V1: 20, WEB_V2: 80}
    assert path.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [path]
    old, new = MANIFEST.read_text(), path.read_text()
    assert old.count("backendRefs") == new.count("backendRefs")


def test_a_service_without_a_weight_is_named(tmp_path: Path) -> None:
    path = tmp_path / route.FILE
    path.write_text(MANIFEST.read_text())
    with pytest.raises(InputError, match="no backendRef web-v3 with a weight"):
        route.reweigh(path, {"web-v3": 1})
