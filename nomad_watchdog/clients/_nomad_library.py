"""The library python-nomad, run in threads over a session of our own.

It serves rare calls: parse, validate, register, read.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Final, TypeVar
from urllib.parse import quote

import nomad  # type: ignore[import-untyped]  # python-nomad ships no types
import nomad.api.exceptions  # type: ignore[import-untyped]
import requests
import requests.adapters

from nomad_watchdog.clients._nomad_settings import NomadAccess, translate
from nomad_watchdog.clients.nomad_rows import Job
from nomad_watchdog.errors import TransientError

_T = TypeVar("_T")
MAX_THREADS: Final = 4
CONNECT_S: Final = 2.0


class NoAnswerError(TransientError):
    """The connection failed or was closed before a response arrived."""


class _Adapter(requests.adapters.HTTPAdapter):
    """Transport of requests with our TLS context and server name, and as many connections as threads."""

    def __init__(self, context: ssl.SSLContext | None, server_name: str) -> None:
        self._context = context
        self._server_name = server_name
        super().__init__(pool_maxsize=MAX_THREADS, pool_block=True)

    def init_poolmanager(self, *args: Any, **keywords: Any) -> None:
        if self._context is not None:
            keywords["ssl_context"] = self._context
        if self._server_name:
            keywords["server_hostname"] = self._server_name
            keywords["assert_hostname"] = self._server_name
        super().init_poolmanager(*args, **keywords)

    def cert_verify(self, *args: Any, **keywords: Any) -> None:
        """Our context has its authorities; requests would add those of its own bundle."""
        if self._context is None:
            super().cert_verify(*args, **keywords)  # type: ignore[no-untyped-call]  # requests


class NomadLibrary:
    """The calls of the library that this project uses. They block; `run` runs them in a thread."""

    def __init__(self, settings: NomadAccess, context: ssl.SSLContext | None) -> None:
        self._base = settings.address.rstrip("/")
        self._threads = asyncio.Semaphore(MAX_THREADS)
        self._session = requests.Session()
        self._session.trust_env = False  # ignore proxies and bundles of the environment
        self._session.mount(self._base, _Adapter(context, settings.tls_server_name))
        library = nomad.Nomad(
            address=self._base,
            namespace=settings.namespace,
            timeout=(CONNECT_S, settings.timeout_s),
            verify=not settings.tls_skip_verify,
            session=self._session,
        )
        self._jobs, self._job, self._validate = library.jobs, library.job, library.validate
        for endpoint in (self._jobs, self._job, self._validate):
            # the library replaces empty values by the environment's; these are explicit
            endpoint.region = settings.region or None
            endpoint.cert = (
                (settings.client_cert, settings.client_key) if settings.client_cert else ()
            )

    def close(self) -> None:
        self._session.close()

    def set_token(self, token: str) -> None:
        for endpoint in (self._jobs, self._job, self._validate):
            endpoint.token = token or None

    def parse(self, text: str, variables: str) -> object:
        body = {"JobHCL": text, "Variables": variables, "Canonicalize": False}
        return self._jobs.request("parse", json=body, method="post").json()

    def validate(self, job: Job) -> dict[str, Any]:
        answer: dict[str, Any] = self._validate.validate_job({"Job": job}).json()
        return answer

    def register(self, body: dict[str, object]) -> int:
        return int(self._jobs.request(json=body, method="post").json()["JobModifyIndex"])

    def job(self, job_id: str) -> Job:
        found: Job = self._job.get_job(quote(job_id, safe=""))
        return found

    async def run(self, capability: str, function: Callable[[], _T]) -> _T:
        """Run a call in a thread. `capability`: the one that it needs. Raises NoAnswerError and as `translate`."""
        async with self._threads:
            try:
                return await asyncio.to_thread(function)
            except nomad.api.exceptions.BaseNomadException as error:
                response = error.nomad_resp
                if isinstance(response, requests.Response):
                    after = response.headers.get("Retry-After", "")
                    found = translate(response.status_code, response.text, capability, after)
                    raise found from error
                kind = type(response).__name__
                raise NoAnswerError(f"nomad at {self._base} does not answer: {kind}") from error
            except (requests.RequestException, ValueError) as error:
                kind = type(error).__name__
                raise NoAnswerError(f"nomad at {self._base} does not answer: {kind}") from error
