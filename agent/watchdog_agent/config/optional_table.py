"""Type, bounds and default of the settings that only some agents have (see `table`)."""

from __future__ import annotations

from watchdog_agent.config.table import (
    ALNUM,
    ASCII,
    DAY_S,
    PATH,
    PHRASE,
    YEAR_S,
    Choice,
    Flag,
    Number,
    Range,
    TextRule,
    Whole,
)


class Mac(TextRule):
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


COMMAND = Command()
PLUGIN = TextRule("the name of a plugin, an entry point", 128, ALNUM + "._-", ALNUM)
NAME = TextRule('a name of letters, digits, "_", "." and "-"', 64, ALNUM + "._-")


class TlsProbe:
    """Settings of tls probes."""

    warn_days = Number(14, 0, 3650)


class FileProbe:
    """Settings of file probes."""

    file = PATH
    expect_text = PHRASE
    forbid_text = PHRASE
    max_age_s = Range(0.1, YEAR_S)


class Mqtt:
    """Settings of mqtt probes and repairs."""

    tls = Flag(False)
    user = PHRASE
    password_file = PATH


class SnmpProbe:
    """Settings of snmp probes."""

    community_file = PATH


class DnsProbe:
    """Settings of dns probes. `name` must also be a domain name."""

    type = Choice("A", "AAAA")
    name = TextRule("ASCII without blanks", 253, ASCII)


class Repair:
    """Settings of every repair step."""

    when = Choice("suspect", "degraded", "offline")
    budget = Whole(3, 1, 1000)
    window_s = Number(3600.0, 0.1, YEAR_S)
    cooldown_s = Number(30.0, 0.0, YEAR_S)
    timeout_s = Number(10.0, 0.01, 600.0)
    verify_s = Number(30.0, 0.01, DAY_S)
    tries = Whole(1, 1, 64)
    dry_run = Flag(False)
    even_behind_gateway = Flag(False)


MAX_TRIES = 64
"""Maximum number of attempts of all steps per episode; it limits the size of the history."""
TARGETS = {
    "interface": "interface",
    "http": "url",
    "mqtt": "topic",
    "unit": "unit",
    "command": "command",
    "wake": "mac",
    "plugin": "plugin",
}
"""Step kind → the setting that names its target."""


class RepairTarget:
    """Targets of steps; the kind of a step determines which one it has. `url` is checked as a URL."""

    interface = TextRule("the name of a network interface", 15, ALNUM + "._:-", ALNUM)
    topic = TextRule("ASCII without blanks, + and #", 256, ASCII.replace("+", "").replace("#", ""))
    unit = TextRule("the name of a systemd unit", 255, ALNUM + ":_.@-", ALNUM)
    command = COMMAND
    mac = Mac('a MAC address such as "52:54:00:12:34:56"', 17)
    plugin = PLUGIN


class RepairHttp:
    """Settings of http steps."""

    method = Choice("POST", "GET")


class RepairPolicyTable:
    """Settings of all repairs of a class."""

    dry_run = Flag(False)
    accepted_beats = Whole(4, 1, 1000)
    alone_s = Number(DAY_S, 0.0, YEAR_S)


class GatewayTable:
    """Settings of the gateway's probe."""

    timeout_s = Number(2.0, 0.01, 600.0)


class Escalate:
    """Settings of the block `escalate`."""

    degraded = Flag(False)
    window_s = Number(30.0, 1.0, 3600.0)
    gather_s = Number(2.0, 0.1, 600.0)
    retry_s = Number(1.0, 0.1, 600.0)
    give_up_s = Number(900.0, 1.0, DAY_S)
    consul_wait_s = Number(10.0, 0.5, 600.0)
    session_ttl_s = Number(10.0, 10.0, DAY_S)
    note_s = Number(900.0, 1.0, DAY_S)


SINKS = ("webhook", "alertmanager", "consul_event")
GROUPS = ("gateway", "site", "class", "host")
MAX_SINKS = 8


class SinkTable:
    """Settings of an escalation sink; only for `consul_event`."""

    name = NAME


class Loki:
    """Settings of log shipping."""

    tenant = NAME
