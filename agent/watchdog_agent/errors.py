"""Errors that more than one package raises."""

from __future__ import annotations


class ConfigError(Exception):
    """What is wrong, and what is allowed."""
