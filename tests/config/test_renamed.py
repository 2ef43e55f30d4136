"""Settings under their old names: they still work, and each is reported."""

import json
from pathlib import Path

import click.testing
import pytest

from nomad_watchdog.cli.main import cli
from nomad_watchdog.config.load import load
from nomad_watchdog.config.renamed import RENAMED
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.reload import warn_of_old_names
from nomad_watchdog.errors import UserError

ENV = {"HOME": "/nowhere"}
OLD = """\
presence {
  grace        = "1m"
  report_stale = "50s"
}
breaker {
  min      = 7
  fraction = 0.5
}
"""
WARNINGS = (
    "presence.report_stale (line 3) is deprecated; use agents.report_stale",
    "breaker.min (line 6) is deprecated; use mass_change.min",
    "breaker.fraction (line 7) is deprecated; use mass_change.fraction",
)


def written(folder: Path, text: str) -> Path:
    file = folder / "old.hcl"
    file.write_text(text)
    return file


def test_old_names_set_the_new_settings(tmp_path: Path) -> None:
    """A file with old names gives the same settings as one with new names, and a warning per setting with its line."""
    settings = load(written(tmp_path, OLD), ENV)
    assert settings.deprecated == WARNINGS
    new = OLD.replace("breaker", "mass_change").replace(
        '  report_stale = "50s"\n}', '}\nagents { report_stale = "50s" }'
    )
    wanted = load(written(tmp_path, new), ENV)
    assert wanted.deprecated == ()
    assert settings.model_dump() == wanted.model_dump()
    assert (wanted.agents.report_stale, wanted.mass_change.min) == (50.0, 7)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_every_new_name_exists_and_every_old_one_does_not(
    old: tuple[str, str], new: tuple[str, str]
) -> None:
    """The table of renamed settings maps names that the schema lacks to names that it has."""
    settings = Settings(data_dir="/nowhere")
    assert hasattr(getattr(settings, new[0]), new[1])
    assert not hasattr(getattr(settings, old[0], None), old[1])


def test_an_old_variable_works_and_the_new_one_takes_precedence() -> None:
    """Environment variables have old names too."""
    old = {"NOMAD_WATCHDOG_BREAKER_MIN": "7"}
    settings = load(None, ENV | old)
    assert settings.mass_change.min == 7
    assert settings.deprecated == (
        "environment NOMAD_WATCHDOG_BREAKER_MIN is deprecated; use NOMAD_WATCHDOG_MASS_CHANGE_MIN",
    )
    assert load(None, ENV | old | {"NOMAD_WATCHDOG_MASS_CHANGE_MIN": "8"}).mass_change.min == 8


def test_the_environment_overrides_an_old_name_in_the_file(tmp_path: Path) -> None:
    """The order of precedence does not depend on the spelling."""
    file = written(tmp_path, "breaker { min = 7 }\n")
    env = ENV | {"NOMAD_WATCHDOG_MASS_CHANGE_MIN": "8"}
    assert load(file, env).mass_change.min == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'agents { report_stale = "1m" }\npresence { report_stale = "2m" }\n',
            ":2: presence > report_stale: given twice; this is the old name of agents.report_stale (line 1)",
        ),
        ("breaker {\n  min = -1\n}\n", ":2: mass_change > min: found -1; expected"),
        ("breaker {\n  max = 1\n}\n", ":1: breaker: no such setting"),
        ('agents = 1\nbreaker { min = 1 }\npresence { start_max = "1m" }\n', ":1: agents: "),
    ],
)
def test_mistakes_in_old_names_are_reported_with_their_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    """A wrong value under an old name, and a setting under both names, are errors with a line."""
    with pytest.raises(UserError) as error:
        load(written(tmp_path, text), ENV)
    assert expected in str(error.value)


def test_config_check_and_doctor_report_old_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`config check` warns and succeeds; `doctor` has a warning with the new name as its fix."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, OLD + 'api { listen = "127.0.0.1:1" }\n')
    runner = click.testing.CliRunner()
    checked = runner.invoke(cli, ["--config", str(file), "config", "check"])
    assert (checked.exit_code, checked.stderr.splitlines()) == (
        0,
        [f"warning: {one}" for one in WARNINGS],
    )
    examined = runner.invoke(cli, ["--config", str(file), "doctor", "-o", "json"])
    found = [one for one in json.loads(examined.stdout)["checks"] if one["name"] == "config"]
    assert [(one["status"], one["found"], one["fix"]) for one in found[1:]] == [
        ("warn", *one.split("; ")) for one in WARNINGS
    ]


def test_the_service_logs_old_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log has a warning per setting with an old name, at start and at each reload."""
    warn_of_old_names(load(written(tmp_path, OLD), ENV))
    assert [(one.levelname, one.__dict__["reason"]) for one in caplog.records] == [
        ("WARNING", warning) for warning in WARNINGS
    ]
