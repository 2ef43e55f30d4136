"""The settings of an agent: type, bounds and default of each.

The agent checks its document by this table, and the control plane its configuration file, so that both accept the
same values. Times are in seconds; in the control plane such a setting has no `_s` at the end of its name.
A setting without a default is optional, or only some kinds have it. The `check` of each rule raises ValueError with
what is allowed.
"""

from __future__ import annotations

_ALNUM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_ASCII = "".join(map(chr, range(0x21, 0x7F)))
_DAY_S = 86400.0
_YEAR_S = 365 * _DAY_S


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
    """One of several words; the first is the default."""

    __slots__ = ("default", "words")

    def __init__(self, *words: str) -> None:
        self.words, self.default = words, words[0]

    def check(self, value: object) -> None:
        if value not in self.words:
            raise ValueError(f"allowed are {', '.join(self.words)}")


class Text:
    """Text of 1 to `most` characters of `allowed` ("" = all printable ones), the first of them of `first`.

    `expected` describes it in an error."""

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


class Path(Text):
    """An absolute path."""

    __slots__ = ()

    def fits(self, text: str) -> bool:
        return text[0] == "/" and "\0" not in text


class Mac(Text):
    """A MAC address."""

    __slots__ = ()

    def fits(self, text: str) -> bool:
        pairs = text.split(":")
        return len(pairs) == 6 and all(
            len(one) == 2 and not one.strip("0123456789abcdefABCDEF") for one in pairs
        )


class Command:
    """A program and its arguments."""

    WORDS, CHARS = 64, 1024

    def check(self, value: object) -> None:
        words = value if isinstance(value, (list, tuple)) else ()
        if not 0 < len(words) <= self.WORDS or not words[0] or not all(map(self._is_word, words)):
            raise ValueError(
                f"expected a list of 1 to {self.WORDS} texts of at most {self.CHARS} characters"
            )

    def _is_word(self, word: object) -> bool:
        return isinstance(word, str) and "\0" not in word and len(word) <= self.CHARS


PATH = Path("an absolute path, which begins with /", 1024)
PHRASE = Text("printable text", 1024)
COMMAND = Command()
PLUGIN = Text("the name of a plugin, an entry point", 128, _ALNUM + "._-", _ALNUM)
NAME = Text('a name of letters, digits, "_", "." and "-"', 64, _ALNUM + "._-")
STATUS = Whole(200, 100, 599)
MAX_STATUSES = 32
PORT = Whole(0, 1, 65535)
"""Its default is that of the kind: `PORTS`."""
PORTS = {"https": 443, "tls": 443, "dns": 53, "mqtt": 1883, "snmp": 161}
"""Kind of probe → its default port; the other kinds have none."""
MQTT_TLS_PORT = 8883


class Agent:
    """Of the document itself."""

    beat_s = Number(15.0, 0.1, 3600.0)
    register_every_s = Number(45.0, 0.1, 3600.0)


class Probe:
    """Of a probe of any kind."""

    interval_s = Number(5.0, 0.05, _DAY_S)
    timeout_s = Number(2.0, 0.01, 600.0)
    misses = Whole(3, 1, 1000)
    jitter = Number(0.05, 0.0, 0.5)
    min_interval_s = Number(0.5, 0.05, _DAY_S)
    warn_time_s = Range(0.001, 600.0)
    warn_loss = Range(0.001, 1.0)


class HttpProbe:
    """Of probes of the kinds http and https."""

    path = Text("a path that begins with /, of ASCII without blanks", 1024, _ASCII, "/")
    expect_body = PHRASE


class TlsProbe:
    """Of probes of the kind tls."""

    warn_days = Number(14, 0, 3650)


class FileProbe:
    """Of probes of the kind file."""

    file = PATH
    expect_text = PHRASE
    forbid_text = PHRASE
    max_age_s = Range(0.1, _YEAR_S)


class Mqtt:
    """Of probes and repairs of the kind mqtt."""

    tls = Flag(False)
    user = PHRASE
    password_file = PATH


class SnmpProbe:
    """Of probes of the kind snmp."""

    community_file = PATH


class DnsProbe:
    """Of probes of the kind dns. `name` is a domain name, too."""

    type = Choice("A", "AAAA")
    name = Text("ASCII without blanks", 253, _ASCII)


class Repair:
    """Of a step of any kind."""

    when = Choice("suspect", "degraded", "offline")
    budget = Whole(3, 1, 1000)
    window_s = Number(3600.0, 0.1, _YEAR_S)
    cooldown_s = Number(30.0, 0.0, _YEAR_S)
    timeout_s = Number(10.0, 0.01, 600.0)
    verify_s = Number(30.0, 0.01, _DAY_S)
    tries = Whole(1, 1, 64)
    dry_run = Flag(False)
    even_behind_gateway = Flag(False)


MAX_TRIES = 64
"""Maximum number of attempts of all steps per episode, so that the record of it is bounded."""
TARGETS = {
    "interface": "interface",
    "http": "url",
    "mqtt": "topic",
    "unit": "unit",
    "command": "command",
    "wake": "mac",
    "plugin": "plugin",
}
"""Kind of step → the setting that names what it acts on."""


class RepairTarget:
    """What a step acts on; its kind decides which one it has. `url` is checked as a URL."""

    interface = Text("the name of a network interface", 15, _ALNUM + "._:-", _ALNUM)
    topic = Text("ASCII without blanks, + and #", 256, _ASCII.replace("+", "").replace("#", ""))
    unit = Text("the name of a systemd unit", 255, _ALNUM + ":_.@-", _ALNUM)
    command = COMMAND
    mac = Mac('a MAC address such as "52:54:00:12:34:56"', 17)
    plugin = PLUGIN


class RepairHttp:
    """Of steps of the kind http."""

    method = Choice("POST", "GET")


class RepairPolicy:
    """Of all repairs of a class."""

    dry_run = Flag(False)
    accepted_beats = Whole(4, 1, 1000)
    alone_s = Number(_DAY_S, 0.0, _YEAR_S)


class Gateway:
    """Of the gateway's probe."""

    timeout_s = Number(2.0, 0.01, 600.0)


class Escalate:
    """Of the block `escalate`."""

    degraded = Flag(False)
    window_s = Number(30.0, 1.0, 3600.0)
    gather_s = Number(2.0, 0.1, 600.0)
    retry_s = Number(1.0, 0.1, 600.0)
    give_up_s = Number(900.0, 1.0, _DAY_S)
    consul_wait_s = Number(10.0, 0.5, 600.0)
    session_ttl_s = Number(10.0, 10.0, _DAY_S)
    note_s = Number(900.0, 1.0, _DAY_S)


SINKS = ("webhook", "alertmanager", "consul_event")
GROUPS = ("gateway", "site", "class", "host")
MAX_SINKS = 8


class Sink:
    """Of a receiver of escalations; only `consul_event` has it."""

    name = NAME


class Loki:
    """Of log shipping."""

    tenant = NAME
