"""The event log: in memory, on disk, and merged from all replicas."""
