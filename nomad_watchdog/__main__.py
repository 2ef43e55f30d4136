"""``python -m nomad_watchdog``."""

from nomad_watchdog.cli.main import main

if __name__ == "__main__":
    main()
