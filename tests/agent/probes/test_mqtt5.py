"""MQTT 5: answers of brokers that do not speak MQTT 3.1.1, for probes and repairs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.config import probes
from watchdog_agent.probes import mqtt, mqtt5
from watchdog_agent.runtime import http_response

from tests.agent.probing import asked, run
from tests.agent.repairs.test_repair_steps import attempt, broken
from tests.agent.world import AGENT, Listener, World

ONLY5 = b"\x20\x03\x00\x84\x00"
"""CONNACK "unsupported protocol version", in MQTT 5 as 3.1.2.2 requires."""
TOLD_IN_3 = b"\x20\x02\x00\x01"
"""The same in MQTT 3.1.1 (3.1.2.2 there): HiveMQ, VerneMQ and Mochi with a minimum version."""
HANG_UP = b""
TAKEN = b"\x20\x13\x00\x00\x10\x12\x00\x0dchosen-by-you"
"""CONNACK of MQTT 5: accepted, with the property "assigned client identifier"."""
PUBACK = b"\x40\x02\x00\x01"


class Broker5(Listener):
    """An MQTT 5 broker that answers any other version with `other` and then closes the connection."""

    def __init__(
        self, other: bytes = ONLY5, connack: bytes = TAKEN, puback: bytes = PUBACK
    ) -> None:
        super().__init__(self._serve_one)
        self.other, self.connack, self.puback = other, connack, puback
        self.levels: list[int] = []
        self.packets: list[tuple[int, bytes]] = []
        self.left = asyncio.Event()

    async def _packet(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        kind = (await reader.readexactly(1))[0]
        size, shift, digit = 0, 0, 0x80
        while digit & 0x80:
            digit = (await reader.readexactly(1))[0]
            size |= (digit & 0x7F) << shift
            shift += 7
        return kind, await reader.readexactly(size)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, hello = await self._packet(reader)
        self.levels.append(hello[6])
        if hello[6] != 5:
            writer.write(self.other)
            await writer.drain()
            return
        assert hello[:6] == b"\x00\x04MQTT"
        assert hello[10] == 0  # no properties
        self.packets.append((0x10, hello[11:]))
        for byte in self.connack:  # in the smallest pieces
            writer.write(bytes([byte]))
            await writer.drain()
        while True:
            kind, body = await self._packet(reader)
            self.packets.append((kind, body))
            if kind == 0xE0:
                self.left.set()
                return
            writer.write(self.puback)
            await writer.drain()


@asynccontextmanager
async def broker5(*answers: bytes) -> AsyncIterator[Broker5]:
    """Start a broker that listens."""
    it = Broker5(*answers)
    await it.start()
    try:
        yield it
    finally:
        await it.stop()


@pytest.mark.parametrize("other", [ONLY5, TOLD_IN_3, HANG_UP])
async def test_a_broker_of_mqtt_5_alone_is_asked_in_mqtt_5(other: bytes) -> None:
    """However the broker rejects MQTT 3.1.1, the probe succeeds in MQTT 5, and disconnects properly."""
    async with broker5(other) as broker:
        port = broker.port
        assert await asked(kind="mqtt", port=port, timeout_s=10.0) == (
            True,
            "connected with MQTT 5",
        )
        await asyncio.wait_for(broker.left.wait(), 10.0)
    assert broker.levels == [4, 5]
    assert [kind for kind, _ in broker.packets] == [0x10, 0xE0]


@pytest.mark.parametrize(
    ("other", "connack", "reason"),
    [
        (ONLY5, b"\x20\x03\x00\x86\x00", "wrong user or password"),
        (ONLY5, b"\x20\x03\x00\x87\x00", "not authorised"),
        (ONLY5, b"\x20\x06\x00\x80\x03\x1f\x00\x00", "code 128"),
        (ONLY5, ONLY5, "the broker speaks MQTT 5 only; in MQTT 5: it does not speak MQTT 5"),
        (TOLD_IN_3, TOLD_IN_3, "it does not speak MQTT 3.1.1; in MQTT 5: it does not speak MQTT 5"),
        (
            ONLY5,
            b"HTTP/1.1 400",
            "the broker speaks MQTT 5 only; in MQTT 5: its answer is not MQTT",
        ),
        (b"\x20\x02\x00\x05", TAKEN, "not authorised"),
    ],
)
async def test_what_a_broker_answers_is_the_reason(
    other: bytes, connack: bytes, reason: str
) -> None:
    """A rejection in either version is reported in words, with the version when that is the reason."""
    async with broker5(other, connack) as broker:
        found = await asked(kind="mqtt", port=broker.port, timeout_s=10.0)
    assert found == (False, reason)


async def test_the_version_is_remembered_until_it_fails() -> None:
    """The next probe of the same spec starts with MQTT 5; after the broker hangs up, with MQTT 3.1.1 again."""
    async with broker5() as broker:
        spec = probes.check({"kind": "mqtt", "port": broker.port, "timeout_s": 10.0}, "probe")

        async def succeeds() -> bool:
            return (await asyncio.to_thread(run, spec))[0] is True

        assert await succeeds()
        assert await succeeds()
        broker.connack = b"?"
        assert not await succeeds()
        broker.connack = TAKEN
        assert await succeeds()
    assert broker.levels == [4, 5, 5, 5, 4, 5]


@pytest.mark.parametrize(
    ("puback", "outcome", "reason"),
    [
        (PUBACK, "no help", ""),
        (b"\x40\x04\x00\x01\x10\x00", "no help", ""),  # no subscribers
        (b"\x40\x03\x00\x01\x87", "failed", "the broker refuses: not authorised"),
        (b"\xe0\x02\x9b\x00", "failed", "the broker refuses: it does not accept QoS 1"),
        (
            b"\x40\x02\x00\x07",
            "failed",
            "the broker: it does not speak MQTT 3.1.1; in MQTT 5: it did not take the message",
        ),
    ],
)
async def test_a_message_is_published_in_mqtt_5(
    world: World, puback: bytes, outcome: str, reason: str
) -> None:
    """A repair step publishes to an MQTT 5 broker, with the properties of that version, and reads the broker's
    answer."""
    async with broker5(TOLD_IN_3, TAKEN, puback) as broker:
        place = f"127.0.0.1:{broker.port}"
        step = {"kind": "mqtt", "broker": place, "topic": "plant/7", "payload": "reset"}
        agent = await broken(world, step)
        attempted = await attempt(agent, outcome)
    assert broker.levels == [4, 5]
    assert broker.packets[1] == (0x32, b"\x00\x07plant/7\x00\x01\x00reset")
    assert not reason or attempted["reason"] == reason


def test_mqtt_5_costs_nothing_where_nobody_speaks_it() -> None:
    """The module that reads MQTT 5 is not loaded with the probe."""
    text = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from watchdog_agent.probes import mqtt as probe_mqtt; from watchdog_agent.repairs import mqtt as repair_mqtt\n"
        "assert 'watchdog_agent.probes.mqtt5' not in sys.modules\n"
    )
    argv = [sys.executable, "-I", "-S", "-c", text, str(AGENT)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


READERS: list[Callable[..., int | None]] = [mqtt5.connack, mqtt5.puback, mqtt.connack]


@given(
    st.sampled_from(READERS),
    st.binary(max_size=20) | st.binary(max_size=20).map(lambda rest: b"\x20" + rest),
    st.booleans(),
)
def test_any_bytes_are_a_code_or_an_error(
    read: Callable[..., int | None], data: bytes, closed: bool
) -> None:
    """Whatever a broker sends is a code, nothing yet, or an HttpError; after the end it is not "nothing
    yet"."""
    try:
        code = read(data, closed=closed)
    except http_response.HttpError:
        return
    assert not (closed and code is None)
    assert code is None or -2 <= code <= 255


@given(st.binary(max_size=3000), st.integers(0, 255), st.data())
def test_a_connack_is_read_whole_and_not_before(
    properties: bytes, code: int, data: st.DataObject
) -> None:
    """However long its properties are, a CONNACK gives its code exactly when its last byte has arrived."""
    size = mqtt.length(len(properties))
    body = bytes([0, code]) + size + properties
    raw = b"\x20" + mqtt.length(len(body)) + body
    assert mqtt5.connack(raw, closed=False) == code
    cut = data.draw(st.integers(0, len(raw) - 1))
    assert mqtt5.connack(raw[:cut], closed=False) is None
