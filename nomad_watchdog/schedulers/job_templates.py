"""Job templates: found by name or path, filled by Nomad's own HCL parser, linted before use.

Templates never contain device data: it is sent as dispatch payload and meta (S11). An operator's variables are
quoted as HCL string literals, so none can become an expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from nomad_watchdog import text_files
from nomad_watchdog.clients.nomad_rows import EphemeralDisk, Job, Task, TaskGroup
from nomad_watchdog.errors import UserError
from nomad_watchdog.text_files import did_you_mean

META_KEYS: Final = ("device_id", "slug", "epoch", "spec_hash", "agent_class", "shard")
"""What a template must declare in ``parameterized.meta_required``."""
DEFAULT: Final = "device-watchdog"
_SUFFIX: Final = ".nomad.hcl"
_HERE: Final = Path(__file__).resolve().parent.parent
_FOLDERS: Final = (_HERE / "_jobs", _HERE.parent / "jobs")
"""The wheel contains the templates inside the package; a checkout has them at its top."""
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_DECLARED: Final = re.compile(
    r"""^[ \t]*variable[ \t]+(?:"([^"\n]+)"|([A-Za-z_]\w*))""", re.MULTILINE
)
_MAX_BYTES: Final = 256 * 1024
_MAX_DISK_MB: Final = 50
_MAX_ATTEMPTS: Final = 10
_SECOND_NS: Final = 1_000_000_000
_HEARTBEAT_S: Final = 30
"""Twice Nomad's least heartbeat TTL plus its default grace of 10 s: a shorter
stop_on_client_after stops healthy agents."""


@dataclass(frozen=True, slots=True)
class Template:
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One error or warning of a template: where it is, what it is, and what is allowed."""

    level: Literal["error", "warning"]
    where: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.where} is {self.found}; allowed: {self.allowed}"


class UndeclaredError(UserError):
    """A template does not declare a variable. `variable`: its name."""

    def __init__(self, template: str, variable: str, declared: Iterable[str]) -> None:
        known = sorted(declared)
        super().__init__(
            f"template {template!r} has no variable {variable!r}; {did_you_mean(variable, known)}"
            f"it has {', '.join(known) or 'none'}"
        )
        self.variable = variable


def check_variables(template: Template, given: Iterable[str]) -> None:
    """Raises UndeclaredError for a variable that a Nomad template does not declare: Nomad itself silently ignores
    it (hashicorp/nomad#11149)."""
    declared = {match[1] or match[2] for match in _DECLARED.finditer(template.text)}
    for name in sorted(given):
        if name not in declared:
            raise UndeclaredError(template.name, name, declared)


def builtin_names() -> list[str]:
    return sorted(
        {
            path.name.removesuffix(_SUFFIX)
            for folder in _FOLDERS
            if folder.is_dir()
            for path in folder.glob(f"*{_SUFFIX}")
        }
    )


def load(name: str, text: str = "") -> Template:
    """A built-in template by its name (empty = the default), or a file by its path. `text`: the content of the
    file, if it is known already.

    A name with a slash or the suffix ``.hcl`` is a path. Raises UserError when there is no such template.
    """
    chosen = name or DEFAULT
    if text:
        return Template(chosen, text)
    if "/" in chosen or chosen.endswith(".hcl"):
        return Template(chosen, _read(Path(chosen)))
    for folder in _FOLDERS:
        path = folder / f"{chosen}{_SUFFIX}"
        if path.is_file():
            return Template(chosen, _read(path))
    raise UserError(
        f"no template {chosen!r}: give a path, or one of the built-in {', '.join(builtin_names())}"
    )


def load_yaml(name: str, text: str = "") -> Template:
    """As `load`, for a Kubernetes manifest: a name with a slash or the suffix ``.yaml`` or ``.yml`` is a path."""
    chosen = name or DEFAULT
    if text:
        return Template(chosen, text)
    if "/" in chosen or chosen.endswith((".yaml", ".yml")):
        return Template(chosen, _read(Path(chosen)))
    for folder in _FOLDERS:
        path = folder / "kubernetes" / f"{chosen}.yaml"
        if path.is_file():
            return Template(chosen, _read(path))
    raise UserError(f"no template {chosen!r}: give a path, or the built-in {DEFAULT}")


def _read(path: Path) -> str:
    return text_files.read("template", path, _MAX_BYTES)


def quote(value: str) -> str:
    """An HCL string literal with exactly this value: ``${`` and ``%{`` are escaped."""
    out = []
    for character in value:
        if character in '"\\':
            out.append(f"\\{character}")
        elif not character.isprintable():
            code = ord(character)
            out.append(f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}")
        else:
            out.append(character)
    return '"' + "".join(out).replace("${", "$${").replace("%{", "%%{") + '"'


def variables_text(variables: Mapping[str, str]) -> str:
    """The field ``Variables`` of a parse request. Raises UserError for a name that HCL does not allow."""
    for name in variables:
        if not _VARIABLE.fullmatch(name):
            raise UserError(
                f"template variable {name!r}: allowed are letters, digits and _, at most 64 characters"
            )
    return "\n".join(f"{name} = {quote(value)}" for name, value in sorted(variables.items()))


def lint(job: Job, *, disconnect: bool = True) -> list[Finding]:
    """Why a parsed job is not suitable for agents, errors first.

    `disconnect`: whether the servers support the block of that name."""
    found = [*_lint_job(job)]
    groups = job.get("TaskGroups") or []
    if len(groups) != 1:
        found.append(Finding("error", "number of groups", str(len(groups)), "exactly 1"))
    for group in groups:
        found.extend(_lint_group(group, disconnect=disconnect))
        for task in group.get("Tasks") or []:
            found.extend(_lint_task(group.get("Name", ""), task))
    return sorted(found, key=lambda one: one.level)


def adapt(job: Job, *, disconnect: bool) -> None:
    """Express, in place, what happens when a node is lost, in the way that the servers support.

    A template uses `max_client_disconnect`, which every parser accepts, and `replace_lost` in the group's meta.
    From 1.8 on Nomad ignores `max_client_disconnect` for batch jobs and has the block `disconnect` instead.
    Earlier versions replace the agent of a lost node by rescheduling it. With rescheduling off, the node keeps
    its agent, and only the control plane starts another one (measured on 1.6.3 and 1.11.3)."""
    for group in job.get("TaskGroups") or []:
        lost_after = group.get("MaxClientDisconnect")
        if not lost_after:
            continue
        replace = (group.get("Meta") or {}).get("replace_lost") == "true"
        if disconnect:
            group["MaxClientDisconnect"] = None
            group["Disconnect"] = {
                "LostAfter": lost_after,
                "Replace": replace,
                "Reconcile": "keep_original",
            }
        elif not replace:
            group["ReschedulePolicy"] = {"Attempts": 0, "Unlimited": False}


def _lint_job(job: Job) -> Iterator[Finding]:
    if job.get("Type") != "batch":
        yield Finding("error", "type", repr(job.get("Type")), '"batch"')
    parameterized = job.get("ParameterizedJob")
    if not parameterized:
        yield Finding("error", "block parameterized", "missing", "payload and meta_required")
        return
    if parameterized.get("Payload") not in ("required", "optional"):
        allowed = '"required"'
        yield Finding("error", "parameterized.payload", repr(parameterized.get("Payload")), allowed)
    declared = set(parameterized.get("MetaRequired") or [])
    every = declared | set(parameterized.get("MetaOptional") or [])
    if missing := [key for key in META_KEYS if key not in every]:
        allowed = ", ".join(META_KEYS)
        yield Finding("error", "meta_required", f"without {', '.join(missing)}", allowed)
    if unknown := declared - set(META_KEYS):
        allowed = ", ".join(META_KEYS)
        yield Finding("error", "meta_required", f"with {', '.join(sorted(unknown))}", allowed)
    if job.get("Periodic"):
        yield Finding("error", "block periodic", "present", "none")


def _lint_group(group: TaskGroup, *, disconnect: bool) -> Iterator[Finding]:
    where = f"group {group.get('Name', '')!r}"
    if group.get("Count") not in (None, 1):
        yield Finding("error", f"{where} count", str(group["Count"]), "1")
    if not (group.get("ReschedulePolicy") or {}).get("Unlimited"):
        # the default of a batch job: one attempt in 24 h, then it stays dead
        yield Finding(
            "error", f"{where} reschedule", "not unlimited", "unlimited = true, attempts = 0"
        )
    restart = group.get("RestartPolicy") or {}
    if restart.get("Mode", "fail") != "fail":
        yield Finding("error", f"{where} restart.mode", repr(restart["Mode"]), '"fail"')
    if (restart.get("Attempts") or 0) > _MAX_ATTEMPTS:
        found, allowed = str(restart["Attempts"]), f"at most {_MAX_ATTEMPTS}"
        yield Finding("warning", f"{where} restart.attempts", found, allowed)
    yield from _lint_disk(where, group.get("EphemeralDisk") or {})
    yield from _lint_disconnect(where, group, disconnect=disconnect)


def _lint_disk(where: str, disk: EphemeralDisk) -> Iterator[Finding]:
    size = disk.get("SizeMB")
    if size is None or size > _MAX_DISK_MB:
        found = f"{300 if size is None else size} MB"
        # the default of 300 MB filled a node of 66 GB with 219 agents
        yield Finding(
            "warning", f"{where} ephemeral_disk.size", found, f"at most {_MAX_DISK_MB} MB"
        )
    if disk.get("Migrate"):
        yield Finding(
            "warning",
            f"{where} ephemeral_disk.migrate",
            "true: a moved agent stays pending after its node was purged",
            "false; a moved agent waits for the end of the old one in either case",
        )


def _lint_disconnect(where: str, group: TaskGroup, *, disconnect: bool) -> Iterator[Finding]:
    block = group.get("Disconnect") or {}
    lost_after = block.get("LostAfter") or group.get("MaxClientDisconnect")
    if not lost_after:
        yield Finding(
            "warning",
            f"{where} max_client_disconnect",
            "missing: a lost node gives two agents",
            'a duration, for example "1h"',
        )
    stop_after = block.get("StopOnClientAfter") or group.get("StopAfterClientDisconnect")
    if stop_after:
        seconds = stop_after / _SECOND_NS
        short = seconds < _HEARTBEAT_S
        # without the block, Nomad 1.6 ends the job while its process may still run
        level: Literal["error", "warning"] = "error" if short or not disconnect else "warning"
        yield Finding(
            level,
            f"{where} stop_on_client_after",
            f"{seconds:g} s: the child is then never started again",
            f"none, or at least {_HEARTBEAT_S} s",
        )


def _lint_task(group: str, task: Task) -> Iterator[Finding]:
    where = f"group {group!r} task {task.get('Name', '')!r}"
    logs = task.get("LogConfig") or {}
    if not (logs.get("Disabled") or logs.get("Enabled") is False):
        yield Finding(
            "warning",
            f"{where} logs",
            "enabled: about 13 MB of memory per agent",
            "disabled = true",
        )
    if task.get("KillTimeout") is None:
        yield Finding("warning", f"{where} kill_timeout", "not set (5 s)", "a duration")
    for artifact in task.get("Artifacts") or []:
        if "checksum" not in (artifact.get("GetterOptions") or {}):
            yield Finding(
                "warning",
                f"{where} artifact",
                "without a checksum: anyone who can change the file runs code on every client",
                "options { checksum = var.agent_checksum }",
            )
    if not task.get("DispatchPayload"):
        yield Finding("error", f"{where} dispatch_payload", "missing", 'file = "device.json"')
