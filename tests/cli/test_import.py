"""`devices import`: its formats, what it would change, and what it removes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.cli._import_diff import compare
from nomad_watchdog.cli.main import _code
from nomad_watchdog.controllers.device_list import ListedDevice, parse


def listed(*items: Mapping[str, object]) -> list[ListedDevice]:
    return parse("\n".join(map(json.dumps, items)), "json", "-")


def test_a_comparison_names_each_difference() -> None:
    """Added, changed with both values, unchanged; removed only with `prune`, and never what an inventory lists."""
    registered: list[dict[str, object]] = [
        {"id": "same", "address": "h", "class": "default", "labels": {}, "ttl": None},
        {"id": "other", "address": "h", "class": "gate", "labels": {"k": "v"}, "ttl": "90s"},
        {"id": "gone", "address": "h", "class": "default"},
        {"id": "inventory", "address": "h", "class": "default", "source": "/etc/fleet.hcl"},
        {"id": "left", "address": "h", "class": "default", "presence": "absent"},
    ]
    wanted = listed(
        {"id": "same", "address": "h"},
        {"id": "other", "address": "i", "ttl": "2m"},
        {"id": "left", "address": "h"},
    )
    diff = compare(wanted, registered, prune=True)
    assert list(diff.lines()) == [
        "+ left",
        "~ other: address h -> i; class gate -> default; labels k=v -> none; ttl 90s -> 120s",
        "- gone",
        "1 to add, 1 to change, 1 to remove, 1 unchanged, 1 kept (inventory)",
    ]
    kept = compare(wanted, registered, prune=False)
    assert (kept.removed, kept.foreign) == ([], 0)


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), unique=True),
    st.sets(st.sampled_from(["b", "c", "d"])),
)
def test_what_was_imported_needs_no_import(wanted: Sequence[str], before: set[str]) -> None:
    """After the changes that a comparison names, it names none."""
    items = listed(*({"id": name, "address": "h"} for name in wanted))
    registered: list[dict[str, object]] = [{"id": name, "address": "i"} for name in before]
    diff = compare(items, registered, prune=True)
    assert {*diff.added, *diff.changed} == set(wanted)
    assert set(diff.removed) == before - set(wanted)
    after: list[dict[str, object]] = [
        {"id": one.device.id, "address": "h", "class": "default", "labels": {}} for one in items
    ]
    again = compare(items, after, prune=True)
    assert (again.added, again.changed, again.removed) == ([], {}, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.hcl", 'device "cam" { address = "10.0.0.7" }'),
        ("a.csv", "id,address,label.site\ncam,10.0.0.7,north\n"),
        ("a.json", '[\n{"id": "cam", "address": "10.0.0.7"}\n]'),
        ("a.ndjson", '{"id": "cam", "address": "10.0.0.7"}\n'),
    ],
)
@pytest.mark.usefixtures("served")
def test_each_format_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    """A dry run changes nothing; a second one after the import has nothing to do."""
    file = tmp_path / name
    file.write_text(text)
    assert _code(["devices", "import", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "+ cam",
        "1 to add, 0 to change, 0 to remove, 0 unchanged",
    ]
    assert _code(["devices", "get", "cam"]) == 66
    assert _code(["devices", "import", str(file)]) == 0
    capsys.readouterr()
    assert _code(["devices", "import", str(file), "--dry-run", "--prune"]) == 0
    assert capsys.readouterr().out == "0 to add, 0 to change, 0 to remove, 1 unchanged\n"


@pytest.mark.usefixtures("served")
def test_prune_asks_before_it_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal it is refused and nothing is sent; with --auto-approve what is not listed leaves."""
    for name in ("old", "cam"):
        assert _code(["devices", "add", name, "--address", "10.0.0.7"]) == 0
    file = tmp_path / "fleet.csv"
    file.write_text("id,address\ncam,10.0.0.8\nnew,10.0.0.9\n")
    capsys.readouterr()
    assert _code(["devices", "import", str(file), "--prune"]) == 64
    told = capsys.readouterr().err
    assert "- old" in told
    assert "--auto-approve" in told
    assert _code(["devices", "get", "new"]) == 66
    assert _code(["devices", "import", str(file), "--prune", "--auto-approve"]) == 0
    capsys.readouterr()
    assert _code(["devices", "ls", "-o", "json"]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    present = {one["id"]: one["address"] for one in items if one["presence"] == "present"}
    assert present == {"cam": "10.0.0.8", "new": "10.0.0.9"}


@pytest.mark.usefixtures("served")
def test_mistakes_are_named_and_nothing_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with `--format`."""
    file = tmp_path / "fleet.txt"
    file.write_text("id,address\ncam,10.0.0.8\nnew\n")
    assert _code(["devices", "import", str(file), "--format", "csv"]) == 64
    assert "line 3: 1 cells, but 2 columns" in capsys.readouterr().err
    assert _code(["devices", "get", "cam"]) == 66


@pytest.mark.usefixtures("served")
def test_an_incomplete_file_removes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither one without devices, nor one of which the service rejects a device."""
    assert _code(["devices", "add", "old", "--address", "10.0.0.7"]) == 0
    for name, text in (
        ("a.csv", ""),
        ("b.csv", "id,address\n"),
        ("c.json", "[]"),
        ("d.hcl", "# none\n"),
    ):
        file = tmp_path / name
        file.write_text(text)
        assert _code(["devices", "import", str(file), "--prune", "--auto-approve"]) == 64
        assert "lists no device" in capsys.readouterr().err
    file = tmp_path / "renamed.csv"
    file.write_text("id,address,class\nnew,10.0.0.7,defualt\ngood,10.0.0.8,\n")
    assert _code(["devices", "import", str(file), "--prune", "--auto-approve"]) == 64
    told = capsys.readouterr().err
    assert "1 device registered" in told
    assert "nothing was removed" in told
    assert _code(["devices", "get", "old"]) == 0
