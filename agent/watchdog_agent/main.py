"""Start and exit of the agent process."""

from __future__ import annotations

import os
import sys

from watchdog_agent import wire
from watchdog_agent.agent import Agent
from watchdog_agent.config import document as configuration
from watchdog_agent.runtime import http
from watchdog_agent.runtime.log import log


def main() -> None:
    """Run the agent configured by the environment. Exits with the codes in `wire`."""
    try:
        agent = Agent(configuration.load(os.environ), os.environ)
    except configuration.ConfigError as error:
        log("bad configuration", reason=str(error))
        sys.exit(wire.EXIT_CONFIG)
    except OSError as error:
        log("can't listen", reason=http.reason_of(error))
        sys.exit(wire.EXIT_CRASH)
    try:
        code = agent.run()
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}:{where.lineno}"
        log("crashed", reason=f"{type(error).__name__}: {error}", at=place)
        os._exit(wire.EXIT_CRASH)
    # Nothing is left to flush, and shutting down the interpreter would cost more than the agent's work.
    os._exit(code)
