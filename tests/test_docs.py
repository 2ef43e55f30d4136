"""The documents stay correct: what they name exists, and their examples are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from nomad_watchdog.cli.main import cli
from nomad_watchdog.config.load import load

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("agent/*.md")])


def blocks(language: str) -> list[str]:
    """Fenced blocks in README in one language."""
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link in a document names an existing file."""
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    broken = [
        link
        for link in links
        if not link.startswith(("http://", "https://")) and not (document.parent / link).exists()
    ]

    assert broken == []


def test_the_configuration_of_readme_is_accepted(tmp_path: Path) -> None:
    """Each HCL example in README passes the configuration check; the second is a class to add to the first."""
    whole, a_class = blocks("hcl")
    file = tmp_path / "nomad-watchdog.hcl"
    file.write_text(whole + a_class)

    assert list(load(file).agent_class) == ["gateway", "camera"]


def test_the_commands_of_readme_exist() -> None:
    """Every `make` target, command, option and file in README's shell blocks exists."""
    makefile = (ROOT / "Makefile").read_text()
    for line in "\n".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        match words:
            case ["make", target, *_]:
                assert f"\n{target}:" in makefile
            case ["nomad-watchdog", *rest]:
                _assert_parses(rest)
            case _:
                for word in words:
                    if (path := word.lstrip("@")).startswith("jobs/"):
                        assert (ROOT / path).exists(), path


def _assert_parses(words: list[str]) -> None:
    command: click.Command = cli
    while isinstance(command, click.Group):
        verb, *words = words
        found = command.get_command(click.Context(command), verb)
        assert found is not None, verb
        command = found
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_the_programs_that_readme_names_as_needed_are_those_that_are_checked() -> None:
    """README asks for the Python that pyproject.toml requires."""
    (wanted,) = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())

    assert f"Python {wanted} or newer" in (ROOT / "README.md").read_text()
