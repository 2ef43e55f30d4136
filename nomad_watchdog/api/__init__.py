"""The door: HTTP API, webhook, event stream, status page. Projections of `fleet`; decides nothing."""

from nomad_watchdog.api.app import RUNNER_OPTIONS, make_app

__all__ = ["RUNNER_OPTIONS", "make_app"]
