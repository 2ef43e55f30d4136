"""Error messages for a configuration: the setting, its line, the value found and the value expected. Errors in
request bodies get the same messages (`in_body`).

The messages are derived from the types of the settings, so that users see no names from libraries or Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from types import UnionType
from typing import Annotated, Final, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import AwareDatetime, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from nomad_watchdog.config.hcl import KINDS, NAMED, HclDocument, Path, Problem
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.text_files import did_you_mean
from nomad_watchdog.units import parse_duration, parse_size, show

MAX_SHOWN: Final = 50
PATTERNS: Final[Mapping[str, str]] = {
    r"\S": "text that is not blank",
    r"^[a-z][a-z0-9-]{0,31}$": "a name of a-z, 0-9 and - that begins with a letter, at most 32 characters",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*$": (
        'a path such as "nomad-watchdog" or "team/watchdog", of letters, digits, ".", "_", "-" and "/"'
    ),
    r"^[a-z0-9]([a-z0-9-]{0,56}[a-z0-9])?$": "a name of a-z, 0-9 and -, at most 58 characters",
    r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$": 'a version such as "1.4.0", at most 64 characters',
    r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$": (
        'a name of a-z, 0-9, ".", "_" and "-", at most 63 characters'
    ),
    r"^[a-z][a-z0-9_-]{0,63}$": (
        'the name of a scheduler backend, of a-z, 0-9, "_" and "-", at most 64 characters'
    ),
    r"^[0-9a-f]{12}$": "the `held.id` of a plan: 12 hexadecimal digits",
    r"^[a-z][a-z ]*$": "lower-case letters and blanks, at most 32 characters",
}
"""Pattern of a setting → description of the valid values."""
DOTTED: Final = 'names and indexes with "." between them, such as "queues[name=jobs].depth"'
"""Description for the pattern of `metric.value`, which is built from parts."""


def in_words(item: ErrorDetails, document: HclDocument) -> Problem:
    """Convert a pydantic error to a problem of the file."""
    named = tuple(step for step in item["loc"] if step != "[key]")
    path, holder, wanted = _walk(named, Settings)
    line = document.line_of(path)
    if len(named) < len(item["loc"]) and item["type"] not in _PLAIN_KINDS:  # the name of a block
        pattern = str(item.get("ctx", {}).get("pattern", ""))
        expected = PATTERNS.get(pattern, "another name")
        return Problem(path, f"found {show(item.get('input'))}; expected {expected}", line)
    found = item.get("input") if path == named else _value_at(document.data, path)
    return Problem(path, _message(item, path, holder, wanted, found, "setting"), line)


def in_body(item: ErrorDetails, model: type[BaseModel]) -> tuple[Path, str]:
    """Convert a pydantic error about a request body of type `model` to a path and a message."""
    if item["type"] == "json_invalid":
        return (), f"it is not valid JSON: {item['ctx']['error']}"
    path, holder, wanted = _walk(tuple(item["loc"]), model)
    return path, _message(item, path, holder, wanted, item.get("input"), "field")


_PLAIN_KINDS: Final = ("value_error", "missing", "extra_forbidden")
"""Errors whose message does not need the value."""


def _message(  # the parts of one error
    item: ErrorDetails,
    path: Path,
    holder: type[BaseModel],
    wanted: object,
    found: object,
    noun: str,
) -> str:
    kind = item["type"]
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        fields = holder.model_fields.items()
        allowed = [one.alias or name for name, one in fields if name != "kind"]
        hint = did_you_mean(str(path[-1]), allowed)
        return f"no such {noun}; {hint}allowed here: {', '.join(allowed)}"
    choices = [str(one) for one in _choices(wanted)]
    hint = did_you_mean(str(found), choices) if isinstance(found, str) else ""
    return f"found {show(found)}; {hint}expected {_expected(wanted)}"


def model_of(annotation: object) -> type[BaseModel] | None:
    """The block that is the type of a setting, or is contained in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (model_of(inner) for inner in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _walk(path: Path, root: type[BaseModel]) -> tuple[Path, type[BaseModel], object]:
    """The part of a path that names settings, the block that contains its end, and the type expected there. pydantic
    appends the failed branch of a union, which is not the name of a setting."""
    holder: type[BaseModel] = root
    here: object = root
    for size, step in enumerate(path):
        inner = _inside(here, step)
        if isinstance(inner, FieldInfo):
            block = _plain(here)
            assert block is not None
            holder = block
            here = Annotated[inner.annotation, inner] if inner.annotation else inner
        elif inner is not None:
            here = inner
        elif (block := _plain(here)) is None:
            return path[:size], holder, here
        else:
            return path[: size + 1], block, None  # no such setting
    return path, holder, here


def _inside(here: object, step: str | int) -> object:
    """The type of `step` within a value of type `here`; None = no such step."""
    for one in _branches(here):
        if _is_model(one):
            for name, field in one.model_fields.items():
                if step == (field.alias or name):
                    return field
        elif get_origin(one) is dict and isinstance(step, str):
            return get_args(one)[1]
        elif get_origin(one) in (tuple, list) and isinstance(step, int):
            return get_args(one)[0]
    return None


def _plain(here: object) -> type[BaseModel] | None:
    return next((one for one in _branches(here) if _is_model(one)), None)


def _is_model(one: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(one, type) and issubclass(one, BaseModel)


def _branches(here: object) -> Iterator[object]:
    """The types that a value may have, without annotations and without None."""
    origin = get_origin(here)
    if origin is Annotated:
        yield from _branches(get_args(here)[0])
    elif origin in (Union, UnionType):
        for one in get_args(here):
            yield from _branches(one)
    elif here is not type(None):
        yield here


def _choices(wanted: object) -> list[object]:
    return [one for b in _branches(wanted) if get_origin(b) is Literal for one in get_args(b)]


def _expected(wanted: object) -> str:
    """Description of the valid values of this type."""
    origin = get_origin(wanted)
    if origin in (Union, UnionType):
        parts = [_expected(one) for one in get_args(wanted) if one is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin is Annotated:
        inner, *notes = get_args(wanted)
        found = dict(_rules(notes))
        if get_origin(inner) in (Union, UnionType, Annotated) and not found:
            return _expected(inner)
        return _with_rules(inner, found)
    return _with_rules(wanted, {})


def _rules(notes: Iterable[object]) -> Iterator[tuple[str, object]]:
    for note in notes:
        if isinstance(note, FieldInfo):
            yield from _rules(note.metadata)
        if isinstance(note, BeforeValidator):
            yield "reader", note.func
        for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern"):
            if (value := getattr(note, name, None)) is not None:
                yield name, value


def _with_rules(wanted: object, rules: Mapping[str, object]) -> str:
    if pattern := rules.get("pattern"):
        return PATTERNS.get(str(pattern), DOTTED)
    if rules.get("reader") is parse_duration:
        return f'a duration such as "10s" or "5m"{_bounds(rules, "s")}'
    if rules.get("reader") is parse_size:
        return 'a size such as "64Mi"'
    if get_origin(wanted) is not None:
        return _with_arguments(wanted, rules)
    if _is_model(wanted):
        return "a block { ... }"
    if wanted is AwareDatetime:
        return 'a time with its zone, such as "2026-01-31T05:00:00Z"'
    names: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number"}
    if wanted is str:
        return "text between double quotes" + _length(rules, "characters")
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return f"one of {', '.join(show(str(one.value)) for one in wanted)}"
    return names.get(wanted, "another value") + _bounds(rules, "")


def _with_arguments(wanted: object, rules: Mapping[str, object]) -> str:
    """Description of the valid values of a type with arguments, such as Literal, tuple or dict."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        choices = ", ".join(show(one) for one in arguments)
        return choices if len(arguments) == 1 else f"one of {choices}"
    if origin in (tuple, list):
        return f"a list of {_expected(arguments[0])}{_length(rules, 'elements')}"
    if origin is dict:
        what = "blocks" if model_of(wanted) else 'a map such as { name = "value" }'
        return what + _length(rules, "entries")
    return _expected(wanted) if origin in (Union, UnionType, Annotated) else "another value"


def _bounds(rules: Mapping[str, object], unit: str) -> str:
    low, high = rules.get("ge"), rules.get("le")
    if isinstance(low, int | float) and isinstance(high, int | float):
        return (
            f" from {low:g}{unit} to {high:g}{unit}" if high < 10**6 else f" from {low} to {high}"
        )
    parts = [
        f"{words} {value:g}{unit}"
        for name, words in (("gt", "greater than"), ("ge", "at least"), ("le", "at most"))
        if (value := rules.get(name)) is not None
    ]
    return f", {' and '.join(parts)}" if parts else ""


def _length(rules: Mapping[str, object], unit: str) -> str:
    low, high = rules.get("min_length"), rules.get("max_length")
    if low and high:
        return f", {low} to {high} {unit}"
    return f", at most {high} {unit}" if high else ""


def where(path: Path, document: HclDocument) -> str:
    """``agent_class "default" > probe "tcp" > port``."""
    words: list[str] = []
    value: object = document.data
    for number, step in enumerate(path):
        before = path[number - 1] if number else None
        value = step_into(value, step)
        if isinstance(step, int):
            kind = value.get("kind") if isinstance(value, dict) else step
            words[-1] += f" {show(kind)}" if before in KINDS else f"[{step}]"
        elif before in NAMED and number == 1 + _last_named(path, number):
            words[-1] += f" {show(step)}"
        else:
            words.append(show(step)[1:-1])
    return " > ".join(words)


def _last_named(path: Path, number: int) -> int:
    """Position of the block whose label is the step at `number`; -1 = that step is not a label.

    A label may equal the name of a block type: `agent_class "on"`."""
    is_label = False
    for place in range(number):
        is_label = not is_label and path[place] in NAMED
    return number - 1 if is_label else -1


def step_into(value: object, step: str | int) -> object:
    """The value at a step in a document; None = no such value."""
    if isinstance(value, dict):
        return value.get(str(step))
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


def _value_at(data: object, path: Path) -> object:
    for step in path:
        data = step_into(data, step)
    return data


def message(
    problems: Iterable[Problem], source: str, origins: Mapping[Path, str], document: HclDocument
) -> str:
    """One line per problem, in the order of the file: ``FILE:LINE: SETTING: what is wrong``."""
    lines: dict[str, None] = {}
    for problem in sorted(problems, key=lambda problem: problem.line):
        place = origins.get(problem.path)
        if place is None:
            place = f"{source}:{problem.line}" if problem.line else source
        setting = where(problem.path, document)
        text = f"{setting}: {problem.message}" if setting else problem.message
        lines[f"{place}: {text}"] = None
    shown = list(lines)[:MAX_SHOWN]
    if len(lines) > MAX_SHOWN:
        shown.append(f"... and {len(lines) - MAX_SHOWN} more")
    return "\n".join(shown)
