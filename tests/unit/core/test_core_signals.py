"""The first request to stop is a question, the second an order, and afterwards all is as before."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gesso.core.signals import stop_requests

BOTH = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", BOTH)
def test_the_first_only_asks(number: signal.Signals) -> None:
    with stop_requests() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        assert asked(), "the answer stays"


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_the_second_stops_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests() as asked:
        os.kill(os.getpid(), first)
        assert asked()
        os.kill(os.getpid(), second)
        raise AssertionError("went on after the second request")


def test_handlers_are_put_back_whatever_happened() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with stop_requests():
        assert [signal.getsignal(number) for number in BOTH] != before
    assert [signal.getsignal(number) for number in BOTH] == before
    with pytest.raises(ZeroDivisionError), stop_requests():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in BOTH] == before


def test_one_request_does_not_reach_the_next_run() -> None:
    with stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    with stop_requests() as asked:
        assert not asked()


def test_outside_the_main_thread_nothing_is_changed() -> None:
    """The Python API may be called from a thread, as notebooks and servers do."""
    seen: list[object] = []

    def work() -> None:
        with stop_requests() as asked:
            seen.extend([asked(), signal.getsignal(signal.SIGTERM)])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]
