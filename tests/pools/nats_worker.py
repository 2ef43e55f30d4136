"""A worker on a NATS work queue: takes one message, works for a while, acknowledges, takes the next.

Run as `python nats_worker.py URL SECONDS FOLDER`; each message that is done leaves a line in FOLDER. On
SIGTERM it finishes the current message and stops."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import nats
import nats.errors

STREAM = "JOBS"


async def main(url: str, work_s: float, folder: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    done = folder / f"{os.getpid()}.done"
    client = await nats.connect(url)
    queue = await client.jetstream().pull_subscribe("jobs", durable="workers")
    while not stop.is_set():
        try:
            (message,) = await queue.fetch(1, timeout=0.5)
        except nats.errors.TimeoutError:
            continue
        await asyncio.sleep(work_s)
        with done.open("a") as stream:
            stream.write(f"{message.data.decode()}\n")
        await message.ack_sync()
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])))
