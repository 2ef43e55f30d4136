"""Certificates of a control plane for tests and the demo, made with openssl; valid for two days."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Final

from nomad_watchdog.errors import TerminalError

_EC: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


class Authority:
    """A certificate authority in its own directory, which also stores the certificates it signs. `timeout_s`: timeout of
    each run of openssl, in seconds."""

    def __init__(self, folder: Path, timeout_s: float = 60.0) -> None:
        self.folder = folder
        self._timeout_s = timeout_s
        self.cert = folder / "ca.crt"

    async def make(self) -> None:
        """Create the CA. Raises TerminalError if openssl is missing, fails or hangs."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.cert.exists():
            await self._openssl(
                ["req", "-x509", *_EC, "-subj", "/CN=dev-ca", *self._out("ca")],
            )

    async def issue(self, name: str, subject: str, *, san: str = "") -> tuple[Path, Path]:
        """Certificate and key of `name`. `subject`: such as ``/O=group/CN=user``; `san` makes it a server certificate."""
        cert, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        if not cert.exists():
            usage = f"extendedKeyUsage={'serverAuth' if san else 'clientAuth'}"
            more = ["-addext", f"subjectAltName={san}"] if san else []
            signed = ["-CA", str(self.cert), "-CAkey", str(self.folder / "ca.key")]
            await self._openssl(
                ["req", "-x509", *_EC, *signed, "-subj", subject, "-addext", usage, *more,
                 "-addext", "basicConstraints=critical,CA:FALSE", *self._out(name)],
            )  # fmt: skip
        return cert, key

    async def rsa_key(self, name: str) -> Path:
        """Create a private key for signing tokens."""
        key = self.folder / f"{name}.key"
        if not key.exists():
            await self._openssl(["genrsa", "-out", str(key), "2048"])
        return key

    def _out(self, name: str) -> list[str]:
        return [
            "-keyout",
            str(self.folder / f"{name}.key"),
            "-out",
            str(self.folder / f"{name}.crt"),
        ]

    async def _openssl(self, arguments: list[str]) -> None:
        try:
            done = await asyncio.to_thread(
                subprocess.run, ["openssl", *arguments], capture_output=True, check=False,
                timeout=self._timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise TerminalError(
                f"openssl {arguments[0]} gave nothing within {self._timeout_s:g} s"
            ) from error
        except OSError as error:
            raise TerminalError(
                "openssl is needed for a control plane on this machine, and is not on PATH"
            ) from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace")[-300:]
            raise TerminalError(f"openssl {arguments[0]}: {said}")
