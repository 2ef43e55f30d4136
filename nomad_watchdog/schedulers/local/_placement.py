"""What happens to one local placement: blocking, level-triggered, decided under its own lock.

Any thread of any process may call any of these at any time; what is on disk and in /proc decides.
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
"""`driver` and `workload` are of classes that also run elsewhere."""
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
    """Without the working folder, whose files are not ours (-P)."""
    return [settings.python, "-P", "-m", "watchdog_agent"]


def _isolated(argv: list[str]) -> list[str]:
    """The command line of our agent as it is now, where an earlier version has written another one."""
    return [argv[0], "-P", *argv[1:]] if argv[1:] == ["-m", "watchdog_agent"] else argv


def argv_of(settings: PlacementSettings, spec: AgentSpec) -> list[str]:
    """The agent's command line: ours, or the operator's variable `command` (a JSON list of texts)."""
    return command_of(spec) or _ours(settings)


def command_of(spec: AgentSpec) -> list[str]:
    """The operator's variable `command`; empty = there is none. Raises UserError for one that won't do, and for
    a variable that no local agent knows."""
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
            f"variable command of class {spec.agent_class} is no JSON: {error}"
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
    """Make the placement exist. ConflictError: a later epoch is there, or an earlier one still runs."""
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
                raise ConflictError(f"{record.slug} was placed at epoch {old.epoch}, past {epoch}")
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
    """Say the stop on disk first, then to the process. None = it is gone already."""
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
                    reason="told to stop",
                )
                write_entry(home, entry)
                process.send(entry.pid, entry.pid_start, signal.SIGTERM)
            return _stepped(settings, home, entry)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise translated(error, f"cannot stop {slug}") from error


def step(settings: PlacementSettings, slug: Slug) -> Entry | None:
    """Bring one placement forward as far as it goes now; how it stands then."""
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
    """Remove the files of a dead placement; never while a process holds its lock."""
    home = settings.home(slug)
    if not home.is_dir():
        return False
    with exclusive(home):
        entry = _read(home)
        if entry is None or entry.epoch != epoch or entry.state != PlacementState.DEAD:
            return False
        if process.is_locked(home):
            return False
        # The lock files stay until the very end: somebody may be waiting for the right to decide.
        (home / "placement.json").unlink()
        shutil.rmtree(home, ignore_errors=True)
        return True


def _read(home: Path) -> Entry | None:
    """The entry; a damaged one is set aside and made again from the configuration (S9)."""
    try:
        return read_entry(home)
    except CorruptError as error:
        log.error(  # noqa: TRY400  # the traceback says nothing more
            "damaged placement set aside", extra={"slug": home.name, "reason": str(error)[:200]}
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
            reason="placement.json was damaged and made again",
        )
        if entry.slug != home.name:
            return None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    write_entry(home, entry)
    return entry


def _located(home: Path, entry: Entry) -> Entry:
    """Find the process when we died between starting it and writing its pid down."""
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
        return _dead(settings, home, entry, "stopped as told")
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
    """Exit 0 was retirement by the API: dead for good. Anything else is started again, later."""
    code = settings.parents.exit_code(entry.pid)
    foreign = code is None and not settings.parents.are(entry.parent)
    if foreign and process.is_same(entry.parent, entry.parent_start):
        # Its parent lives and alone knows the exit code: let it go first, for a second.
        if not entry.act_at:
            entry = replace(entry, act_at=_now() + 1.0)
            write_entry(home, entry)
        if _now() < entry.act_at:
            return entry
    if code == wire.EXIT_RETIRED:
        return _dead(settings, home, entry, "the agent retired by itself (exit 0)")
    if not entry.argv:
        return _dead(
            settings, home, entry, "ended; its command line was lost with a damaged placement.json"
        )
    said = "ended, exit code unknown"
    if code is not None:
        said = f"exited with {code}" if code > 0 else f"killed by signal {-code}"
    return _later(settings, home, entry, said)


def _later(settings: PlacementSettings, home: Path, entry: Entry, said: str) -> Entry:
    fast = entry.fast_crashes + 1
    if _now() - entry.started_at >= settings.stable_after_s:
        fast = 1
    wait = min(settings.backoff_max_s, settings.backoff_initial_s * 2.0 ** min(fast - 1, 30))
    reason = f"{said}; {fast} crashes in a row, next start {wait:g} s after the last"
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
        born = settings.parents.spawn(home, entry.argv, environment, ours=ours)
    except BlockingIOError:
        return _later(settings, home, entry, "an earlier process of this device is still there")
    except ChangedError as error:
        return _later(settings, home, entry, str(error))
    except OSError as error:
        return _later(settings, home, entry, f"cannot run {entry.argv[0]!r}: {error.strerror}")
    done = replace(
        entry,
        state=PlacementState.RUNNING,
        pid=born.pid,
        pid_start=process.start_time(born.pid),
        parent=born.parent,
        parent_start=process.start_time(born.parent),
        act_at=0.0,
        reason="",
    )
    write_entry(home, done)
    return done


def slugs(settings: PlacementSettings) -> list[Slug]:
    """Every device that has files here."""
    return [Slug(one.name) for one in os.scandir(settings.directory) if is_slug(one.name)]
