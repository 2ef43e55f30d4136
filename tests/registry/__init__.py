"""The registry over both stores, and Consul's health information."""
