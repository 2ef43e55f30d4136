"""The licence check on tiny Go modules, which Go itself lists without any download."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nomad_watchdog.demo.process import cache_folder
from nomad_watchdog.errors import TerminalError
from servers import licences
from servers.binaries import Tool, find_go

MIT = (
    "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\n"
)
MPL = (
    "Mozilla Public License Version 2.0\n\n1.12. Secondary License means either the GNU General Public "
    "License, Version 2.0, the GNU Lesser General Public License, Version 2.1, the GNU Affero\n"
    "General Public License, Version 3.0, or any later versions of those licenses.\n"
)
BUSL = "Business Source License 1.1\n\nLicensor: Example, Inc.\n"
AGPL = "                    GNU AFFERO\n   GENERAL PUBLIC LICENSE\n Version 3, 19 November 2007\n"

Check = Callable[..., licences.Report]


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return find_go(tmp_path_factory.mktemp("go"))


@pytest.fixture
def check(tmp_path: Path, go: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """A check of a program that imports some packages of a module with these files."""
    monkeypatch.setenv("GOPROXY", "off")
    monkeypatch.setenv("GOFLAGS", "")
    monkeypatch.setenv("NOMAD_WATCHDOG_CACHE", str(tmp_path / "cache"))

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def run(files: dict[str, str], *, imports: str = "", tags: str = "") -> licences.Report:
        packages = [f"example.org/dep{package}" for package in imports.split(",")]
        write(
            {
                "server/go.mod": "module server\ngo 1.24\ntool example.org/prog\n"
                "require (\nexample.org/prog v0.0.0\nexample.org/dep v0.0.0\n)\n"
                "replace (\nexample.org/prog => ../prog\nexample.org/dep => ../dep\n)\n",
                "prog/go.mod": "module example.org/prog\ngo 1.24\nrequire example.org/dep v0.0.0\n",
                "prog/LICENSE": MPL,
                "prog/main.go": "package main\nimport (\n\t_ "
                + "\n\t_ ".join(f'"{package}"' for package in packages)
                + "\n)\nfunc main() {}\n",
                "dep/go.mod": "module example.org/dep\ngo 1.24\n",
                "dep/dep.go": 'package dep\nimport _ "fmt"\n',
            }
        )
        write({f"dep/{name}": text for name, text in files.items()})
        tool = Tool(minimum=(0,), minutes=1, tags=tags)
        licences._licence_files.cache_clear()
        licences._text.cache_clear()
        licences._header.cache_clear()
        return licences.check("prog", tool, tmp_path / "server", go)

    return run


def fault(file: str, problem: str) -> licences.Fault:
    return licences.Fault("example.org/dep", file, problem)


def test_open_source_passes(check: Check) -> None:
    """Open-source licences pass and are counted; the standard library and licences that the MPL mentions are not."""
    report = check({"LICENSE": MIT})
    assert report == ("prog: 2 modules; MIT 1, MPL-2.0 1", [])


@pytest.mark.parametrize(
    "name", ["LICENSE", "licence.md", "COPYING", "LICENSE-BSL.txt", "SERVER_LICENSE"]
)
def test_busl_in_the_root(check: Check, name: str) -> None:
    """The Business Source License in the module's root is an error, whatever the name of the file."""
    report = check({name: BUSL})
    assert report.faults == [fault(name, "the Business Source License is not open source")]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Server Side Public License\nVERSION 1, OCTOBER 16, 2018\n", "Server Side Public License"),
        (AGPL, "GNU Affero General Public License"),
        ('"Commons Clause" License Condition v1.0\n\n' + MIT, "Commons Clause"),
        ("Elastic License 2.0\n", "Elastic License"),
        ("Confluent Community License Agreement\nVersion 1.0\n", "Confluent Community License"),
        ("# PolyForm Noncommercial License 1.0.0\n", "PolyForm"),
        ("Redis Source Available License 2.0 (RSALv2)\n", "source-available"),
        (MIT + "The Software shall be used for Good, not Evil.\n", "JSON"),
        ("Creative Commons Attribution-NonCommercial 4.0 International\n", "non-commercial"),
        ("PROPRIETARY AND CONFIDENTIAL\n" + MIT, "proprietary"),
        (MIT + AGPL, "GNU Affero General Public License"),
    ],
)
def test_other_licences_that_are_not_open_source(check: Check, text: str, what: str) -> None:
    """Each licence that restricts use fails under its name, even beside an open-source one."""
    [found] = check({"LICENSE": text}).faults
    assert found.file == "LICENSE"
    assert what in found.problem


def test_licence_of_a_package(check: Check) -> None:
    """The AGPL in a subdirectory is an error only if the package below it is compiled in."""
    files = {
        "LICENSE": MIT,
        "extra/COPYING": AGPL,
        "extra/deep/deep.go": "package deep\n",
    }
    assert check(files).faults == []
    found = check(files, imports=",/extra/deep").faults
    assert found == [
        fault("extra/COPYING", "the GNU Affero General Public License is not open source")
    ]


def test_build_tag(check: Check) -> None:
    """A package excluded by a build tag is not checked; without the tag it is."""
    files = {
        "LICENSE": MIT,
        "extra.go": '//go:build !slim\n\npackage dep\nimport _ "example.org/dep/extra"\n',
        "extra/extra.go": "package extra\n",
        "extra/LICENSE": BUSL,
    }
    assert check(files, tags="slim").faults == []
    assert [found.file for found in check(files).faults] == ["extra/LICENSE"]


def test_no_licence_file(check: Check) -> None:
    """A module without a licence file is an error; Go sources named like licences are not licences."""
    report = check({"license.go": f"package dep\n\nconst text = `{MIT}`\n", "README.md": MIT})
    assert report.faults == [fault("", "no licence file")]


def test_unknown_licence(check: Check) -> None:
    """Text that is not a known licence is an error, even beside a known one."""
    files = {"LICENSE": MIT, "LICENSE.extra": "Copyright Example, Inc. All rights reserved.\n"}
    assert check(files).faults == [fault("LICENSE.extra", "not a licence known to this check")]


def test_header_of_a_compiled_file(check: Check) -> None:
    """A compiled file whose header names another licence is an error; its tests are not compiled."""
    header = "// Copyright Example\n// SPDX-License-Identifier: BUSL-1.1\n\n"
    files = {
        "LICENSE": MPL,
        "new.go": f"{header}package dep\n",
        "new_test.go": f"{header}package dep\n",
        "says.go": 'package dep\n\nconst says = "Business Source License"\n',
    }
    assert check(files).faults == [
        fault("new.go", "the Business Source License is not open source")
    ]


def test_headers_that_repeat_the_licence_file(check: Check) -> None:
    """Headers that repeat the licence file's licence add no lines; another licence in one does."""
    header = "// SPDX-License-Identifier: {}\npackage dep\n"
    files = {
        "LICENSE": BUSL,
        "a.go": header.format("BUSL-1.1"),
        "b.go": header.format("SSPL-1.0"),
    }
    assert [found.file for found in check(files).faults] == ["LICENSE", "b.go"]


def test_embedded_file(check: Check) -> None:
    """The licence beside files that are embedded in the program is checked, too."""
    files = {
        "LICENSE": MIT,
        "page.go": 'package dep\n\nimport _ "embed"\n\n//go:embed ui/dist/page.html\nvar Page string\n',
        "ui/dist/page.html": "<html>",
        "ui/LICENSE": AGPL,
    }
    assert [found.file for found in check(files).faults] == ["ui/LICENSE"]


def test_folder_is_not_cached(check: Check) -> None:
    """A module in a folder, which no go.sum pins, is read again each time."""
    assert check({"LICENSE": MIT}).faults == []
    assert check({"LICENSE": BUSL}).faults != []


def test_list_that_fails(check: Check) -> None:
    """If Go cannot list the packages, the error quotes Go."""
    with pytest.raises(TerminalError, match=r"example\.org/nowhere"):
        check({"LICENSE": MIT, "far.go": 'package dep\nimport _ "example.org/nowhere"\n'})


def test_command(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command names module, file and what to do, and exits with 1; when the problem is fixed it exits with 0."""
    check({"LICENSE": BUSL})
    monkeypatch.setattr(licences, "SERVERS", tmp_path)
    monkeypatch.setattr(licences, "TOOLS", {"prog": Tool((0,), 1, module="server")})
    licences._licence_files.cache_clear()
    licences._text.cache_clear()
    done = CliRunner().invoke(licences.main)
    assert done.exit_code == 1
    assert done.stdout.startswith("prog: 2 modules")
    assert "error: prog: example.org/dep LICENSE: the Business Source License" in done.stderr
    assert "go.mod" in done.stderr
    check({"LICENSE": MIT})
    assert CliRunner().invoke(licences.main).exit_code == 0


def test_cache(tmp_path: Path, go: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that passed is not listed again until its go.sum or its build tags change."""
    monkeypatch.setenv("NOMAD_WATCHDOG_CACHE", str(tmp_path))
    (tmp_path / "go.mod").write_text("module server\ngo 1.24\n")
    listed = []

    def modules_of(*_: object) -> list[licences.Module]:
        listed.append(1)
        return []

    monkeypatch.setattr(licences, "modules_of", modules_of)
    tool = Tool(minimum=(0,), minutes=1)
    first = licences.check("prog", tool, tmp_path, go)
    assert licences.check("prog", tool, tmp_path, go) == first
    assert len(listed) == 1
    (tmp_path / "go.sum").write_text("changed\n")
    licences.check("prog", tool, tmp_path, go)
    assert len(listed) == 2
    licences.check("prog", Tool(minimum=(0,), minutes=1, tags="slim"), tmp_path, go)
    assert len(listed) == 3
    assert list((cache_folder() / "licences").iterdir())
