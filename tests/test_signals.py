"""Signals between components."""

from __future__ import annotations

import pytest

from nomad_watchdog.signals import Signal


def test_listeners_are_called_in_order_until_they_disconnect() -> None:
    """Each connected listener is called once per emit, in the order of connection."""
    signal: Signal[[int]] = Signal()
    calls: list[tuple[str, int]] = []

    def first(value: int) -> None:
        calls.append(("first", value))

    signal.emit(0)
    signal.connect(first)
    signal.connect(lambda value: calls.append(("second", value)))
    signal.emit(1)
    signal.disconnect(first)
    signal.emit(2)
    assert calls == [("first", 1), ("second", 1), ("second", 2)]
    with pytest.raises(ValueError):
        signal.disconnect(first)


def test_an_exception_of_a_listener_reaches_the_emitter() -> None:
    """Later listeners are not called."""
    signal: Signal[[]] = Signal()
    calls: list[str] = []
    signal.connect(lambda: calls.append("before"))
    signal.connect(lambda: 1 / 0)
    signal.connect(lambda: calls.append("after"))
    with pytest.raises(ZeroDivisionError):
        signal.emit()
    assert calls == ["before"]
