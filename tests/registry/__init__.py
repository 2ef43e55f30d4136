"""The registry over both stores, and what Consul says about health."""
