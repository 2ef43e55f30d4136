"""What a third party needs to test its own backend; no pytest import."""
