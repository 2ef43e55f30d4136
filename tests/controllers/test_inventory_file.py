"""Parsing an inventory file: its devices, or all of its errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.controllers.inventory_file import ChangingError, read, signature
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, Slug
from nomad_watchdog.model import Device

HCL = """\
# cameras
device "cam 1" {
  address = "10.0.0.7"
  class   = "gateway"
  ttl     = "90s"
  labels  = { site = "north" }
}
device "cam 2" {
  address = "10.0.0.8"
}
"""
CSV = """\
id,label.site,address,class,ttl
cam 1,north,10.0.0.7,gateway,90s
"cam 2",,10.0.0.8,,
"""
DEVICES = [
    Device(DeviceId("cam 1"), "gateway", "10.0.0.7", {"site": "north"}, 90.0),
    Device(DeviceId("cam 2"), "default", "10.0.0.8"),
]
OBJECTS = [
    {
        "id": "cam 1",
        "address": "10.0.0.7",
        "class": "gateway",
        "ttl": "90s",
        "labels": {"site": "north"},
    },
    {"id": "cam 2", "address": "10.0.0.8"},
]


def load(path: Path, text: str) -> dict[Slug, Device]:
    path.write_text(text)
    return read(path, signature(path))


def wrong(path: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, text)
    assert str(caught.value).replace("\n", "").isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.hcl", HCL),
        ("a.json", "\n".join(map(json.dumps, OBJECTS)) + "\n\n"),
        ("a.json", json.dumps(OBJECTS, indent=1)),
        ("a.json", json.dumps(OBJECTS).replace("[", " [ ", 1)),
        ("a.csv", CSV),
        ("A.CSV", CSV.replace("\n", "\r\n") + "\r\n"),
    ],
)
def test_all_forms_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    """HCL blocks, one object per line, an array, and CSV list the same devices."""
    assert list(load(tmp_path / name, text).values()) == DEVICES


def test_all_mistakes_of_a_file_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    """Unknown settings, wrong values, duplicates and expressions, each with its line."""
    text = """\
device "a" { address = "10.0.0.1" }
device "b" { adress = "10.0.0.1" }
device "c" { address = "10.0.0.1", }
"""
    assert ":3:" in wrong(tmp_path / "a.hcl", text)
    text = """\
device "a" { address = "10.0.0.1" }
device "b" { adress = "10.0.0.1" }
gadget "c" { address = "10.0.0.1" }
device "d" { address = var.x }
device "a" { address = "10.0.0.2" }
device "e" {
  address = "10.0.0.3"
  ttl     = "1 minute"
}
device { address = "10.0.0.4" }
"""
    said = wrong(tmp_path / "a.hcl", text)
    for line in (2, 3, 4, 5, 6, 10):
        assert f"line {line}:" in said, said
    lines = ['{"id": "a", "address": "h"}', "{", '{"id": "a", "address": "h"}', '{"id": ""}', "[]"]
    said = wrong(tmp_path / "a.json", "\n".join(lines))
    for line in (2, 3, 4, 5):
        assert f"line {line}:" in said, said
    text = (
        '[\n{"id": "a", "address": "h"}, {"id": "b"},\n\n  {"id": "a",\n"address": "h"}, 7, [[8]]]'
    )
    said = wrong(tmp_path / "a.json", text)
    assert [line.split(": ")[1] for line in said.split("\n")] == [
        "line 2",
        "line 4",
        "line 5",
        "line 5",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "id,adress\na,h\n",
            'line 1: no such column: "adress"; did you mean address? columns: id, ',
        ),
        (
            "id,class\na,b\n",
            "line 1: the first line must name the columns, at least id and address",
        ),
        ("id,address,id\na,h,a\n", "line 1: a column is named twice"),
        ("id,address\na,h\n\nb\n", "line 4: 1 cells, but 2 columns"),
        ('id,address\n"a\nb",h\n"a\nb",h\n', "line 4: id: device id "),
        ('id,address\na,"h\n', "line 2: not CSV: "),
        ("id,address,ttl\na,h,soon\n", "line 2: ttl: "),
        ("id,address,label.\na,h,x\n", "line 2: labels"),
    ],
)
def test_mistakes_in_csv_are_named_with_their_lines(tmp_path: Path, text: str, words: str) -> None:
    """Unknown, missing and repeated columns, short lines, open quotes and wrong values."""
    assert words in wrong(tmp_path / "a.csv", text)


@pytest.mark.parametrize("name", ["a.hcl", "a.json", "a.csv"])
@pytest.mark.parametrize("text", ["", "\n", "id,address\n", "# nothing\n", "[]"])
def test_a_file_that_lists_nobody_is_not_believed(tmp_path: Path, name: str, text: str) -> None:
    """An empty file is rejected, because it may be incomplete."""
    assert wrong(tmp_path / name, text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["hcl", "json", "csv"]))
def test_any_text_is_read_or_refused(text: str, kind: str) -> None:
    """No file content causes an error other than our own."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind}"
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        try:
            assert read(path, signature(path))
        except UserError as error:
            assert str(error)


def test_another_file_than_was_looked_at_is_not_read(tmp_path: Path) -> None:
    """A rename over the file, a swapped link and a longer file between check and read are detected."""
    one, two, link = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "link.json"
    for path in (one, two):
        path.write_text(json.dumps(OBJECTS))
    link.symlink_to(one)
    seen = signature(link)
    other = tmp_path / "other"
    other.symlink_to(two)
    other.replace(link)
    with pytest.raises(ChangingError):
        read(link, seen)
    seen = signature(one)
    with one.open("a") as file:
        file.write(" ")
    with pytest.raises(ChangingError):
        read(one, seen)
    seen = signature(one)
    two.replace(one)
    with pytest.raises(ChangingError):
        read(one, seen)
    assert len(read(one, signature(one))) == 2


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """A folder, a pipe and a missing file are each named as such."""
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path, tmp_path / "pipe.json", tmp_path / "none.json"):
        with pytest.raises(UserError):
            signature(path)
