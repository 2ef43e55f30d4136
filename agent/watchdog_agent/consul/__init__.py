"""Registration in Consul, and its key-value store."""
