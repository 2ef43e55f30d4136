"""What a setting's value may be: durations, sizes, addresses; each checked and converted once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from nomad_watchdog.config_hcl import parse_duration, parse_size, show
from nomad_watchdog.errors import UserError


def checked_url(value: str) -> str:
    parts = urlsplit(value if "//" in value else f"http://{value}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{show(value)} is not an address; write http://HOST:PORT or https://...")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address holds no user, password, query or fragment")
    _ = parts.port  # raises ValueError when it is no port
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def checked_url_or_none(value: str) -> str:
    return checked_url(value) if value else ""


def checked_listen(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{show(value)} is not HOST:PORT")
    return f"{host or '0.0.0.0'}:{port}"  # noqa: S104  # ":9670" means every address, as in Go


def certificates(setting: str, path: str) -> str:
    """The certificates in a file, for those who are told them. Raises UserError when there are none."""
    where = f"{setting} {path!r}"
    try:
        text = Path(path).read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or 'not PEM'}") from error
    if "BEGIN CERTIFICATE" not in text or "PRIVATE KEY" in text or len(text) > 8192:
        raise UserError(f"{where} must hold certificates in PEM form and no key, 8 KiB at most")
    return text


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Url = Annotated[str, AfterValidator(checked_url)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Text = Annotated[str, Field(max_length=1024)]
Absolute = Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=1024)]


def checked_inventories(value: object) -> object:
    """One path, or a list of different ones that end in .hcl or .json."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple):
        return paths
    for path in paths:
        if not isinstance(path, str) or not path.endswith((".hcl", ".json")):
            raise ValueError(
                f"{show(path)} is no inventory; name a file that ends in .hcl or .json"
            )
    if len(set(paths)) != len(paths):
        raise ValueError("names a file twice")
    return tuple(paths)


Inventories = Annotated[
    tuple[Text, ...], BeforeValidator(checked_inventories), Field(max_length=64)
]


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)
