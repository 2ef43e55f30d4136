"""The volumes of a pod as directories: its Secrets, ConfigMaps and service account token."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.errors import NotFoundError
from servers.kubelet import spec
from servers.kubelet.spec import CannotRunError, Object

_TOKEN_S: Final = 3600
_REASON: Final = "CreateContainerConfigError"


class Volumes:
    """Volumes of one pod, below `folder`. They are read once, at the start of a container: changes of a
    Secret or a ConfigMap are not applied, and a token is not renewed before its hour is over."""

    def __init__(self, client: KubernetesClient, pod: Object, folder: Path, ip: str) -> None:
        self._client, self._pod, self._folder, self._ip = client, pod, folder, ip
        self._namespace: str = pod["metadata"]["namespace"]

    async def secret(self, name: str) -> dict[str, str]:
        """The keys of a Secret. Raises CannotRunError if it does not exist."""
        data = (await self._get("secret", name)).get("data") or {}
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    async def mounts(self, container: Object) -> dict[str, str]:
        """Mount path → directory or file, for the mounts of a container. Raises CannotRunError for a volume
        that cannot be created."""
        known = {volume["name"]: volume for volume in self._pod["spec"].get("volumes") or []}
        found = {}
        for mount in container.get("volumeMounts") or []:
            folder = self._folder / mount["name"]
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in (await self._files(known[mount["name"]])).items():
                file = folder / Path(path).name
                file.touch(mode=0o600)
                file.write_text(text)
            place = folder / mount["subPath"] if "subPath" in mount else folder
            found[mount["mountPath"].rstrip("/")] = str(place)
        return found

    async def _files(self, volume: Object) -> dict[str, str]:
        if "emptyDir" in volume:
            return {}
        if "secret" in volume:
            return await self.secret(volume["secret"]["secretName"])
        if "configMap" in volume:
            return await self._config_map(volume["configMap"])
        if "projected" in volume:
            files: dict[str, str] = {}
            for source in volume["projected"]["sources"]:
                files |= await self._projected(source)
            return files
        raise CannotRunError(f"{_REASON}|volume {volume['name']}: its kind is not known here")

    async def _projected(self, source: Object) -> dict[str, str]:
        if asked := source.get("serviceAccountToken"):
            return {asked["path"]: await self._token(asked)}
        if asked := source.get("configMap"):
            return await self._config_map(asked)
        if asked := source.get("downwardAPI"):
            return {
                item["path"]: spec.field_of(self._pod, item["fieldRef"]["fieldPath"], self._ip)
                for item in asked["items"]
            }
        raise CannotRunError(f"{_REASON}|a projected source that is not known here")

    async def _config_map(self, asked: Object) -> dict[str, str]:
        data: Mapping[str, str] = (await self._get("configmap", asked["name"])).get("data") or {}
        if not (items := asked.get("items")):
            return dict(data)
        return {item["path"]: data[item["key"]] for item in items if item["key"] in data}

    async def _token(self, asked: Object) -> str:
        """A token of the pod's service account that expires with the pod."""
        meta = self._pod["metadata"]
        account = self._pod["spec"].get("serviceAccountName") or "default"
        wish = {
            "audiences": [asked["audience"]] if asked.get("audience") else [],
            "expirationSeconds": int(asked.get("expirationSeconds") or _TOKEN_S),
            "boundObjectRef": {
                "kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"],
            },
        }  # fmt: skip
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": wish}
        path = f"/api/v1/namespaces/{self._namespace}/serviceaccounts/{account}/token"
        answer: dict[str, Any] = await self._client.create(path, body)
        return str(answer["status"]["token"])

    async def _get(self, kind: str, name: str) -> dict[str, Any]:
        try:
            return await self._client.get(f"/api/v1/namespaces/{self._namespace}/{kind}s/{name}")
        except NotFoundError:
            raise CannotRunError(f'{_REASON}|{kind} "{name}" not found') from None
