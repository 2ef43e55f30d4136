"""Whom to tell, and who of many agents does."""
