"""Who is let in, told by the clock that the test holds."""

import pytest
from xds_server.admission import Admission, Limits, Reason, Refused, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def reason(admission: Admission) -> Reason:
    with pytest.raises(Refused) as refused, admission.place():
        pytest.fail("was let in")
    return refused.value.reason


def test_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 3, clock)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    clock.now += 0.25
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    clock.now += 3600
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_bucket_tells_how_long_to_wait() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 2, clock)
    assert [bucket.owe() for _ in range(4)] == pytest.approx([0, 0, 0.1, 0.2])
    clock.now += 0.3
    assert bucket.owe() == pytest.approx(0)


def test_places_are_given_back() -> None:
    admission = Admission(Limits(clients=2))
    with admission.place():
        with admission.place():
            assert reason(admission) is Reason.MAX_CLIENTS
        with admission.place():
            assert admission.clients == 2
    assert admission.clients == 0


def test_clients_that_come_too_fast_are_refused_until_time_passes() -> None:
    clock = Clock()
    admission = Admission(Limits(connects=5), clock)
    for _ in range(10):
        with admission.place():
            pass
    assert reason(admission) is Reason.CONNECT_RATE
    clock.now += 0.2
    with admission.place():
        pass


def test_nobody_is_let_in_while_draining() -> None:
    admission = Admission(Limits(), draining=True)
    assert reason(admission) is Reason.DRAINING


def test_every_refusal_counts_and_few_are_told(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    admission = Admission(Limits(), clock)
    for _ in range(50):
        admission.note(Refused(Reason.NODE_ID, "node id 'x': must look otherwise"))
    clock.now += 2
    admission.note(Refused(Reason.NODE_ID, "node id 'y': must look otherwise"))
    admission.note(Refused(Reason.NAMES, "asks for too many"))
    assert admission.refused == {Reason.NODE_ID: 51, Reason.NAMES: 1}
    assert [record.message for record in caplog.records] == [
        "refused a client: node id 'x': must look otherwise",
        "refused a client: node id 'y': must look otherwise (and 49 more since the last such line)",
        "refused a client: asks for too many",
    ]
