"""Whom a TLS connection trusts."""

from __future__ import annotations

import os
import ssl

from watchdog_agent import errors
from watchdog_agent.runtime import tls
from watchdog_agent.runtime.http import reason_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Probe


class Trust:
    """The context of one probe, made anew when one of its files has changed: certificates of devices are
    short-lived. Raises ConfigError when it can't be made at first, unless `later`; then the old one is kept."""

    def __init__(self, spec: Probe, *, later: bool = False) -> None:
        self.spec = spec
        # before they are read, so that a change meanwhile is one
        self.stamp = self._stamp()
        self.context: ssl.SSLContext | None = None
        try:
            self.context = context_of(spec)
        except errors.ConfigError:
            if not later or not self.stamp:
                raise

    def now(self) -> ssl.SSLContext:
        """The context for the next connection. Raises ConfigError while none could be made."""
        if self.context is None:
            self.context = context_of(self.spec)
        stamp = self._stamp()
        if stamp != self.stamp:
            try:
                # Half written, or the key comes a moment later than its certificate: next time.
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
                    found.append((about.st_mtime_ns, about.st_ino))
        return found


def context_of(spec: Probe) -> ssl.SSLContext:
    """What is trusted; with `verify = false` everybody. Raises ConfigError."""
    if spec["verify"]:
        context = tls.trusting(spec["ca_cert"])
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if spec["client_cert"]:
        try:
            # Without a password of ours OpenSSL would ask for one at a terminal, and wait.
            def chain(cert: str, key: str | None = None) -> None:
                context.load_cert_chain(cert, key, password=lambda: "none")

            def with_key(cert: str) -> None:
                tls.from_file(spec["client_key"], lambda key: chain(cert, key))

            tls.from_file(spec["client_cert"], with_key if spec["client_key"] else chain)
        except OSError as error:
            raise errors.ConfigError(f"client_cert: {reason_of(error)}") from None
    return context
