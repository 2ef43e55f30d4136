"""The kinds of probes."""
