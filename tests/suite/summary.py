"""Summary printed at the end of a run: the ten slowest tests, those over the budget, CPU and wall time, and the
versions of the servers under test. With xdist it covers all workers, and states how long the last one ran after the
first became idle."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator
from typing import Any, Final

import pytest

from servers import binaries

BUDGET_S = 5.0
"""docs/contributing.md: a test of `make test` whose own time exceeds this states a reason."""
_SLOWEST: Final = 10
_KEY: Final = "nomad_watchdog_summary"
_OWN: Final = "nomad_watchdog_own_s"


class Summary:
    """The hooks; registered by `tests.conftest`, in each worker and in the main process."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._started = time.monotonic()
        self._shared_s = 0.0
        self._shared_depth = 0
        self._shared_since = 0.0
        self._total_s: dict[str, float] = defaultdict(float)
        self._own_s: dict[str, float] = defaultdict(float)
        self._cpu_s = 0.0
        self._versions: dict[str, str] = {}
        self._workers_ended: list[float] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        """The set-up and tear-down time of a fixture with a wider scope does not count for any test."""
        if fixturedef.scope == "function":
            return (yield)
        fixturedef.addfinalizer(self._shared_ends)
        self._shared_begins()
        try:
            return (yield)
        finally:
            self._shared_ends()
            fixturedef.addfinalizer(self._shared_begins)

    def _shared_begins(self) -> None:
        self._shared_depth += 1
        if self._shared_depth == 1:
            self._shared_since = time.monotonic()

    def _shared_ends(self) -> None:
        self._shared_depth -= 1
        if self._shared_depth == 0:
            self._shared_s += time.monotonic() - self._shared_since

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        own_s, self._shared_s = call.duration - self._shared_s, 0.0
        if not (item.get_closest_marker("slow_because") or item.get_closest_marker("long")):
            report.user_properties.append((_OWN, own_s))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._total_s[report.nodeid] += report.duration
        self._own_s[report.nodeid] += sum(
            took_s for key, took_s in report.user_properties if key == _OWN
        )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        used = os.times()
        ours = used.user + used.system
        theirs = used.children_user + used.children_system
        output = getattr(self._config, "workeroutput", None)
        if output is not None:
            output[_KEY] = {"cpu_s": ours + theirs, "versions": dict(binaries.found)}
        elif self._config.pluginmanager.hasplugin("dsession"):
            self._cpu_s += ours  # the children are the workers, which report their own time
        else:
            self._cpu_s += ours + theirs
            self._versions |= binaries.found

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        reported = getattr(node, "workeroutput", {}).get(_KEY)
        if reported:
            self._workers_ended.append(time.monotonic())
            self._cpu_s += reported["cpu_s"]
            self._versions |= reported["versions"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        out = terminalreporter
        self._list(out, "slowest tests, with their fixtures", self._total_s, _SLOWEST)
        over = {name: own_s for name, own_s in self._own_s.items() if own_s > BUDGET_S}
        self._list(out, f"over {BUDGET_S:.0f} s without a stated reason", over, len(over))
        out.section("time and versions")
        wall_s = time.monotonic() - self._started
        out.line(f"CPU {self._cpu_s:.0f} s, wall {wall_s:.0f} s, {len(self._total_s)} tests")
        if len(self._workers_ended) > 1:
            alone_s = max(self._workers_ended) - min(self._workers_ended)
            out.line(f"the last worker ended {alone_s:.0f} s after the first")
        for name, version in sorted(self._versions.items()):
            out.line(f"tested with {name} {version}")

    def _list(
        self, out: pytest.TerminalReporter, title: str, took: dict[str, float], most: int
    ) -> None:
        if took:
            out.section(title)
        for name, took_s in sorted(took.items(), key=lambda pair: -pair[1])[:most]:
            out.line(f"{took_s:7.1f} s  {name}")
