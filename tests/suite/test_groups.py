"""Groups of tests stay together when several workers run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import pathlib, pytest
from tests.suite.groups import assign_groups, pytest_runtest_setup

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    assign_groups(items)

@pytest.fixture(scope="session")
def kube():
    yield
    (pathlib.Path(__file__).parent / "workers").open("a").write("ended\\n")

@pytest.fixture(scope="session")
def nomad():
    pass
"""
TESTS = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(12))
def test_it(kube, number):
    with (pathlib.Path(__file__).parent / "workers").open("a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")
"""


@pytest.mark.slow_because("starts pytest with two workers")
def test_tests_of_one_server_and_file_run_in_one_worker(tmp_path: Path, repository: Path) -> None:
    """Twelve tests of a shared server, in a run with two workers, all run in one worker."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_them.py").write_text(TESTS)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    argv += ["--numprocesses=2", "--dist=loadgroup", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(argv, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    *workers, last = (tmp_path / "workers").read_text().split()
    assert (len(workers), len(set(workers)), last) == (12, 1, "ended")


ORDERED = """
import pytest

def test_alone():
    pass

@pytest.mark.slow_because("it says so")
def test_slow():
    pass

@pytest.mark.parametrize("number", range(12))
def test_short(nomad, number):
    pass

@pytest.mark.slow_because("it says so")
@pytest.mark.parametrize("number", range(2))
def test_long(kube, number):
    pass
"""


NEXT = """
import pathlib

def test_served(kube):
    pass

def test_next():
    assert (pathlib.Path(__file__).parent / "workers").read_text() == "ended\\n"
"""


@pytest.mark.slow_because("starts pytest")
def test_a_server_ends_when_no_test_needs_it_any_more(tmp_path: Path, repository: Path) -> None:
    """A test that needs no server, and therefore runs last, finds the session's server ended."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_them.py").write_text(NEXT)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    argv += [f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(argv, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_longest_group_is_first(tmp_path: Path, repository: Path) -> None:
    """Two slow tests of one server run before twelve short ones of another, then slow ones without a server."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_them.py").write_text(ORDERED)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    argv += [f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(argv, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    order = [line.split("::")[1].split("[")[0] for line in done.stdout.splitlines() if "::" in line]
    assert list(dict.fromkeys(order)) == ["test_long", "test_short", "test_slow", "test_alone"]
