"""Labels as they are written on a command line and in a query string."""

from __future__ import annotations

from collections.abc import Iterable

from nomad_watchdog.errors import UserError


def parse_labels(pairs: Iterable[str]) -> dict[str, str]:
    """KEY=VALUE texts as a mapping.

    Raises UserError for a text of another form, and for a key with two values: no device has both."""
    labels: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UserError(f"label {ascii(pair)[:80]} must be KEY=VALUE")
        if labels.setdefault(key, value) != value:
            raise UserError(
                f"label {ascii(key)[:80]} is given twice, as {ascii(labels[key])[:80]} and as "
                f"{ascii(value)[:80]}; a device has one value per label, so give it once"
            )
    return labels
