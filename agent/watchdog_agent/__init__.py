"""The watchdog agent: one small process per device. Standard library only."""

__version__ = "0.1.0"
