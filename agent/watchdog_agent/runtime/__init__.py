"""Event loop, HTTP, TLS and child processes with low memory use."""
