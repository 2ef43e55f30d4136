"""The agent's document and its checks."""
