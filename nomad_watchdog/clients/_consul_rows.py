"""Keys of Consul's store, and a transaction that was not applied."""

from __future__ import annotations

from dataclasses import dataclass, field

from nomad_watchdog.errors import ConflictError


@dataclass(frozen=True, slots=True)
class KvRow:
    """One key of Consul's store."""

    key: str
    value: bytes
    index: int
    """ModifyIndex, for compare-and-set."""
    session: str = field(default="", repr=False)
    """The session that holds the key's lock; "" = none. A secret: anyone who knows it can release the lock."""
    lock_index: int = 0
    """The fencing token: it increases each time the lock is acquired."""


class TxnConflictError(ConflictError):
    """The transaction was not applied. `lost`: positions of the operations that failed."""

    def __init__(self, message: str, lost: frozenset[int]) -> None:
        super().__init__(message)
        self.lost = lost
