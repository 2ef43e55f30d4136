"""Starts, stops and restarts one local placement: blocking, level-triggered, under its own lock.

Any thread of any process may call these functions at any time; only the files and /proc decide.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import watchdog_agent
from watchdog_agent import wire
from watchdog_agent.runtime.parsing import loads

from nomad_watchdog import private_files
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import ConflictError, TransientError, UserError
from nomad_watchdog.ids import Slug, is_slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, PlacementState
from nomad_watchdog.schedulers import agent_document, job_templates
from nomad_watchdog.schedulers.local import process
from nomad_watchdog.schedulers.local._zygote import ChangedError, Parents
from nomad_watchdog.schedulers.local.files import (
    CorruptError,
    Entry,
    bound_log,
    exclusive,
    read_entry,
    translated,
    write_entry,
    write_whole,
)

log = logging.getLogger(__name__)

VARIABLES = frozenset({"command", "driver", "workload"})
"""Allowed variables. `driver` and `workload` are for classes that also run on other schedulers."""
_SITES = {"site-packages", "dist-packages"}


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """Where and how agents run. Seconds are float."""

    directory: Path
    python: str
    token_file: str
    backoff_initial_s: float
    backoff_max_s: float
    stable_after_s: float
    parents: Parents

    def home(self, slug: Slug) -> Path:
        return self.directory / slug


def _now() -> float:
    return float(SystemClock().wall())


def _ours(settings: PlacementSettings) -> list[str]:
    """-P: do not import from the working directory."""
    return [settings.python, "-P", "-m", "watchdog_agent"]


def _isolated(argv: list[str]) -> list[str]:
    """The current command line of the agent for one that an earlier version has stored."""
    return [argv[0], "-P", *argv[1:]] if argv[1:] == ["-m", "watchdog_agent"] else argv


def argv_of(settings: PlacementSettings, spec: AgentSpec) -> list[str]:
    """The agent's command line: this project's agent, or the operator's variable `command` (a JSON list of texts)."""
    return command_of(spec) or _ours(settings)


def command_of(spec: AgentSpec) -> list[str]:
    """The operator's variable `command`; empty = there is none. Raises UserError for an invalid command, and for a
    variable that is unknown on this backend."""
    for name in spec.variables:
        if name not in VARIABLES:
            raise job_templates.UndeclaredError("local", name, VARIABLES - {"driver", "workload"})
    text = spec.variables.get("command", "")
    if not text:
        return []
    try:
        found = loads(text)
    except ValueError as error:
        raise UserError(
            f"variable command of class {spec.agent_class} is not JSON: {error}"
        ) from None
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise UserError(
            f"variable command of class {spec.agent_class} must be a JSON list of texts,"
            ' such as ["python3", "agent.py"]'
        )
    return found


def config_of(record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> str:
    facts = {
        "agent_class": spec.agent_class,
        "version": spec.version,
        "spec_hash": spec.spec_hash,
    }
    part = {**spec.agent_config, **facts}
    return json.dumps(agent_document.document(record, epoch, part))


def ensure(
    settings: PlacementSettings, record: DeviceRecord, epoch: Epoch, spec: AgentSpec
) -> Entry:
    """Create the placement unless it exists. Raises ConflictError when there is a later epoch, and TransientError while
    an earlier one still runs."""
    argv = argv_of(settings, spec)
    config = config_of(record, epoch, spec)
    home = settings.home(record.slug)
    try:
        private_files.folder(home / "state")
        with exclusive(home):
            old = _read(home)
            if old is not None and old.epoch == epoch:
                return old
            if old is not None and old.epoch > epoch:
                raise ConflictError(f"{record.slug} is already at epoch {old.epoch}, not {epoch}")
            if (old is not None and old.state != PlacementState.DEAD) or process.is_locked(home):
                raise TransientError(
                    f"{record.slug} still has an earlier placement; retire it first"
                )
            write_whole(home / "config.json", config)
            entry = Entry(
                device_id=record.device.id,
                epoch=epoch,
                agent_class=spec.agent_class,
                spec_hash=spec.spec_hash,
                instance=str(uuid.uuid4()),
                argv=argv,
                state=PlacementState.STARTING,
                created_at=_now(),
            )
            write_entry(home, entry)
            return _started(settings, home, entry)
    except OSError as error:
        raise translated(error, f"cannot place {record.slug} in {settings.directory}") from error


def retire(settings: PlacementSettings, slug: Slug, epoch: Epoch, grace_s: float) -> Entry | None:
    """Store the stop, then signal the process. None = the placement no longer exists."""
    home = settings.home(slug)
    try:
        if not home.is_dir():
            return None
        with exclusive(home):
            entry = _read(home)
            if entry is None or entry.epoch != epoch or entry.state == PlacementState.DEAD:
                return entry
            entry = _located(home, entry)
            if entry.state != PlacementState.STOPPING:
                entry = replace(
                    entry,
                    state=PlacementState.STOPPING,
                    act_at=_now() + grace_s,
                    reason="stop requested",
                )
                write_entry(home, entry)
                process.send(entry.pid, entry.pid_start, signal.SIGTERM)
            return _stepped(settings, home, entry)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise translated(error, f"cannot stop {slug}") from error


def step(settings: PlacementSettings, slug: Slug) -> Entry | None:
    """Advance one placement as far as possible now, and return its entry."""
    home = settings.home(slug)
    if not home.is_dir():
        return None
    with exclusive(home):
        bound_log(home / "agent.log")
        entry = _read(home)
        if entry is None or entry.state == PlacementState.DEAD:
            return entry
        return _stepped(settings, home, _located(home, entry))


def sweep(settings: PlacementSettings, slug: Slug, epoch: Epoch) -> bool:
    """Remove the files of a dead placement, unless a process holds its lock."""
    home = settings.home(slug)
    if not home.is_dir():
        return False
    with exclusive(home):
        entry = _read(home)
        if entry is None or entry.epoch != epoch or entry.state != PlacementState.DEAD:
            return False
        if process.is_locked(home):
            return False
        # The lock files are removed last: another thread or process may be waiting for the lock.
        (home / "placement.json").unlink()
        shutil.rmtree(home, ignore_errors=True)
        return True


def _read(home: Path) -> Entry | None:
    """The entry. A damaged one is renamed and created again from the configuration (S9)."""
    try:
        return read_entry(home)
    except CorruptError as error:
        log.error(  # noqa: TRY400  # the traceback adds nothing
            "damaged placement renamed", extra={"slug": home.name, "reason": str(error)[:200]}
        )
    (home / "placement.json").replace(home / "placement.json.damaged")
    pid, instance = process.find(home)
    try:
        facts = loads((home / "config.json").read_text())
        entry = Entry(
            device_id=facts["device_id"],
            epoch=int(facts["epoch"]),
            agent_class=str(facts["agent_class"]),
            spec_hash=str(facts["spec_hash"]),
            instance=instance or str(uuid.uuid4()),
            argv=[],
            state=PlacementState.RUNNING if pid else PlacementState.DEAD,
            created_at=_now(),
            pid=pid,
            pid_start=process.start_time(pid),
            reason="placement.json was damaged and created again",
        )
        if entry.slug != home.name:
            return None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    write_entry(home, entry)
    return entry


def _located(home: Path, entry: Entry) -> Entry:
    """The entry with its process, if a crash prevented that its pid was stored after its start."""
    if entry.pid or not process.is_locked(home):
        return entry
    pid, _ = process.find(home)
    found = replace(entry, pid=pid, pid_start=process.start_time(pid), started_at=_now())
    if entry.state in {PlacementState.STARTING, PlacementState.RESTARTING}:
        restarts = entry.restarts + (entry.state == PlacementState.RESTARTING)
        found = replace(found, state=PlacementState.RUNNING, restarts=restarts, reason="")
    if pid:
        write_entry(home, found)
        return found
    return entry


def _stepped(settings: PlacementSettings, home: Path, entry: Entry) -> Entry:
    alive = process.is_same(entry.pid, entry.pid_start)
    if entry.state == PlacementState.STOPPING:
        if alive:
            if _now() >= entry.act_at:
                process.send(entry.pid, entry.pid_start, signal.SIGKILL)
            return entry
        return _dead(settings, home, entry, "stopped as requested")
    if entry.state == PlacementState.RUNNING:
        return entry if alive else _ended(settings, home, entry)
    if entry.state == PlacementState.STARTING or _now() >= entry.act_at:
        return _started(settings, home, entry)
    return entry


def _dead(settings: PlacementSettings, home: Path, entry: Entry, reason: str) -> Entry:
    done = replace(entry, state=PlacementState.DEAD, pid=0, pid_start=0, reason=reason)
    write_entry(home, done)
    if entry.pid:
        settings.parents.reap(entry.pid)
    return done


def _ended(settings: PlacementSettings, home: Path, entry: Entry) -> Entry:
    """After exit 0 the API has retired the agent, and it stays dead. Otherwise it is restarted later."""
    code = settings.parents.exit_code(entry.pid)
    foreign = code is None and not settings.parents.include(entry.parent)
    if foreign and process.is_same(entry.parent, entry.parent_start):
        # Only its parent can read the exit code: give it one second to act first.
        if not entry.act_at:
            entry = replace(entry, act_at=_now() + 1.0)
            write_entry(home, entry)
        if _now() < entry.act_at:
            return entry
    if code == wire.EXIT_RETIRED:
        return _dead(settings, home, entry, "the agent was retired by the API (exit 0)")
    if not entry.argv:
        return _dead(
            settings, home, entry, "ended; its command line was lost with a damaged placement.json"
        )
    cause = "ended, exit code unknown"
    if code is not None:
        cause = f"exited with {code}" if code > 0 else f"killed by signal {-code}"
    return _restart_later(settings, home, entry, cause)


def _restart_later(settings: PlacementSettings, home: Path, entry: Entry, cause: str) -> Entry:
    fast = entry.fast_crashes + 1
    if _now() - entry.started_at >= settings.stable_after_s:
        fast = 1
    wait = min(settings.backoff_max_s, settings.backoff_initial_s * 2.0 ** min(fast - 1, 30))
    reason = f"{cause}; {fast} consecutive crashes, restart after {wait:g} s"
    done = replace(
        entry,
        state=PlacementState.RESTARTING,
        pid=0,
        pid_start=0,
        fast_crashes=fast,
        act_at=_now() + wait,
        reason=reason,
    )
    write_entry(home, done)
    if entry.pid:
        settings.parents.reap(entry.pid)
    return done


def _started(settings: PlacementSettings, home: Path, entry: Entry) -> Entry:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "WATCHDOG_CONFIG": str(home / "config.json"),
        "WATCHDOG_STATE_DIR": str(home / "state"),
        "WATCHDOG_INSTANCE": entry.instance,
        "WATCHDOG_LISTEN": "127.0.0.1:0",
    }
    if settings.token_file:
        environment["WATCHDOG_TOKEN_FILE"] = settings.token_file
    above = Path(str(watchdog_agent.__file__)).resolve().parent.parent
    if above.name not in _SITES:
        environment["PYTHONPATH"] = str(above)
    restarts = entry.restarts + (entry.state == PlacementState.RESTARTING)
    now = _now()
    argv = _isolated(entry.argv)
    entry = replace(entry, argv=argv, restarts=restarts, started_at=now)
    try:
        ours = entry.argv == _ours(settings)
        started = settings.parents.spawn(home, entry.argv, environment, ours=ours)
    except BlockingIOError:
        return _restart_later(settings, home, entry, "an earlier process of this device still runs")
    except ChangedError as error:
        return _restart_later(settings, home, entry, str(error))
    except OSError as error:
        return _restart_later(
            settings, home, entry, f"cannot run {entry.argv[0]!r}: {error.strerror}"
        )
    done = replace(
        entry,
        state=PlacementState.RUNNING,
        pid=started.pid,
        pid_start=process.start_time(started.pid),
        parent=started.parent,
        parent_start=process.start_time(started.parent),
        act_at=0.0,
        reason="",
    )
    write_entry(home, done)
    return done


def slugs(settings: PlacementSettings) -> list[Slug]:
    """All devices that have files."""
    return [Slug(one.name) for one in os.scandir(settings.directory) if is_slug(one.name)]
