"""Row 29: webhooks that are forged, replayed, or signed with a wrong secret or clock."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from nomad_watchdog.core.webhook_signature import SignatureHeaders, secret_of, sign
from tests.faults.matrix import row
from tests.faults.site import BrokenRowError, until
from tests.faults.world import World, webhook_secret


class Gateway:
    """Signs events like a gateway, correctly or not."""

    def __init__(self, world: World, secret: str) -> None:
        self.world = world
        self.secret = secret_of(secret)
        self.number = 0

    def made(
        self, event: str, name: str, *, id_: str = "", ago_s: float = 0.0
    ) -> tuple[bytes, Any]:
        """Body and headers of one event."""
        self.number += 1
        said = {"event": event, "device": {"id": name, "address": self.world.site.ops.address}}
        body = json.dumps(said).encode()
        signed = SignatureHeaders(id_ or f"{name}-{self.number}", int(time.time() - ago_s))
        return body, {
            "Content-Type": "application/json",
            "webhook-id": signed.id,
            "webhook-timestamp": str(signed.at),
            "webhook-signature": sign(self.secret, signed, body),
        }

    async def send(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        url = f"{self.world.program.api}/v1/webhook"
        async with self.world.session.post(url, data=body, headers=headers) as answer:
            return answer.status, await answer.text()

    async def expect(self, want: int, what: str, body: bytes, headers: dict[str, str]) -> str:
        status, said = await self.send(body, headers)
        if status != want:
            self.world.broken.append(f"S5: {what} is answered with {status}, not {want}: {said}")
        return said


@row(
    "29-webhooks",
    "webhooks forged, unsigned, of a wrong clock, replayed before and after a kill -9, and a changed secret",
    stake="S4 S5 S10",
)
async def webhooks(world: World) -> None:
    await world.program.start()
    own = Gateway(world, world.webhook_secrets[0])
    one, two, ghost = world.names(3)
    connected = own.made("connected", one)
    said = await own.expect(201, "a signed event", *connected)
    if one not in said:
        raise BrokenRowError(f"the event was not applied: {said}")
    world.wanted[one] = True
    await own.expect(201, "an event 4 min old", *own.made("connected", two, ago_s=240))
    world.wanted[two] = True
    # none of these may leave a trace
    body, headers = own.made("connected", ghost)
    forged = Gateway(world, webhook_secret())
    await own.expect(401, "a stranger's signature", *forged.made("connected", ghost))
    await own.expect(401, "an event 6 min old", *own.made("connected", ghost, ago_s=360))
    await own.expect(401, "an event 6 min ahead", *own.made("connected", ghost, ago_s=-360))
    await own.expect(
        401, "another body under a signature", body.replace(b"connected", b"connectee"), headers
    )
    bare = {k: v for k, v in headers.items() if k != "webhook-signature"}
    await own.expect(401, "an unsigned event", body, bare)
    # a replay has no effect, and another body under the same ID is refused
    said = await own.expect(200, "a replay", *connected)
    if "duplicate" not in said:
        world.broken.append(f"S5: a replay is not said to be one: {said}")
    twin = own.made("disconnected", one, id_=connected[1]["webhook-id"])
    await own.expect(409, "another event under a used id", *twin)
    # a connected device leaves; a replay of its connection brings it back neither now nor after a crash
    await asyncio.sleep(1.1)  # a restarted service compares in whole seconds of the sender
    await own.expect(200, "a signed departure", *own.made("disconnected", two))
    world.wanted[two] = False
    early = own.made("connected", two, id_="kept by somebody", ago_s=60)
    await own.expect(409, "an older event", *early)
    await world.acknowledged_is_stored()
    world.program.kill_now()
    await world.program.start()
    await own.expect(409, "an older event, after a kill -9", *early)
    # the secret is rotated: both are valid for a while, then only the new one
    fresh = webhook_secret()
    world.webhook_secrets.insert(0, fresh)
    world.configure()
    new = Gateway(world, fresh)

    async def taken() -> bool:
        return (await new.send(*new.made("connected", one)))[0] < 300

    await until(taken, 20.0, "the new secret is taken without a restart")
    await own.expect(200, "the old secret beside the new one", *own.made("connected", one))
    world.webhook_secrets.pop()
    world.configure()

    async def refused() -> bool:
        return (await own.send(*own.made("connected", one)))[0] == 401

    await until(refused, 20.0, "the old secret is refused")
    await world.settle()
