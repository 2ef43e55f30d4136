"""Text that other programs accept is accepted here: byte order marks, wrapped base64, comments in any language."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from nomad_watchdog import text_files
from nomad_watchdog.api.listener import outgoing_context, tls_context
from nomad_watchdog.clients import hashicorp_environment
from nomad_watchdog.clients._kubernetes_settings import KubernetesAccess
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.config.load import load
from nomad_watchdog.config.types import certificates
from nomad_watchdog.controllers import inventory_file
from nomad_watchdog.errors import UserError
from nomad_watchdog.secret_files import SecretFile, read_keys, read_token
from servers.certificates import Authority

BOM = b"\xef\xbb\xbf"
COMMENT = "# Wurzel für Geräte, 根证书\n".encode()


def kubeconfig(folder: Path, **cluster: str) -> str:
    """A kubeconfig with these settings of its cluster."""
    document = {
        "current-context": "one",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1", **cluster}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u"}}],
    }
    file = folder / "kubeconfig"
    file.write_bytes(BOM + json.dumps(document).encode())
    return str(file)


async def test_a_kubeconfig_with_wrapped_base64_is_taken(tmp_path: Path) -> None:
    """Lines of 64 and 76 characters, with LF and CRLF, and a comment before the certificate (C7)."""
    authority = Authority(tmp_path / "ca")
    await authority.make()
    plain = authority.cert.read_bytes()
    for raw in (plain, COMMENT + plain, BOM + plain):
        packed = base64.b64encode(raw).decode()
        for width, end in ((64, "\n"), (76, "\r\n"), (10_000, "\n")):
            rows = [packed[i : i + width] for i in range(0, len(packed), width)]
            wrapped = end.join(rows) + end
            file = kubeconfig(tmp_path, **{"certificate-authority-data": wrapped})
            settings = KubernetesAccess.discover(file)
            assert settings.ca == plain.decode()
            settings.ssl_context()


def test_a_proxy_of_a_kubeconfig_is_refused_in_words(tmp_path: Path) -> None:
    """A proxy is rejected rather than bypassed; an empty setting means no proxy (C7)."""
    with pytest.raises(UserError, match="proxy-url of the cluster is not supported"):
        KubernetesAccess.discover(kubeconfig(tmp_path, **{"proxy-url": "http://p:3128"}))
    assert KubernetesAccess.discover(kubeconfig(tmp_path, **{"proxy-url": ""})).token == "t"


async def test_comments_between_certificates_are_left_out(tmp_path: Path) -> None:
    """Agents get only the certificates, and TLS contexts accept the file as it is (C7)."""
    authority = Authority(tmp_path / "ca")
    await authority.make()
    plain = authority.cert.read_bytes()
    file = tmp_path / "commented.pem"
    for text in (COMMENT + plain, BOM + plain + COMMENT, plain.replace(b"\n", b"\r\n") + COMMENT):
        file.write_bytes(text)
        assert certificates("api.ca_cert", str(file)) == plain.decode()
        hashicorp_environment.trust("consul", ca_cert=str(file))
    with pytest.raises(UserError, match=r"consul\.ca_cert .*no usable certificate"):
        file.write_bytes(COMMENT)
        hashicorp_environment.trust("consul", ca_cert=str(file))


@pytest.mark.parametrize("key", ["of its own", "in the same file"])
async def test_certificates_with_a_byte_order_mark_are_shown(tmp_path: Path, key: str) -> None:
    """Our own certificate, a client certificate, their keys and the authority of the clients are accepted as saved by a
    Windows editor; a key that belongs to another certificate is still rejected."""
    authority = Authority(tmp_path / "ca")
    await authority.make()
    cert, own = await authority.issue("server", "/CN=server")
    _, other = await authority.issue("other", "/CN=other")
    for file in (cert, own, other, authority.cert):
        file.write_bytes(BOM + file.read_bytes())
    if key == "in the same file":
        cert.write_bytes(cert.read_bytes() + own.read_bytes().removeprefix(BOM))
    files = {"tls_cert": str(cert), "tls_key": str(own if key == "of its own" else cert)}
    api = ApiSettings(**files, client_ca=str(authority.cert), ca_cert=str(authority.cert))
    assert tls_context(api) is not None
    assert outgoing_context(api) is not None
    own_key = str(own) if key == "of its own" else ""
    hashicorp_environment.trust("consul", client_cert=str(cert), client_key=own_key)
    if key == "of its own":
        with pytest.raises(UserError, match="tls_key"):
            tls_context(api.model_copy(update={"tls_key": str(other)}))


@pytest.mark.parametrize(
    ("number", "value"), [("2.5e-1", 0.25), ("1E-2", 0.01), ("1e0", 1.0), ("0.5", 0.5), ("1", 1.0)]
)
def test_a_number_may_have_an_exponent(tmp_path: Path, number: str, value: float) -> None:
    """A number is read as in HCL, in a block and in a list (C7)."""
    file = tmp_path / "w.hcl"
    file.write_bytes(BOM + f"mass_change {{\n  fraction = {number}\n}}\n".encode())
    assert load(file, {"HOME": "/nowhere"}).mass_change.fraction == value


@pytest.mark.parametrize("name", ["i.json", "array.json", "i.hcl"])
def test_an_inventory_with_a_byte_order_mark_is_read(tmp_path: Path, name: str) -> None:
    """As saved by a spreadsheet or a Windows editor, in each of its forms (C7)."""
    one = '{"id": "gerät", "address": "10.0.0.1"}'
    text = {
        "i.json": one,
        "array.json": f"[{one}]",
        "i.hcl": 'device "gerät" {\n  address = "10.0.0.1"\n}\n',
    }[name]
    file = tmp_path / name
    file.write_bytes(BOM + text.encode())
    (found,) = inventory_file.read(file, inventory_file.signature(file)).values()
    assert found.id == "gerät"


def test_a_secret_with_a_byte_order_mark_is_the_secret(tmp_path: Path) -> None:
    """Tokens and keys are the text in the file without the mark before it."""
    file = tmp_path / "secret"
    file.write_bytes(BOM + b"k" * 40 + b"\r\n")
    assert text_files.token("consul.token_file", file) == "k" * 40
    assert SecretFile("x", file, read_token).required().now(0.0) == (b"k" * 40,)  # type: ignore[arg-type]
    assert SecretFile("x", file, read_keys).required().now(0.0) == (b"k" * 40,)  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", ["tök".encode(), b"a\nb", b"\xff\xfe\x00"])
def test_what_no_token_holds_is_refused_without_being_shown(tmp_path: Path, raw: bytes) -> None:
    """An invalid file is named, and its content is not disclosed (S10)."""
    file = tmp_path / "secret"
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"nomad\.token_file .*secret") as caught:
        text_files.token("nomad.token_file", file)
    assert "tök" not in str(caught.value)
