"""Fixtures that several folders share: real servers, started once per session."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio

from nomad_watchdog import secret_values
from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from servers.binaries import find
from servers.consul import ConsulServer
from servers.kubernetes import KubernetesCluster
from servers.nomad import NomadServer
from tests.attacks import table
from tests.suite import groups, interrupts, leftovers
from tests.suite.summary import Summary

SERVERS = {"consul", "acl_consul", "nomad", "kube", "helm"}
"""Fixtures that start a server, or a program that is built like one. A test that uses one, even indirectly, needs the
servers built."""


# A busy machine is not a failure: no time limit for an example or for its generation. pytest-timeout ends hung tests.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


# The garbage collector's search among the thousands of tests and modules that stay costs a sixth of the CPU time.
gc.set_threshold(10_000, 10, 10)


def pytest_collection_finish() -> None:
    """Exclude the objects that exist now from garbage collection; they stay until the end."""
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(table)  # for its fixture
    config.pluginmanager.register(interrupts)
    config.pluginmanager.register(groups)
    config.pluginmanager.register(leftovers)  # for its fixtures
    config.pluginmanager.register(leftovers.Leftovers())
    config.pluginmanager.register(Summary(config))


@pytest.hookimpl(tryfirst=True)  # before xdist's worker reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a server, based on their fixtures."""
    for item in items:
        consul_store = getattr(item, "callspec", None) and "consul" in item.callspec.params.values()
        if SERVERS & set(getattr(item, "fixturenames", ())) or consul_store:
            item.add_marker("servers")
        if item.get_closest_marker("busy"):
            item.add_marker("long")
            item.add_marker(pytest.mark.xdist_group("busy"))  # one after another
        leftovers.check_tasks(item)
    groups.assign_groups(items)


@pytest.fixture(autouse=True)
def no_secret_of_another_test() -> Iterator[None]:
    """Secrets that a test made known to this process are hidden only until the test ends."""
    yield
    secret_values.forget()


@pytest.fixture
def yielding(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lower the priority, so that tests with deadlines get more CPU time. A test that is not long still gets enough for
    its own time limit. Only root can restore the priority afterwards."""
    if os.geteuid() != 0:
        yield
        return
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, 15 if request.node.get_closest_marker("long") else 5)
    yield
    os.setpriority(os.PRIO_PROCESS, 0, before)


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> None:
    """Nothing in the caller's environment may lead a test to real servers of the caller."""
    for name in list(os.environ):
        ours = ("CONSUL_", "NOMAD_", "KUBE")
        if name.startswith(ours) and not name.startswith("NOMAD_WATCHDOG_CACHE"):
            del os.environ[name]
    os.environ.pop("AWS_CA_BUNDLE", None)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def consul(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ConsulServer]:
    """One Consul server for the whole session. Use your own key prefix and service names, and do not pause or kill it
    (create your own ConsulServer for that)."""
    async with ConsulServer(tmp_path_factory.mktemp("consul")) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def acl_consul(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ConsulServer]:
    """One Consul server with ACLs that deny by default; its `token` may do everything."""
    async with ConsulServer(tmp_path_factory.mktemp("acl-consul"), acl=True) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nomad(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NomadServer]:
    """One Nomad with one client for the whole session. Use your own job prefix, stop your jobs, and leave Nomad ready,
    whatever you do to it meanwhile."""
    async with NomadServer(tmp_path_factory.mktemp("nomad")) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kube(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KubernetesCluster]:
    """One Kubernetes control plane for the whole session. Use your own namespace and nodes, and leave its processes
    running."""
    async with KubernetesCluster(tmp_path_factory.mktemp("kube")) as cluster:
        yield cluster


@pytest_asyncio.fixture
async def consul_client(consul: ConsulServer) -> AsyncIterator[ConsulClient]:
    """A client of the session's Consul."""
    client = ConsulClient(ConsulAccess(address=consul.http_addr))
    yield client
    await client.close()


@pytest.fixture(scope="session")
def helm() -> Path:
    """The `helm` program."""
    return find("helm")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's folder."""
    return Path(__file__).resolve().parents[1]
