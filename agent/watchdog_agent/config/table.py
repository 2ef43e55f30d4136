"""Type, bounds and default of each setting of an agent.

The agent checks its document against this table, and the control plane its configuration file, so both accept the
same values. Times are in seconds; the control plane's names of such settings have no `_s` suffix.
A setting without a default is optional, or only some kinds have it. The `check` method of each rule raises ValueError
with the allowed values. `optional_table` has the settings that only some agents have.
"""

from __future__ import annotations

ALNUM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
ASCII = "".join(map(chr, range(0x21, 0x7F)))
DAY_S = 86400.0
YEAR_S = 365 * DAY_S


class Range:
    """A number from `low` to `high`."""

    __slots__ = ("high", "low")

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def check(self, value: object) -> None:
        number = value if isinstance(value, (int, float)) and type(value) is not bool else None
        if number is None or not self.low <= number <= self.high:
            raise ValueError(f"allowed are {self.low:g} to {self.high:g}")


class Number(Range):
    """A number with a default."""

    __slots__ = ("default",)

    def __init__(self, default: float, low: float, high: float) -> None:
        super().__init__(low, high)
        self.default = default


class Whole(Range):
    """A whole number with a default."""

    __slots__ = ("default",)

    def __init__(self, default: int, low: int, high: int) -> None:
        super().__init__(low, high)
        self.default = default

    def check(self, value: object) -> None:
        super().check(value)
        if isinstance(value, float) and value != int(value):
            raise ValueError(f"allowed are whole numbers from {self.low:g} to {self.high:g}")


class Flag:
    """True or false."""

    __slots__ = ("default",)

    def __init__(self, default: bool) -> None:  # a value, not a mode
        self.default = default

    def check(self, value: object) -> None:
        if type(value) is not bool:
            raise ValueError("allowed are true and false")


class Choice:
    """One of several words; the first one is the default."""

    __slots__ = ("default", "words")

    def __init__(self, *words: str) -> None:
        self.words, self.default = words, words[0]

    def check(self, value: object) -> None:
        if value not in self.words:
            raise ValueError(f"allowed are {', '.join(self.words)}")


class TextRule:
    """Text of 1 to `most` characters in `allowed` ("" = all printable ones); the first one must be in `first`.

    `expected` describes the rule in errors."""

    __slots__ = ("allowed", "expected", "first", "most")

    def __init__(
        self,
        expected: str,
        most: int,
        allowed: str = "",
        first: str = "",
    ) -> None:
        self.expected = f"{expected}, at most {most} characters"
        self.most, self.allowed, self.first = most, allowed, first or allowed

    def check(self, value: object) -> None:
        if not isinstance(value, str) or not 0 < len(value) <= self.most or not self.fits(value):
            raise ValueError(f"expected {self.expected}")

    def fits(self, text: str) -> bool:
        if not self.allowed:
            return text.isprintable()
        return text[0] in self.first and not text.strip(self.allowed)


class Path(TextRule):
    """An absolute path."""

    __slots__ = ()

    def fits(self, text: str) -> bool:
        return text[0] == "/" and "\0" not in text


PATH = Path("an absolute path, which begins with /", 1024)
PHRASE = TextRule("printable text", 1024)
STATUS = Whole(200, 100, 599)
MAX_STATUSES = 32
PORT = Whole(0, 1, 65535)
"""The default depends on the kind: `PORTS`."""
PORTS = {"https": 443, "tls": 443, "dns": 53, "mqtt": 1883, "snmp": 161}
"""Probe kind → its default port; the other kinds have none."""
MQTT_TLS_PORT = 8883


class AgentTable:
    """Settings of the document itself."""

    beat_s = Number(15.0, 0.1, 3600.0)
    register_every_s = Number(45.0, 0.1, 3600.0)


class ProbeTable:
    """Settings of every probe."""

    interval_s = Number(5.0, 0.05, DAY_S)
    timeout_s = Number(2.0, 0.01, 600.0)
    misses = Whole(3, 1, 1000)
    jitter = Number(0.05, 0.0, 0.5)
    min_interval_s = Number(0.5, 0.05, DAY_S)
    warn_time_s = Range(0.001, 600.0)
    warn_loss = Range(0.001, 1.0)


class HttpProbe:
    """Settings of http and https probes."""

    path = TextRule("a path that begins with /, of ASCII without blanks", 1024, ASCII, "/")
    expect_body = PHRASE
