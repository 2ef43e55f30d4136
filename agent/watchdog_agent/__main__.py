"""`python -m watchdog_agent`."""

from watchdog_agent.main import main

main()
