"""A repair by an HTTP request. Any 2xx is success; redirects are not followed."""

from __future__ import annotations

from watchdog_agent.runtime import http, transport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Ended, Step


def start(loop: Loop, step: Step, device: dict[str, str], ended: Ended) -> Call:
    """Start it; `ended(ok, reason)` is called once, unless it is cancelled."""
    return Call(loop, step, device, ended)


class Call:
    """One request. The body of a POST names the device."""

    def __init__(self, loop: Loop, step: Step, device: dict[str, str], ended: Ended) -> None:
        url = http.Url(step["url"], tls=True)
        body = b""
        if step["method"] == "POST":
            from watchdog_agent.runtime.stdlib_light import json

            body = json.dumps(device).encode()
        data = http.request(step["method"], url.base, url.host_header, body)

        def answered(
            status: int | None, _headers: dict[str, str], _body: bytes, reason: str
        ) -> None:
            if status is None:
                ended(False, reason)
            else:
                ended(200 <= status < 300, f"status {status}")

        trusted = transport.trust(url, "")
        self.fetch = transport.send(
            loop, url, data, step["timeout_s"], answered, trusted, max_body=0
        )

    def finish_soon(self) -> None:
        """No-op: cannot be sped up."""

    def cancel(self) -> None:
        """Cancel it without a result."""
        self.fetch.cancel()
