"""A server that rejects all requests gets fewer; a device that fails alone delays no other (S9)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.circuit_breaker import (
    FIRST_S,
    LONGEST_S,
    MAX_RETRY_AFTER_S,
    TOGETHER,
    CircuitBreaker,
)
from nomad_watchdog.ids import Slug

CAMS = [Slug(f"cam-{n}") for n in range(TOGETHER)]


def opened(now: float = 0.0, retry_after_s: float = 0.0, jitter: float = 1.0) -> CircuitBreaker:
    circuit = CircuitBreaker()
    for slug in CAMS:
        circuit.failed(slug, now, retry_after_s, jitter)
    return circuit


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_s9_a_device_that_fails_alone_opens_nothing(times: list[float]) -> None:
    """Failures of fewer different devices than TOGETHER, however many, leave the allowance unchanged."""
    circuit = CircuitBreaker()
    for now in sorted(times):
        for slug in CAMS[:-1]:
            assert not circuit.failed(slug, now, 0.0, 0.5)
        assert circuit.allowance(32, now) == 32
        assert circuit.wait_s(now) == 0.0


@given(st.floats(0, 1e6), st.floats(0, 1))
def test_many_that_fail_together_stop_all_for_a_while(now: float, jitter: float) -> None:
    """The failure that completes TOGETHER opens the breaker for half to all of FIRST_S; then one call may try."""
    circuit = opened(now, jitter=jitter)
    wait_s = circuit.wait_s(now)
    assert FIRST_S / 2 - 1e-6 <= wait_s <= FIRST_S + 1e-6
    assert circuit.allowance(32, now) == 0
    assert circuit.allowance(32, now + FIRST_S + 1e-6) == 1


def test_one_answer_closes_it() -> None:
    """After an answer all calls are allowed, and the next storm begins with the shortest wait."""
    circuit = opened()
    circuit.answered()
    assert circuit.allowance(32, 0.0) == 32
    for slug in CAMS:
        circuit.failed(slug, 10.0, 0.0, 1.0)
    assert circuit.wait_s(10.0) == FIRST_S


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1e9))
def test_it_waits_longer_each_time_up_to_a_bound(jitters: list[float], asked_s: float) -> None:
    """No wait exceeds the larger of LONGEST_S and the server's request, which is itself bounded."""
    circuit, now = opened(retry_after_s=asked_s), 0.0
    for jitter in jitters:
        now += circuit.wait_s(now)
        assert circuit.failed(CAMS[0], now, asked_s, jitter)
        wait_s = circuit.wait_s(now)
        bound = max(LONGEST_S, min(asked_s, MAX_RETRY_AFTER_S))
        assert min(asked_s, MAX_RETRY_AFTER_S) - 1e-6 <= wait_s <= bound + 1e-6


def test_calls_under_way_when_it_opened_do_not_prolong_it() -> None:
    """A hundred late failures of the same storm do not change the wait."""
    circuit = opened()
    before = circuit.wait_s(0.1)
    for number in range(100):
        assert not circuit.failed(Slug(f"late-{number}"), 0.1, 0.0, 1.0)
    assert circuit.wait_s(0.1) == before
