"""The state that survives a restart of the agent: one small file, replaced atomically."""

from __future__ import annotations

import binascii
import os

from watchdog_agent.runtime import parsing
from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from watchdog_agent.runtime.types import Document, SavedState

NAME = "state.json"


def load(folder: str, device_id: str) -> tuple[Document, str]:
    """(state, remark): the state stored for this device, else {} and the reason. Never raises."""
    try:
        with open(os.path.join(folder, NAME), "rb") as file:
            raw = file.read(1 << 20)
        stored = parsing.loads(raw)
        state: Document = stored["state"]
        if binascii.crc32(encode(state)) != stored["crc32"]:
            return {}, "state file: wrong checksum; starting clean"
        if state.get("device_id") != device_id:
            return {}, "state file is another device's; starting clean"
    except FileNotFoundError:
        return {}, ""
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        return {}, f"state file can't be used ({type(error).__name__}); starting clean"
    return state, ""


def save(folder: str, state: SavedState) -> None:
    """Store the state; a crash at any time leaves the old or the new file. Raises OSError."""
    text = json.dumps({"state": state, "crc32": binascii.crc32(encode(state))}).encode()
    write(os.path.join(folder, NAME), text)


def save_address(folder: str, listen: str, instance: str) -> None:
    """Write `agent.json`, which lets other programs on this host find the agent. Raises OSError."""
    address = {"pid": os.getpid(), "listen": listen, "instance": instance}
    write(os.path.join(folder, "agent.json"), json.dumps(address).encode())


def write(path: str, data: bytes) -> None:
    """Write, sync, rename, sync the directory."""
    temporary = f"{path}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def encode(state: Mapping[str, object]) -> bytes:
    """The bytes that the checksum covers."""
    return json.dumps(state, sort_keys=True).encode()
