"""The reconciler: exactly one agent per device."""
