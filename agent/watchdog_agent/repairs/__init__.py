"""The repair ladder, and the repair kinds."""
