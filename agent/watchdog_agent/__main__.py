"""`python -m watchdog_agent`."""

from .main import main

main()
