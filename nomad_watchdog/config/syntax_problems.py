"""Describes why a text is not HCL: the block that is not closed, with the line where it opens.

A parser notices a missing brace only at the end of the file. This module matches braces, brackets and quotes, and
uses indentation to find the block without a brace: the first one that is followed by a block that is not indented
further.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_CLOSES: Final = {"}": "{", "]": "[", ")": "("}
_HEREDOC: Final = re.compile(r"<<[-~]?([A-Za-z_][A-Za-z0-9_]*)\s*$")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_MAX_NAME: Final = 60


@dataclass(frozen=True, slots=True)
class _Open:
    bracket: str
    line: int
    indent: int
    what: str


@dataclass(frozen=True, slots=True)
class _Mark:
    """A bracket outside of strings and comments."""

    bracket: str
    line: int
    indent: int
    is_first: bool
    """No other text precedes it on its line."""
    before: str


def trouble(text: str) -> tuple[int, str] | None:
    """The line and the error message; None if brackets and quotes match."""
    marks: list[_Mark] = []
    if (quote := _marks(text, marks)) is not None:
        return quote, 'a text on this line has no closing "'
    stack: list[_Open] = []
    for mark in marks:
        if mark.bracket in "{[(":
            stack.append(_opened(mark))
        elif not stack:
            return mark.line, f'"{mark.bracket}" closes nothing: no block is open here'
        elif stack[-1].bracket != _CLOSES[mark.bracket]:
            return _unclosed(stack[-1])
        else:
            stack.pop()
    if not stack:
        return None
    return _unclosed(_by_indent(marks) or stack[-1])


def _unclosed(opened: _Open) -> tuple[int, str]:
    return opened.line, f"{opened.what} (line {opened.line}) is not closed"


def _by_indent(marks: list[_Mark]) -> _Open | None:
    """The first block that, judging by indentation, should have ended before what follows it."""
    stack: list[_Open] = []
    indented = any(mark.indent for mark in marks)
    for mark in marks:
        top = stack[-1] if stack else None
        if mark.bracket in "{[(":
            if indented and top and mark.line > top.line and mark.indent <= top.indent:
                return top
            stack.append(_opened(mark))
        elif top is not None:
            if mark.is_first and mark.line > top.line and mark.indent < top.indent:
                return top
            stack.pop()
    return None


def _opened(mark: _Mark) -> _Open:
    before = " ".join(mark.before.split())
    name = _NAME.match(before)
    shown = ascii(before[:_MAX_NAME])[1:-1]
    if name is None:
        what = f'"{mark.bracket}"'
    elif before.endswith(("=", ":")):
        what = f"the value of `{name[0]}`"
    elif mark.bracket == "{":
        what = f"block `{shown}`"
    else:
        what = f'"{mark.bracket}" after `{shown}`'
    return _Open(mark.bracket, mark.line, mark.indent, what)


def _marks(text: str, marks: list[_Mark]) -> int | None:
    """Collect the brackets in `marks`. Returns the line of an unterminated string; None = all are terminated."""
    is_comment, heredoc = False, ""
    for number, line in enumerate(text.split("\n"), 1):
        if heredoc:
            heredoc = "" if line.strip() == heredoc else heredoc
            continue
        indent = len(line) - len(line.lstrip())
        place, start = 0, 0
        while place < len(line):
            if is_comment:
                is_comment, place = _after_comment(line, place)
                continue
            character = line[place]
            if character == "#" or line.startswith("//", place):
                break
            if line.startswith("/*", place):
                is_comment, place = True, place + 2
                continue
            if character == '"':
                end = _end_of_text(line, place + 1)
                if end < 0:
                    return number
                place = end
                continue
            if character in "{[(}])":
                is_first = not line[:place].strip()
                marks.append(_Mark(character, number, indent, is_first, line[start:place]))
                start = place + 1
            place += 1
        if found := _HEREDOC.search(line):
            heredoc = found[1]
    return None


def _after_comment(line: str, place: int) -> tuple[bool, int]:
    """(whether the comment continues on the next line, the position after it)."""
    end = line.find("*/", place)
    return (True, len(line)) if end < 0 else (False, end + 2)


def _end_of_text(line: str, place: int) -> int:
    """The position after the closing quote; -1 = none on the line."""
    while place < len(line):
        if line[place] == "\\":
            place += 1
        elif line[place] == '"':
            return place + 1
        place += 1
    return -1
