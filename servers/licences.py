"""`python -m servers.licences`: fails if a program built from servers/ contains code that is not open source.

Reads what is compiled in, as `go list -deps` reports it for the same package and build tags as the
build: every licence file beside a compiled package and in the directories above it, up to the
module's root, and the first lines of every compiled file, which may name another licence.
Only the text of a known open-source licence passes. Licences that publish the source but restrict its
use fail, and so does the AGPL. Go's standard library is not checked. A program that passed is checked
again when its go.mod, go.sum, build tags, the Go toolchain, or this file changes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from nomad_watchdog.demo.process import cache_folder
from nomad_watchdog.errors import TerminalError, WatchdogError
from servers.binaries import SERVERS, TOOLS, Tool, find_go, go_environment

_FILE: Final = re.compile(
    r"(?:[\w.]+[-_])?(?:(?:un)?licen[cs]es?|copying|eula)(?:[-_.].*)?", re.IGNORECASE
)
_SOURCE: Final = {".go", ".c", ".h", ".s", ".py", ".sh", ".js", ".ts"}
"""Source code about licences, such as license.go."""
_HEADER_BYTES: Final = 2000
_PACKAGE: Final = re.compile(rb"^package ", re.MULTILINE)

# Patterns for text in lower case with single blanks.
_OPEN: Final = {
    "Apache-2.0": r"apache license,? version 2\.0|apache-2\.0",
    "BSD": r"redistribution and use in source and binary forms|bsd-[23]-clause",
    "BSL-1.0": r"boost software license|bsl-1\.0",
    "CC-BY": r"creative commons attribution(?:-sharealike)? [34]\.0|cc-by(?:-sa)?-[34]\.0",
    "CC0-1.0": r"cc0[- ]1\.0",
    "CDDL": r"common development and distribution license|cddl-1\.[01]",
    "EPL": r"eclipse public license|epl-[12]\.0",
    "GPL": r"gnu general public license|\bgpl-[23]\.0",
    "ISC": r"permission to use, copy, modify,? and(?:/or)? distribute this software|\bisc license",
    "LGPL": r"gnu (?:lesser|library) general public license|lgpl-[23]\.[01]",
    "MIT": r"permission is hereby granted, free of charge, to any person obtaining a copy|\bmit license",
    "MPL-2.0": r"mozilla public license,? (?:v\. ?|version )2\.0|mpl-2\.0",
    "Unicode": r"unicode, inc\. license agreement|unicode license v3|unicode-3\.0",
    "Unlicense": r"free and unencumbered software released into the public domain",
    "Zlib": r"provided 'as-is', without any express or implied warranty",
}
_CLOSED: Final = {
    "the Business Source License": r"business source license|busl-1\.1",
    "the Server Side Public License": r"server side public license|sspl-1\.0",
    "the GNU Affero General Public License": r"affero|\bagpl",
    "the Commons Clause": r"commons clause",
    "the Elastic License": r"elastic license|elastic-2\.0",
    "the Confluent Community License": r"confluent community license",
    "a PolyForm licence": r"polyform",
    "the Functional Source License": r"functional source license|\bfsl-1\.[01]",
    "the JSON licence": r"shall be used for good, not evil",
    "a source-available licence": r"source available licen[cs]e|source-available"
    r"|fair (?:source|core) license|sustainable use license|timescale license",
    "a licence for non-commercial use": r"attribution-noncommercial|cc-by-nc|prosperity public license"
    r"|non-?commercial (?:use|purposes?) only|only for non-?commercial (?:use|purposes?)",
    "a proprietary licence": r"proprietary and confidential|confidential and proprietary",
}
_ANY_CLOSED: Final = re.compile("|".join(_CLOSED.values()))
# Where open-source licences name other licences that do not apply to the code.
_MENTIONS: Final = re.compile(
    # MPL 2.0, 1.12
    r"means either the gnu general public license, .{0,200}?those licenses"
    # GPL 3, section 13
    r"|13\. use with the gnu affero general public license\..{0,900}?will apply to the combination as such"
)

_NOMAD: Final = (
    "its header says BUSL-1.1, but the LICENSE of this release is MPL 2.0 for all of it, and the "
    "maintainers state that 1.6.2 and 1.6.3 are under MPL 2.0 (hashicorp/nomad, pull request 19203)"
)
# A module version has fixed content, pinned by go.sum, so an entry applies to exactly what was reviewed.
_REVIEWED: Final = {
    ("github.com/tj/go-spin@v1.1.0", ""): "no licence file; Readme.md ends with: License MIT",
    ("github.com/hashicorp/nomad@v1.6.3", "helper/backoff.go"): _NOMAD,
    ("github.com/hashicorp/nomad@v1.6.3", "testutil/mock_calls.go"): _NOMAD,
    ("github.com/hashicorp/nomad@v1.6.3", "client/pluginmanager/csimanager/testing.go"): _NOMAD,
}
"""Exceptions: module and file (empty = it has no licence file), and why the code is open source."""


class Fault(NamedTuple):
    """A problem with one file of a module, or with a module that has no licence file."""

    module: str
    """``path@version``; without a version for a module in a local directory."""
    file: str
    """Relative to the module's root; empty if no licence file was found."""
    problem: str


@dataclass(frozen=True, slots=True)
class Module:
    """A module with packages that are compiled in."""

    name: str
    """``path@version`` of the code; without a version for a module in a local directory."""
    root: Path
    files: frozenset[Path]
    """Compiled and embedded files."""

    def fault(self, file: Path, problem: str) -> Fault:
        return Fault(self.name, str(file.relative_to(self.root)), problem)

    @property
    def folders(self) -> frozenset[Path]:
        """Directories that may contain a licence for one of the files."""
        return frozenset(
            folder
            for parent in {file.parent for file in self.files}
            for folder in (parent, *parent.parents)
            if folder.is_relative_to(self.root)
        )


class Report(NamedTuple):
    """The result for one program."""

    line: str
    """Number of modules, and of those with a file under each licence."""
    faults: list[Fault]


def modules_of(name: str, tool: Tool, source: Path, go: Path) -> list[Module]:
    """The modules with code compiled into the program, without the standard library.

    Downloads missing modules; progress goes to stderr. Raises TerminalError if Go cannot list them.
    """
    fields = "Dir,Module,GoFiles,CgoFiles,CFiles,CXXFiles,HFiles,SFiles,SysoFiles,EmbedFiles"
    tags = ["-tags", tool.tags] if tool.tags else []
    argv = [str(go), "list", "-deps", f"-json={fields}", *tags, tool.package]
    modules: dict[tuple[str, Path], set[Path]] = {}
    for package in _objects(_listed(argv, name, source)):
        if (module := package.pop("Module", None)) is None:
            continue  # the standard library
        code = module.get("Replace", module)
        version = code.get("Version")
        key = (f"{code['Path']}@{version}" if version else module["Path"], Path(code["Dir"]))
        folder = Path(package.pop("Dir"))
        modules.setdefault(key, set()).update(
            folder / file for files in package.values() for file in files
        )
    return [Module(module, root, frozenset(files)) for (module, root), files in modules.items()]


def _listed(argv: list[str], name: str, source: Path) -> str:
    downloads = 0
    complaints = []
    with (
        tempfile.TemporaryFile("w+") as out,
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            cwd=source,
            env=go_environment(),
        ) as child,
    ):
        assert child.stderr is not None
        for line in child.stderr:
            if not line.startswith("go: downloading "):
                complaints.append(line)
                continue
            if downloads % 50 == 0:
                so_far = f", {downloads} so far" if downloads else " (up to a minute)"
                click.echo(f"{name}: downloading the sources of Go modules{so_far}", err=True)
            downloads += 1
        if child.wait() != 0:
            raise TerminalError(
                f"{name}: Go cannot list what servers/{source.name} builds; fix its go.mod or the "
                f"network and run this again:\n{''.join(complaints[-20:])}"
            )
        out.seek(0)
        return out.read()


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    at = 0
    while (at := text.find("{", at)) >= 0:
        found, at = decoder.raw_decode(text, at)
        yield found


def inspect(name: str, modules: list[Module]) -> Report:
    """Read the licences of a program's modules."""
    count: Counter[str] = Counter()
    faults: list[Fault] = []
    for module in modules:
        count.update(sorted(_read(module, faults)))
    left = sorted(fault for fault in faults if (fault.module, fault.file) not in _REVIEWED)
    line = f"{name}: {len(modules)} modules; " + ", ".join(
        f"{n} {c}" for n, c in count.most_common()
    )
    if reviewed := len(faults) - len(left):
        line += f"; reviewed exceptions: {reviewed}"
    return Report(line, left)


def _read(module: Module, faults: list[Fault]) -> set[str]:
    """The names of the module's open-source licences; adds problems to `faults`."""
    names: set[str] = set()
    reported: set[str] = set()
    licences = {file: _text(file) for folder in module.folders for file in _licence_files(folder)}
    if not licences:
        faults.append(Fault(module.name, "", "no licence file"))
    for file, text in licences.items():
        permitted, closed = _permitted(text), _forbidden(text)
        faults += [module.fault(file, f"{licence} is not open source") for licence in closed]
        if not permitted | closed:
            faults.append(module.fault(file, "not a licence known to this check"))
        names |= permitted
        reported |= closed
    for file in module.files:
        # Thousands of headers may repeat the text of the licence file: report it once.
        closed = _forbidden(_header(file)) - reported
        faults += [module.fault(file, f"{licence} is not open source") for licence in closed]
    return names


@functools.cache
def _licence_files(folder: Path) -> tuple[Path, ...]:
    found = []
    for entry in folder.iterdir():
        if _FILE.fullmatch(entry.name) and entry.suffix.lower() not in _SOURCE and entry.is_file():
            found.append(entry)
        elif entry.name.upper() in {"LICENSES", "LICENCES"} and entry.is_dir():
            # The REUSE specification stores licences here, for example as LICENSES/MIT.txt.
            found += [f for f in entry.iterdir() if f.suffix == ".txt" or _FILE.fullmatch(f.name)]
    return tuple(found)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


@functools.cache
def _text(file: Path) -> str:
    return _plain(file.read_text(errors="replace"))


@functools.cache
def _header(file: Path) -> str:
    """The text before Go's package clause, or the start of any other file."""
    with file.open("rb") as start:
        head = _PACKAGE.split(start.read(_HEADER_BYTES), 1)[0]
    return _plain(head.decode(errors="replace"))


@functools.cache
def _permitted(text: str) -> set[str]:
    text = _MENTIONS.sub("", text)
    return {name for name, pattern in _OPEN.items() if re.search(pattern, text)}


@functools.cache
def _forbidden(text: str) -> set[str]:
    text = _MENTIONS.sub("", text)
    if not _ANY_CLOSED.search(text):
        return set()  # one search instead of a dozen for each of 30,000 headers
    return {name for name, pattern in _CLOSED.items() if re.search(pattern, text)}


def check(name: str, tool: Tool, source: Path, go: Path) -> Report:
    """List and read the modules of one program, or return the result from the cache.

    `source` is the directory of its go.mod. Raises TerminalError if Go cannot list the modules.
    """
    kept = cache_folder() / "licences" / name
    key = _key(tool, source, go)
    if kept.is_file() and (lines := kept.read_text().splitlines())[0] == key:
        return Report(lines[1], [])
    modules = modules_of(name, tool, source, go)
    report = inspect(name, modules)
    # A module in a local directory can change while go.sum stays the same.
    if not report.faults and all("@" in module.name for module in modules):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(f"{key}\n{report.line}\n")
    return report


def _key(tool: Tool, source: Path, go: Path) -> str:
    settings = "GOVERSION", "GOOS", "GOARCH", "CGO_ENABLED", "GOFLAGS", "GOWORK", "GOEXPERIMENT"
    asked = subprocess.run(
        [str(go), "env", *settings],
        capture_output=True,
        cwd=source,
        env=go_environment(),
        check=False,
    )
    parts = [asked.stdout, f"{tool.package} {tool.tags}".encode(), Path(__file__).read_bytes()]
    parts += [
        (source / file).read_bytes() for file in ("go.mod", "go.sum") if (source / file).exists()
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(TOOLS)))
def main(names: tuple[str, ...]) -> None:
    """Check the licences of the code in NAMES, or in every program built from servers/."""
    failed = False
    try:
        folder = cache_folder() / "build"
        folder.mkdir(parents=True, exist_ok=True)
        go = find_go(folder)
        for name in names or TOOLS:
            tool = TOOLS[name]
            source = SERVERS / (tool.module or name)
            report = check(name, tool, source, go)
            click.echo(report.line)
            for fault in report.faults:
                failed = True
                where = f" {fault.file}" if fault.file else ""
                click.echo(f"error: {name}: {fault.module}{where}: {fault.problem}", err=True)
    except WatchdogError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    if failed:
        click.echo(
            "Every module compiled in must be under an open-source licence. Pin a release that is, in "
            "the go.mod of the program, or leave the package out with a build tag. Where the code is "
            "open source nevertheless, add it to _REVIEWED in servers/licences.py with the reason.",
            err=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
