"""`nomad-watchdog demo`: a simulated fleet on this machine, and seven steps that must converge."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.display import Show
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.demo.stage import BRISK, CALM, Stage, open_stage
from nomad_watchdog.errors import TransientError, UserError
from nomad_watchdog.ids import DeviceId, slug_of

STEP_TIMEOUT_S: Final = 90.0
POLL_S: Final = 0.1
FEW: Final = 50
"""Up to this number of devices, each is probed twice per second. More would overload a small machine."""
EXIT_INTERRUPTED: Final = 130
NOMAD: Final = ("nomad", "consul")
BACKENDS: Final = {
    "local": ("local processes", ()),
    "nomad": ("Nomad and Consul", NOMAD),
    "kubernetes": (
        "Kubernetes and Consul",
        ("consul", "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"),
    ),
}
"""Backend -> what it is called in the output, and the servers that it needs."""
TRY: Final = (
    "status",
    "devices ls",
    "explain device-07",
    "events --device device-07",
    "agents exec-probe device-03",
)
"""Commands to try while the demo keeps running."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """How one step ended."""

    name: str
    converged: bool
    took_s: float
    detail: str


@dataclass(slots=True)
class Demo:
    """The steps, in order, over one stage and one simulated fleet."""

    stage: Stage
    fleet: SimulatedFleet
    show: Show
    count: int
    results: list[StepResult] = field(default_factory=list)

    async def run(self) -> None:
        """Run all steps. If one does not converge, the following ones are run as well."""
        steps: list[tuple[str, Callable[[], Awaitable[str]]]] = [
            (f"{self.count} devices appear", self.come_up),
            ("an agent is killed with kill -9", self.kill_agent),
            ("a device is switched off and deregistered", self.device_leaves),
            ("a device stops responding", self.device_stops_responding),
            ("a device reboots", self.device_reboots),
            ("a new device is registered", self.device_appears),
            ("the reconciler is killed and restarted", self.kill_reconciler),
        ]
        for name, step in steps:
            began = time.monotonic()
            self.show.running(name)
            try:
                async with asyncio.timeout(STEP_TIMEOUT_S):
                    detail = await step()
                converged = True
            except (TimeoutError, TransientError) as error:
                converged = False
                detail = str(error) or f"did not converge within {STEP_TIMEOUT_S:.0f} s"
            result = StepResult(name, converged, round(time.monotonic() - began, 1), detail)
            self.results.append(result)
            self.show.done(result.name, result.detail, result.took_s, converged=converged)

    async def item(self, name: str) -> dict[str, Any]:
        """Return one device as the API returns it, or an empty object."""
        items = await self.look()
        return next((i for i in items if i["id"] == name), {})

    async def look(self) -> list[dict[str, Any]]:
        """Read all devices and update the live view. Returns nothing while the API is unavailable."""
        try:
            items = await self.stage.items()
        except TransientError:
            return []
        self.show.devices(items)
        return items

    async def until(self, name: str, *verdicts: str) -> dict[str, Any]:
        """Wait until a device has one of these verdicts."""
        while True:
            item = await self.item(name)
            if item and item["verdict"] in verdicts:
                return item
            await asyncio.sleep(POLL_S)

    async def come_up(self) -> str:
        names = [f"device-{n:02}" for n in range(1, self.count + 1)]
        devices = {name: (await self.fleet.add(name)).address for name in names}
        await self.stage.register(devices)
        while True:
            items = await self.look()
            if sum(i["verdict"] == "watched" for i in items) == len(names):
                break
            await asyncio.sleep(POLL_S)
        if not self.stage.consul:
            return "one agent ready per device"
        # Consul checks each agent every 10 s, starting at a random moment.
        while await self.stage.passing() < len(names):
            await self.look()
            await asyncio.sleep(0.5)
        return "one agent ready per device, passing in Consul"

    async def kill_agent(self) -> str:
        name = "device-03"
        slug = slug_of(DeviceId(name))
        before = await self.item(name)
        pid = self.stage.agent_pid(slug)
        os.kill(pid, signal.SIGKILL)
        while True:
            again = self.stage.agent_pids().get(slug)
            item = await self.item(name)
            if again not in {None, pid} and item.get("verdict") == "watched":
                break
            await asyncio.sleep(POLL_S)
        if item["epoch"] != before["epoch"]:
            raise TransientError("the agent was replaced instead of restarted: its epoch changed")
        return f"restarted by the scheduler in the same placement, pid {again} (was {pid})"

    async def device_leaves(self) -> str:
        name = "device-05"
        slug = slug_of(DeviceId(name))
        pid = self.stage.agent_pid(slug)
        with self.stage.shutdown_of(slug) as was_graceful:
            await self.fleet.devices[name].power_off()
            await self.stage.deregister(name)
            while True:
                item = await self.item(name)
                gone = slug not in self.stage.agent_pids()
                if item.get("verdict") == "departed" and gone and await was_graceful():
                    break
                await asyncio.sleep(POLL_S)
        evidence = "deregistered from Consul" if self.stage.consul else "logged it"
        return f"its agent (pid {pid}) shut down gracefully and {evidence}"

    async def device_stops_responding(self) -> str:
        name = "device-07"
        await self.fleet.devices[name].power_off()
        item = await self.until(name, "offline")
        return f"offline, two probes agree: {item['reason']}"

    async def device_reboots(self) -> str:
        name = "device-09"
        before = await self.item(name)
        await self.fleet.devices[name].power_off()
        await self.until(name, "suspect", "offline")
        await self.fleet.devices[name].power_on()
        item = await self.until(name, "watched")
        if item["epoch"] != before["epoch"]:
            raise TransientError("the agent was replaced although only its device rebooted")
        return "detected; the same agent watches it again"

    async def device_appears(self) -> str:
        name = f"device-{self.count + 1:02}"
        device = await self.fleet.add(name)
        began = time.monotonic()
        await self.stage.register({name: device.address})
        await self.until(name, "watched")
        return f"watched after {time.monotonic() - began:.1f} s"

    async def kill_reconciler(self) -> str:
        before = self.stage.agent_pids()
        verdicts = {i["id"]: i["verdict"] for i in await self.look()}
        if not verdicts or self.stage.reconciler is None:
            raise TransientError("there is no running reconciler to kill")
        await self.stage.reconciler.kill()
        await self.stage.start_reconciler()
        while True:
            same = {i["id"]: i["verdict"] for i in await self.look()} == verdicts
            # A level-triggered reconciler changes nothing in its second pass either.
            if same and await self.stage.metric('passes_total{outcome="ok"}') >= 2:
                break
            await asyncio.sleep(POLL_S)
        done = await self.stage.metric("dispatches_total") + await self.stage.metric(
            "retires_total"
        )
        after = self.stage.agent_pids()
        if done or after != before:
            differ = len(before.items() ^ after.items())
            raise TransientError(
                f"expected no action, got {done:.0f}; {differ} agent processes started or ended"
            )
        return f"same verdicts, 0 actions, all {len(after)} agents kept running"


async def _run(backend: str, devices: int, output: str, show: Show, *, keep: bool) -> int:
    main_task = asyncio.current_task()
    assert main_task is not None
    interrupted = tidying = keeping = False
    ended = asyncio.Event()

    def interrupt() -> None:
        # Only the first signal cancels, and only during the steps: later it would cut the clean-up short.
        nonlocal interrupted
        ended.set()
        if keeping:
            return
        if not interrupted and not tidying:
            main_task.cancel()
            show.line("interrupted: stopping everything that was started")
        interrupted = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    began = time.monotonic()
    port = free_port()
    converged = False
    with tempfile.TemporaryDirectory(
        prefix="nomad-watchdog-demo-", ignore_cleanup_errors=True
    ) as at:
        fleet = SimulatedFleet(port=port)
        try:
            show.line(f"{devices} simulated devices on {BACKENDS[backend][0]}, in {at}", "bold")
            pace = BRISK if devices <= FEW else CALM
            with show:
                show.running("starting the control plane")
                async with open_stage(backend, Path(at), port, pace=pace) as stage:
                    demo = Demo(stage, fleet, show, devices)
                    try:
                        await demo.run()
                    finally:
                        tidying = True
                        show.stop()
                    converged = _report(demo, backend, time.monotonic() - began, output)
                    if keep:
                        keeping = True
                        _print_commands(show, stage)
                        await ended.wait()
                    show.line("stopping everything that was started")
        except asyncio.CancelledError:
            if not interrupted:
                raise
        finally:
            await fleet.close()
    # Another Ctrl-C while the interpreter exits must not change the exit code.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    if interrupted:
        show.line("stopped")
        return EXIT_INTERRUPTED
    _print_next(show, backend, keep=keep)
    return 0 if converged else 1


def _report(demo: Demo, backend: str, took_s: float, output: str) -> bool:
    """Print the result; True if every step converged."""
    failed = sum(not step.converged for step in demo.results)
    if output == "json":
        summary = {
            "backend": backend,
            "devices": demo.count,
            "converged": not failed,
            "took_s": round(took_s, 1),
            "steps": [asdict(step) for step in demo.results],
        }
        print(json.dumps(summary, indent=2), flush=True)
    elif failed:
        demo.show.line(
            f"{failed} of {len(demo.results)} steps did not converge ({took_s:.1f} s).", "bold red"
        )
    else:
        demo.show.line(f"Every step converged in {took_s:.1f} s.", "bold green")
    return not failed


def _program() -> str:
    """How the user called this program, for commands to paste."""
    called = sys.argv[0]
    if Path(called).name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -P -m nomad_watchdog"
    return shlex.quote(called)


def _print_commands(show: Show, stage: Stage) -> None:
    """Print how to reach the running demo."""
    address = stage.api.removeprefix("http://")
    show.line(f"Status page: {stage.api}/")
    show.line(f"Commands to try in another terminal, from {Path.cwd()}:")
    for command in TRY:
        show.command(f"{_program()} --address {address} {command}")
    show.line("Press Ctrl-C to stop the demo.")


def _print_next(show: Show, backend: str, *, keep: bool) -> None:
    """Print how to run the demo in other ways."""
    by_make = "MAKELEVEL" in os.environ
    if not keep:
        show.line("To keep it running and try commands yourself:")
        chosen = f"make demo BACKEND={backend} KEEP=1"
        show.command(chosen if by_make else f"{_program()} --backend {backend} demo --keep")
    if backend != "nomad":
        minutes = _build_minutes()
        if minutes is None:
            show.line("To run it on real Nomad and Consul, in a checkout of the project:")
            by_make = True
        elif minutes:
            show.line(f"To run it on real Nomad and Consul, built once in about {minutes} minutes:")
        else:
            show.line("To run it on real Nomad and Consul, which are installed here:")
        show.command("make demo BACKEND=nomad" if by_make else f"{_program()} --backend nomad demo")


def _binaries() -> Any:
    """The module that finds and builds servers; None outside of a checkout."""
    if not (Path(__file__).parents[2] / "servers" / "binaries.py").is_file():
        return None
    from servers import binaries

    return binaries


def _build_minutes() -> int | None:
    """Minutes that a build of Nomad and Consul takes; 0 = they are here, None = there is no checkout."""
    binaries = _binaries()
    return None if binaries is None else binaries.build_minutes(*NOMAD)


def _find(name: str, backend: str) -> None:
    """Have a server's program. Raises UserError where it can't be had."""
    binaries = _binaries()
    if binaries is None:
        raise UserError(
            f"the demo on {BACKENDS[backend][0]} starts servers, which needs a checkout of the project:"
            f" run  make demo BACKEND={backend}  there"
        )
    binaries.find(name)


def main(
    backend: str | None = None,
    devices: int = 20,
    output: str = "table",
    *,
    keep: bool = False,
    no_color: bool = False,
) -> int:
    """Run the demo; return 0 only if every step converged, and 130 after Ctrl-C during the steps.

    `backend`: a key of `BACKENDS`; None = `nomad` if Nomad and Consul are here already, else `local`.
    `devices`: 10 to 200. `keep`: when the steps have ended, keep everything running until Ctrl-C, which then
    does not change the exit code.
    Raises UserError for an unknown backend, and as `find` when a server of the backend can't be built.
    Everything that was started is stopped in every case."""
    chosen = backend or ("nomad" if _build_minutes() == 0 else "local")
    if chosen not in BACKENDS:
        raise UserError(f'unknown backend "{chosen}": expected one of {", ".join(BACKENDS)}')
    for name in BACKENDS[chosen][1]:
        _find(name, chosen)
    show = Show(stderr=output == "json", no_color=no_color)
    return asyncio.run(_run(chosen, devices, output, show, keep=keep))
