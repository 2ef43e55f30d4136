"""The repair ladder, and the kinds of repairs."""
