"""The block `relief`: its defaults, its checks, and the rules that it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad_watchdog.config.load import load
from nomad_watchdog.core.host_load import PressureThresholds
from nomad_watchdog.core.relief import ReliefRules
from nomad_watchdog.daemon.reload import applicable
from nomad_watchdog.errors import UserError
from nomad_watchdog.host_pressure import Resource

BLOCK = """
relief {
  signal "memory" {
    high = 0.2
    low  = 0.05
  }
  MORE
}
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "nomad-watchdog.hcl"
    file.write_text(f'data_dir = "{tmp_path}"\n{text}')
    return file


def test_relief_is_off_without_the_block_and_a_dry_run_with_it(tmp_path: Path) -> None:
    """Without the block there are no rules; with thresholds only, everything else has its default and nothing moves."""
    off = load(written(tmp_path, ""))
    assert off.relief_rules() is None
    on = load(written(tmp_path, BLOCK.replace("MORE", "")))
    assert on.relief_rules() == ReliefRules({Resource.MEMORY: PressureThresholds(20.0, 5.0)})
    rules = on.relief_rules()
    assert rules is not None
    assert rules.dry_run
    assert applicable(off, on).relief_rules() == rules, "a reload applies it"


def test_all_settings_reach_the_rules(tmp_path: Path) -> None:
    """Each setting is a rule; several resources have their own thresholds."""
    more = """
      signal "io" {
        high = 1
        low  = 0
      }
      looks = 5
      stale = "2m"
      per_host = 2
      at_once = 3
      min_age = "1h"
      cooldown = "90s"
      dry_run = false
      signal "cpu" {
        high       = 0.5
        low        = 0.1
        usage_high = 0.9
        usage_low  = 0.6
      }
    """
    rules = load(written(tmp_path, BLOCK.replace("MORE", more))).relief_rules()
    limits = {
        Resource.MEMORY: PressureThresholds(20.0, 5.0),
        Resource.IO: PressureThresholds(100.0, 0.0),
        Resource.CPU: PressureThresholds(50.0, 10.0),
    }
    usage = {Resource.CPU: PressureThresholds(90.0, 60.0)}
    assert rules == ReliefRules(limits, 5, 120.0, 2, 3, 3600.0, 90.0, dry_run=False, usage=usage)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("relief {}", "signal"),
        (BLOCK.replace("0.05", "0.2").replace("MORE", ""), "low must be less than high"),
        (BLOCK.replace("memory", "disk").replace("MORE", ""), "disk"),
        (BLOCK.replace("MORE", 'signal "memory" {\nhigh = 0.5\nlow = 0.1\n}'), "same kind"),
        (BLOCK.replace("MORE", "").replace("0.05", "0\n usage_low = 0.1"), "set together"),
        (
            BLOCK.replace("MORE", "").replace("0.05", "0\n usage_low = 0.9\n usage_high = 0.9"),
            "usage_low must be less",
        ),
        (
            BLOCK.replace("MORE", "")
            .replace("memory", "io")
            .replace("0.05", "0\n usage_low = 0\n usage_high = 1"),
            "no statistics of io",
        ),
        (BLOCK.replace("MORE", "at_once = 0"), "at_once"),
        (BLOCK.replace("MORE", 'cooldown = "1s"'), "cooldown"),
    ],
)
def test_a_wrong_block_is_rejected(tmp_path: Path, text: str, why: str) -> None:
    """A block without thresholds, with thresholds in the wrong order, of an unknown resource, given twice, or with a
    value out of range is rejected, and the error names it."""
    with pytest.raises(UserError, match=why):
        load(written(tmp_path, text))
