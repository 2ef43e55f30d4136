"""Text files as other readers take them: with a byte order mark, with blanks around a token, with comments
in any language between PEM blocks; and the known word that a misspelt one is closest to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from nomad_watchdog import secret_file_rules
from nomad_watchdog.errors import UserError
from nomad_watchdog.secret_values import know

_PEM: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\s.*?-----END \1-----", re.DOTALL | re.ASCII)


def read(what: str, path: str | Path, most: int = 1024 * 1024) -> str:
    """The text of a file of at most `most` bytes, without a byte order mark.

    Raises UserError: `what`, the path, and why it can't be read."""
    where = f"{what} {shown(str(path))}"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or 'no path'}") from error
    if len(raw) > most:
        raise UserError(f"{where} is larger than {most} bytes")
    return decoded(where, raw)


def decoded(where: str, raw: bytes) -> str:
    """UTF-8 text without a byte order mark. Raises UserError that begins with `where`."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text at byte {error.start}") from None


def token(what: str, path: str | Path) -> str:
    """The token of a file, or of a pipe, without the blanks around it. Raises UserError as `read`, for a file
    that is not safe (`secret_files`), and for a token that no HTTP header can hold."""
    where, most = f"{what} {shown(str(path))}", 64 * 1024
    try:
        raw = secret_file_rules.read(path, most + 1, pipe=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or 'no path'}") from error
    if len(raw) > most:
        raise UserError(f"{where} is larger than {most} bytes")
    found = decoded(where, raw).strip()
    if not (found.isascii() and found.isprintable()):
        raise UserError(f"{where} holds characters that no token has")
    know(found)
    return found


def only_pem(text: str) -> str:
    """All PEM blocks of a text without what stands between them, as every reader of PEM takes it (RFC 7468,
    section 2). Empty when there is none."""
    blocks = [m[0].replace("\r\n", "\n") + "\n" for m in _PEM.finditer(text) if m[0].isascii()]
    return "".join(blocks)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X? `, or nothing when no known word is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(
        word.lower(), known, n=1
    )
    return f"did you mean {close[0]}? " if close else ""


def shown(text: str) -> str:
    """A path or a value as it may stand in a message: quoted, ASCII, at most 200 characters."""
    quoted = '"' + ascii(text)[1:-1] + '"'
    return quoted if len(quoted) <= 200 else quoted[:197] + "..."
