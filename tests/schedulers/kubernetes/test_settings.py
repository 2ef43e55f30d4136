"""How the API server is found, and how credentials are refreshed; no server is needed."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients._kubernetes_credentials import RETRY_S, Credentials
from nomad_watchdog.clients._kubernetes_settings import KubernetesAccess, in_cluster
from nomad_watchdog.errors import TransientError, UserError
from nomad_watchdog.model import Monotonic, WallTime


@dataclass
class HandClock:
    now: float = 1000.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.now)

    def wall(self) -> WallTime:
        return WallTime(self.now)


def kubeconfig(path: Path, user: dict[str, Any] | None = None, **cluster: Any) -> Path:
    document = {
        "current-context": "one",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:6443", **cluster}}],
        "users": [{"name": "u", "user": user or {"token": "t"}}],
        "contexts": [
            {"name": "one", "context": {"cluster": "c", "user": "u", "namespace": "n1"}},
            {"name": "two", "context": {"cluster": "c", "user": "u"}},
        ],
    }
    path.write_text(json.dumps(document))
    return path


def test_a_kubeconfig_gives_the_current_or_the_named_context(tmp_path: Path) -> None:
    """Without a name the file's current context is used, otherwise the named one; an unknown
    context is rejected by name."""
    file = str(kubeconfig(tmp_path / "config"))

    assert KubernetesAccess.discover(file).namespace == "n1"
    assert KubernetesAccess.discover(file, "two").namespace == ""
    with pytest.raises(UserError, match="no context 'three'; there are: one, two"):
        KubernetesAccess.discover(file, "three")


def test_places_are_tried_in_order(tmp_path: Path) -> None:
    """An explicit file takes precedence over KUBECONFIG, and KUBECONFIG over the file in HOME; with
    none of them the error says what to do."""
    explicit = kubeconfig(tmp_path / "explicit", {"token": "explicit"})
    other = kubeconfig(tmp_path / "other", {"token": "other"})
    (tmp_path / ".kube").mkdir()
    kubeconfig(tmp_path / ".kube" / "config", {"token": "home"})
    home = {"HOME": str(tmp_path)}
    both = {**home, "KUBECONFIG": f"{tmp_path}/missing:{other}"}

    assert KubernetesAccess.discover(str(explicit), env=both).token == "explicit"
    assert KubernetesAccess.discover(env=both).token == "other"
    assert KubernetesAccess.discover(env=home).token == "home"
    with pytest.raises(UserError, match=r"set kubernetes.kubeconfig or KUBECONFIG"):
        KubernetesAccess.discover(env={})


def test_several_files_are_merged_and_the_first_wins(tmp_path: Path) -> None:
    """If two users have the same name, the first file wins; a user only in the second file is
    found."""
    one = kubeconfig(tmp_path / "one", {"token": "first"})
    two = tmp_path / "two"
    two.write_text(
        json.dumps({"contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}]})
    )
    found = KubernetesAccess.discover(env={"KUBECONFIG": f"{one}:{two}"}, context="x")

    assert found.token == "first"


def test_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    """A certificate with a relative path is read from the kubeconfig's directory, like kubectl
    does."""
    (tmp_path / "ca.pem").write_text("-- a PEM --")
    file = kubeconfig(tmp_path / "config", **{"certificate-authority": "ca.pem"})

    assert KubernetesAccess.discover(str(file)).ca == "-- a PEM --"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not YAML, line"),
        ("[]", "contains no document"),
        ("current-context: x", "no context 'x'; there are: none"),
        ("a: 1", "no current-context"),
        ("users: 5", "users is not a list"),
        ("contexts: [{name: x, context: y}]", "context 'x' is not a mapping"),
    ],
)
def test_what_is_no_kubeconfig_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """An unparsable file is rejected with a readable error that does not quote it."""
    file = tmp_path / "config"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        KubernetesAccess.discover(str(file))


def test_a_secret_is_not_in_messages_or_in_repr(tmp_path: Path) -> None:
    """Neither a broken file's error nor the settings' repr contains a token (S10)."""
    file = tmp_path / "config"
    file.write_text("users: [{token: hunter2, x: }}")
    with pytest.raises(UserError) as error:
        KubernetesAccess.discover(str(file))
    good = KubernetesAccess.discover(str(kubeconfig(tmp_path / "good", {"token": "hunter2"})))

    assert "hunter2" not in str(error.value) + repr(good)


def test_a_wrong_certificate_is_a_user_error(tmp_path: Path) -> None:
    """Invalid base64, and PEM that is not a certificate, are reported as wrong settings."""
    with pytest.raises(UserError, match="is not base64"):
        KubernetesAccess.discover(
            str(kubeconfig(tmp_path / "a", **{"certificate-authority-data": "%"}))
        )
    data = base64.b64encode(b"nonsense").decode()
    found = KubernetesAccess.discover(
        str(kubeconfig(tmp_path / "b", **{"certificate-authority-data": data}))
    )
    with pytest.raises(UserError, match="cannot load the TLS certificates"):
        found.ssl_context()


def test_the_service_account_of_a_pod(tmp_path: Path) -> None:
    """In a pod the server comes from the environment, and the namespace and the token from the
    mounted files, in whatever directory the setting names."""
    env = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    with pytest.raises(UserError, match="automountServiceAccountToken"):
        in_cluster(env, tmp_path)
    for name, text in (("token", "abc\n"), ("ca.crt", "pem"), ("namespace", "where\n")):
        (tmp_path / name).write_text(text)
    found = in_cluster(env, tmp_path)

    assert (found.server, found.namespace) == ("https://[fd00::1]:443", "where")
    assert found.token_file == str(tmp_path / "token")
    assert KubernetesAccess.discover("", "", env, service_account=str(tmp_path)) == found


async def test_a_token_file_is_read_again_after_a_minute_and_when_refused(tmp_path: Path) -> None:
    """A rotated token is used within a minute, and at once when the old one is refused."""
    file = tmp_path / "token"
    file.write_text("one")
    clock = HandClock()
    credentials = Credentials(KubernetesAccess("http://x", token_file=str(file)), clock)

    assert (await credentials.current()).token == "one"
    file.write_text("two")
    assert (await credentials.current()).token == "one"
    clock.now += 61
    assert (await credentials.current()).token == "two"
    file.write_text("three")
    assert await credentials.refused(await credentials.current())
    assert (await credentials.current()).token == "three"
    assert not await credentials.refused(await credentials.current())


PLUGIN = """#!{python}
import json, os, pathlib, sys
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
count = pathlib.Path(sys.argv[1])
n = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(n))
print(json.dumps({{"kind": "ExecCredential", "apiVersion": info["apiVersion"],
    "status": {{"token": os.environ["WORD"] + str(n), "expirationTimestamp": "1970-01-01T01:00:00Z"}}}}))
"""


async def test_an_exec_credential_is_kept_until_it_expires(tmp_path: Path) -> None:
    """The plugin beside the kubeconfig runs with its arguments and environment, and only once until
    its credential is about to expire or is refused."""
    plugin = tmp_path / "plugin"
    plugin.write_text(PLUGIN.format(python=sys.executable))
    plugin.chmod(0o755)
    block = {
        "command": "./plugin",
        "args": [str(tmp_path / "count")],
        "env": [{"name": "WORD", "value": "token-"}],
        "apiVersion": "client.authentication.k8s.io/v1",
    }
    settings = KubernetesAccess.discover(str(kubeconfig(tmp_path / "config", {"exec": block})))
    clock = HandClock(3580.0)
    credentials = Credentials(settings, clock)

    assert (await credentials.current()).token == "token-1"
    clock.now = 3589.0
    assert (await credentials.current()).token == "token-1"
    clock.now = 3590.0
    assert (await credentials.current()).token == "token-2"
    clock.now = 0.0
    assert await credentials.refused(await credentials.current())
    assert (await credentials.current()).token == "token-3"


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("exit 3", TransientError, "exited with 3"),
        ("echo hello", UserError, "printed no ExecCredential"),
        ("echo '{\"status\": {}}'", UserError, "with a token or a certificate"),
    ],
)
async def test_a_plugin_that_gives_nothing_is_named(
    tmp_path: Path, script: str, kind: type[Exception], words: str
) -> None:
    """A plugin failure is transient; unexpected plugin output is a wrong setting."""
    plugin = tmp_path / "plugin"
    plugin.write_text(f"#!/bin/sh\n{script}\n")
    plugin.chmod(0o755)
    block = {"exec": {"command": str(plugin)}}
    settings = KubernetesAccess.discover(str(kubeconfig(tmp_path / "config", block)))
    with pytest.raises(kind, match=words):
        await Credentials(settings, HandClock()).current()


@pytest.mark.parametrize(
    ("user", "cluster", "words"),
    [
        ({"exec": ["x"]}, {}, "exec has no command"),
        ({"exec": {"command": "x", "args": "-v"}}, {}, "exec.args is not a list"),
        ({"exec": {"command": "x", "env": 5}}, {}, "exec.env is not a list"),
        ({"exec": {"command": "x", "env": ["A=b"]}}, {}, "needs a name and a value"),
        ({"exec": {"command": "x", "env": [{"name": "A"}]}}, {}, "needs a name and a value"),
        ({"client-certificate": 5}, {}, '/5": No such file'),
        ({}, {"server": "https://[::1"}, "must be https://host:port"),
        ({}, {"server": "https://host:port"}, "must be https://host:port"),
    ],
)
def test_a_kubeconfig_of_another_shape_is_refused(
    tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], words: str
) -> None:
    """A wrong type where a string, list or mapping is expected is named; no other error is
    raised."""
    file = kubeconfig(tmp_path / "config", user, **cluster)
    with pytest.raises(UserError, match=words):
        KubernetesAccess.discover(str(file))


def counting_plugin(tmp_path: Path, then: str) -> tuple[KubernetesAccess, Path]:
    plugin, runs = tmp_path / "plugin", tmp_path / "runs"
    plugin.write_text(f"#!/bin/sh\necho >> {runs}\nsleep 0.2\n{then}\n")
    plugin.chmod(0o755)
    block = {"exec": {"command": str(plugin)}}
    return KubernetesAccess.discover(str(kubeconfig(tmp_path / "config", block))), runs


async def test_who_waits_for_a_plugin_that_fails_gets_its_failure(tmp_path: Path) -> None:
    """A hundred calls run the plugin once and all get its failure; it is retried after a few
    seconds."""
    settings, runs = counting_plugin(tmp_path, "exit 3")
    clock = HandClock()
    credentials = Credentials(settings, clock)
    calls = [credentials.current() for _ in range(100)]
    told = await asyncio.gather(*calls, return_exceptions=True)

    assert {(type(one), str(one)) for one in told} == {
        (TransientError, "kubernetes: the credential plugin plugin exited with 3")
    }
    assert len(runs.read_text()) == 1
    clock.now += RETRY_S
    with pytest.raises(TransientError):
        await credentials.current()
    assert len(runs.read_text()) == 2


async def test_a_plugin_that_gives_what_was_refused_is_not_asked_by_each_call(
    tmp_path: Path,
) -> None:
    """A hundred calls that are refused with one token run the plugin once more, not a hundred
    times."""
    settings, runs = counting_plugin(tmp_path, 'echo \'{"status": {"token": "same"}}\'')
    clock = HandClock()
    credentials = Credentials(settings, clock)
    used = await credentials.current()
    told = await asyncio.gather(*(credentials.refused(used) for _ in range(100)))

    assert set(told) == {False}
    assert len(runs.read_text()) == 2
    clock.now += RETRY_S
    assert not await credentials.refused(used)
    assert len(runs.read_text()) == 3
