"""One pod as processes on this machine: starts, probes, restarts and stops them according to its spec."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import ConflictError, NotFoundError, WatchdogError
from servers.kubelet import spec
from servers.kubelet.pages import Use
from servers.kubelet.spec import MARK, CannotRunError, Image, Object, Run
from servers.kubelet.volumes import Volumes

_BACKOFF_MAX_S: Final = 300.0
_QUIET_S: Final = 600.0
"""Running time in seconds after which a container's back-off is reset."""
_MEMORY_S: Final = 0.5
_AGAIN_S: Final = 0.5
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def now_text() -> str:
    return datetime.fromtimestamp(SystemClock().wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process with all its threads, in nanosecond resolution: metrics-server ignores a value of 0. The
    clock ID is that of clock_getcpuclockid(3). Raises OSError if there is no such process."""
    return time.clock_gettime(~pid << 3 | 2)


class Pod:
    """`live` is the coroutine of its whole life; `seen` passes it updates from the API server."""

    def __init__(
        self,
        pod: Object,
        *,
        client: KubernetesClient,
        http: aiohttp.ClientSession,
        images: Mapping[str, Image],
        folder: Path,
        ip: str,
        backoff_s: float,
    ) -> None:
        self.pod = pod
        self.uid: str = pod["metadata"]["uid"]
        self.folder = folder
        self._client, self._http, self._images = client, http, images
        self._ip = ip
        self._backoff_s = backoff_s
        self._started_at = now_text()
        self._containers: list[Object] = list(pod["spec"]["containers"])
        self._runs = [Run() for _ in self._containers]
        self._leaving = asyncio.Event()
        self._quiet = False
        self._told: dict[str, Any] = {}
        self._phase = ""
        self.owes = False
        """Its status could not be written and must be reported again."""
        self._writing = asyncio.Lock()

    @property
    def path(self) -> str:
        meta = self.pod["metadata"]
        return f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"

    def log_file(self, container: str) -> Path:
        return self.folder / f"{container}.log"

    def seen(self, pod: Object) -> None:
        self.pod = pod
        ended = (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")
        if pod["metadata"].get("deletionTimestamp") or ended:
            self._leaving.set()

    def uses(self) -> Iterator[Use]:
        """Resource usage of its running containers."""
        meta = self.pod["metadata"]
        for container, run in zip(self._containers, self._runs, strict=True):
            try:
                memory, cpu_s = _resident_pages(run.pid) * _PAGE, _cpu_s(run.pid)
            except (OSError, IndexError):  # no longer running, or not yet
                continue
            yield Use(meta["namespace"], meta["name"], container["name"], run.began, cpu_s, memory)

    def leave(self) -> None:
        """Stop without reporting, because the node shuts down."""
        self._quiet = True
        self._leaving.set()

    async def live(self) -> None:
        """Run until it is deleted, ends by itself, or the node shuts down."""
        self.seen(self.pod)
        ends = await asyncio.gather(*(self._keep(at) for at in range(len(self._runs))))
        if self._quiet:
            return
        if (self.pod.get("status") or {}).get("phase") not in ("Failed", "Succeeded"):
            self._phase = "Succeeded" if not any(ends) else "Failed"
            await self.tell()
        while not self._quiet:
            try:
                if self.owes:
                    await self.tell()
                if self.pod["metadata"].get("deletionTimestamp"):
                    await self._client.delete(self.path, grace_s=0, uid=self.uid)
            except (NotFoundError, ConflictError):  # it is gone, or another pod has its name
                return
            except WatchdogError:
                self.owes = True
            if not self.owes:
                return
            await asyncio.sleep(_AGAIN_S)

    async def tell(self) -> None:
        """Report its status if it has changed. The API server's own conditions are not modified.

        Never raises: an update that fails now is sent later, because a node that ended with its API server would
        also end all its agents.
        """
        phase = self._phase
        if not phase:
            started = any("waiting" not in run.state for run in self._runs)
            restarted = any(run.restarts or run.last for run in self._runs)
            phase = "Running" if started or restarted else "Pending"
        async with self._writing:
            status = spec.pod_status(
                self.pod, self._runs, ip=self._ip, phase=phase,
                started_at=self._started_at, now=now_text(),
            )  # fmt: skip
            if status == self._told:
                self.owes = False
                return
            # With the UID, so that it does not apply to the next pod of the same name.
            body = {"metadata": {"uid": self.uid}, "status": status}
            try:
                self.pod = await self._client.call(
                    "PATCH", f"{self.path}/status", body=body,
                    content="application/strategic-merge-patch+json",
                )  # fmt: skip
            except (NotFoundError, ConflictError):
                pass  # the pod no longer exists
            except WatchdogError:
                self.owes = True
                return
            self._told, self.owes = status, False

    def is_written_over(self) -> bool:
        """Whether the conditions contradict each other, because the controllers considered the node lost."""
        found = (self.pod.get("status") or {}).get("conditions") or []
        told = {one["type"]: one["status"] for one in found}
        return told.get("Ready") != told.get("ContainersReady")

    async def retell(self) -> None:
        """Report again even without a change: the API server may have modified the status meanwhile."""
        self._told = {}
        await self.tell()

    async def _keep(self, at: int) -> int:
        """Run one container repeatedly; return its last exit code."""
        policy = self.pod["spec"].get("restartPolicy", "Always")
        code, failures = 0, 0
        while not self._leaving.is_set():
            began = time.monotonic()
            try:
                code = await self._run_once(at)
            except CannotRunError as error:
                reason, _, message = str(error).partition("|")
                await self._wait(at, reason, message, failures)
                failures += 1
                continue
            except WatchdogError as error:
                await self._wait(at, "CreateContainerConfigError", str(error)[:200], failures)
                failures += 1
                continue
            if self._leaving.is_set() or policy == "Never" or (policy == "OnFailure" and not code):
                break
            run = self._runs[at]
            run.last, run.restarts = run.state, run.restarts + 1
            failures = 0 if time.monotonic() - began > _QUIET_S else failures + 1
            if failures > 1:  # the first restart is immediate, as in a kubelet
                message = f"back-off restarting failed container {self._containers[at]['name']}"
                await self._wait(at, "CrashLoopBackOff", message, failures - 2)
        return code

    async def _wait(self, at: int, reason: str, message: str, failures: int) -> None:
        run = self._runs[at]
        run.ready = run.started = False
        run.state = {"waiting": {"reason": reason, "message": message}}
        await self.tell()
        pause_s = min(_BACKOFF_MAX_S, self._backoff_s * 2 ** min(failures, 10))
        if reason == "ErrImagePull":
            await self._sleep(min(1.0, pause_s))
            run.state = {"waiting": {"reason": "ImagePullBackOff", "message": message}}
            await self.tell()
        await self._sleep(pause_s)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._leaving.wait()

    async def _run_once(self, at: int) -> int:
        container, run = self._containers[at], self._runs[at]
        child = await self._start(container)
        run.pid, run.began = child.pid, SystemClock().wall()
        run.state = {"running": {"startedAt": now_text()}}
        run.ready = not container.get("readinessProbe")
        run.started = not container.get("startupProbe")
        died = asyncio.get_running_loop().create_future()
        pidfd = os.pidfd_open(child.pid)
        loop = asyncio.get_running_loop()

        def on_death() -> None:
            if not died.done():
                died.set_result(None)

        loop.add_reader(pidfd, on_death)
        why: list[str] = []
        try:
            await self.tell()
            await self._attend(at, child, died, why)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            if child.poll() is None:
                child.kill()
            child.wait()
            run.pid = 0
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        code = child.returncode if child.returncode >= 0 else 128 - child.returncode
        run.ready = run.started = False
        reason = why[0] if why else ("Completed" if code == 0 else "Error")
        told = {"exitCode": code, "reason": reason, "finishedAt": now_text()}
        run.state = {"terminated": {"startedAt": run.state["running"]["startedAt"], **told}}
        if not self._leaving.is_set():
            await self.tell()
        return code

    async def _attend(
        self, at: int, child: subprocess.Popen[bytes], died: asyncio.Future[None], why: list[str]
    ) -> None:
        """Until the process has exited: probe it, and stop it because of a probe, its memory use or the pod's
        end."""
        watchers = self._watchers(at, child, died, why)
        tasks = [asyncio.ensure_future(one) for one in watchers]
        try:
            pending: set[asyncio.Future[None]] = set(tasks)
            while not died.done():
                await asyncio.wait([died, *pending], return_when=asyncio.FIRST_COMPLETED)
                for task in [one for one in pending if one.done()]:
                    pending.discard(task)
                    task.result()  # raise errors of a watcher instead of hiding them
        finally:
            await _end(tasks)

    def _watchers(
        self, at: int, child: subprocess.Popen[bytes], died: asyncio.Future[None], why: list[str]
    ) -> list[Coroutine[Any, Any, None]]:
        container, run = self._containers[at], self._runs[at]

        async def on_ready(good: bool) -> None:
            run.ready = good
            await self.tell()

        async def on_live(good: bool) -> None:
            if not good:
                await self._stop(child, died, why, "Error")

        async def on_started(good: bool) -> None:
            run.started = run.started or good
            await self.tell()
            await on_live(good)

        async def on_leave() -> None:
            await self._leaving.wait()
            await self._stop(child, died, why, "")

        found = [on_leave(), self._memory(container, child, why)]
        for name, act in (
            ("startupProbe", on_started),
            ("livenessProbe", on_live),
            ("readinessProbe", on_ready),
        ):
            if probe := container.get(name):
                found.append(self._probe(probe, container, act, run, name))
        return found

    async def _stop(
        self,
        child: subprocess.Popen[bytes],
        died: asyncio.Future[None],
        why: list[str],
        reason: str,
    ) -> None:
        """Send SIGTERM, and SIGKILL after the grace period."""
        if reason:
            why.append(reason)
        meta = self.pod["metadata"]
        grace_s = meta.get("deletionGracePeriodSeconds")
        if grace_s is None:
            grace_s = self.pod["spec"].get("terminationGracePeriodSeconds", 30)
        child.send_signal(signal.SIGTERM)
        await asyncio.wait([died], timeout=float(grace_s))
        if not died.done():
            child.kill()

    async def _memory(
        self, container: Object, child: subprocess.Popen[bytes], why: list[str]
    ) -> None:
        limit = spec.memory_limit(container)
        while limit is not None:
            await asyncio.sleep(_MEMORY_S)
            try:
                pages = _resident_pages(child.pid)
            except (OSError, IndexError):
                return
            if pages * _PAGE > limit:
                why.append("OOMKilled")
                child.kill()
                return

    async def _probe(
        self,
        probe: Object,
        container: Object,
        act: Callable[[bool], Awaitable[None]],
        run: Run,
        name: str,
    ) -> None:
        """Probe at the specified interval, and call `act` on each change according to the thresholds."""
        await asyncio.sleep(float(probe.get("initialDelaySeconds") or 0))
        good = bad = 0
        last: bool | None = None
        while True:
            if name == "startupProbe" or run.started:
                if await self._passes(probe, container):
                    good, bad = good + 1, 0
                else:
                    good, bad = 0, bad + 1
                verdict = last
                if good >= int(probe.get("successThreshold") or 1):
                    verdict = True
                elif bad >= int(probe.get("failureThreshold") or 3):
                    verdict = False
                if verdict is not None and verdict != last:
                    last = verdict
                    await act(verdict)
                    if name == "startupProbe":
                        return
            await asyncio.sleep(float(probe.get("periodSeconds") or 10))

    async def _passes(self, probe: Object, container: Object) -> bool:
        timeout = aiohttp.ClientTimeout(total=float(probe.get("timeoutSeconds") or 1))
        asked = probe.get("httpGet") or {}
        port = asked.get("port")
        for one in container.get("ports") or []:
            if one.get("name") == port:
                port = one["containerPort"]
        host = asked.get("host") or self._ip
        try:
            scheme = (asked.get("scheme") or "HTTP").lower()
            url = f"{scheme}://{host}:{port}{asked.get('path') or '/'}"
            # A kubelet does not verify certificates either.
            async with self._http.get(
                url, timeout=timeout, allow_redirects=False, ssl=False
            ) as answer:
                return 200 <= answer.status < 400
        except (aiohttp.ClientError, OSError):
            return False

    async def _start(self, container: Object) -> subprocess.Popen[bytes]:
        image = self._images.get(container["image"].rpartition(":")[0] or container["image"])
        image = image or self._images.get(container["image"])
        if image is None:
            told = f'failed to pull image "{container["image"]}": not found'
            raise CannotRunError(f"ErrImagePull|{told}")
        volumes = Volumes(self._client, self.pod, self.folder / "volumes", self._ip)
        mounts = await volumes.mounts(container)
        wanted = sorted(spec.secret_names(container))
        secrets = {name: await volumes.secret(name) for name in wanted}
        try:
            env = spec.environment(self.pod, container, image, self._ip, secrets)
            argv = [spec.moved(one, mounts) for one in spec.command(container, image, env)]
        except CannotRunError as error:
            raise CannotRunError(f"CreateContainerConfigError|{error}") from None
        env = {name: spec.moved(value, mounts) for name, value in env.items()}
        place = urlsplit(self._client.settings.server)
        env = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "KUBERNETES_SERVICE_HOST": place.hostname or "",
            "KUBERNETES_SERVICE_PORT": str(place.port or 443),
            **env,
            MARK: str(self.folder),
        }
        return self._spawn(argv, env, self.log_file(container["name"]))

    def _spawn(self, argv: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            try:
                return subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    env=env, cwd=self.folder, process_group=0,
                )  # fmt: skip
            except OSError as error:
                raise CannotRunError(f"RunContainerError|{argv[0]}: {error.strerror}") from error


async def _end(tasks: Collection[asyncio.Future[None]]) -> None:
    """Cancel repeatedly until all have ended: a probe timeout at the same time as a cancellation swallows the
    cancellation, and the pod would wait forever for a probe that continues."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        ended, pending = await asyncio.wait(pending, timeout=1.0)
        await asyncio.gather(*ended, return_exceptions=True)
