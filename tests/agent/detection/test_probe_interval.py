"""The interval and the statistics of probes, as units."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.detection import probe_interval
from watchdog_agent.detection.failure_detector import FailureDetector
from watchdog_agent.detection.probe_stats import KEPT, Stats

seconds = st.floats(0.05, 86400.0)
results = st.lists(st.tuples(st.booleans(), st.floats(0.0, 600.0)), max_size=3 * KEPT)


@given(seconds, seconds, st.sampled_from(["ok", "suspect", "offline"]), st.integers(0, 100))
def test_the_pace_is_never_slower_than_the_interval(
    interval: float, least: float, state: str, quick: int
) -> None:
    """The wait is the interval; while suspect it is a quarter of it but at least `min_interval`. It is never longer,
    and after 40 quick probes it is the interval again."""
    wait = probe_interval.interval(interval, least, state, quick)
    assert 0 < wait <= interval
    if state != "suspect" or quick >= probe_interval.MAX_QUICK:
        assert wait == interval
    else:
        assert wait == min(interval, max(least, interval / 4))


@given(st.integers(1, 1000), st.integers(0, KEPT), st.floats(0.0, 1.0))
def test_the_threshold_stays_between_once_and_twice(misses: int, seen: int, loss: float) -> None:
    """A lossy path is allowed up to twice the misses; a sound, a very bad or a barely known path is allowed no extra
    misses."""
    need = probe_interval.need(misses, seen, loss)
    assert misses <= need <= 2 * misses
    if seen < probe_interval.ENOUGH or loss > probe_interval.MAX_LOSS or loss == 0.0:
        assert need == misses
    assert need == misses or need == 2 * misses or loss**need <= probe_interval.CHANCE * 1.001


def test_the_threshold_of_a_lossy_path() -> None:
    """With a fifth of the probes lost, three consecutive misses occur by chance about every minute: five are
    required."""
    assert probe_interval.need(3, 60, 0.2) == 5
    assert probe_interval.need(3, 60, 0.05) == 3
    assert probe_interval.need(1, 60, 0.2) == 1


@given(results)
def test_statistics_are_those_of_the_last_60(history: list[tuple[bool, float]]) -> None:
    """Loss, minimum, mean, quantiles and maximum equal those computed from a list of the last 60 results."""
    stats = Stats()
    for ok, took in history:
        stats.add(ok, took)
    last = history[-KEPT:]
    good = sorted(int(took * 1e6) / 1e6 for ok, took in last if ok)
    shown = stats.summary()
    assert shown["count"] == len(last)
    assert shown["loss"] == pytest.approx(1 - len(good) / len(last) if last else 0.0, abs=1e-4)
    if not good:
        assert shown["min_s"] is None
        return
    near = {"abs": 2e-6}
    assert shown["min_s"] == pytest.approx(good[0], **near)
    assert shown["max_s"] == pytest.approx(good[-1], **near)
    assert shown["mean_s"] == pytest.approx(statistics.fmean(good), **near)
    assert shown["p50_s"] == pytest.approx(statistics.median_low(good), **near)
    assert sum(value <= shown["p95_s"] + 2e-6 for value in good) >= 0.95 * len(good)


@given(results)
def test_a_run_of_misses_is_no_evidence_of_a_lossy_path(history: list[tuple[bool, float]]) -> None:
    """The current run of misses is excluded from the path's usual loss."""
    stats = Stats()
    for ok, took in [*history, (True, 0.1)]:
        stats.add(ok, took)
    before = stats.earlier()[1]
    for _ in range(10):
        stats.add(ok=False, took_s=2.0)
    assert stats.streak == 10
    if len(history) + 11 <= KEPT:
        assert stats.earlier()[1] == before


gateways = st.lists(
    st.sampled_from(["miss", "dead", "alive", "unable", "confirm-", "ok"]), max_size=60
)


@given(gateways)
def test_nothing_is_confirmed_behind_a_dead_gateway(history: list[str]) -> None:
    """Offline requires two failed confirmations since the gateway was last dead or could not be checked (S6), and while
    it is dead the reason names it; after two unsuccessful rounds the device is no longer suspect but unable."""
    it = FailureDetector(2, was_ready=True)
    failed = dead = 0
    for event in history:
        before = it.state
        if event == "ok":
            it.probed("p", True, "well")
            failed = dead = 0
        elif event == "miss":
            it.probed("p", False, "p: no answer")
        elif event == "confirm-":
            failed += it.wants_confirmation()
            it.confirmation("icmp", False, "no echo")
        else:
            it.gateway({"alive": True, "dead": False}.get(event), "gateway g does not answer")
            if event in ("dead", "unable") and it.misses >= 2 and before != "offline":
                failed = 0
                dead += 1
                assert "gateway g does not answer" in it.reason
                assert it.state == ("unable" if dead > 1 else it.state)
        if it.state == "offline" and before != "offline":
            assert failed >= 2
        if it.behind and it.state in ("suspect", "unable"):
            assert it.reason == "gateway g does not answer"
