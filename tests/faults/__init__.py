"""The fault matrix on real servers. `make faults` runs all of it."""


def collect() -> None:
    """Import the modules that add their rows to the matrix."""
    from tests.faults import (  # noqa: F401
        rows_answers,
        rows_crash,
        rows_hosts,
        rows_inputs,
        rows_limits,
        rows_nodes,
        rows_outages,
        rows_own,
        rows_replicas,
        rows_rollouts,
        rows_servers,
        rows_verdicts,
        rows_webhooks,
    )
