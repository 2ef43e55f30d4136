"""Probe scheduling and failure detection."""
