"""The fault matrix on real servers. `make faults` plays all of it."""


def collect() -> None:
    """Import the modules that put their rows into the matrix."""
    from tests.faults import rows_crash  # noqa: F401
