"""The guards of the promises that the explorer can leave out."""

from __future__ import annotations

from enum import StrEnum


class Guard(StrEnum):
    """Keeps a promise; the explorer must find what happens without it."""

    INSTANCE = "instance"
    """S1: at one epoch another instance is accepted only when the first is no longer listed."""
    CAS = "cas"
    """S2: a start is preceded by a compare-and-set of its epoch."""
    RETURN_WHEN_STORED = "stored"
    """S4: a request is acknowledged after its commit."""
    BREAKER = "breaker"
    """S7: more stops in a pass than the limit wait for a second read."""
    REREAD = "reread"
    """S7: a stop reads the record again, so that a partial listing stops nothing."""
    FRESHNESS = "freshness"
    """S8, S3: an agent counts as gone only on a listing that is younger than the record."""
    LISTING = "listing"
    """S8, S1: an instance is replaced only on a listing that is younger than the record."""
    REST = "rest"
    """S2: a dead placement is swept only when no request for it can be in progress."""
    FENCE_EACH = "fence"
    """S4, S1: a commit of an epoch loses against any other write of the record."""
    FLOOR = "floor"
    """S2: the first epoch of a record is above those of all deleted tombstones."""
    LISTED = "listed"
    """S3: a tombstone is deleted only on a listing that shows all started agents, once no process
    is left."""
