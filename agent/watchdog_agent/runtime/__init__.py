"""Loop, HTTP, TLS and child processes, on little memory."""
