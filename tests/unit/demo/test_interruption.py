"""Being told to end, at any moment and in any process."""

import contextlib
import os
import signal
import time

import pytest

from redirector.demo.interruption import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_interrupts_and_the_handlers_are_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_an_interruption_that_was_swallowed_is_found_by_asking() -> None:
    with interruptible() as interruption:
        # As a library that catches everything does.
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def test_held_off_nothing_interrupts_but_it_is_remembered() -> None:
    with interruptible() as interruption:
        with interruption.held_off():
            signal.raise_signal(signal.SIGINT)
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def test_an_interruption_of_another_handler_counts() -> None:
    with interruptible() as interruption:
        interruption.check()
        interruption.remember()
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def test_a_forked_child_ends_by_the_signal_and_cleans_up_nothing() -> None:
    reader, writer = os.pipe()
    with interruptible():
        pid = os.fork()
        if pid == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.write(writer, b"handled")
                os._exit(0)
        os.close(writer)
        _, status = os.waitpid(pid, 0)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b""
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_an_exception_that_a_library_swallows_is_raised_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("redirector.demo.interruption._AGAIN_SECONDS", 0.05)
    with interruptible() as interruption:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
        interruption.remember()
        time.sleep(0.2)  # it has arrived: not once more
