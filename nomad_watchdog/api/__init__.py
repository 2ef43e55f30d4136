"""The HTTP API with webhook, event stream and status page. It displays `fleet` and decides nothing."""

from nomad_watchdog.api.app import make_app
from nomad_watchdog.api.malformed import RUNNER_OPTIONS, Runner

__all__ = ["RUNNER_OPTIONS", "Runner", "make_app"]
