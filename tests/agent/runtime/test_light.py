"""The light parts do what the standard library's own modules do."""

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
    """Every value is the same text, and comes back as it was."""
    text = json_light.dumps(value, sort_keys=in_order)
    assert text == json.dumps(value, sort_keys=in_order)
    assert json_light.loads(text) == json_light.loads(text.encode()) == value


@given(st.text() | st.text(alphabet='{}[]",:0123456789.-eEtruefalsn \n\\u'))
def test_json_is_read_as_the_module_reads_it(text: str) -> None:
    """What the module takes is taken, and gives the same; what it refuses is refused with a ValueError."""
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
    """Text that begins as JSON and is cut or wrong is a ValueError where `json` was never imported, as in the
    agent: there Python 3.10 and 3.11 find no class for the error they want to raise."""
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
    """Whatever bytes come, they are a value or a ValueError."""
    with contextlib.suppress(ValueError):
        json_light.loads(data)


def test_what_is_no_json_is_refused_and_defaults_are_asked() -> None:
    """A value that JSON has not is a TypeError, or what `default` makes of it; nesting without end is a
    RecursionError, as in the module."""
    with pytest.raises(TypeError):
        json_light.dumps({"a": {1}})
    assert json_light.dumps({"a": {1}}, default=str) == '{"a": "{1}"}'
    with pytest.raises(RecursionError):
        json_light.loads("[" * 100_000)
    assert json_light.loads(b"\xef\xbb\xbf{}") == {}


def test_the_light_parts_are_used_here_and_the_modules_where_there_are_none() -> None:
    """On this Python the C parts are taken; where they can't be had the agent has the modules, and its
    configuration is read as before."""
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
    """What `socket.send_fds` sends, with no, one or two descriptors, is received with them."""
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
    """A watched socket that somebody closes keeps nobody busy, and who gets its number is not taken for it."""
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
    """Whoever waits to read or to write is called when the other side is gone, with what it waits for."""
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
