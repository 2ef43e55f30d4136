"""The in-memory view of the devices: records, heartbeats, reports, verdicts."""
