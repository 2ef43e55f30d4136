"""The watchdog agent: one small process beside each device. Standard library only."""

__version__ = "0.1.0"
