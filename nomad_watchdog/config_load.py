"""Flags over environment over file over defaults, and one message for all that is wrong."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path as FilePath
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from nomad_watchdog import schedulers
from nomad_watchdog.config import ENVIRONMENT, FILE_NAME, PREFIX, Settings, template_text
from nomad_watchdog.config_hcl import KINDS, NAMED, Document, Path, Problem, read, show
from nomad_watchdog.errors import UserError

MAX_SHOWN: Final = 50


def load(
    path: str | FilePath | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    templates: bool = False,
) -> Settings:
    """Read, merge and check. `overrides`: dotted setting → value, from flags. None = empty.
    `templates`: also that the files of the classes' templates can be read.

    Raises one UserError that names every problem of the file."""
    env, overrides = env or {}, overrides or {}
    file = find_file(path, env)
    source = str(file) if file else "built-in defaults"
    document = _read_file(file) if file else Document()
    origins = _merge_env(document.data, env) | _merge_flags(document.data, overrides)
    if "data_dir" not in document.data:
        document.data["data_dir"] = _state_dir(env)
    problems = list(document.problems)
    settings = None
    try:
        settings = Settings.model_validate(document.data)
    except ValidationError as error:
        known = {(problem.path, problem.line) for problem in problems}
        found = (_problem(dict(item), document) for item in error.errors(include_url=False))
        problems += [problem for problem in found if (problem.path, problem.line) not in known]
    wrong = {problem.path for problem in problems}
    sound = settings or _sound_part(document.data)
    for paths, text in _misfits(sound, templates=templates) if sound else ():
        # What was left out has its default there, and would be compared in vain.
        if not any(_overlap(path, bad) for path in paths for bad in wrong):
            problems.append(Problem(paths[0], text, document.line_of(paths[0])))
    if problems or settings is None:
        raise UserError(_message(problems, source, origins, document))
    return settings


def _misfits(settings: Settings, *, templates: bool) -> Iterator[tuple[tuple[Path, ...], str]]:
    """What no single setting shows: (the settings concerned, first the one to change; message)."""
    backends = sorted({point.name for point in entry_points(group=schedulers.GROUP)})
    if settings.backend not in backends:
        yield (("backend",),), f"{show(settings.backend)} is not installed; installed: {backends}"
    yield from _class_misfits(settings, backends, templates=templates)
    yield from _pool_misfits(settings, templates=templates)
    least, most = settings.presence.startup_grace_min, settings.presence.startup_grace_max
    if least > most:
        yield (
            (("presence", "startup_grace_min"), ("presence", "startup_grace_max")),
            f"{least:g}s is longer than presence.startup_grace_max ({most:g}s)",
        )
    if settings.retry.initial > settings.retry.max:
        yield (
            (("retry", "initial"), ("retry", "max")),
            f"{settings.retry.initial:g}s is longer than retry.max ({settings.retry.max:g}s)",
        )
    for setting, text in settings.api.misfits():
        yield (("api", setting), ("api",)), text
    for side in ("nomad", "consul"):
        block = getattr(settings, side)
        if (block.client_cert is None) != (block.client_key is None):
            paths = ((side, "client_cert"), (side, "client_key"))
            yield paths, "client_cert and client_key go together"
    if settings.consul.agent_client_key and not settings.consul.agent_client_cert:
        yield (("consul", "agent_client_key"),), "agent_client_key needs agent_client_cert"


def _class_misfits(
    settings: Settings, backends: Sequence[str], *, templates: bool
) -> Iterator[tuple[tuple[Path, ...], str]]:
    for name, kind in settings.agent_class.items():
        where: Path = ("agent_class", name)
        if not kind.probe:
            yield ((*where, "probe"),), 'has no probe; add  probe "tcp" { port = 80 }'
        stale, start = settings.presence.report_stale, settings.presence.startup_grace
        if stale < 2 * kind.beat:
            yield (
                (("presence", "report_stale"), (*where, "beat")),
                f"{stale:g}s is less than two beats of class {name}; at least {2 * kind.beat:g}s",
            )
        if kind.kill_timeout > start:
            yield (
                ((*where, "kill_timeout"), ("presence", "startup_grace")),
                f"{kind.kill_timeout:g}s is longer than presence.startup_grace ({start:g}s)",
            )
        if not settings.agent_consul and (text := kind.needs_consul()):
            yield ((*where, "escalate"), ("consul", "agent_address")), text
        for backend in kind.on.keys() - set(backends):
            text = f"{show(backend)} is not installed; installed: {backends}"
            yield ((*where, "on"),), text
        if templates:
            at: dict[Path, str] = {(*where, "template"): kind.template}
            at |= {(*where, "on", b, "template"): one.template for b, one in kind.on.items()}
            for path, template in at.items():
                try:
                    template_text(template)
                except UserError as error:
                    yield (path,), str(error)


def _pool_misfits(settings: Settings, *, templates: bool) -> Iterator[tuple[tuple[Path, ...], str]]:
    for name, pool in settings.agent_pool.items():
        where: Path = ("agent_pool", name)
        for setting, text in pool.misfits(settings.backend):
            yield ((*where, setting), ("backend",)), text
        if templates and pool.template:
            try:
                template_text(pool.template)
            except UserError as error:
                yield ((*where, "template"),), str(error)


def _overlap(one: Path, other: Path) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _sound_part(data: Mapping[str, Any]) -> Settings | None:
    """The settings without those that are wrong by themselves, so that the rest can be compared in
    the same run; None when nothing sensible is left."""
    rest = copy.deepcopy(dict(data))
    for _ in range(8):  # each round drops at least one step of a path, and no path is longer
        try:
            return Settings.model_validate(rest)
        except ValidationError as error:
            places = {tuple(s for s in item["loc"] if s != "[key]") for item in error.errors()}
        for place in sorted(places, key=str, reverse=True):  # of a list the last one first
            _drop(rest, place)
    return None


def _drop(data: Any, place: Path) -> None:
    """Take out the setting at this place, or the block around it when it is what is missing."""
    holders = [data]
    for step in place[:-1]:
        holders.append(_step(holders[-1], step))
    for holder, step in zip(reversed(holders), reversed(place), strict=True):
        if isinstance(holder, dict) and step in holder:
            del holder[str(step)]
            return
        if isinstance(holder, list) and isinstance(step, int) and step < len(holder):
            del holder[step]
            return


def find_file(path: str | FilePath | None, env: Mapping[str, str]) -> FilePath | None:
    """The file that will be read, or None for the built-in defaults."""
    named = path or env.get(f"{PREFIX}CONFIG")
    if named:
        return FilePath(named)
    here = FilePath(FILE_NAME)
    return here if here.is_file() else None


def variables() -> dict[str, tuple[str, ...]]:
    """Environment variable → setting, later ones over earlier ones."""
    ours: dict[str, tuple[str, ...]] = {}
    for name, field in Settings.model_fields.items():
        block = _model_of(field.annotation)
        if name in NAMED:
            continue
        if block is None:
            ours[f"{PREFIX}{name.upper()}"] = (name,)
            continue
        for setting in block.model_fields.keys() - NAMED:
            ours[f"{PREFIX}{name.upper()}_{setting.upper()}"] = (name, setting)
    return dict(ENVIRONMENT) | ours


def _read_file(file: FilePath) -> Document:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or 'cannot be read'}") from error
    return read(text, str(file))


def _merge_env(data: dict[str, Any], env: Mapping[str, str]) -> dict[Path, str]:
    origins: dict[Path, str] = {}
    for variable, where in variables().items():
        if env.get(variable):
            value = env[variable]
            if variable == "CONSUL_HTTP_ADDR" and "://" not in value:
                secure = env.get("CONSUL_HTTP_SSL", "").lower() in ("1", "true")
                value = f"{'https' if secure else 'http'}://{value}"
            _put(data, where, value)
            origins[where] = f"environment {variable}"
    return origins


def _merge_flags(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[Path, str]:
    origins: dict[Path, str] = {}
    for dotted, value in overrides.items():
        if value is not None:
            where = tuple(dotted.split("."))
            _put(data, where, value)
            origins[where] = f"flag --{where[-1].replace('_', '-')}"
    return origins


def _put(data: dict[str, Any], where: tuple[str, ...], value: object) -> None:
    *blocks, name = where
    for block in blocks:
        inner = data.setdefault(block, {})
        if not isinstance(inner, dict):
            return  # the file has something else there; pydantic will say so
        data = inner
    data[name] = value


def _state_dir(env: Mapping[str, str]) -> str:
    try:
        state = env.get("XDG_STATE_HOME") or f"{env.get('HOME') or FilePath.home()}/.local/state"
    except RuntimeError:  # a user that no passwd file knows, as in a container
        raise UserError(
            "set data_dir (NOMAD_WATCHDOG_DATA_DIR): this user has no home folder"
        ) from None
    return str(FilePath(state) / "nomad-watchdog")


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_of(inner) for inner in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _block_at(path: Path) -> type[BaseModel]:
    """The block that holds the last step of path; Settings when that can't be told."""
    model: type[BaseModel] = Settings
    for step in path[:-1]:
        field = model.model_fields.get(str(step))
        inner = _model_of(field.annotation) if field else None
        model = inner or model
    return model


def _problem(item: dict[str, Any], document: Document) -> Problem:
    path: Path = tuple(step for step in item["loc"] if step != "[key]")
    # A union adds the name of the branch that failed ("constrained-str"): no setting has such a name.
    line, kind, message = document.line_of(path), item["type"], item["msg"]
    if kind == "extra_forbidden":
        allowed = [name for name in _block_at(path).model_fields if name != "kind"]
        close = difflib.get_close_matches(str(path[-1]), allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        message = f"no such setting; {hint}allowed here: {', '.join(allowed)}"
    elif kind == "value_error":
        message = str(item["ctx"]["error"])
    elif kind == "missing":
        message = "is missing"
    else:
        message = f"found {show(item.get('input'))}: {message[:1].lower()}{message[1:]}"
        expected = str(item.get("ctx", {}).get("expected", ""))
        close = difflib.get_close_matches(str(item.get("input")), expected.split("'"), n=1)
        if close:
            message += f"; did you mean {close[0]}?"
    return Problem(path, message, line)


def _where(path: Path, document: Document) -> str:
    """``agent_class "default" > probe "tcp" > port``."""
    words: list[str] = []
    value: Any = document.data
    for number, step in enumerate(path):
        before = path[number - 1] if number else None
        value = _step(value, step)
        if isinstance(step, int):
            kind = value.get("kind") if isinstance(value, dict) else step
            words[-1] += f" {show(kind)}" if before in KINDS else f"[{step}]"
        elif before in NAMED:
            words[-1] += f" {show(step)}"
        else:
            words.append(show(step)[1:-1])
    return " > ".join(words)


def _step(value: Any, step: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(str(step))
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


def _message(
    problems: Iterable[Problem], source: str, origins: Mapping[Path, str], document: Document
) -> str:
    lines: dict[str, None] = {}
    for problem in sorted(problems, key=lambda problem: problem.line):
        place = origins.get(problem.path)
        if place is None:
            place = f"{source}:{problem.line}" if problem.line else source
        where = _where(problem.path, document)
        lines[
            f"{place}: {where}: {problem.message}" if where else f"{place}: {problem.message}"
        ] = None
    shown = list(lines)[:MAX_SHOWN]
    if len(lines) > MAX_SHOWN:
        shown.append(f"... and {len(lines) - MAX_SHOWN} more")
    return "\n".join(shown)
