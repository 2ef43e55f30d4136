"""Attacks on the control plane, the CLI and the agent, each performed for real. ``make attacks`` writes docs/security.md's table."""
