"""The probe kinds."""
