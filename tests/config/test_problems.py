"""Messages about a wrong configuration: plain words, the right line, and the probable intention."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nomad_watchdog.config.load import load
from nomad_watchdog.config.problems import DOTTED, PATTERNS
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.errors import UserError

PROBE = 'probe "tcp" { port = 80 }'
LIBRARYS_WORDS = re.compile(
    r"Input should|input should|valid (integer|string|dict|tuple|number|boolean)|parsing|pattern '|Traceback|"
    r"less than or equal|<class|ValueError|NoneType|\bdict\b|\btuple\b|\bTrue\b|\bFalse\b|\bNone\b|"
    r"set_int_max_str_digits|Exceeds the limit|does not appear to be|constrained"
)


def told(folder: Path, text: str, **env: str) -> str:
    """The messages about a file, which may contain nothing but plain words."""
    file = folder / "w.hcl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(file, {"HOME": "/nowhere", **env})
    found = str(caught.value).replace(str(file), "w.hcl")
    assert not LIBRARYS_WORDS.search(found), found
    return found


@pytest.mark.parametrize("name", ["gateway", "probe", "on", "api", "token", "escalate"])
def test_a_class_named_as_a_block_is_checked_as_a_class(tmp_path: Path, name: str) -> None:
    """Its misspelt settings are compared with those of a class, at any depth (C8)."""
    found = told(
        tmp_path,
        f'agent_class "{name}" {{\n  memroy = "64Mi"\n  probe "tcp" {{\n    prt = 80\n  }}\n}}\n',
    )
    assert f'w.hcl:2: agent_class "{name}" > memroy: no such setting; did you mean memory?' in found
    assert (
        f'w.hcl:4: agent_class "{name}" > probe "tcp" > prt: no such setting; did you mean port?'
        in found
    )


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('agent_class "a" {\n  probe "tcp" {\n    port = 80\n}\napi {\n}\n', 2,
         'block `probe "tcp"` (line 2) is not closed'),
        (f'api {{\n  listen = "127.0.0.1:1"\n\nagent_class "a" {{\n  {PROBE}\n}}\n', 1,
         "block `api` (line 1) is not closed"),
        ('agent_class "a" {\n  labels = {\n    x = "1"\n  probe "tcp" { port = 1 }\n}\n', 2,
         "the value of `labels` (line 2) is not closed"),
        ('inventory = [\n  "a.hcl",\n  "b.hcl"\napi {\n}\n', 1, "the value of `inventory` (line 1) is not"),
        ('api {\nlisten = "x"\n', 1, "block `api` (line 1) is not closed"),
        ("api {\n}\n}\n", 3, '"}" closes nothing'),
        ('# {\nbackend = "local\nshards = 2\n', 2, 'has no closing "'),
        ('/* { */ api {\n  listen = "{"\n', 1, "(line 1) is not closed"),
    ],
)  # fmt: skip
def test_a_block_that_is_not_closed_is_named_where_it_opens(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    """The line is that of the block, not the end of the file (C10)."""
    found = told(tmp_path, text)
    assert found.startswith(f"w.hcl:{line}: syntax error: ")
    assert words in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('probe "tcp" { port = "four" }', 'port: found "four"; expected a whole number from 1 to 65535'),
        ('probe "tcp" { port = 2.5 }', "port: found 2.5; expected a whole number"),
        ('probe "tcp" { port = [80] }', "port: found [80]; expected a whole number"),
        ('probe "http" {\n port = 80\n expect_status = "x"\n }',
         'expect_status: found "x"; expected a whole number from 100 to 599 or a list of a whole number'),
        ('probe "http" {\n port = 80\n expect_status = [200, "x"]\n }', 'expect_status: found [200, "x"]'),
        ('probe "http" {\n port = 80\n expect_status = []\n }', "expect_status: found []"),
        (f"{PROBE}\n cpu = [true]", "cpu: found [true]; expected a whole number from 1 to 1000000"),
        (f"{PROBE}\n cpu = true", "cpu: found true; expected a whole number from 1 to 1000000"),
        (f'{PROBE}\n cpu = "100"', 'cpu: found "100"; expected a whole number from 1 to 1000000'),
        ('probe "tcp" { port = true }', "port: found true; expected a whole number from 1 to 65535"),
        ('probe "http" { expect_status = [true] }', "expect_status: found [true]; expected a whole number"),
        ('probe "icmp" { warn_loss = true }', "warn_loss: found true; expected a number from 0.001 to 1"),
        ('probe "http" { tls = 1 }', "tls: found 1; expected true or false"),
        ('probe "http" { tls = "yes" }', 'tls: found "yes"; expected true or false'),
        (f'{PROBE}\n variables = ["a"]', 'variables: found ["a"]; expected a map such as { name = "value" }'),
        (f'{PROBE}\n repair_dry_run = "perhaps"', "expected true or false"),
        (f'{PROBE}\n version = "a b"', 'expected a version such as "1.4.0"'),
        (f'{PROBE}\n kill_timeout = "0s"', 'found "0s"; expected a duration such as "10s" or "5m", greater than 0s'),
        (f'{PROBE}\n state = "nowhere"', 'expected one of "folder", "consul"'),
        (f'{PROBE}\n gateway = "x"', "expected a block { ... }"),
        ('probe "dns" {\n name = "x"\n expect_address = "300.1.1.1"\n }', "is not an IP address"),
        (f"{PROBE}\n cpu = {'9' * 5000}", "is a number with too many digits"),
        (f"probe \"tcp\" {{ port = {'9' * 4000} }}", "found a number of very many digits; expected"),
        (f"{PROBE}\n memory = \"{'9' * 5000}Mi\"", "is not a size"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_what_is_expected(tmp_path: Path, text: str, words: str) -> None:
    """The message is written for users, for every type of a setting, and also for a number of 5,000 digits (C10,
    H6)."""
    assert words in told(tmp_path, f'agent_class "a" {{\n {text}\n}}\n')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('agent_class "A B" {\n probe "tcp" { port = 1 }\n}', 'found "A B"; expected a name of a-z'),
        (f'api {{\n listen = "h:{"9" * 5000}"\n}}', "is not HOST:PORT"),
        (f'nomad {{\n address = "http://h:{"9" * 5000}"\n}}', "is not an address"),
        ('backend = "nomed"', 'backend: "nomed" is not installed; did you mean nomad? installed: kubernetes'),
        ('backend = "kubernets"', "did you mean kubernetes?"),
        ("mass_change { fraction = 1.5e3 }", "found 1500.0; expected a number from 0 to 1"),
        ("mass_change { fraction = 1e999 }", "fraction: found inf; expected a number from 0 to 1"),
        ('api {\n token "x" {\n  role = "oprator"\n  file = "/t"\n }\n}', "did you mean operator?"),
        ('api {\n token "x" {\n  rol = "operator"\n  file = "/t"\n }\n}', "rol: no such setting; did you mean role?"),
        ('resync = "soon"', "is not a duration"),
    ],
)  # fmt: skip
def test_what_is_wrong_elsewhere_is_told_in_the_same_words(
    tmp_path: Path, text: str, words: str
) -> None:
    """This covers names of blocks, addresses, backends and numbers of any form (C9, C10)."""
    assert words in told(tmp_path, text + "\n")


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    """Errors of the file and misspelt variables are reported in one message, each with its line."""
    found = told(
        tmp_path,
        f'shard = 2\nagent_class "a" {{\n  {PROBE}\n  cpu = "x"\n}}\n',
        NOMAD_WATCHDOG_PRESENSE_TTL="5s",
        NOMAD_WATCHDOG_RESYNC="5",
        NOMAD_SKIP_VERIFY="perhaps",
    ).splitlines()
    assert len(found) == 5
    assert any(line.startswith("w.hcl:1: shard") for line in found)
    assert any(line.startswith('w.hcl:4: agent_class "a" > cpu') for line in found)
    assert any(line.startswith("environment NOMAD_WATCHDOG_RESYNC: resync: ") for line in found)
    assert any("environment NOMAD_SKIP_VERIFY: nomad > tls_skip_verify: " in line for line in found)
    assert any("did you mean NOMAD_WATCHDOG_PRESENCE_TTL?" in line for line in found)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("NOMAD_WATCHDOG_API_LISTN", "did you mean NOMAD_WATCHDOG_API_LISTEN?"),
        ("NOMAD_WATCHDOG_TOKENFILE", "did you mean NOMAD_WATCHDOG_TOKEN_FILE?"),
        ("NOMAD_WATCHDOG_AGENT_CLASS_DEFAULT_CPU", "no such variable"),
    ],
)
def test_a_misspelt_variable_is_reported(variable: str, meant: str) -> None:
    """A variable with our prefix that is not used is an error, not a later surprise."""
    with pytest.raises(UserError, match=re.escape(meant)) as caught:
        load(None, {"HOME": "/nowhere", variable: "s3cret"})
    assert str(caught.value).startswith(f"environment {variable}: ")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "variable",
    [
        "NOMAD_WATCHDOG_SERVICE_HOST",
        "NOMAD_WATCHDOG_SERVICE_PORT_HTTP",
        "NOMAD_WATCHDOG_PORT",
        "NOMAD_WATCHDOG_PORT_9670_TCP_ADDR",
        "NOMAD_WATCHDOG_AGENTS_SERVICE_PORT",
        "NOMAD_WATCHDOG_TOKEN",
        "NOMAD_WATCHDOG_FAILPOINT",
        "NOMAD_WATCHDOGS",
    ],
)
def test_what_others_set_is_left_alone(variable: str) -> None:
    """Kubernetes sets variables for a Service with our name; the CLI has some of its own."""
    assert load(None, {"HOME": "/nowhere", variable: "tcp://10.0.0.1:80"}).shards == 1


def models(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """All blocks nested in a block, and itself."""
    if model in seen:
        return
    seen.add(model)
    yield model

    def inner(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for one in get_args(annotation):
            yield from inner(one)

    for field in model.model_fields.values():
        for found in inner(field.annotation):
            yield from models(found, seen)


def patterns(note: Any) -> Iterator[str]:
    """All patterns in an annotation."""
    if isinstance(note, FieldInfo):
        for one in (*note.metadata, note.annotation):
            yield from patterns(one)
    elif isinstance(getattr(note, "pattern", None), str):
        yield note.pattern
    else:
        for one in (*get_args(note), *getattr(note, "__metadata__", ())):
            yield from patterns(one)


def test_every_pattern_of_a_setting_has_words() -> None:
    """A new setting with a pattern needs a sentence that explains it."""
    blocks = list(models(Settings, set()))
    found = {
        p for block in blocks for field in block.model_fields.values() for p in patterns(field)
    }
    assert len(blocks) > 20
    assert len(found) > 5  # the agent's own texts are described in its table of settings
    without = {pattern for pattern in found if pattern not in PATTERNS}
    assert len(without) == 1, without  # of `metric.value`
    assert "queues" in DOTTED


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('agent_class "d" {\n  prob "icmp" {}\n}\n', "probe"),
        ('agent_pool "d" {\n  maxx = 3\n  command = ["x"]\n}\n', "max"),
    ],
)
def test_a_misspelt_name_is_one_error(text: str, named: str, tmp_path: Path) -> None:
    """A misspelt setting is not reported as missing as well."""
    file = tmp_path / "w.hcl"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(file)
    (line,) = str(caught.value).splitlines()
    assert f"did you mean {named}?" in line
