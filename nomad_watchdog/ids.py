"""Outside text becomes a name here and nowhere else (S11).

A device id is data: any printable Unicode text of 1 to 128 bytes of UTF-8. It never reaches a job
name, a path, a label or HCL; what does is its slug.
"""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from functools import lru_cache
from typing import Final, NewType

from nomad_watchdog.errors import UserError

DeviceId = NewType("DeviceId", str)
"""A checked device id: printable, 1 to 128 bytes."""

Slug = NewType("Slug", str)
"""``[a-z0-9-]``, at most 53 characters, starts with a letter: safe as a Nomad job id, a Kubernetes
label or object name (RFC 1123, 63 characters), a Consul service id and a file name."""

Shard = NewType("Shard", int)
"""0 <= shard < shards."""

MAX_ID_BYTES: Final = 128
_READABLE: Final = 32
_HASH: Final = 20
_SLUG: Final = re.compile(r"[a-z](?:[a-z0-9-]{0,31})-[a-z2-7]{20}")
_NOT_NAME: Final = re.compile(r"[^a-z0-9]+")


def parse_device_id(text: object) -> DeviceId:
    """Check a device id from outside.

    Raises UserError when it is not text, is empty, is longer than 128 bytes of UTF-8, or holds
    anything unprintable (control characters, lone surrogates, separators other than the space).
    """
    if not isinstance(text, str):
        raise UserError(f"device id must be text, not {type(text).__name__}")
    if not text or text != text.strip():
        raise UserError("device id must not be empty, nor begin or end with a blank")
    if not text.isprintable():
        raise UserError(f"device id {ascii(text)[:80]} holds an unprintable character")
    size = len(text.encode())
    if size > MAX_ID_BYTES:
        raise UserError(f"device id is {size} bytes long; at most {MAX_ID_BYTES} are allowed")
    return DeviceId(text)


@lru_cache(maxsize=1 << 16)
def slug_of(device_id: DeviceId) -> Slug:
    """Readable part plus 100 bits of SHA-256, so that equal slugs mean equal ids.

    A request asks for it several times; those of the last 65,536 devices are remembered. The fixed-length
    end keeps one slug from being a prefix of another: Nomad 1.11.0 to 1.11.2 read the
    status of jobs by prefix (GH-27516).
    """
    # 5 bytes make 8 characters: of the 32 only those are encoded that are kept.
    head = hashlib.sha256(device_id.encode()).digest()[:15]
    digest = base64.b32encode(head).decode().lower()[:_HASH]
    folded = unicodedata.normalize("NFKD", device_id).lower()
    readable = _NOT_NAME.sub("-", folded).strip("-")[: _READABLE - 2].strip("-")
    if not readable or not readable[0].isalpha():
        readable = f"d-{readable}".strip("-")
    return Slug(f"{readable}-{digest}")


def is_slug(text: str) -> bool:
    """Whether text has the form that slug_of makes."""
    return _SLUG.fullmatch(text) is not None


def shard_of(slug: Slug, shards: int) -> Shard:
    """The shard of a device: a hash of its slug modulo shards (1 or more)."""
    if shards == 1:
        return Shard(0)  # asked several times for each action
    return Shard(int.from_bytes(hashlib.sha256(slug.encode()).digest()[:8]) % shards)
