"""The few calls to Consul's KV store and sessions that coordination and kept state need."""

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
"""Of a listing; what is beyond it is not seen. About 8,000 notes."""


class Kv:
    """Calls of one agent, each over its own connection that is closed after it."""

    def __init__(self, loop: Loop, config: Config, folder: str) -> None:
        """`folder`: below the installation's prefix, as ``anomalies``."""
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
        """`path` begins after /v1. The token goes in a header and is read anew (S10)."""
        token = registration.read_token()
        headers = [("X-Consul-Token", token)] if token else []
        raw = b"" if body is None else json.dumps(body).encode()
        data = http.request(method, f"{self.url.base}/v1{path}", self.url.host_header, raw, headers)
        # 1.0: to 1.1 Consul sends what is longer than some KB in chunks, and `http` knows none.
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
        """`done(taken, reason)`: None = Consul did not answer properly, and why."""

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
        """All entries whose key begins so, each with its decoded ``value`` and its key below our folder
        as ``name``; [] when there is none. Of a listing of more than `most` bytes the beginning."""

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
        """`index`: only if it is still as it was then. `done(gone)`."""
        path = f"/kv/{self.folder}/{key}" + ("" if index is None else f"?cas={index}")

        def answered(
            status: int | None, _headers: dict[str, str], body: bytes, _reason: str
        ) -> None:
            done(status == 200 and body.strip() == b"true")

        return self.call("DELETE", path, None, answered)


def entries(body: bytes, folder: str, most: int = MAX_BYTES) -> list[KvEntry] | None:
    """Consul's listing, decoded; of one that was cut at `most` bytes the whole entries. None of what is no
    listing: to take that for an empty one would make each agent of many the only one."""
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
    """Why Consul refused a call: the status and the beginning of its answer."""
    return f"status {status}: {body[:120].decode('utf-8', 'replace').strip()}"
