"""One document that several replicas change: what each reads, and which change is stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest

from nomad_watchdog.errors import ConflictError, DamagedError
from nomad_watchdog.registry import COMMIT_TRIES, Registry, RegistryDocument
from nomad_watchdog.registry.document import Document, DocumentFormat, OtherVersionError
from tests.registry.conftest import Store


def _parse(fields: object) -> int:
    assert isinstance(fields, dict)
    return int(fields["number"])


def _serialize(number: int) -> Mapping[str, object]:
    return {"number": number}


FORMAT = DocumentFormat("number", 0, _parse, _serialize, "delete it")
DAMAGED = (b"{", b"[]", b'{"v": 1}', b'{"v": "1", "number": 1}', b'{"v": 1, "number": "x"}')


async def test_of_many_changes_at_once_each_counts(store: Store) -> None:
    """Four replicas each add one several times; then every one of them reads the sum."""
    await store.open().initialise()
    documents = [Document(store.open(), FORMAT) for _ in range(4)]

    async def add(document: Document[int]) -> None:
        for _ in range(3):
            while True:
                try:
                    assert await document.update(lambda number: number + 1)
                except ConflictError:
                    continue
                break

    await asyncio.gather(*map(add, documents))
    for document in documents:
        await document.refresh()
        assert document.value == 12
        assert not await document.refresh()
        assert not await document.update(lambda number: number)


async def test_a_change_that_always_loses_ends_with_a_conflict(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After COMMIT_TRIES lost attempts the caller gets the error, and nothing is stored."""
    tries = 0

    async def lose(_name: str, _document: RegistryDocument) -> None:
        nonlocal tries
        tries += 1

    monkeypatch.setattr(registry, "commit_document", lose)
    document = Document(registry, FORMAT)
    with pytest.raises(ConflictError, match="document number is being changed by others"):
        await document.update(lambda number: number + 1)
    assert (tries, document.value, document.index) == (COMMIT_TRIES, 0, -1)


async def test_a_value_replaces_only_what_was_read(store: Store) -> None:
    """A replica that has not read another replica's change does not overwrite it."""
    await store.open().initialise()
    first, second = Document(store.open(), FORMAT), Document(store.open(), FORMAT)
    assert await first.replace(1)
    assert not await second.replace(2)
    assert second.value == 0
    assert await second.refresh()
    assert await second.replace(2)
    assert (await first.refresh(), first.value) == (True, 2)


@pytest.mark.parametrize("body", DAMAGED, ids=ascii)
async def test_a_damaged_document_is_an_error_until_it_is_repaired(
    registry: Registry, body: bytes
) -> None:
    """Each read fails and names the fix. The last value stays, and the repaired document is read."""
    document = Document(registry, FORMAT)
    assert await document.update(lambda _: 7)
    good = await registry.document("number")
    damaged = await registry.commit_document("number", replace(good, body=body))
    assert damaged is not None
    for _ in range(2):
        with pytest.raises(DamagedError, match="number can't be used; delete it"):
            await document.refresh()
    with pytest.raises(DamagedError):
        await document.update(lambda number: number + 1)
    assert (document.value, document.index) == (7, damaged.index)
    assert await registry.commit_document("number", replace(damaged, body=good.body)) is not None
    assert await document.refresh()
    assert document.value == 7


async def test_a_replaceable_document_counts_as_empty_when_it_is_damaged(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The damage is logged once, and the next change overwrites the document, even if it has another version."""
    layout = replace(FORMAT, replaceable=True)
    assert await registry.commit_document("number", RegistryDocument(b'{"v": 9}')) is not None
    with pytest.raises(OtherVersionError, match="version 9; this program reads 1"):
        await Document(registry, FORMAT).refresh()
    document = Document(registry, layout)
    with caplog.at_level(logging.WARNING):
        await document.refresh()
        await document.refresh()
    assert (document.value, len(caplog.records)) == (0, 1)
    assert await document.update(lambda number: number + 1)
    assert layout.decode((await registry.document("number")).body) == 1
