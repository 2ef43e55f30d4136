"""HTTP responses as devices and servers really send them, read as RFC 9110 and 9112 require of a recipient."""

from __future__ import annotations

import asyncio
import functools
import gzip
import itertools
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from watchdog_agent.runtime.http_response import MAX_BODY, MAX_HEAD, MAX_INTERIM, HttpError, Reader

from tests.agent.probing import asked, tcp
from tests.agent.world import Listener, Speaker, World, says, until

HEAD = b"HTTP/1.1 200 OK\r\n"
TEXT = b"all is well"


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def coded(coding: bytes, body: bytes) -> bytes:
    return HEAD + b"Content-Encoding: " + coding + b"\r\n" + sized(body)


def sized(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*chunks: bytes, end: bytes = b"\r\n", last: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%X" % len(one) + end + one + end for one in chunks) + last


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WELL = [
    # lines that end with LF alone (A2)
    ("lf", b"HTTP/1.0 200 OK\nServer: x\n\nall is well", True),
    ("lf-length", b"HTTP/1.1 200\nContent-Length: 11\n\nall is well", False),
    ("lf-mixed", b"HTTP/1.1 200 OK\r\nServer: x\n\r\nall is well", True),
    # interim responses (A3)
    ("103", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HEAD + sized(TEXT), False),
    ("100", b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + sized(TEXT), False),
    ("102s", b"HTTP/1.1 102 Processing\n\n" * 5 + b"\r\n" + HEAD + sized(TEXT), False),
    # chunks (A4)
    ("chunks", CHUNKED + chunked(b"all is", b" well"), False),
    ("chunks-lf", CHUNKED + chunked(b"a", b"ll is well", end=b"\n"), False),
    (
        "extensions",
        HEAD
        + b"TRANSFER-ENCODING: Chunked\r\nContent-Length: 3\r\n\r\n"
        + b'00b ;name="a;b"\r\nall is well\r\n000\r\nTrailer: x\r\n\r\n',
        False,
    ),
    ("chunks-no-trailer", CHUNKED + chunked(TEXT, last=b"0\r\n"), False),
    # content codings that were not requested (A5)
    ("gzip", coded(b"gzip", gzip.compress(TEXT)), False),
    ("x-gzip-close", HEAD + b"Content-Encoding: x-gzip\r\n\r\n" + gzip.compress(TEXT), True),
    ("gzip-members", coded(b"GZIP", gzip.compress(b"all ") + gzip.compress(b"is well")), False),
    ("gzip-rubbish", coded(b"gzip", gzip.compress(TEXT) + b"x\x1f\x8b"), False),
    ("deflate", coded(b"deflate", zlib.compress(TEXT)), False),
    ("deflate-raw", coded(b"deflate", raw_deflate(TEXT)), False),
    (
        "gzip-chunks",
        HEAD
        + b"Transfer-Encoding: chunked\r\nContent-Encoding: identity, gzip\r\n\r\n"
        + chunked(gzip.compress(TEXT)[:7], gzip.compress(TEXT)[7:]),
        False,
    ),
    ("te-gzip", HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked(gzip.compress(TEXT)), False),
    ("te-identity", HEAD + b"Transfer-Encoding: identity\r\n" + sized(TEXT), False),
    # other forms that a recipient accepts
    ("empty-line", b"\r\n\n" + HEAD + sized(TEXT), False),
    ("folded", HEAD + b"X: a\r\n\t b\r\nContent-Length:\r\n 11\r\n\r\nall is well", False),
    ("length-twice", HEAD + b"Content-Length: 11, 11\r\nContent-Length: 11\r\n\r\nall is well", False),
    ("no-colon", HEAD + b"rubbish\r\n : x\r\nContent-Length : 11\r\n\r\nall is well", False),
    ("zeros", HEAD + b"Content-Length: " + b"0" * 5000 + b"11\r\n\r\nall is well", False),
    ("bare-cr", HEAD + b"X: a\rb\r\nContent-Length: 11\r\n\r\nall is well", False),
    ("bytes", HEAD + b"X: \xff\xfe\x00\r\nContent-Length: 11\r\n\r\nall is well", False),
]  # fmt: skip


def parts(data: bytes, size: int) -> Iterable[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def read(data: bytes, size: int, *, close: bool = True, most: int = MAX_BODY) -> Any:
    """The reader's result for `data` in parts of this size, followed by a closed connection."""
    reader = Reader(most)
    for part in parts(data, size):
        found = reader.feed(part)
        if found is not None:
            return found
    return reader.feed(b"") if close else None


@pytest.mark.parametrize(("data", "close"), [one[1:] for one in WELL], ids=[one[0] for one in WELL])
def test_what_a_recipient_takes(data: bytes, close: bool) -> None:
    """Each form gives the final status and the decoded body, whole or byte by byte, and on an open connection if the
    response states its length."""
    for size in (1, 7, len(data)):
        status, _, body = read(data, size, close=close)
        assert (status, body) == (200, TEXT)


@pytest.mark.parametrize(("data", "close"), [one[1:] for one in WELL], ids=[one[0] for one in WELL])
async def test_a_probe_finds_its_text(data: bytes, close: bool) -> None:
    """A probe with `expect_body` finds the text in each of these forms, over a connection that the device keeps open
    unless its close marks the end of the text."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        if not close:
            await reader.read()

    async with tcp(speak) as port:
        found = await asked(kind="http", port=port, expect_body="is well", timeout_s=20.0)
    assert found == (True, "status 200")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"HTTP/1.1 204 No Content\r\nContent-Encoding: gzip\r\n\r\n", 204),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", 304),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n\x81\x05hello", 101),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Encoding: br\r\n\r\n", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n0\r\n", 200),
    ],
)  # fmt: skip
def test_responses_without_a_body_are_complete_with_their_head(data: bytes, status: int) -> None:
    """Status 101, 204 and 304 have no body whatever their headers say, and an empty body needs no decoding."""
    for size in (1, len(data)):
        found = read(data, size, close=False)
        assert found is not None
        assert (found[0], found[2]) == (status, b"")


def test_fields_are_joined() -> None:
    """A repeated header has its values in order, a folded one its lines, and names are in lower case."""
    data = HEAD + b"A: 1\r\nb:2\r\na: 3\r\n 4\r\n\t5 \r\n\r\n"
    assert read(data, 3)[1] == {"a": "1, 3 4 5", "b": "2"}


WRONG = [
    (b"HTTP/1.1 " + b"2" * 5000 + b" OK\r\n\r\n", "not HTTP"),
    (b"HTTP/1.1 099 X\r\n\r\n", "not HTTP"),
    (b"HTTP/1.1 2000 X\r\n\r\n", "not HTTP"),
    (b"HTTP/1.1 2\xb200 X\r\n\r\n", "not HTTP"),
    (b"HTTP/1.1\r\n\r\n", "not HTTP"),
    (b"http/1.1 200 OK\r\n\r\n", "not HTTP"),
    (b"<html>", "not HTTP"),
    (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", "Content-Length is '999999999999999999999999'"),
    (HEAD + b"Content-Length: 1, 2\r\n\r\nab", "Content-Length is '1, 2'"),
    (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", "Content-Length"),
    (HEAD + b"Content-Length: +2\r\n\r\nab", "Content-Length"),
    (HEAD + b"Content-Length: 0x2\r\n\r\nab", "Content-Length"),
    (HEAD + b"Content-Length: \xb2\r\n\r\nab", "Content-Length"),
    (HEAD + b"Content-Length:\r\n\r\nab", "Content-Length"),
    (CHUNKED + b"f" * 17 + b"\r\n", "wrong chunk size"),
    (CHUNKED + b"9" * 5000 + b"\r\n", "wrong chunk size"),
    (CHUNKED + b"-5\r\nabcde\r\n", "wrong chunk size"),
    (CHUNKED + b"0x5\r\nabcde\r\n", "wrong chunk size"),
    (CHUNKED + b";x\r\n", "wrong chunk size"),
    (CHUNKED + b"2\r\nabcde\r\n", "wrong chunk size"),
    (CHUNKED + b"2;" + b"x" * 9000, "chunk size of more than 8 KiB"),
    (HEAD + b"X: " + b"x" * 9000, "head of more than 8 KiB"),
    (HEAD + b"X: yyyy\r\n" * 1000, "head of more than 8 KiB"),
    (b"\r\n" * 5000, "head of more than 8 KiB"),
    (HEAD + b"".join(b"a%d:\n" % n for n in range(300)) + b"\n", "more than 256 header fields"),
    (b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INTERIM + 1), "more than 16 answers"),
    (coded(b"br", b"x"), "encoded as 'br', which was not requested"),
    (coded(b"gzip, gzip", b"x"), "encoded as 'gzip, gzip'"),
    (coded(b"gzip", b"no gzip at all"), "not valid gzip"),
    (coded(b"deflate", b"\xff" * 20), "not valid deflate"),
    (coded(b"gzip", gzip.compress(TEXT)[:-4]), "in the middle of its gzip data"),
    (HEAD + b"Content-Length: 5\r\n\r\nabc", "closed the connection in the middle"),
    (CHUNKED + chunked(TEXT, last=b""), "closed the connection in the middle"),
    (HEAD + b"X: y\r\n", "closed the connection in the middle"),
    (b"HTTP/1.1 100 Continue\r\n\r\n", "closed the connection without a whole answer"),
    (b"", "closed the connection without a whole answer"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), WRONG, ids=itertools.count())
def test_what_is_wrong_is_said(data: bytes, words: str) -> None:
    """An unreadable response ends with a short reason in printable ASCII, however it is split."""
    for size in (1, 7, max(1, len(data))):
        with pytest.raises(HttpError, match=words.replace("(", "\\(")) as caught:
            read(data, size)
        assert str(caught.value).isascii()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 120


@functools.cache
def packed(size: int) -> bytes:
    """Zeros in gzip. Computed on demand: each worker imports this file, and one runs its tests."""
    return gzip.compress(bytes(size), compresslevel=1)


@pytest.mark.parametrize(
    "bomb",
    [
        lambda: coded(b"gzip", packed(64 << 20)),
        lambda: coded(b"deflate", zlib.compress(bytes(64 << 20), level=1)),
        lambda: coded(b"gzip", packed(1 << 20) * 64),
        lambda: coded(b"gzip", gzip.compress(b"") * 5_000 + packed(64 << 20)),
    ],
    ids=["gzip", "deflate", "members", "empty-members"],
)
def test_a_bomb_is_unpacked_no_further_than_64_kib(bomb: Callable[[], bytes]) -> None:
    """64 MiB in a few hundred KB of gzip or deflate take less than 400 KB of memory."""
    data = bomb()
    read(data, 16384)  # loads zlib
    tracemalloc.start()
    try:
        status, _, body = read(data, 16384)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (status, len(body)) == (200, MAX_BODY)
    assert peak < 400_000


def test_what_has_come_is_not_copied_with_each_part() -> None:
    """A body takes its own size once, and nothing is kept of an unwanted one."""
    head = HEAD + b"Content-Length: 9000000\r\n\r\n"
    reader = Reader(8_000_000)
    assert reader.feed(head + b"x" * 10) is None
    for _ in range(240):
        reader.feed(b"x" * 16384)
    tracemalloc.start()
    try:
        assert reader.feed(b"x" * 16384) is None
        assert tracemalloc.get_traced_memory()[1] < 700_000
    finally:
        tracemalloc.stop()
    assert read(head + b"x" * 100, 1000, close=False, most=3)[2] == b"xxx"
    assert read(head, 1000, close=False, most=0)[2] == b""


PIECES = st.sampled_from(
    [b"HTTP/1.1 200 OK", b"HTTP/1.0 ", b"103", b"\r\n", b"\n", b"\r", b" ", b":", b"\x00", b"0", b"5", b"ffff", b";", b"Content-Length: ", b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"deflate", b", ", gzip.compress(TEXT), raw_deflate(TEXT), b"x" * 5000, b"\x1f\x8b"]
)  # fmt: skip
ANSWERS = st.sampled_from([one[1] for one in WELL] + [one[0] for one in WRONG])


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A response with some bytes changed, removed or inserted; or pieces of responses; or anything."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return draw(st.binary(max_size=400))
    if kind == 1:
        return b"".join(draw(st.lists(PIECES, max_size=20)))
    data = bytearray(draw(ANSWERS))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3) | PIECES)
    return bytes(data)


def outcome(data: bytes, sizes: list[int], most: int) -> Any:
    reader, at = Reader(most), 0
    try:
        for size in [*sizes, len(data)]:
            if at < len(data) and size:
                found = reader.feed(data[at : at + size])
                at += size
                # a reader that has its answer leaves the rest of the input unread
                assert found is not None or len(reader._got) <= MAX_HEAD
                assert len(reader.body) <= most
                if found is not None:
                    return found
        return reader.feed(b"")
    except HttpError as error:
        return str(error)


@example(
    data=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;" + 9000 * b"x", sizes=[], most=0
)
@given(hostile(), st.lists(st.integers(1, 3000), max_size=30), st.sampled_from([0, 5, MAX_BODY]))
def test_whatever_comes_is_an_answer_or_a_reason(data: bytes, sizes: list[int], most: int) -> None:
    """Any bytes give a response within its bounds or an HttpError, and the same one however they are split."""
    found = outcome(data, sizes, most)
    assert found == outcome(data, [], most)
    if not isinstance(found, str):
        status, headers, body = found
        assert 100 <= status <= 999
        assert len(headers) <= 256
        assert len(body) <= most


# -- one reader for all clients


def forms(body: bytes) -> list[bytes]:
    """One response in the forms that a proxy or a small server may use."""
    return [
        b"HTTP/1.0 200 OK\nServer: x\n\n" + body,
        b"\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + CHUNKED + chunked(body[:3], body[3:]),
        coded(b"gzip", gzip.compress(body)),
    ]


@pytest.mark.parametrize("number", range(3))
async def test_reports_sinks_loki_and_consul_are_read_alike(world: World, number: int) -> None:
    """Answers of an API, a webhook, a Loki and a Consul with LF alone, in chunks after a 103, or in gzip are accepted,
    and an address in the API's answer is learned."""
    answer = forms(b'{"api": ["http://127.0.0.1:1"]}')[number]
    listeners = [Listener(_answering(answer)) for _ in range(4)]
    for one in listeners:
        await one.start()
    api, loki, consul, sink = (f"http://127.0.0.1:{one.port}" for one in listeners)
    agent = world.agent(
        api=[api],
        loki={"url": loki},
        consul=consul,
        escalate={
            "sinks": [{"kind": "webhook", "url": sink}],
            "consul_wait_s": 0.5,
            "gather_s": 0.2,
        },
    )
    try:
        await agent.start()
        await agent.is_in("reports", state="ok", ready=True)
        await world.device.stop()

        async def done() -> bool:
            status = await agent.status()
            return (
                status["escalations"]["sent"] > 0
                and status["logs"]["shipped"] > 0
                and status["reports"]["sent"] > 2
            )

        await until(done, "deliveries", 30.0)
        assert any(one["msg"] == "consul: registered" for one in agent.log)
        assert not any("report failed" in one["msg"] for one in agent.log)
    finally:
        await agent.stop()
        for one in listeners:
            await one.stop()


def _answering(answer: bytes) -> Speaker:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        await reader.readexactly(int(length or 0))
        writer.write(answer)

    return speak


async def test_a_device_that_answers_anything_else_is_a_miss_in_words() -> None:
    """A 5,000-digit length or status is a missed probe with a reason, not a crash (H6)."""
    for data, words in (WRONG[0], WRONG[7]):
        async with tcp(says(data)) as port:
            ok, reason = await asked(kind="http", port=port)
        assert not ok
        assert words in reason
