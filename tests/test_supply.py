"""What is installed and shipped: exact versions with hashes, a base image by digest, and the bill of materials."""

from __future__ import annotations

import http.server
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from packaging.requirements import Requirement

from tests.attacks.table import Attack

LOCKS = ("build", "dev", "go", "run", "uv")
MACHINES = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0", "sys_platform": system}
    for minor in (11, 12, 13, 14)
    for system in ("linux", "darwin")
]


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    """.ci/sbom.py"""
    file = Path(__file__).parents[1] / ".ci" / "sbom.py"
    spec = importlib.util.spec_from_file_location("sbom", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["sbom"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unsatisfied(sbom: ModuleType, lock: Path, wanted: list[str]) -> list[str]:
    """The requirements that the lock does not satisfy on one of the platforms."""
    packages = list(sbom.locked(lock))
    problems = []
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        for machine in MACHINES:
            if requirement.marker is not None and not requirement.marker.evaluate(machine):
                continue
            found = [
                one.version
                for one in packages
                if one.name == name
                and (not one.marker or Requirement(f"x;{one.marker}").marker.evaluate(machine))
            ]
            if len(found) != 1 or found[0] not in requirement.specifier:
                problems.append(f"{requirement}: {found} (make lock)")
    return problems


def test_the_locks_satisfy_pyproject(sbom: ModuleType, repository: Path) -> None:
    """Every package in pyproject.toml is in its lock, in one version that pyproject.toml allows, for each Python from
    3.11 on; the development lock has all packages of the runtime lock in the same versions."""
    told = tomllib.loads((repository / "pyproject.toml").read_text())
    project, folder = told["project"], repository / ".ci" / "lock"
    development = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert unsatisfied(sbom, folder / "run.txt", project["dependencies"]) == []
    assert unsatisfied(sbom, folder / "dev.txt", development) == []
    assert unsatisfied(sbom, folder / "build.txt", told["build-system"]["requires"]) == []
    run, dev = (
        {(one.name, one.version, one.marker) for one in sbom.locked(folder / f"{name}.txt")}
        for name in ("run", "dev")
    )
    assert run <= dev


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("click>=8,<9", "clock==8.5 \\\n    --hash=sha256:" + "0" * 64),
        ("click>=9", "click==8.5 \\\n    --hash=sha256:" + "0" * 64),
        ("click", "click==8.5 ; python_full_version < '3.13' \\\n    --hash=sha256:" + "0" * 64),
        ("click", "click==8.5"),
        ("click", "click>=8.5 \\\n    --hash=sha256:" + "0" * 64),
        ("click", "click==8.5 \\\n    --hash=md5:" + "0" * 32),
        ("click", "--index-url x\nclick==8.5 \\\n    --hash=sha256:" + "0" * 64),
        ("click", "click @ git+ssh://x/y"),
    ],
)
def test_a_lock_that_is_behind_or_not_exact_is_found(
    sbom: ModuleType, tmp_path: Path, wanted: str, text: str
) -> None:
    """A missing package, another version, a marker that excludes a Python version, and a line without an exact version
    and a SHA-256 are each detected."""
    lock = tmp_path / "lock.txt"
    lock.write_text(text + "\n")
    try:
        problems = unsatisfied(sbom, lock, [wanted])
    except ValueError as error:
        problems = [str(error)]

    assert problems


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_server(sbom: ModuleType, repository: Path, name: str) -> None:
    """Each entry is an exact version with hashes, and no line names an index or another address."""
    lock = repository / ".ci" / "lock" / f"{name}.txt"

    assert list(sbom.locked(lock))
    assert "://" not in lock.read_text()
    assert "index" not in lock.read_text()


class Index(http.server.BaseHTTPRequestHandler):
    """A package index that offers any requested package, with its own file."""

    served: ClassVar[list[str]]

    def do_GET(self) -> None:
        if self.path.startswith("/simple/"):
            name = self.path.strip("/").rpartition("/")[2]
            files = [f"{name}-{version}-py3-none-any.whl" for version in ("0.6", "0.13.9", "99")]
            body = "".join(f'<a href="/files/{file}">{file}</a>' for file in files).encode()
            kind = "text/html"
        else:
            self.served.append(self.path)
            name, version = self.path.rpartition("/")[2].split("-")[:2]
            package = io.BytesIO()
            with zipfile.ZipFile(package, "w") as wheel:
                info = f"{name}-{version}.dist-info"
                wheel.writestr(f"{name}.py", "raise SystemExit('foreign code ran')\n")
                wheel.writestr(
                    f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                )
                wheel.writestr(
                    f"{info}/WHEEL",
                    "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                )
                wheel.writestr(f"{info}/RECORD", "")
            body, kind = package.getvalue(), "application/octet-stream"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hostile_index() -> Iterator[http.server.ThreadingHTTPServer]:
    class Mine(Index):
        served: ClassVar[list[str]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.attack(
    "D1", "a package index that serves another file under a locked version, at set-up"
)
def test_a_file_without_a_known_hash_is_not_installed(
    repository: Path,
    tmp_path: Path,
    hostile_index: http.server.ThreadingHTTPServer,
    attack: Attack,
) -> None:
    """The real set-up downloads the file and rejects it; nothing is installed."""
    target, tools = tmp_path / "installed", tmp_path / "tools"
    tools.mkdir()
    (tmp_path / ".ci").symlink_to(repository / ".ci")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for name in ("sh", "dirname"):
        (tools / name).symlink_to(
            f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}"
        )
    script = tmp_path / "setup"
    script.write_text((repository / ".ci" / "setup").read_text().replace("/..", ""))
    script.chmod(0o755)
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))
    }
    env |= {
        "PATH": str(tools), "no_proxy": "*", "PIP_TARGET": str(target), "PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://127.0.0.1:{hostile_index.server_port}/simple/",
    }  # fmt: skip
    done = subprocess.run(
        [script, "run"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    served = hostile_index.RequestHandlerClass.served  # type: ignore[attr-defined]
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr, done.stderr
    assert served
    assert not target.exists()
    attack.tried = len(served)
    attack.result = f"{len(served)} such files served, 0 installed; the set-up ends with status {done.returncode}"


def test_the_images_stand_on_one_digest(repository: Path) -> None:
    """Both Dockerfiles use the same base, by its digest, and install nothing without hashes."""
    texts = [(repository / name).read_text() for name in ("jobs/Dockerfile", "agent/Dockerfile")]
    bases = [re.findall(r"^(?:ARG BASE=|FROM )(\S+)", text, re.MULTILINE) for text in texts]
    (base,) = {name for names in bases for name in names if name != "${BASE}"}

    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim@sha256:[0-9a-f]{64}", base)
    installs = re.findall(r"pip install(.*?)(?:&&|\n\n)", texts[0], re.DOTALL)
    assert len(installs) == 3
    assert all("--require-hashes" in one or "--no-index --no-deps" in one for one in installs)


def test_the_bill_of_materials_lists_what_is_shipped(repository: Path, sbom: ModuleType) -> None:
    """`make sbom` gives the same bytes twice and from another folder. It has each package of the runtime lock with
    version and hashes, and the base image, and dependencies lead from this project to each of them."""
    runs = [
        subprocess.run(
            [sys.executable, repository / ".ci" / "sbom.py"],
            cwd=folder, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True,
        ).stdout
        for folder, seed in ((repository, "1"), (Path("/"), "2"))
    ]  # fmt: skip
    assert runs[0] == runs[1]
    told: dict[str, Any] = json.loads(runs[0])
    assert (told["bomFormat"], told["specVersion"]) == ("CycloneDX", "1.6")
    listed = {(one["name"], one["version"]) for one in told["components"]}
    lock = list(sbom.locked(repository / ".ci" / "lock" / "run.txt"))
    image, *packages = told["components"]
    assert listed == {(one.name, one.version) for one in lock} | {(image["name"], image["version"])}
    assert image["hashes"][0]["content"] in (repository / "jobs" / "Dockerfile").read_text()
    assert all(one["hashes"] and one["purl"].startswith("pkg:pypi/") for one in packages)
    needs = {one["ref"]: one["dependsOn"] for one in told["dependencies"]}
    reached: set[str] = set()
    ahead = [told["metadata"]["component"]["bom-ref"]]
    while ahead:
        ref = ahead.pop()
        if ref not in reached:
            reached.add(ref)
            ahead += needs[ref]
    assert reached == {one["bom-ref"] for one in told["components"]} | {
        told["metadata"]["component"]["bom-ref"]
    }
