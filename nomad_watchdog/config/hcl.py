"""Parses HCL text into plain values and their line numbers.

Nothing is evaluated. A value that needs evaluation (a reference, a function, an operator) is reported as a problem
with its line, never returned as a string.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import hcl2
from hcl2 import SerializationOptions
from hcl2.rules.base import AttributeRule, BlockRule, BodyRule
from hcl2.rules.expressions import ExprTermRule
from lark import Token, Tree
from lark.exceptions import LarkError, UnexpectedInput

from nomad_watchdog.config.syntax_problems import trouble
from nomad_watchdog.errors import UserError
from nomad_watchdog.units import show

Path = tuple[str | int, ...]
"""Location of a value, in pydantic's form: ("agent_class", "default", "probe", 0, "port")."""

NAMED: Final = frozenset({"agent_class", "agent_pool", "token", "device", "on"})
"""Blocks whose label is a name; they become a mapping."""
KINDS: Final = frozenset({"probe", "confirm", "repair", "sink", "metric", "signal"})
"""Blocks whose label is a kind; they become a list, in the order of the file."""
LISTED: Final = frozenset({"step"})
"""Blocks without a label that become a list, in the order of the file."""

MAX_BYTES: Final = 1024 * 1024
"""Maximum length of a file, in characters; the parser takes about 1 ms per line."""

_NUMBER: Final = re.compile(r"\$\{(-?\d{1,400}(?:\.\d{1,400})?(?:[eE][+-]?\d{1,4})?)\}", re.ASCII)
"""How python-hcl2 returns a number with an exponent."""
_PLAIN: Final = frozenset(
    {"string", "string_part", "int_lit", "float_lit", "literal_value", "tuple", "object"}
    | {"object_elem", "object_elem_key", "identifier", "expr_term", "unary_op", "keyword"}
    | {"new_line_or_comment", "new_line_and_or_comma"}
)


@dataclass(frozen=True, slots=True)
class Problem:
    path: Path
    message: str
    line: int = 0
    """0 = unknown (an environment variable, a default)."""


@dataclass(slots=True)
class HclDocument:
    """The contents of a file: plain values, their lines, and the problems found so far."""

    data: dict[str, object] = field(default_factory=dict)
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line_of(self, path: Path) -> int:
        """The line of the value, or of the nearest block around it; 0 = unknown."""
        for size in range(len(path), 0, -1):
            if path[:size] in self.lines:
                return self.lines[path[:size]]
        return 0


def read(text: str, source: str) -> HclDocument:
    """Parse a file. Raises UserError if it is too long or not HCL; other errors go to `HclDocument.problems`."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{source}: {len(text)} characters; at most {MAX_BYTES} are allowed")
    text = text.removeprefix("\ufeff")
    try:
        tree = hcl2.parses(text)
    except (LarkError, RuntimeError, RecursionError, ValueError) as error:
        raise UserError(_syntax_error(text, source, error)) from error
    document = HclDocument()
    document.data = _body(tree.body, (), document)
    return document


def _syntax_error(text: str, source: str, error: Exception) -> str:
    if found := trouble(text):
        return f"{source}:{found[0]}: syntax error: {found[1]}"
    if not isinstance(error, UnexpectedInput):
        return (
            f"{source}: syntax error: blocks or lists are nested too deeply, or a value is too long"
        )
    lines = text.splitlines() or [""]
    line = min(max(error.line, 1), len(lines))
    return (
        f"{source}:{line}: syntax error near {show(lines[line - 1].strip())} "
        f'(column {max(error.column, 1)}); a setting is  name = "value"  on one line, a block is  '
        "name { ... }"
    )


def _body(body: BodyRule, path: Path, document: HclDocument) -> dict[str, object]:
    data: dict[str, object] = {}
    for child in body.children:
        if not isinstance(child, AttributeRule | BlockRule):
            continue
        line = child.to_lark().meta.line
        if isinstance(child, AttributeRule):
            name = str(child.identifier.serialize())
            where = (*path, name)
            if name in data:
                first = document.line_of(where)
                message = f"given twice; the first is on line {first}"
                document.problems.append(Problem(where, message, line))
                continue
            document.lines[where] = line
            data[name] = _value(child.expression, where, line, document)
        else:
            _block(child, data, path, line, document)
    return data


def _block(
    block: BlockRule, data: dict[str, object], path: Path, line: int, document: HclDocument
) -> None:
    name, *labels = (str(label.serialize(_options())) for label in block.labels)
    wanted = 1 if name in NAMED | KINDS else 0
    where: Path = (*path, name)
    if (wanted or name in LISTED) and len(labels) != wanted:
        label = ' "NAME"' if wanted else ""
        message = f"has {len(labels)} labels; write  {name}{label} {{ ... }}"
        document.problems.append(Problem(where, message, line))
        return
    if name in KINDS | LISTED:
        blocks = data.setdefault(name, [])
        if not isinstance(blocks, list):
            message = f"given twice; the first is on line {document.line_of(where)}"
            document.problems.append(Problem(where, message, line))
            return
        where = (*where, len(blocks))
        document.lines[where] = line
        kind = {"kind": labels[0]} if name in KINDS else {}
        blocks.append({**kind, **_body(block.body, where, document)})
        return
    # An unexpected label becomes an unknown setting: pydantic reports what is allowed.
    holder, key = (data.setdefault(name, {}), labels[0]) if labels else (data, name)
    labels = labels[:1]
    document.lines.setdefault((*path, name), line)
    if not isinstance(holder, dict):
        return
    where = (*where, *labels)
    if key in holder:
        message = f"given twice; the first is on line {document.line_of(where)}"
        document.problems.append(Problem(where, message, line))
        return
    document.lines[where] = line
    holder[key] = _body(block.body, where, document)


def _value(expression: ExprTermRule, path: Path, line: int, document: HclDocument) -> object:
    odd = {name for name in _rules(expression.to_lark()) if name not in _PLAIN}
    if odd:
        what = "an expression"
        if "interpolation" in odd:
            what = 'an interpolation ("${...}")'
        elif any("heredoc" in name for name in odd):
            what = "a heredoc"
        message = (
            f'{what} is not evaluated here; write the value itself ("$${{" for a literal "${{")'
        )
        document.problems.append(Problem(path, message, line))
        return None
    try:
        value = _numbers(expression.serialize(_options()))
    except (ValueError, OverflowError):  # Python converts at most 4,300 digits
        document.problems.append(Problem(path, "is a number with too many digits", line))
        return None
    if isinstance(value, str) and value.startswith("${") and value.endswith("}"):
        # python-hcl2 returns a bare identifier in this form.
        message = f"{show(value[2:-1])} is not a plain value; put text between double quotes"
        document.problems.append(Problem(path, message, line))
        return None
    return _unescaped(value)


def _rules(tree: Tree[Token]) -> Iterator[str]:
    """Names of the grammar rules below a value; a bare identifier counts as a reference."""
    for subtree in tree.iter_subtrees():
        name = str(subtree.data)
        if name == "expr_term":
            kinds = [str(child.data) for child in subtree.children if hasattr(child, "data")]
            if "identifier" in kinds:
                yield "reference"
        yield name


def _numbers(value: object) -> object:
    if isinstance(value, str) and (found := _NUMBER.fullmatch(value)):
        return float(found[1])
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return value


def _unescaped(value: object) -> object:
    if isinstance(value, str):
        return value.replace("$${", "${").replace("%%{", "%{")
    if isinstance(value, list):
        return [_unescaped(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _unescaped(item) for key, item in value.items()}
    return value


def _options() -> SerializationOptions:
    return SerializationOptions(
        strip_string_quotes=True, with_comments=False, explicit_blocks=False
    )
