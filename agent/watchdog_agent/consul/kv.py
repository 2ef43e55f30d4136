"""Calls to Consul's KV store and sessions, for coordination and stored state."""

from __future__ import annotations

from watchdog_agent.consul import registration
from watchdog_agent.runtime import http, parsing, transport
from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Config, Fetched, KvEntry

TIMEOUT_S = 2.0
MAX_BYTES = 4 << 20
"""Maximum size of a listing in bytes, about 8,000 notes; the rest is ignored."""


class Kv:
    """Consul calls of one agent, each over its own connection, which is closed afterwards."""

    def __init__(self, loop: Loop, config: Config, folder: str) -> None:
        """`folder`: path below the installation's prefix, such as ``anomalies``."""
        self.loop = loop
        self.config = config
        self.url = registration.place(config)
        self.folder = f"{config.get('prefix') or 'nomad-watchdog'}/{folder}"

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        done: Fetched,
        timeout_s: float = TIMEOUT_S,
        most: int = MAX_BYTES,
    ) -> http.HttpRequest:
        """Send a request; `path` is below /v1. The token goes in a header and is read again each time (S10)."""
        token = registration.read_token()
        headers = [("X-Consul-Token", token)] if token else []
        raw = b"" if body is None else json.dumps(body).encode()
        data = http.request(method, f"{self.url.base}/v1{path}", self.url.host_header, raw, headers)
        # HTTP/1.0, because to 1.1 Consul sends bodies of more than a few KB in chunks, which `http` does not support.
        data = data.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)
        trusted = registration.trusted_by(self.config)
        return transport.send(self.loop, self.url, data, timeout_s, done, trusted, max_body=most)

    def put(
        self,
        key: str,
        query: str,
        body: Mapping[str, object],
        done: Callable[[bool | None, str], None],
    ) -> http.HttpRequest:
        """Write a key. `done(taken, reason)`; taken is None if Consul did not answer properly."""

        def answered(
            status: int | None, _headers: dict[str, str], body: bytes, reason: str
        ) -> None:
            if status == 200:
                done(body.strip() == b"true", "")
            else:
                done(None, reason if status is None else reason_of(status, body))

        return self.call("PUT", f"/kv/{self.folder}/{key}?{query}", body, answered)

    def listed(
        self,
        key: str,
        done: Callable[[list[KvEntry] | None, str], None],
        most: int = MAX_BYTES,
    ) -> http.HttpRequest:
        """List all entries with this key prefix, each with its decoded ``value`` and, as ``name``, its key relative to
        the folder; [] if there are none. A listing of more than `most` bytes is cut off."""

        def answered(
            status: int | None, _headers: dict[str, str], body: bytes, reason: str
        ) -> None:
            if status == 404:
                done([], "")
            elif status != 200:
                done(None, reason if status is None else reason_of(status, body))
            else:
                found = entries(body, f"{self.folder}/", most)
                done(found, "" if found is not None else "its listing is not JSON")

        path = f"/kv/{self.folder}/{key}?recurse=true&consistent=true"
        return self.call("GET", path, None, answered, most=most)

    def delete(
        self, key: str, done: Callable[[bool], None], index: int | None = None
    ) -> http.HttpRequest:
        """Delete a key; with `index`, only if it is unchanged since. `done(gone)`."""
        path = f"/kv/{self.folder}/{key}" + ("" if index is None else f"?cas={index}")

        def answered(
            status: int | None, _headers: dict[str, str], body: bytes, _reason: str
        ) -> None:
            done(status == 200 and body.strip() == b"true")

        return self.call("DELETE", path, None, answered)


def entries(body: bytes, folder: str, most: int = MAX_BYTES) -> list[KvEntry] | None:
    """Decode Consul's listing; if it was cut off at `most` bytes, its complete entries. None for anything that is not
    a listing: treating it as empty would make each of many agents believe that it is the only one."""
    import base64

    if len(body) >= most:
        body = body[: body.rfind(b"},{")] + b"}]"
    try:
        found = parsing.loads(body)
    except ValueError:
        return None
    if not isinstance(found, list):
        return None
    out: list[KvEntry] = []
    for entry in found:
        try:
            value = parsing.loads(base64.b64decode(entry["Value"] or ""))
            name = str(entry["Key"]).removeprefix(folder)
            index = int(entry["ModifyIndex"])
        except (ValueError, KeyError, TypeError):
            continue
        session = entry.get("Session") or ""
        out.append({"name": name, "value": value, "session": session, "index": index})
    return out


def reason_of(status: int, body: bytes) -> str:
    """Why Consul rejected a call: the status and the beginning of the response body."""
    return f"status {status}: {body[:120].decode('utf-8', 'replace').strip()}"
