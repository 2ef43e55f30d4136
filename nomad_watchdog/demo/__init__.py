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
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Final

from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.display import Show
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.demo.stage import BRISK, CALM, Stage, open_stage
from nomad_watchdog.demo.steps import Demo
from nomad_watchdog.errors import UserError

FEW: Final = 50
"""Up to this number of devices, each is probed twice per second. More would overload a small machine."""
EXIT_INTERRUPTED: Final = 130
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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


class _Interruption:
    """Handles SIGINT, SIGTERM and SIGHUP. Only the first signal cancels the main task, and only during the steps: a
    later one would interrupt the clean-up."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._main_task = asyncio.current_task()
        self.interrupted = False
        self.ended = asyncio.Event()
        """A signal has arrived."""
        self.cancels = True
        self.ignored = False
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self.ended.set()
        if self.ignored:
            return
        if not self.interrupted and self.cancels:
            assert self._main_task is not None
            self._main_task.cancel()
            self._show.line("interrupted: stopping everything that was started")
        self.interrupted = True


async def _run(backend: str, devices: int, output: str, show: Show, *, keep: bool) -> int:
    interruption = _Interruption(show)
    port = free_port()
    converged = False
    os.umask(0o077)  # for the files of all programs that it starts
    with tempfile.TemporaryDirectory(
        prefix="nomad-watchdog-demo-", ignore_cleanup_errors=True
    ) as at:
        fleet = SimulatedFleet(port=port)
        try:
            show.line(f"{devices} simulated devices on {BACKENDS[backend][0]}, in {at}", "bold")
            pace = BRISK if devices <= FEW else CALM
            stage = open_stage(backend, Path(at), port, pace=pace)
            converged = await _run_steps(
                stage, fleet, show, interruption, devices=devices, output=output, keep=keep
            )
        except asyncio.CancelledError:
            if not interruption.interrupted:
                raise
        finally:
            await fleet.close()
    # Another Ctrl-C while the interpreter exits must not change the exit code.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if interruption.interrupted:
        show.line("stopped")
        return EXIT_INTERRUPTED
    _print_next(show, backend, keep=keep)
    return 0 if converged else 1


async def _run_steps(
    opening: AbstractAsyncContextManager[Stage],
    fleet: SimulatedFleet,
    show: Show,
    interruption: _Interruption,
    *,
    devices: int,
    output: str,
    keep: bool,
) -> bool:
    """Open the stage, run the steps and print the result; True if every step converged."""
    began = time.monotonic()
    with show:
        show.running("starting the control plane")
        async with opening as stage:
            demo = Demo(stage, fleet, show, devices)
            try:
                await demo.run()
            finally:
                interruption.cancels = False
                show.stop()
            converged = _report(demo, time.monotonic() - began, output)
            if keep:
                interruption.ignored = True
                _print_commands(show, stage)
                await interruption.ended.wait()
            show.line("stopping everything that was started")
    return converged


def _report(demo: Demo, took_s: float, output: str) -> bool:
    """Print the result; True if every step converged."""
    failed = sum(not step.converged for step in demo.results)
    if output == "json":
        summary = {
            "backend": demo.stage.backend,
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


def _binaries() -> ModuleType | None:
    """The module that finds and builds servers; None outside of a checkout."""
    if not (Path(__file__).parents[2] / "servers" / "binaries.py").is_file():
        return None
    from servers import binaries

    return binaries


def _build_minutes() -> int | None:
    """Minutes that a build of Nomad and Consul takes; 0 = they are here, None = there is no checkout."""
    binaries = _binaries()
    if binaries is None:
        return None
    minutes: int | None = binaries.build_minutes(*NOMAD)
    return minutes


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
