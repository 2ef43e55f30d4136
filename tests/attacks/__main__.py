"""Run every attack and print the table: ``python -m tests.attacks [--write docs/security.md] [PYTEST ARGUMENTS]``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.attacks.table import Rows


def main() -> int:
    """Returns 0 if every attack failed; otherwise pytest's exit code, and nothing is written."""
    arguments = sys.argv[1:]
    document = None
    if "--write" in arguments:
        at = arguments.index("--write")
        document = Path(arguments[at + 1])
        del arguments[at : at + 2]
    rows = Rows()
    code = pytest.main(["-m", "attack", "-q", *arguments], plugins=[rows])
    if code == 0 and document is not None:
        rows.write(document)
    print(rows.markdown())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
