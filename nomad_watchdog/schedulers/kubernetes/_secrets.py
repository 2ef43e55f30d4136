"""The Secret with the credential of one agent: made before its workload, and gone with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.schedulers.kubernetes.names import Ref
from nomad_watchdog.schedulers.kubernetes.objects import expecting


def secret_name(ref: Ref, epoch: int) -> str:
    """One for each epoch: a late start must not overwrite the credential of the accepted agent."""
    return f"{ref.name}-{epoch}"


def _path(ref: Ref, epoch: int) -> str:
    return f"/api/v1/namespaces/{ref.namespace}/secrets/{secret_name(ref, epoch)}"


class AgentSecret:
    """Our right to Secrets is to write them, never to read them: what is there shows in conflicts only.

    `body`: None for an agent without a credential, of which nothing is written."""

    def __init__(self, client: KubernetesClient, ref: Ref, body: Mapping[str, Any] | None) -> None:
        self._client = client
        self._ref = ref
        self._path = _path(ref, ref.epoch)
        self._body = body
        self._put = False

    async def put(self, *, new: bool) -> None:
        """Write it, yet without an owner; once for all tries.

        `new`: raises ConflictError when there is one of this name, which may have its owner already, or
        belong to another installation."""
        if self._body is None or self._put:
            return
        await self._client.apply(self._path, expecting(self._body, None) if new else self._body)
        self._put = True

    async def adopt(self, body: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """Give it to the workload with this body, which is there as `made`: the garbage collector takes the
        Secret with its owner. What is read as metadata alone has another kind, so that is the body's."""
        if self._body is None:
            return
        self._put = False  # from here on it is the agent's
        reference = {
            "apiVersion": body["apiVersion"],
            "kind": body["kind"],
            "name": made["metadata"]["name"],
            "uid": made["metadata"]["uid"],
        }
        meta = {**self._body["metadata"], "ownerReferences": [reference]}
        await self._client.apply(self._path, {**self._body, "metadata": meta})

    async def drop(self, *, sure: bool = False) -> None:
        """Delete it when it was made here and has no workload; `sure`: it is ours whoever made it."""
        if self._put or (sure and self._body is not None):
            await self._client.delete(self._path)
            self._put = False

    async def replace(self, epoch: int) -> None:
        """Delete the one of this earlier epoch."""
        if self._body is not None:
            await self._client.delete(_path(self._ref, epoch))
