"""Quantities of the Kubernetes API, such as "250m" or "12Mi"."""

from __future__ import annotations

from typing import Final

from watchdog_agent.runtime.parsing import finite

_SUFFIX: Final = {
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
}


def number(quantity: str) -> float:
    """The value of a quantity such as "250m", "12Mi" or "31415926n". Raises ValueError."""
    text = quantity.rstrip("abcdefghijklmnopqrstuvwxyzKMGTPE")
    suffix = quantity[len(text) :]
    if suffix not in _SUFFIX:
        raise ValueError(f"quantity {quantity!r}")
    return finite(text) * _SUFFIX[suffix]
