"""Names of our jobs on Nomad, and the devices that they belong to.

A parent is ``<prefix>[-<class>][-s<shard>][_next]``, with `_next` for the spec that a roll-out in steps tries; its child ``<parent>/dispatch-<slug>-<unix seconds>-<8 hex digits>``.
With the strategy `register` a device has the job ``<prefix>-<slug>``.
"""

from __future__ import annotations

import re
from typing import Final

from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import Slug, is_slug

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
_SLUG_LENGTH: Final = 53
_NEXT: Final = "_next"
"""No class name contains this character."""


class JobNames:
    """The names of one installation. Raises UserError for a prefix that is not allowed."""

    def __init__(self, prefix: str, shards: int) -> None:
        if not _NAME.fullmatch(prefix):
            raise UserError(
                f"nomad job prefix {prefix!r}: allowed are a-z, 0-9 and -, at most 63 characters"
            )
        self.prefix = prefix
        self.parents: set[str] = set()
        """Parents that were registered here or listed; device lookups search below each of them."""
        self._shards = shards
        self._names: dict[tuple[str, int], str] = {}

    def parent(self, agent_class: str, shard: int) -> str:
        """The parent job of a class and shard. Raises UserError for a class name that is not allowed."""
        if known := self._names.get((agent_class, shard)):
            return known
        if not _NAME.fullmatch(agent_class) or re.fullmatch(r"(.*-)?s\d+", agent_class):
            raise UserError(
                f"agent class {agent_class!r}: allowed are a-z, 0-9 and -, not ending like a shard (s1)"
            )
        name = self.prefix if agent_class == "default" else f"{self.prefix}-{agent_class}"
        name = name if self._shards == 1 else f"{name}-s{shard}"
        self._names[agent_class, shard] = name
        return name

    def other(self, parent: str) -> str:
        """The parent of the same class and shard for the spec on trial, or the usual one of that."""
        usual = parent.removesuffix(_NEXT)
        return usual if usual != parent else f"{parent}{_NEXT}"

    def of_device(self, slug: Slug) -> str:
        """The job of a device with the strategy `register`."""
        return f"{self.prefix}-{slug}"

    def prefixes_of(self, slug: Slug) -> list[str]:
        """Prefixes that find all jobs of a device, in either strategy."""
        children = [f"{parent}/dispatch-{slug}-" for parent in sorted(self.parents)]
        return [*children, self.of_device(slug)]

    def is_ours(self, job_id: str) -> bool:
        return job_id == self.prefix or job_id.startswith(
            (f"{self.prefix}-", f"{self.prefix}/", f"{self.prefix}{_NEXT}")
        )

    def slug_in(self, job_id: str) -> Slug | None:
        """The device of one of our jobs; None for a parent and for the job of another installation."""
        if not self.is_ours(job_id):
            return None
        _, dispatched, rest = job_id.partition("/dispatch-")
        slug = rest.rsplit("-", 2)[0] if dispatched else job_id.removeprefix(f"{self.prefix}-")
        return Slug(slug) if len(slug) <= _SLUG_LENGTH and is_slug(slug) else None
