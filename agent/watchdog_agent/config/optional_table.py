"""The settings of an agent that only some documents have: type, bounds and default of each (see `table`)."""

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
    """Of probes of the kind tls."""

    warn_days = Number(14, 0, 3650)


class FileProbe:
    """Of probes of the kind file."""

    file = PATH
    expect_text = PHRASE
    forbid_text = PHRASE
    max_age_s = Range(0.1, YEAR_S)


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
    name = TextRule("ASCII without blanks", 253, ASCII)


class Repair:
    """Of a step of any kind."""

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

    interface = TextRule("the name of a network interface", 15, ALNUM + "._:-", ALNUM)
    topic = TextRule("ASCII without blanks, + and #", 256, ASCII.replace("+", "").replace("#", ""))
    unit = TextRule("the name of a systemd unit", 255, ALNUM + ":_.@-", ALNUM)
    command = COMMAND
    mac = Mac('a MAC address such as "52:54:00:12:34:56"', 17)
    plugin = PLUGIN


class RepairHttp:
    """Of steps of the kind http."""

    method = Choice("POST", "GET")


class RepairPolicyTable:
    """Of all repairs of a class."""

    dry_run = Flag(False)
    accepted_beats = Whole(4, 1, 1000)
    alone_s = Number(DAY_S, 0.0, YEAR_S)


class GatewayTable:
    """Of the gateway's probe."""

    timeout_s = Number(2.0, 0.01, 600.0)


class Escalate:
    """Of the block `escalate`."""

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
    """Of a receiver of escalations; only `consul_event` has it."""

    name = NAME


class Loki:
    """Of log shipping."""

    tenant = NAME
