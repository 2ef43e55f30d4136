"""The door: HTTP API, webhook, event stream, status page. Projections of `fleet`; decides nothing."""

from nomad_watchdog.api.app import make_app
from nomad_watchdog.api.malformed import RUNNER_OPTIONS, Runner

__all__ = ["RUNNER_OPTIONS", "Runner", "make_app"]
