"""Registration in Consul, and Consul's key-value store."""
