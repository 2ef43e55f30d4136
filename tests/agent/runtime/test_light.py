"""The lightweight replacements behave like the standard library's own modules."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent import zygote
from watchdog_agent.runtime import json_light, stdlib_light
from watchdog_agent.runtime.loop import READ, WRITE, Loop

from tests.agent.world import AGENT

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(values, st.booleans())
def test_json_is_written_as_the_module_writes_it(value: Any, in_order: bool) -> None:
    """Every value is written as the same text, and read back unchanged."""
    text = json_light.dumps(value, sort_keys=in_order)
    assert text == json.dumps(value, sort_keys=in_order)
    assert json_light.loads(text) == json_light.loads(text.encode()) == value


@given(st.text() | st.text(alphabet='{}[]",:0123456789.-eEtruefalsn \n\\u'))
def test_json_is_read_as_the_module_reads_it(text: str) -> None:
    """What the module accepts is accepted with the same result; what it rejects is rejected with a ValueError."""
    try:
        wanted = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            json_light.loads(text)
        return
    found = json_light.loads(text)
    assert found == wanted or (math.isnan(found) and math.isnan(wanted))


BROKEN = ['{"a": 1', "{", '"abc', "[1 2]", '{"a" 1}', "[1,]", '"\\x"', '"\\u12"', "nul", "", "1 2"]


def test_broken_json_is_a_value_error_in_a_process_without_the_module() -> None:
    """Text that begins as JSON and is truncated or wrong is a ValueError where `json` was never imported, as in the
    agent: there Python 3.10 and 3.11 lack the class of the error they want to raise."""
    text = (
        "import sys; sys.path.insert(0, sys.argv[1]); from watchdog_agent.runtime import json_light as light_json\n"
        "assert 'json' not in sys.modules\n"
        "for text in sys.argv[2:]:\n"
        "    try: light_json.loads(text)\n"
        "    except ValueError: pass\n"
        "    else: sys.exit(f'{text} was taken')\n"
    )
    argv = [sys.executable, "-I", "-S", "-c", text, str(AGENT), *BROKEN]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@given(st.binary())
def test_bytes_that_are_no_json_are_a_value_error(data: bytes) -> None:
    """Any bytes give a value or a ValueError."""
    with contextlib.suppress(ValueError):
        json_light.loads(data)


def test_what_is_no_json_is_refused_and_defaults_are_asked() -> None:
    """A value that JSON does not support is a TypeError, or converted by `default`; endless nesting is a
    RecursionError, as in the module."""
    with pytest.raises(TypeError):
        json_light.dumps({"a": {1}})
    assert json_light.dumps({"a": {1}}, default=str) == '{"a": "{1}"}'
    with pytest.raises(RecursionError):
        json_light.loads("[" * 100_000)
    assert json_light.loads(b"\xef\xbb\xbf{}") == {}


def test_the_light_parts_are_used_here_and_the_modules_where_there_are_none() -> None:
    """On this Python the C parts are used; where they are missing the agent uses the modules, and its configuration is
    read as before."""
    assert stdlib_light.json is json_light
    script = """
import sys
sys.modules["_json"] = None
from watchdog_agent.runtime import stdlib_light as light; from watchdog_agent.config import document as config
assert light.json.__name__ == "json", light.json
print(light.json.dumps(config.check({"v": 1, "device_id": "a", "slug": "a", "epoch": 1,
    "address": "::1", "probes": [{"kind": "icmp"}]})["epoch"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(AGENT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_request_comes_with_its_descriptors() -> None:
    """Messages from `socket.send_fds` with no, one or two descriptors are received with them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open(os.devnull, os.O_RDONLY)
    with ours, theirs:
        for count in range(3):
            socket.send_fds(ours, [b"{}"], [null] * count)
            data, descriptors = zygote.receive(theirs)
            assert (data, len(descriptors)) == (b"{}", count)
            for one in descriptors:
                assert os.fstat(one).st_rdev == os.fstat(null).st_rdev
                os.close(one)
        ours.close()
        assert zygote.receive(theirs) == (b"", [])
    os.close(null)


def test_a_socket_that_was_closed_by_somebody_else_is_dropped() -> None:
    """A watched socket that is closed elsewhere does not make the loop spin, and a new socket with its number is not
    taken for it."""
    loop = Loop()
    heard: list[str] = []
    ours, theirs = socket.socketpair()
    loop.watch(ours, READ, lambda _mask: heard.append("old"))
    number = ours.fileno()
    ours.close()
    turns = 0
    poll = loop._poll

    class Counted:
        def poll(self, wait: float | None) -> Any:
            nonlocal turns
            turns += 1
            return poll.poll(wait)

        def __getattr__(self, name: str) -> Any:
            return getattr(poll, name)

    loop._poll = Counted()  # type: ignore[assignment]
    loop.later(0.2, loop.stop)
    loop.run()
    assert turns < 5
    assert number not in loop._watched
    theirs.close()
    loop.close()
    assert heard == []


def test_a_hang_up_wakes_readers_and_writers() -> None:
    """A reader or a writer is called when the peer is gone, with the event it waits for."""
    for wanted in (READ, WRITE, READ | WRITE):
        loop = Loop()
        ours, theirs = socket.socketpair()
        seen: list[int] = []

        def happened(mask: int, loop: Loop = loop, seen: list[int] = seen) -> None:
            seen.append(mask)
            loop.stop()

        loop.watch(ours, wanted, happened)
        theirs.close()
        loop.later(5.0, loop.stop)
        loop.run()
        assert seen
        assert seen[0] & wanted
        loop.forget(ours)
        loop.close()
