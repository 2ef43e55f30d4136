"""Trusted CAs and client certificates of TLS connections."""

from __future__ import annotations

import os
import ssl

from watchdog_agent import errors
from watchdog_agent.runtime import secrets, tls
from watchdog_agent.runtime.http import reason_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Probe


class Trust:
    """The TLS context of one probe, reloaded when its files change: device certificates are short-lived. A failed
    reload keeps the old context. Raises ConfigError if the first load fails; with `later`, only without files."""

    def __init__(self, spec: Probe, *, later: bool = False) -> None:
        self.spec = spec
        # Before the files are read, so that a change during the read is detected.
        self.stamp = self._stamp()
        self.context: ssl.SSLContext | None = None
        try:
            self.context = context_of(spec)
        except errors.ConfigError:
            if not later or not self.stamp:
                raise

    def now(self) -> ssl.SSLContext:
        """The context for the next connection. Raises ConfigError while none could be loaded."""
        if self.context is None:
            self.context = context_of(self.spec)
        stamp = self._stamp()
        if stamp != self.stamp:
            try:
                # The file may be half written, or its key not replaced yet: retry on the next call.
                self.context = context_of(self.spec)
                self.stamp = stamp
            except errors.ConfigError:
                pass
        return self.context

    def _stamp(self) -> list[tuple[int, int]]:
        found = []
        for name in ("ca_cert", "client_cert", "client_key"):
            path = self.spec[name]
            if path and "BEGIN CERTIFICATE" not in path:
                try:
                    about = os.stat(path)
                except OSError:
                    found.append((0, 0))
                else:
                    # Not the modification time, which can be set back.
                    found.append((about.st_ctime_ns, about.st_ino))
        return found


def context_of(spec: Probe) -> ssl.SSLContext:
    """A new context; `verify = false` disables verification. Raises ConfigError."""
    if spec["verify"]:
        context = tls.trusting(spec["ca_cert"])
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if spec["client_cert"]:
        try:
            secrets.check(spec["client_key"] or spec["client_cert"])

            # Without a password callback OpenSSL would prompt on the terminal and block.
            def chain(cert: str, key: str | None = None) -> None:
                context.load_cert_chain(cert, key, password=lambda: "none")

            def with_key(cert: str) -> None:
                tls.from_file(spec["client_key"], lambda key: chain(cert, key))

            tls.from_file(spec["client_cert"], with_key if spec["client_key"] else chain)
        except OSError as error:
            raise errors.ConfigError(f"client_cert: {reason_of(error)}") from None
    return context
