"""Keeps exactly one watchdog agent running per device."""

__version__ = "0.1.0"
