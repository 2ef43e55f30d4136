"""Validation of a pool's settings: messages name the place and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad_watchdog.config.load import load
from nomad_watchdog.errors import UserError

GOOD = """
agent_pool "encoder" {
  command = ["/bin/worker"]
  max     = 9
  metric "queue" {
    url    = "http://127.0.0.1:8222/jsz?streams=true"
    value  = "streams[name=jobs].state.messages"
    target = 5
  }
}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "w.hcl"
    file.write_text(text)
    return file


def test_a_pool_is_read_with_its_defaults(tmp_path: Path) -> None:
    """Settings that are omitted have the defaults of the docs."""
    pool = load(write(tmp_path, GOOD)).agent_pool["encoder"]

    assert (pool.min, pool.max, pool.scaler, pool.dry_run) == (1, 9, "builtin", False)
    assert (pool.rules().cooldown_down_s, pool.rules().step_up) == (120.0, 4)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max     = 9", "", 'w.hcl:2: agent_pool "encoder" > max: is missing'),
        ("max     = 9", "max = 9\n min = 10", "min (10) is more than max (9)"),
        ("max     = 9", "max = 9\n maxx = 3", "no such setting; did you mean max?"),
        ('metric "queue"', 'metric "quu"', "did you mean queue?"),
        ("target = 5", "target = 0", "greater than 0"),
        ("target = 5", "", 'metric "queue" > target: is missing'),
        ("value  =", "query =", "queue knows no query"),
        ('value  = "streams[name=jobs].state.messages"', "", "queue needs value"),
        ("[name=jobs]", "[", 'such as "queues[name=jobs].depth"'),
        ("http://127", "ftp://127", "is not an address; write http://HOST:PORT"),
        ('command = ["/bin/worker"]', "", "local starts  command ="),
        ("max     = 9", 'max = 9\n scaler = "external"', "local has no other scaler"),
        ("max     = 9", "max = 9\n min = 0\n tolerance = 1.5", "expected a number from 0 to 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    """Each error is reported with the file and helpful words."""
    assert old in GOOD
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, GOOD.replace(old, new)))

    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/w.hcl:")


def test_a_pool_without_a_metric_says_how_to_have_one(tmp_path: Path) -> None:
    """Only `scaler = "none"` works without a metric."""
    text = 'agent_pool "a" {\n command = ["x"]\n max = 2\n'
    with pytest.raises(UserError, match="needs a metric; add  metric"):
        load(write(tmp_path, text + "}"))

    assert load(write(tmp_path, text + ' scaler = "none"\n}')).agent_pool["a"].metric == ()


def test_an_average_of_nobody_is_refused(tmp_path: Path) -> None:
    """By CPU a pool can't grow again from 0 workers."""
    text = (
        'agent_pool "a" {\n command = ["x"]\n min = 0\n max = 2\n metric "cpu" { target = 70 }\n}'
    )
    with pytest.raises(UserError, match="min must be 1 or more"):
        load(write(tmp_path, text))


def test_nomad_autoscaler_reads_no_queue(tmp_path: Path) -> None:
    """A metric that the external scaler has no source for is rejected during validation."""
    text = 'backend = "nomad"\n' + GOOD.replace("max     = 9", 'max = 9\n scaler = "external"')
    with pytest.raises(UserError, match="can't read metric"):
        load(write(tmp_path, text))


@pytest.mark.parametrize("scaler", ["external", "none"])
def test_another_scaler_makes_no_dry_run(tmp_path: Path, scaler: str) -> None:
    """The user would mistake real scaling for a dry run."""
    text = (
        f'backend = "nomad"\nagent_pool "a" {{\n command = ["x"]\n max = 2\n scaler = "{scaler}"\n'
        ' dry_run = true\n metric "cpu" { target = 70 }\n}'
    )
    with pytest.raises(UserError, match='only scaler = "builtin" heeds'):
        load(write(tmp_path, text))


def test_the_example_of_the_docs_is_valid(tmp_path: Path, repository: Path) -> None:
    """The HCL example of docs/pools.md passes the check."""
    text = (repository / "docs" / "pools.md").read_text()
    example = text.split("```hcl\n")[1].split("```")[0]

    assert list(load(write(tmp_path, example)).agent_pool) == ["encoder"]


def test_the_docs_name_every_event_of_a_pool(repository: Path) -> None:
    """Each kind of event that the controller publishes is listed in docs/pools.md."""
    source = (repository / "nomad_watchdog" / "pools" / "controller.py").read_text()
    kinds = {word for word in source.split('"') if word.startswith("pool.")}
    text = (repository / "docs" / "pools.md").read_text()

    assert len(kinds) == 5
    assert all(f"| `{kind}` |" in text for kind in kinds)
