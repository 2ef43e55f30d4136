"""Records to store."""

from __future__ import annotations

import random
import unicodedata

from nomad_watchdog.ids import parse_device_id, slug_of
from nomad_watchdog.model import Device, DeviceRecord, Epoch, Presence, WallTime


def record(text: str, *, epoch: int = 0, index: int = 0) -> DeviceRecord:
    device_id = parse_device_id(text)
    return DeviceRecord(
        slug=slug_of(device_id),
        device=Device(device_id, "default", "127.0.0.1", {"site": "näh ☃", "": text}),
        presence=Presence.PRESENT,
        generation=1,
        epoch=Epoch(epoch),
        instance="",
        changed_at=WallTime(1.5),
        index=index,
    )


HOSTILE = [
    "../../etc/passwd",
    "a/b//c",
    "x' OR 1=1 --",
    '"; DROP TABLE device; --',
    "${NOMAD_TOKEN}",
    "{{ env }}",
    "<script>",
    "%2e%2e%2f?recurse=1#x",
    "meta",
    "MÜLLER",
    "müller",
    "mu\u0308ller",
    "ﬀ",
    "𝔘𝔫𝔦",
    "😀" * 32,
    "0",
    "-",
    "null",
    "a" * 128,
]


def hostile_ids(count: int) -> list[str]:
    """Distinct IDs of 1 to 128 bytes from all printable Unicode characters; the same on each call."""
    chooser = random.Random(20261123)
    found = dict.fromkeys(HOSTILE)
    while len(found) < count:
        text = ""
        for _ in range(chooser.randint(1, 40)):
            char = chr(
                chooser.choice((chooser.randrange(0x20, 0x7F), chooser.randrange(0x11_0000)))
            )
            if char.isprintable() and unicodedata.category(char) != "Cs":
                text += char
        text = text.strip()
        if text and len(text.encode()) <= 128:
            found[text] = None
    return list(found)
