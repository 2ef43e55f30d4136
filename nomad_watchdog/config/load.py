"""Loads the configuration. Flags override the environment, which overrides the file, which overrides the defaults.
All errors are reported together."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path as FilePath
from typing import Final

from pydantic import ValidationError

from nomad_watchdog import schedulers, secret_file_rules
from nomad_watchdog.clients import hashicorp_environment
from nomad_watchdog.config.blocks import ConsulSettings
from nomad_watchdog.config.hcl import KINDS, NAMED, HclDocument, Path, Problem, read
from nomad_watchdog.config.problems import in_words, message, model_of, step_into
from nomad_watchdog.config.renamed import RENAMED, use_new_names, variable_warning
from nomad_watchdog.config.settings import FILE_NAME, PREFIX, Settings, state_dir
from nomad_watchdog.config.types import from_text
from nomad_watchdog.errors import UserError
from nomad_watchdog.text_files import did_you_mean
from nomad_watchdog.units import show

Misfit = tuple[tuple[Path, ...], str]
"""The conflicting settings, starting with the one to change, and the error message."""
Check = Callable[[Settings], Iterable[tuple[Path, str]]]
OTHER_VARIABLES: Final = frozenset(
    {"ADDR", "TOKEN", "TOKEN_FILE", "CACERT", "CLIENT_CERT", "CLIENT_KEY", "SKIP_VERIFY"}
    | {"CONFIG", "FAILPOINT", "CACHE"}
)
"""Variables with our prefix that are not settings."""
_OF_OTHERS: Final = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?|DEV_\w+)"
)
"""Variables that Kubernetes sets in a pod for each Service, in case a Service has our name; and those of the tests."""


def no_check(_settings: Settings) -> Iterable[tuple[Path, str]]:
    """No additional checks."""
    return ()


def load(
    path: str | FilePath | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    also: Check = no_check,
    options: Callable[[], Collection[str]] = frozenset,
) -> Settings:
    """Read, merge and check the configuration. `overrides`: dotted setting → value, from flags. None = empty. `also`:
    additional checks, such as `preflight.misfits`, that run only if everything else is valid. `options`: the
    environment variables of command-line options.

    Raises one UserError that lists every problem with its location."""
    env, overrides = env or {}, overrides or {}
    file, document = _read_document(path, env)
    mixed = _mixed(document, env) if file and not _is_named(path, env) else ()
    deprecated = use_new_names(document)
    origins = _merge_env(document, env, deprecated) | _merge_flags(document.data, overrides)
    if "data_dir" not in document.data:
        document.data["data_dir"] = state_dir(env)
    problems = [*document.problems, *mixed]
    settings = _validate(document, problems, deprecated)
    if not problems and settings is not None:
        problems += (Problem(at, text, document.line_of(at)) for at, text in also(settings))
    problems = _without_echoes(problems)
    unknown = _unknown_variables(env, options)
    if problems or unknown or settings is None:
        lines = (
            [message(problems, str(file or "built-in defaults"), origins, document)]
            if problems
            else []
        )
        raise UserError("\n".join(lines + unknown))
    return settings


def _is_named(path: str | FilePath | None, env: Mapping[str, str]) -> bool:
    return bool(path or env.get(f"{PREFIX}CONFIG"))


def _read_document(
    path: str | FilePath | None, env: Mapping[str, str]
) -> tuple[FilePath | None, HclDocument]:
    file = find_file(path, env)
    return file, _read_file(file, named=_is_named(path, env)) if file else HclDocument()


def _validate(
    document: HclDocument, problems: list[Problem], deprecated: Sequence[str]
) -> Settings | None:
    """The settings, or None if one is invalid. Adds the errors to `problems`, including conflicts between settings."""
    settings = None
    try:
        settings = Settings.model_validate(document.data, context=tuple(deprecated))
    except ValidationError as error:
        known = {(problem.path, problem.line) for problem in problems}
        found = (in_words(item, document) for item in error.errors(include_url=False))
        problems += [problem for problem in found if (problem.path, problem.line) not in known]
    wrong = {problem.path for problem in problems}
    sound = settings or _sound_part(document.data)
    for paths, text in _misfits(sound) if sound else ():
        # An invalid setting has its default in `sound`: comparing that would be pointless.
        if not any(_overlap(path, bad) for path in paths for bad in wrong):
            problems.append(Problem(paths[0], text, document.line_of(paths[0])))
    return settings


_MISSPELT: Final = re.compile(r"no such setting; did you mean (\w+)\? ")


def _without_echoes(problems: Sequence[Problem]) -> list[Problem]:
    """Drop errors that only follow from a misspelt name: that the intended setting is missing."""
    meant = {
        (*problem.path[:-1], found[1])
        for problem in problems
        if (found := _MISSPELT.match(problem.message))
    }
    return [problem for problem in problems if problem.path not in meant]


def load_block(name: str, path: str | FilePath | None, env: Mapping[str, str]) -> Settings | None:
    """Load one block of a configuration that is invalid elsewhere; all other settings have their defaults. None if
    the block is invalid too, or the file can't be read."""
    try:
        _, document = _read_document(path, env)
    except UserError:
        return None
    _merge_env(document, env, [])
    if any(problem.path[:1] == (name,) for problem in document.problems):
        return None
    part = {key: value for key, value in document.data.items() if key == name}
    try:
        return Settings.model_validate(part | {"data_dir": state_dir(env)})
    except (ValidationError, UserError):
        return None


def _unknown_variables(env: Mapping[str, str], options: Callable[[], Collection[str]]) -> list[str]:
    """One error line per unknown variable with our prefix."""
    ours = {name for name in env if name.startswith(PREFIX)}
    known = (
        variables().keys()
        | _old_variables().keys()
        | {f"{PREFIX}{name}" for name in OTHER_VARIABLES}
    )
    odd = sorted(one for one in ours - known if not _OF_OTHERS.fullmatch(one))
    known |= set(options()) if odd else set()
    names = sorted(known - _old_variables().keys())
    return [
        f"environment {show(name)[1:-1]}: no such variable; {did_you_mean(name, names)}"
        "see docs/configuration.md"
        for name in odd
        if name not in known
    ]


def _misfits(settings: Settings) -> Iterator[Misfit]:
    """Conflicts between settings: (the settings, starting with the one to change; message)."""
    backends = sorted({point.name for point in entry_points(group=schedulers.GROUP)})
    if settings.backend not in backends:
        yield (("backend",),), _not_installed(settings.backend, backends)
    yield from _class_misfits(settings, backends)
    yield from _pool_misfits(settings)
    least, most = settings.agents.startup_grace_min, settings.agents.startup_grace_max
    if least > most:
        yield (
            (("agents", "startup_grace_min"), ("agents", "startup_grace_max")),
            f"{least:g}s is longer than agents.startup_grace_max ({most:g}s)",
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


def _not_installed(backend: str, backends: Sequence[str]) -> str:
    hint = did_you_mean(backend, backends)
    return f"{show(backend)} is not installed; {hint}installed: {', '.join(backends)}"


def _class_misfits(settings: Settings, backends: Sequence[str]) -> Iterator[Misfit]:
    for name, kind in settings.agent_class.items():
        where: Path = ("agent_class", name)
        if not kind.probe:
            yield ((*where, "probe"),), 'has no probe; add  probe "tcp" { port = 80 }'
        stale, start = settings.agents.report_stale, settings.agents.startup_grace
        if stale < 2 * kind.beat:
            yield (
                (("agents", "report_stale"), (*where, "beat")),
                f"{stale:g}s is less than two beats of class {name}; at least {2 * kind.beat:g}s",
            )
        if kind.kill_timeout > start:
            yield (
                ((*where, "kill_timeout"), ("agents", "startup_grace")),
                f"{kind.kill_timeout:g}s is longer than agents.startup_grace ({start:g}s)",
            )
        if not settings.agent_consul and (text := kind.needs_consul()):
            yield ((*where, "escalate"), ("consul", "agent_address")), text
        for backend in kind.on.keys() - set(backends):
            yield ((*where, "on"),), _not_installed(backend, backends)


def _pool_misfits(settings: Settings) -> Iterator[Misfit]:
    for name, pool in settings.agent_pool.items():
        where: Path = ("agent_pool", name)
        for setting, text in pool.misfits(settings.backend):
            yield ((*where, setting), ("backend",)), text


def _overlap(one: Path, other: Path) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _sound_part(data: Mapping[str, object]) -> Settings | None:
    """The settings without the invalid ones, so that the rest can be checked for conflicts in the same run; None if
    nothing usable is left."""
    rest = copy.deepcopy(dict(data))
    for _ in range(8):  # each round drops at least one step of a path, and no path is longer
        try:
            return Settings.model_validate(rest)
        except ValidationError as error:
            places = {tuple(s for s in item["loc"] if s != "[key]") for item in error.errors()}
        for place in sorted(places, key=str, reverse=True):  # last items of a list first
            _drop(rest, place)
    return None


def _drop(data: object, place: Path) -> None:
    """Remove the setting at this place, or the block around it if the setting itself is missing."""
    holders = [data]
    for step in place[:-1]:
        holders.append(step_into(holders[-1], step))
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
    """Our environment variables → settings."""
    ours: dict[str, tuple[str, ...]] = {}
    for name, field in Settings.model_fields.items():
        block = model_of(field.annotation)
        if name in NAMED:
            continue
        if block is None:
            ours[f"{PREFIX}{name.upper()}"] = (name,)
            continue
        for setting in block.model_fields.keys() - NAMED - KINDS:
            ours[f"{PREFIX}{name.upper()}_{setting.upper()}"] = (name, setting)
    return ours


def _old_variables() -> dict[str, tuple[str, ...]]:
    """The environment variables of renamed settings → the settings that they set."""
    return {f"{PREFIX}{block}_{name}".upper(): new for (block, name), new in RENAMED.items()}


def _read_file(file: FilePath, *, named: bool) -> HclDocument:
    """`named`: the user named this file. A file that was only found in the working directory must belong to the user
    or root, and no other user may have write access: it defines where tokens are read from and sent to."""
    try:
        with file.open(encoding="utf-8") as stream:
            if not named and (why := secret_file_rules.foreign(os.fstat(stream.fileno()), file)):
                raise UserError(
                    f"./{file}: {why}; it is not read. If you trust it, name it with --config {file}"
                )
            text = stream.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or 'cannot be read'}") from error
    return read(text, str(file))


def _mixed(document: HclDocument, env: Mapping[str, str]) -> Iterator[Problem]:
    """Report a token and an address from different sources: both must come from the file in the working directory, or
    both from the environment."""
    for block, token in (("nomad", "NOMAD_TOKEN"), ("consul", "CONSUL_HTTP_TOKEN")):
        given = document.data.get(block)
        file = given if isinstance(given, dict) else {}

        def source(setting: str, block: str = block, file: Mapping[str, object] = file) -> str:
            vendors = (
                name
                for name, at in hashicorp_environment.VARIABLES.items()
                if at == (block, setting)
            )
            for name in (*vendors, f"{PREFIX}{block}_{setting}".upper()):
                if env.get(name):
                    return name
            return FILE_NAME if file.get(setting) else ""

        where = source("address")
        sent = source("token_file") or (token if env.get(token) else "")
        if where and sent and (where == FILE_NAME) != (sent == FILE_NAME):
            yield Problem(
                (block, "address"),
                f"the address comes from {where} and the token from {sent}; a token is sent only to an address "
                f"from its own source: set both in one place, or name the file with --config {FILE_NAME}",
                document.line_of((block, "address")),
            )


def _merge_env(
    document: HclDocument, env: Mapping[str, str], deprecated: list[str]
) -> dict[Path, str]:
    """Merge the environment into the document: first the vendors' variables, then ours. Adds unusable values to
    `document.problems`, and a warning for each old name to `deprecated`."""
    data, origins = document.data, dict[Path, str]()
    for variable, where in hashicorp_environment.VARIABLES.items():
        if env.get(variable):
            origins[where] = f"environment {variable}"
            try:
                _put(data, where, hashicorp_environment.value_of(variable, env[variable]))
            except ValueError as error:
                document.problems.append(Problem(where, str(error)))
    current = variables()
    names = {setting: variable for variable, setting in current.items()}
    for variable, setting in (_old_variables() | current).items():  # a new name takes precedence
        if env.get(variable):
            if variable not in current:
                deprecated.append(variable_warning(variable, names[setting]))
            block = model_of(Settings.model_fields[setting[0]].annotation) or Settings
            _put(data, setting, from_text(block, setting[-1], env[variable]))
            origins[setting] = f"environment {variable}"
    _secure_consul(document, env, origins)
    return origins


def _secure_consul(document: HclDocument, env: Mapping[str, str], origins: dict[Path, str]) -> None:
    where: Path = ("consul", "address")
    block = document.data.get("consul", {})
    if not env.get(hashicorp_environment.SSL) or not isinstance(block, dict):
        return
    address = block.get("address", ConsulSettings().address)
    try:
        secure = hashicorp_environment.secured(
            hashicorp_environment.checked_address(str(address)), env
        )
    except ValueError as error:
        if not any(problem.path == where for problem in document.problems):
            origins.setdefault(where, f"environment {hashicorp_environment.SSL}")
            document.problems.append(Problem(where, str(error), document.line_of(where)))
        return
    if secure != address:
        _put(document.data, ("consul", "address"), secure)


def _merge_flags(data: dict[str, object], overrides: Mapping[str, object]) -> dict[Path, str]:
    origins: dict[Path, str] = {}
    for dotted, value in overrides.items():
        if value is not None:
            where = tuple(dotted.split("."))
            _put(data, where, value)
            origins[where] = f"flag --{where[-1].replace('_', '-')}"
    return origins


def _put(data: dict[str, object], where: tuple[str, ...], value: object) -> None:
    *blocks, name = where
    for block in blocks:
        inner = data.setdefault(block, {})
        if not isinstance(inner, dict):
            return  # the file has another type there; pydantic reports it
        data = inner
    data[name] = value
