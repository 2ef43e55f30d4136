"""``python -m tests.faults [--rows 1-K5 20…] [--write FILE]``: run the fault matrix."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from tests.faults import collect, table
from tests.faults.matrix import ROWS, Result, Row, play_all, sites_of


def chosen(words: Collection[str]) -> list[Row]:
    """Rows by name, or by number for all rows with that number."""
    for word in words:
        if not any(_matches(name, word) for name in ROWS):
            sys.exit(f"there is no row {word!r}; there are: {', '.join(ROWS)}")
    found = [
        one for name, one in ROWS.items() if not words or any(_matches(name, w) for w in words)
    ]
    return sorted(found, key=lambda one: table.ordered().index(one.name))


def _matches(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word}-")


async def run(rows: list[Row], document: Path | None) -> list[Result]:
    """Run the rows in their own folder; print and write their results."""

    def told(one: Result) -> None:
        print(table.line(one), flush=True)
        if document is not None:  # an interrupted run leaves its results so far
            table.write(document, [one])

    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-faults-") as folder:
        return await play_all(sites_of(rows), Path(folder), told)


async def until_told(rows: list[Row], document: Path | None) -> list[Result]:
    """Like `run`; SIGTERM shuts everything down in order, like Ctrl-C."""
    task = asyncio.ensure_future(run(rows, document))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rows", nargs="*", default=[], metavar="ROW")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to this file")
    parser.add_argument("--list", action="store_true", help="print the rows and play none")
    options = parser.parse_args()
    collect()
    rows = chosen(options.rows)
    if options.list:
        for one in rows:
            print(f"{one.name:<16} {one.lane:<8} {one.fault}")
        return
    logging.disable(logging.INFO)
    results = asyncio.run(until_told(rows, options.write))
    failed = [result.row.name for result in results if not result.held]
    print(f"{len(results) - len(failed)} of {len(results)} rows held", *failed)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
