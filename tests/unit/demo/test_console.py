"""What the demo says: checks, tables, shares, and a summary that does not flatter."""

import io

import pytest

from redirector.demo.console import Console, State, Step


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(out: io.StringIO) -> Console:
    return Console(out)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_passes_when_all_its_checks_do(console: Console) -> None:
    step = Step(1, "a step")
    with console.step(step):
        console.check(True, "this")
        console.check(True, "that", 3)
    assert (step.state, step.passed, step.failed) == (State.OK, 2, [])
    assert console.summary([step])


def test_one_failed_check_fails_the_step_and_the_summary(
    console: Console, out: io.StringIO
) -> None:
    good, bad = Step(1, "good"), Step(2, "bad")
    with console.step(good):
        console.check(True, "this")
    with console.step(bad):
        console.check(True, "this")
        assert not console.check(False, "that", "17 of 20")
    assert bad.state is State.FAILED
    assert not console.summary([good, bad])
    assert "FAILED  that  17 of 20" in out.getvalue()
    assert "1 of 2 steps passed, 2 checks ok, 1 failed" in out.getvalue()


@pytest.mark.parametrize(
    ("error", "state"), [(ValueError, State.FAILED), (KeyboardInterrupt, State.STOPPED)]
)
def test_a_step_left_by_an_error_has_not_passed(
    console: Console, error: type[BaseException], state: State
) -> None:
    step = Step(1, "a step")
    with pytest.raises(error), console.step(step):
        raise error
    assert step.state is state
    assert not console.summary([step])


def test_a_step_that_was_not_reached_has_not_passed(console: Console) -> None:
    assert not console.summary([Step(1, "a step")])


def test_numbers_of_a_table_stand_to_the_right(console: Console, out: io.StringIO) -> None:
    console.table(("pod", "bytes"), [("client", 1234567), ("web", 5)])
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines == ["pod          bytes", "client   1,234,567", "web              5", ""]


def test_bars_show_shares_of_the_whole(console: Console, out: io.StringIO) -> None:
    console.bars({"web-v1": 30, "web-v2": 10})
    first, second = out.getvalue().splitlines()
    assert (first.count("#"), second.count("#")) == (30, 10)
    assert "75.0%" in first
    assert "25.0%" in second


def test_bars_of_nothing_are_empty(console: Console, out: io.StringIO) -> None:
    console.bars({})
    assert out.getvalue() == ""


def test_only_a_terminal_gets_colours_and_waiting_lines(console: Console, out: io.StringIO) -> None:
    terminal = Terminal()
    for one in (console, Console(terminal)):
        one.waiting("waiting for Envoy")
        one.check(True, "it is there")
    assert out.getvalue() == "     ok      it is there\n"
    assert "\x1b[32m" in terminal.getvalue()
    assert "waiting for Envoy" in terminal.getvalue()
