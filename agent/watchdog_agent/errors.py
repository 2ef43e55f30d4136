"""Errors that more than one package raises."""

from __future__ import annotations


class ConfigError(Exception):
    """An invalid configuration, with the allowed values."""
