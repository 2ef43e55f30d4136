"""A test that leaves something behind fails, and one that cleans up does not: tested with pytest itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import socket
import subprocess
import threading
import pytest
from tests.suite import leftovers, summary

leftovers.GRACE_S = 1.0
summary.BUDGET_S = 0.3

def pytest_configure(config):
    config.pluginmanager.register(leftovers)
    config.pluginmanager.register(leftovers.Leftovers())
    config.pluginmanager.register(summary.Summary(config))
    config.addinivalue_line("markers", "slow_because(reason)")
    config.addinivalue_line("markers", "long")

def pytest_collection_modifyitems(items):
    for item in items:
        leftovers.check_tasks(item)

@pytest.fixture(scope="session")
def shared():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    child = subprocess.Popen(["sleep", "60"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener
    child.kill()
    child.wait()
    stop.set()
    thread.join()
"""

BAD = {
    "task": """
import asyncio
left = []
async def test_it():
    left.append(asyncio.get_running_loop().create_task(asyncio.sleep(60), name="forgotten"))
""",
    "thread": """
import threading
stop = threading.Event()
def test_it():
    threading.Thread(target=stop.wait, args=(20,), name="forgotten", daemon=True).start()
def test_later():
    stop.set()
""",
    "child": """
import subprocess
left = []
def test_it():
    left.append(subprocess.Popen(["sleep", "60"]))
def test_later():
    left[0].kill()
    left[0].wait()
""",
    "orphan": """
import os, signal, subprocess
left = []
def test_it():
    left.append(subprocess.check_output("sleep 60 >/dev/null & echo $!", shell=True, text=True))
def test_later():
    os.kill(int(left[0]), signal.SIGKILL)
""",
    "socket": """
import socket
left = []
def test_it():
    left.append(socket.create_server(("127.0.0.1", 0)))
def test_later():
    left[0].close()
""",
}
SIGNS = {
    "task": "Task pending name='forgotten'",
    "thread": "thread forgotten",
    "child": r"process \d+ \(sleep 60\)",
    "orphan": r"process \d+ \(sleep 60\)",
    "socket": r"socket:\[\d+\] AF_INET SOCK_STREAM \('127.0.0.1', \d+\)",
}

GOOD = """
import asyncio, socket, subprocess, threading

def test_shared(shared):
    pass

def test_clean():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        client.close()
    thread = threading.Thread(target=print)
    thread.start()
    subprocess.run(["true"], check=True)

def test_ends_a_little_later():
    threading.Timer(0.2, print).start()

async def test_async():
    left = asyncio.get_running_loop().create_task(asyncio.sleep(0.2))
    await asyncio.to_thread(print)
    child = await asyncio.create_subprocess_exec("true")
    await child.wait()
"""


def play(folder: Path, tests: dict[str, str], *options: str) -> str:
    """Run pytest on these texts in its own process, and return its output."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    for name, text in tests.items():
        (folder / f"test_{name}.py").write_text(text)
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    argv += [*options, str(folder)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=170)
    return done.stdout


@pytest.mark.slow_because("waits for each leftover as long as it may take to end")
def test_what_a_test_leaves_behind_fails_it(tmp_path: Path) -> None:
    """The test that leaves a task, thread, child, orphan or socket behind fails under its name, and no other."""
    out = play(tmp_path, BAD)
    for sign in SIGNS.values():
        assert re.search(f"^left behind by this test: <?{sign}", out, re.MULTILINE), out
    failed = re.findall(r"^ERROR .*/test_(\w+)\.py::test_it(?: - .*)?$", out, re.MULTILINE)
    assert sorted(failed) == sorted(BAD), out
    assert re.search(r" 9 passed, 5 errors in", out), out


SLOW = """
import pytest, time

@pytest.fixture(scope="module")
def slow():
    time.sleep(0.4)
    yield
    time.sleep(0.4)

def test_waits_for_a_shared_fixture(slow): pass

def test_over(): time.sleep(0.4)

@pytest.mark.slow_because("so it is")
def test_excused(): time.sleep(0.4)

def test_computes():
    end = time.process_time() + 1
    while time.process_time() < end: pass
"""


@pytest.fixture(scope="module", params=[(), ("-n2", "--dist=loadgroup")], ids=["alone", "workers"])
def printed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Output of a run of tests that clean up, without and with workers."""
    folder = tmp_path_factory.mktemp("clean")
    return play(folder, {"good": GOOD, "slow": SLOW}, *request.param)


def test_clean_tests_pass(printed: str) -> None:
    """Tests that clean up pass, and what a fixture of the session keeps does not count for them."""
    assert re.search(r"=+ 8 passed in", printed), printed


def test_summary_names_what_took_long(printed: str) -> None:
    """The summary lists the slowest tests, those over the budget by their own time and without a reason, and the CPU
    time of all workers."""
    slowest, _, rest = printed.partition("without a stated reason")
    over = set(re.findall(r" s .*::(\w+)$", rest, re.MULTILINE))
    assert {"test_over", "test_computes"} <= over, printed
    assert not over & {"test_excused", "test_waits_for_a_shared_fixture"}, printed
    named = set(re.findall(r" s .*::(\w+)$", slowest, re.MULTILINE))
    assert over | {"test_excused", "test_waits_for_a_shared_fixture"} <= named, printed
    cpu = re.search(r"CPU (\d+) s, wall \d+ s, 8 tests", printed)
    assert cpu, printed
    assert int(cpu[1]) >= 1
