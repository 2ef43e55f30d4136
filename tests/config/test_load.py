"""The configuration file: all errors at once, units, precedence, hostile text, the docs."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.config.agent_classes import AgentClassSettings, BackendOverrides, RepairSettings
from nomad_watchdog.config.api import TokenSettings
from nomad_watchdog.config.escalation import EscalationSettings, LokiSettings, SinkSettings
from nomad_watchdog.config.hcl import read
from nomad_watchdog.config.load import load
from nomad_watchdog.config.pools import MetricSettings
from nomad_watchdog.config.probes import GatewaySettings, ProbeSettings
from nomad_watchdog.config.problems import model_of
from nomad_watchdog.config.relief import SignalSettings
from nomad_watchdog.config.rollouts import AnalysisSettings, RolloutStepSettings
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.errors import UserError
from nomad_watchdog.units import parse_duration, parse_size

DOCS = Path(__file__).parents[2] / "docs"

MISTAKES = """\
backend = "nomd"
shard = 2
api {
  listn = "x"
  max_body = 12
}
agent_class "default" {
  cpu = "many"
  template = "/x/${var.y}"
  probe "tcp" {
    port = 99999
  }
  probe "http" {
    port    = 80
    timeout = "9s"
  }
  repair "cycle" {}
}
nomad {
  strategy = "dispach"
  strategy = "register"
}
retry { initial = "10m" }
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "wrong.hcl"
    file.write_text(text)
    return file


def message(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as error:
        load(write(folder, text))
    return str(error.value)


def test_all_mistakes_are_named_at_once_with_lines(tmp_path: Path) -> None:
    """All errors of a file are reported in one run, each with its line, its block path and what is allowed."""
    found = message(tmp_path, MISTAKES)
    for line, words in [
        (2, "shard: no such setting; did you mean shards?"),
        (4, "api > listn: no such setting; did you mean listen?"),
        (5, "api > max_body: 12 is not a size"),
        (8, 'agent_class "default" > cpu: found "many"'),
        (9, 'agent_class "default" > template: an interpolation'),
        (11, 'agent_class "default" > probe "tcp" > port: found 99999'),
        (13, 'probe "http": timeout (9s) must be shorter than interval (5s)'),
        (17, 'agent_class "default" > repair "cycle" > kind: found "cycle"'),
        (23, "retry > initial: 600s is longer than retry.max"),
        (20, 'nomad > strategy: found "dispach"'),
        (21, "nomad > strategy: given twice; the first is on line 20"),
    ]:
        assert any(f"wrong.hcl:{line}: " in row and words in row for row in found.splitlines()), (
            line,
            words,
            found,
        )
    assert "did you mean dispatch?" in found


def test_unknown_backend_names_those_installed(tmp_path: Path) -> None:
    """A backend that is not installed is rejected with the names of those that are."""
    assert "did you mean nomad? installed: kubernetes, local, nomad" in message(
        tmp_path, 'backend = "nomd"\n'
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('agents { report_stale = "20s" }', "less than two beats of class default; at least 30s"),
        (
            'agent_class "a" {\n kill_timeout = "2m"\n probe "tcp" {\n port = 1\n }\n}',
            "startup_grace",
        ),
        ('retry {\n initial = "10m"\n}', "longer than retry.max"),
        ('agent_class "a" {\n probe "icmp" {}\n confirm "icmp" {}\n}', "of another kind"),
        ('agent_class "a" {}', "has no probe"),
        ('nomad {\n client_cert = "x"\n}', "go together"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    """Settings that violate an inequality cause an error that names it."""
    assert words in message(tmp_path, text + "\n")


@pytest.mark.parametrize(
    "text",
    ["x = ", "a {", "}", "= 1", "x = 'a'", "{" * 500, 'a = "\x00"\n= ', "backend = <<X\nlocal\nX"],
)
def test_what_is_not_plain_hcl_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    """Text that is not HCL, or would need evaluation, causes a UserError without unprintable characters."""
    found = message(tmp_path, text)
    assert "wrong.hcl" in found
    assert found.replace("\n", "").isprintable()


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    """Any file gives a document or a UserError."""
    try:
        read(text, "file")
    except UserError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    "value", ['"${var.x}"', "var.x", "1 + 2", 'file("/etc/passwd")', '"%{if x}a%{endif}"']
)
def test_nothing_is_evaluated(tmp_path: Path, value: str) -> None:
    """A value that would need evaluation is rejected; an escaped one is its own text."""
    assert "data_dir" in message(tmp_path, f"data_dir = {value}\n")
    assert read('x = "$${y}"\n', "file").data == {"x": "${y}"}


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("10s", 10.0), ("1m30s", 90.0), ("2h", 7200.0)]
)
def test_durations_become_seconds(text: str, seconds: float) -> None:
    """A duration with its unit becomes float seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", 10, "s", "-1s", "1e9s", "nan", "10 s", "１s", "9999d", None, True]
)
def test_durations_without_sense_are_refused(text: object) -> None:
    """Invalid durations are rejected, including numbers without a unit."""
    with pytest.raises(ValueError):
        parse_duration(text)


def test_sizes_become_bytes() -> None:
    """A size with its unit becomes bytes; one without is rejected."""
    assert (parse_size("64Mi"), parse_size("1k"), parse_size("5B")) == (64 * 1024**2, 1000, 5)
    for wrong in ("64", 64, "Mi", "-1Mi", "1.5Mi", "٣Mi"):
        with pytest.raises(ValueError):
            parse_size(wrong)


def test_flags_go_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    """The order of precedence is flag, our variable, the vendor's variable, file, default."""
    file = write(tmp_path, 'shards = 2\nnomad {\n address = "http://file:1"\n}\n')
    assert load(file, {}).nomad.address == "http://file:1"
    env = {"NOMAD_ADDR": "vendor:2", "NOMAD_WATCHDOG_SHARDS": "3"}
    assert load(file, env).nomad.address == "http://vendor:2"
    env["NOMAD_WATCHDOG_NOMAD_ADDRESS"] = "https://ours:3"
    assert load(file, env).nomad.address == "https://ours:3"
    assert load(file, env).shards == 3
    assert load(file, env, {"shards": 4}).shards == 4
    assert load(file, env, {"shards": None}).shards == 3
    assert load(None, {"NOMAD_WATCHDOG_CONFIG": str(file)}).shards == 2
    assert load(None, {"XDG_STATE_HOME": "/s"}).data_dir == "/s/nomad-watchdog"


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a user without a home directory, as in a container, data_dir is enough, and without it the error asks for
    it."""

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert load(None, {"NOMAD_WATCHDOG_DATA_DIR": "/data"}).data_dir == "/data"
    with pytest.raises(UserError, match="set data_dir"):
        load(None, {})


def test_a_wrong_variable_is_named() -> None:
    """An error in the environment names the variable, not the file."""
    with pytest.raises(UserError, match="environment NOMAD_WATCHDOG_RESYNC: resync"):
        load(None, {"NOMAD_WATCHDOG_RESYNC": "5"})


def test_consul_ssl_variable_makes_the_address_https() -> None:
    """CONSUL_HTTP_SSL applies to a CONSUL_HTTP_ADDR without a scheme."""
    env = {"CONSUL_HTTP_ADDR": "c:8501", "CONSUL_HTTP_SSL": "true"}
    assert load(None, env).consul.address == "https://c:8501"


def test_spec_hash_follows_behaviour_and_template_text(tmp_path: Path) -> None:
    """The hash changes with the template's text and the probes, and not with the API's address."""
    template = tmp_path / "job.hcl"
    template.write_text("one")
    text = f'agent_class "a" {{\n template = "{template}"\n probe "tcp" {{\n  port = 1\n }}\n}}\n'
    file = write(tmp_path, text)
    first = load(file).specs()["a"]
    assert re.fullmatch("[0-9a-f]{12}", first.spec_hash)
    assert (
        load(file, {"NOMAD_WATCHDOG_API_LISTEN": "127.0.0.1:1"}).specs()["a"].spec_hash
        == first.spec_hash
    )
    template.write_text("two")
    assert load(file).specs()["a"].spec_hash != first.spec_hash
    document = first.agent_config
    assert document["api"] == ["http://127.0.0.1:9670"]
    assert document["probes"][0] == {
        "kind": "tcp",
        "port": 1,
        "interval_s": 5.0,
        "timeout_s": 2.0,
        "misses": 3,
    }
    template.unlink()
    with pytest.raises(UserError, match="No such file"):
        load(file).specs()


def test_limits_are_finite_and_follow_settings() -> None:
    """Settings become Limits in seconds."""
    limits = load(None, {"NOMAD_WATCHDOG_RETRY_MAX": "2m", "NOMAD_WATCHDOG_RESYNC": "5s"}).limits()
    assert (limits.backoff_max_s, limits.resync_s) == (120.0, 5.0)
    assert math.isfinite(limits.report_stale_s)


def test_docs_name_every_setting_and_no_other() -> None:
    """docs/configuration.md has a row for each setting of the schema, and no others."""
    wanted: set[str] = set()
    for name, field in Settings.model_fields.items():
        block = model_of(field.annotation)
        wanted |= {f"{name}.{inner}" for inner in block.model_fields} if block else {name}
    assert {f"agent_class.{name}" for name in AgentClassSettings.model_fields} <= wanted
    wanted |= {f"on.{name}" for name in BackendOverrides.model_fields}
    wanted |= {f"step.{name}" for name in RolloutStepSettings.model_fields}
    wanted |= {f"analysis.{name}" for name in AnalysisSettings.model_fields}
    wanted |= {f"probe.{name}" for name in ProbeSettings.model_fields}
    wanted |= {f"metric.{name}" for name in MetricSettings.model_fields}
    wanted |= {f"gateway.{name}" for name in GatewaySettings.model_fields}
    wanted |= {f"repair.{name}" for name in RepairSettings.model_fields}
    wanted |= {f"escalate.{name}" for name in EscalationSettings.model_fields}
    wanted |= {f"sink.{name}" for name in SinkSettings.model_fields}
    wanted |= {f"loki.{name}" for name in LokiSettings.model_fields}
    wanted |= {f"signal.{name}" for name in SignalSettings.model_fields}
    wanted |= {f"token.{name}" for name in TokenSettings.model_fields}
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z_.]+)` \|", text, re.MULTILINE)) == wanted


def test_the_example_of_roll_outs_is_valid(tmp_path: Path) -> None:
    """The HCL examples of docs/rollouts.md pass the check, each block on one line, and the steps are complete."""
    text = (DOCS / "rollouts.md").read_text(encoding="utf-8")
    examples = re.findall(r"```hcl\n(.*?)```", text, re.DOTALL)
    found = [load(write(tmp_path, one)).strategies()["default"] for one in examples]
    strategy, queried, deferred = found
    assert queried.analysis is not None
    assert deferred.defers_upgrades
    assert [one.soak_s for one in strategy.steps] == [600.0, 1800.0, 0.0, 0.0]
    assert [one.by for one in strategy.steps] == ["", "", "", "site"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("step { count = 0 }", "rollout > step[0] > count"),
        ("step {\n count = 1\n fraction = 0.5\n }", "give count or fraction, not both"),
        ("step {\n pause = true\n count = 1\n }", "has no devices"),
        ('step "x" { count = 1 }', "write  step { ... }"),
        ('step = "x"', "expected a list of a block"),
        ("step { fraction = 0 }", "rollout > step[0] > fraction"),
        ('allow = ["Mo 9-16"]', "'Mo 9-16' is not a weekly time"),
        ('on_abort = "stop"', "rollout > on_abort"),
        ('upgrades = "never"', "rollout > upgrades"),
        ('analysis {\n query = "q"\n max = 1\n }', "rollout > analysis > url"),
        (
            'analysis {\n url = "http://p?x=1"\n query = "q"\n max = 1\n }',
            "rollout > analysis > url",
        ),
        ('analysis {\n url = "http://p"\n query = " "\n max = 1\n }', "analysis > query"),
        ('analysis {\n url = "http://p"\n query = "q"\n }', "analysis needs min or max"),
        ('analysis {\n url = "http://p"\n query = "q"\n max = 1\n }', "analysis needs steps"),
        (
            'analysis {\n url = "http://p"\n query = "q"\n min = 2\n max = 1\n }',
            "min (2) is more than max (1)",
        ),
        (
            'analysis {\n url = "http://p"\n query = "q"\n max = 1\n interval = "1s"\n }',
            "timeout (5s) must not be longer than interval (1s)",
        ),
        ("step {\n selector = 5\n }", "rollout > step[0] > selector"),
    ],
)
def test_what_is_no_roll_out(tmp_path: Path, text: str, why: str) -> None:
    """Each is refused with its place in the file."""
    with pytest.raises(UserError, match=re.escape(why)):
        load(write(tmp_path, f"rollout {{\n {text}\n}}\n"))


def test_a_query_judges_the_roll_outs_of_all_classes(tmp_path: Path) -> None:
    """The limits that are not given are open."""
    text = """
    rollout {
      step { count = 1 }
      analysis {
        url   = "http://127.0.0.1:9090"
        query = "sum(rate(errors_total[5m]))"
        max   = 0.05
      }
    }
    """
    (strategy,) = load(write(tmp_path, text)).strategies().values()
    assert strategy.analysis is not None
    assert (strategy.analysis.minimum, strategy.analysis.maximum) == (-math.inf, 0.05)
    assert strategy.analysis.query == "sum(rate(errors_total[5m]))"


def test_an_upgrade_waits_in_classes_without_a_version_of_their_own(tmp_path: Path) -> None:
    """Such a class has at least one step, with the soak of the fleet; a class with a version is rolled out as before."""
    text = """
    rollout {
      upgrades = "wait"
      soak     = "5m"
    }
    agent_class "own" {
      version = "1"
      PROBE
    }
    agent_class "default" {
      PROBE
    }
    agent_class "steps" {
      PROBE
      rollout {
        upgrades = "wait"
        step { count = 1 }
      }
    }
    agent_class "now" {
      PROBE
      rollout {}
    }
    """.replace("PROBE", 'probe "tcp" { port = 80 }')
    found = load(write(tmp_path, text)).strategies()
    assert {name for name, one in found.items() if one.defers_upgrades} == {"default", "steps"}
    assert [step.soak_s for step in found["default"].steps] == [300.0]
    assert len(found["steps"].steps) == 2
    assert not found["own"].steps


def test_the_example_of_the_docs_is_valid(tmp_path: Path) -> None:
    """The HCL example of docs/configuration.md passes the check."""
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```hcl\n(.*?)```", text, re.DOTALL)
    assert list(load(write(tmp_path, example)).agent_class) == ["gateway"]
