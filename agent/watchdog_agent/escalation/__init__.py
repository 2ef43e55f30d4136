"""Alerts to sinks, and the election of the agent that sends them."""
