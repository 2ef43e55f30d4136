"""Parses one HTTP response as RFC 9110 and 9112 require of a recipient, limited in bytes."""

from __future__ import annotations

from watchdog_agent.runtime.parsing import whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_HEAD = 8192
"""Maximum bytes of the status line and header fields of a response, and of a chunk size line."""
MAX_BODY = 65536
MAX_FIELDS = 256
MAX_INTERIM = 16
"""Maximum number of 1xx responses before the final one."""
_ZLIB = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Content coding → `wbits` of zlib."""


class HttpError(Exception):
    """The peer does not send valid HTTP, or did not answer; the text describes it."""


class Reader:
    """Consumes the bytes of a connection as they arrive, until the response is complete.

    Accepts what the RFCs require: lines that end with LF only, empty lines before the status line,
    1xx responses before the final one, folded header fields, chunks, and gzip or deflate that were not
    requested. At most `max_body` bytes of the decoded body are kept; the response counts as
    complete then. With 0 it is complete after its header."""

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names in lower case; values of a repeated field are joined by commas."""
        self.body = bytearray()
        self._got = bytearray()
        self._seen = 0
        """Number of bytes of `_got` known to contain no line end."""
        self._head = self._interim = self._left = 0
        self._name = ""
        self._coding = ""
        self._unpack: Any = None
        self._spent = False
        """Whether the compressed data has ended; the rest is ignored."""
        self._step: Callable[[Reader, bool], bool] | None = Reader._begin

    def feed(self, data: bytes) -> tuple[int, dict[str, str], bytes] | None:
        """Return (status, headers, body) once the response is complete, else None. `data`: received bytes, b"" when the
        connection was closed. Raises HttpError."""
        self._got += data
        while self._step is not None and self._step(self, not data):
            pass
        if self._step is None:
            return self.status, self.headers, bytes(self.body)
        if data:
            return None
        where = "in the middle of its answer" if self.status else "without a whole answer"
        raise HttpError(f"it closed the connection {where}")

    # Each step returns whether the next one may follow at once; otherwise more bytes are needed.

    def _begin(self, _closed: bool) -> bool:  # as a step
        start = bytes(self._got[:7])
        # Checked early, because anything that is not HTTP may have no line end.
        if start[:1] not in b"\r\n" and not b"HTTP/1.".startswith(start):
            raise HttpError("its answer is not HTTP")
        line = self._line("a head")
        if line:
            version, _, rest = line.strip().partition(b" ")
            if not version.startswith(b"HTTP/1."):
                raise HttpError("its answer is not HTTP")
            try:
                self.status = whole(rest.lstrip()[:4].rstrip().decode("latin-1"), 100, 999)
            except ValueError:
                raise HttpError("its answer is not HTTP") from None
            self._step = Reader._field
        return line is not None

    def _field(self, _closed: bool) -> bool:  # as a step
        line = self._line("a head")
        if line is None:
            return False
        if not line:
            self._headed()
        elif line[:1] in b" \t":
            # folded (RFC 9112, 5.2)
            if self._name:
                self.headers[self._name] += " " + line.strip().decode("latin-1")
        else:
            name, colon, value = line.partition(b":")
            self._name = name.strip().lower().decode("latin-1") if colon else ""
            if self._name:
                text, before = value.strip().decode("latin-1"), self.headers.get(self._name)
                self.headers[self._name] = text if before is None else f"{before}, {text}"
            if len(self.headers) > MAX_FIELDS:
                raise HttpError(f"its answer has more than {MAX_FIELDS} header fields")
        return True

    def _headed(self) -> None:
        """The header is complete: determine how the body ends (RFC 9112, 6.3)."""
        if self.status < 200 and self.status != 101:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise HttpError(f"it sends more than {MAX_INTERIM} answers before the final one")
            self.status, self.headers, self._head, self._name = 0, {}, 0, ""
            self._step = Reader._begin
            return
        self._choose_body()

    def _choose_body(self) -> None:
        codings = words(self.headers.get("transfer-encoding", ""))
        codings = [one for one in codings if one != "identity"]
        chunked = codings[-1:] == ["chunked"]
        length = self.headers.get("content-length")
        self._left = -1 if codings or length is None else length_of(length)
        if self.max_body <= 0 or self.status in (101, 204, 304) or self._left == 0:
            self._step = None
            return
        codings += words(self.headers.get("content-encoding", ""))
        self._coding = ", ".join(one for one in codings if one not in ("chunked", "identity"))
        if self._coding and self._coding not in _ZLIB:
            raise HttpError(
                f"its answer is encoded as {self._coding[:40]!a}, which was not requested"
            )
        self._step = Reader._chunk_size if chunked else Reader._rest

    def _rest(self, closed: bool) -> bool:  # as a step
        """Read a body of `_left` bytes; -1: until the connection is closed."""
        self._read_body()
        if self._step is not None and (self._left == 0 or (closed and self._left < 0)):
            self._complete()
        return False

    def _chunk_size(self, _closed: bool) -> bool:  # as a step
        self._head = 0
        line = self._line("a chunk size")
        if line is None:
            return False
        digits = line.partition(b";")[0].strip()
        short = digits.lstrip(b"0") or digits[:1]
        if not 0 < len(short) <= 16 or short.strip(b"0123456789abcdefABCDEF"):
            raise HttpError("its answer has a wrong chunk size")
        self._left = int(short, 16)
        if self._left:
            self._step = Reader._chunk
        else:
            # Complete (RFC 9112, 8): trailer fields may follow, which are not needed here.
            self._complete()
        return True

    def _chunk(self, _closed: bool) -> bool:  # as a step
        self._read_body()
        if self._step is None or self._left:
            return False
        self._head = 0
        self._step = Reader._chunk_end
        return True

    def _chunk_end(self, _closed: bool) -> bool:  # as a step
        line = self._line("a chunk size")
        if line:
            raise HttpError("its answer has a wrong chunk size")
        if line is not None:
            self._step = Reader._chunk_size
        return line is not None

    def _line(self, what: str) -> bytes | None:
        """The next line without its line end; None while it is incomplete."""
        end = self._got.find(b"\n", self._seen)
        size = len(self._got) if end < 0 else end + 1
        if self._head + size > MAX_HEAD:
            raise HttpError(f"its answer has {what} of more than 8 KiB")
        if end < 0:
            self._seen = size
            return None
        line = bytes(self._got[:end])
        del self._got[:size]
        self._seen = 0
        self._head += size
        # A CR within a line counts as a space (RFC 9112, 2.2).
        return line.removesuffix(b"\r").replace(b"\r", b" ")

    def _read_body(self) -> None:
        """Move received bytes of the body, at most `_left`, to `body`."""
        size = len(self._got) if self._left < 0 else min(self._left, len(self._got))
        data = bytes(self._got[:size])
        del self._got[:size]
        if self._left > 0:
            self._left -= size
        room = self.max_body - len(self.body)
        self.body += self._unpacked(data, room) if self._coding else data[:room]
        if len(self.body) >= self.max_body:
            self._step = None

    def _unpacked(self, data: bytes, room: int) -> bytes:
        """Decompress `data`, at most `room` bytes, because a small body may expand to gigabytes."""
        import zlib

        out = b""
        try:
            while data and len(out) < room and not self._spent:
                if self._unpack is None:
                    kind = _ZLIB[self._coding]
                    if kind == 15 and data[0] & 15 != 8:
                        kind = -15  # raw deflate, without the zlib format (RFC 9110, 8.4.1.2)
                    self._unpack = zlib.decompressobj(kind)
                elif self._unpack.eof:
                    # gzip may have several members (RFC 1952, 2.2)
                    self._spent = self._coding == "deflate" or data[:1] != b"\x1f"
                    if self._spent:
                        break
                    self._unpack = zlib.decompressobj(31)
                out += self._unpack.decompress(data, room - len(out))
                data = self._unpack.unused_data
        except zlib.error:
            raise HttpError(f"its answer is not valid {self._coding}") from None
        return out

    def _complete(self) -> None:
        if self._unpack is not None and not self._unpack.eof:
            raise HttpError(f"its answer ends in the middle of its {self._coding} data")
        self._step = None


def words(text: str) -> list[str]:
    """The elements of a list in a header field, in lower case."""
    return [one for part in text.lower().split(",") if (one := part.strip())]


def length_of(text: str) -> int:
    """Parse Content-Length, which may be repeated (RFC 9110, 8.6). Raises HttpError."""
    value, *others = [one.strip() for one in text.split(",")]
    try:
        length = whole(value.lstrip("0") or value[:1], 0, 10**20 - 1)
    except ValueError:
        length = -1
    if length < 0 or any(one != value for one in others):
        raise HttpError(f"its Content-Length is {text[:24]!a}; a number was expected")
    return length
