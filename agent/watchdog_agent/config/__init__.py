"""The configuration document and its validation."""
