"""Which tests one worker of pytest-xdist runs one after another.

Each group runs in one worker: its tests share a server, or a fixture of the file. All other tests go to whichever
worker is idle. Without xdist this only orders the tests.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import pytest

_SHARES: Final = {"kube": 2, "nomad": 3, "acl_consul": 1, "consul": 2}
"""A session server → the maximum number of workers that start one. The first that a test uses decides."""
_GROUP: Final = "xdist_group"
_RANK: Final = pytest.StashKey[int]()
_SLOW_S: Final = 10
"""Weight of a test that states why it is slow, where another test has 1: about the duration in seconds."""
_LONG_S: Final = 60
"""Weight of a long test; one that takes far longer states its seconds: `pytest.mark.lasts`."""


def assign_groups(items: list[pytest.Item]) -> None:
    """Mark each test with its group, and put the longest first: long tests and shared servers, then shared files, then
    single slow tests; within each kind the longest group first. A long group that starts late would run alone at the
    end, while the other workers are idle."""
    servers = {item: _server(item) for item in items}
    shares = _share_out(items, servers)
    rank = {}
    for item in items:
        file = item.path.as_posix()
        server = servers[item]
        if item.get_closest_marker(_GROUP):
            rank[item] = 0
        elif server:
            item.add_marker(pytest.mark.xdist_group(f"{server}-{shares[server, file]}"))
            rank[item] = 0
        elif _shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
            rank[item] = 1
        else:
            rank[item] = 2 if item.get_closest_marker("slow_because") else 3
        if item.get_closest_marker("long"):
            rank[item] = 0
    groups = {item: _group(item) for item in items}
    lengths: defaultdict[str, float] = defaultdict(float)
    for item in items:
        lengths[groups[item]] += _length(item)
    items.sort(key=lambda item: (rank[item], -lengths[groups[item]]))
    for item in items:
        item.stash[_RANK] = rank[item]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the session's servers of this worker when no remaining test needs them: tests with servers come first. An
    idle Kubernetes control plane takes some percent of a core, a Nomad one or two."""
    if item.stash[_RANK] == 0:
        return
    known = item.session._fixturemanager._arg2fixturedefs
    for fixture in (one for server in _SHARES for one in known.get(server, ())):
        if fixture.cached_result is not None:
            fixture.finish(item._request)  # type: ignore[attr-defined]


def _group(item: pytest.Item) -> str:
    """The name of the test's group, or of the test itself if it has none."""
    mark = item.get_closest_marker(_GROUP)
    return str((*mark.args, *mark.kwargs.values())[0]) if mark else item.nodeid


def _length(item: pytest.Item) -> float:
    if lasts := item.get_closest_marker("lasts"):
        return float(lasts.args[0])
    if item.get_closest_marker("long"):
        return _LONG_S
    return _SLOW_S if item.get_closest_marker("slow_because") else 1


def _share_out(
    items: list[pytest.Item], servers: dict[pytest.Item, str | None]
) -> dict[tuple[str, str], int]:
    """(Server, file) → the group of that server which runs the file. The groups take about the same time."""
    sizes: defaultdict[tuple[str, str], float] = defaultdict(float)
    for item in items:
        if server := servers[item]:
            sizes[server, item.path.as_posix()] += _length(item)
    loads = {server: dict.fromkeys(range(most), 0.0) for server, most in _SHARES.items()}
    found = {}
    for (server, file), size in sorted(sizes.items(), key=lambda one: (-one[1], one[0])):
        load = loads[server]
        group = min(load, key=lambda number: (load[number], number))
        load[group] += size
        found[server, file] = group + 1
    return found


def _server(item: pytest.Item) -> str | None:
    names = set(getattr(item, "fixturenames", ()))
    if "consul" in getattr(getattr(item, "callspec", None), "params", {}).values():
        names.add("consul")  # requested by a fixture through its parameter
    return next((server for server in _SHARES if server in names), None)


def _shares_a_fixture(item: pytest.Item) -> bool:
    definitions: dict[str, Any] = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    return any(found[-1].scope in {"module", "class", "package"} for found in definitions.values())
