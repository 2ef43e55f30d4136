"""When to probe, and what to believe."""
