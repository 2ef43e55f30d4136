"""Secrets in files, read again when a file changes: tokens, keys of agents, secrets of webhooks.

A secret is held only as long as its file holds it. A file that is gone, empty or wrong has none: taking
it away is how a token is revoked at once, on a running service. What a file must be at start is checked
by `SecretFile.required`. No message of this module holds anything that stands in such a file (S10).
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nomad_watchdog import secret_file_rules
from nomad_watchdog.core.roles import Role
from nomad_watchdog.core.webhook_signature import secret_of
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import Monotonic
from nomad_watchdog.secret_values import know

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
MAX_BYTES: Final = 64 * 1024
MIN_TOKEN: Final = 16
"""Characters of a token: 16 of `openssl rand -base64` are 96 random bits."""
MIN_KEY: Final = 32
"""Characters of an agent key: 16 random bytes as hexadecimal digits."""

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

Reader = Callable[[str], tuple[bytes, ...]]


@dataclass(slots=True)
class SecretFile:
    """The secrets of one file. `setting`: what names the file, for messages."""

    setting: str
    path: Path
    reader: Reader
    _secrets: tuple[bytes, ...] = ()
    _raw: bytes | None = None
    """What was read last; None = the file could not be read."""
    _looked: float = float("-inf")
    _problem: str = ""

    def required(self) -> SecretFile:
        """Itself, once it has been read. Raises UserError that says what is wrong with the file."""
        self._raw = self._content()
        self._secrets = self._parse(self._raw)
        return self

    def now(self, now: Monotonic) -> tuple[bytes, ...]:
        """The secrets that the file holds. It is read at most once per second, whatever its size and times say:
        they can stay as they were while a secret is replaced."""
        if now - self._looked < LOOK_EVERY_S:
            return self._secrets
        self._looked = now
        raw = None
        try:
            raw = self._content()
            if raw == self._raw:
                _know(raw.decode("utf-8", "replace"))
                return self._secrets
            self._secrets, problem = self._parse(raw), ""
        except UserError as error:
            self._secrets, problem = (), str(error)
        self._raw = raw
        if problem and problem != self._problem:
            log.warning("no secret is left in a file", extra={"reason": problem})
        elif not problem:
            log.info("secrets were read again", extra={"file": str(self.path)})
        self._problem = problem
        return self._secrets

    @property
    def _where(self) -> str:
        return f"{self.setting} {str(self.path)!r}"

    def _content(self) -> bytes:
        try:
            return secret_file_rules.read(self.path, MAX_BYTES + 1)
        except OSError as error:
            if error.errno in _EXHAUSTED and self._raw is not None:
                return self._raw  # that we can't look takes nobody's token away
            raise UserError(f"{self._where}: {error.strerror or 'cannot be read'}") from error

    def _parse(self, raw: bytes) -> tuple[bytes, ...]:
        where = self._where
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{where} is not text") from None
        _know(text)
        if len(raw) > MAX_BYTES:
            raise UserError(f"{where} is larger than {MAX_BYTES} bytes")
        if not text.strip():
            raise UserError(f"{where} is empty")
        try:
            return self.reader(text)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None


def _know(text: str) -> None:
    """Hide what may be a secret of this file; what is shorter is none, and may be an ordinary word."""
    know(*(word for word in text.split() if len(word) >= MIN_TOKEN), rotates=True)


def read_token(text: str) -> tuple[bytes, ...]:
    """One token: the whole file but for the blanks around it. Raises ValueError for one that can be guessed."""
    token = text.strip()
    if len(token) < MIN_TOKEN:
        raise ValueError(
            f"a token of {len(token)} characters can be guessed; it needs at least {MIN_TOKEN} "
            "(openssl rand -hex 32)"
        )
    return (token.encode(),)


def read_keys(text: str) -> tuple[bytes, ...]:
    """Keys that sign agents' credentials, one a line; the first signs, all are believed.

    Raises ValueError for one that is too short to be a secret."""
    lines = _lines(text)
    for number, line in lines:
        if len(line) < MIN_KEY:
            raise ValueError(
                f"line {number} has {len(line)} characters; a key needs at least {MIN_KEY} "
                "(openssl rand -hex 32)"
            )
    return tuple(line.encode() for _, line in lines)


def read_webhook_secrets(text: str) -> tuple[bytes, ...]:
    """Secrets of Standard Webhooks, one a line. Raises ValueError naming the line that is none."""
    secrets = []
    for number, line in _lines(text):
        try:
            secrets.append(secret_of(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return tuple(secrets)


def _lines(text: str) -> list[tuple[int, str]]:
    stripped = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in stripped if line]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a token, and what for."""

    name: str
    role: Role
    id_prefix: str = ""
    """The device ids that it may change begin so."""
    labels: tuple[tuple[str, str], ...] = ()
    """The devices that it may change have all of these, before the change and after it."""
    most_devices: int = 0
    """Maximum number of devices that a device token may register."""


@dataclass(slots=True)
class Keyring:
    """Tokens by their holder. Compared as digests, all of them, in constant time."""

    tokens: Mapping[Holder, SecretFile]
    _digests: dict[Holder, bytes] = field(default_factory=dict)
    _seen: dict[Holder, tuple[bytes, ...]] = field(default_factory=dict)

    def holder_of(self, given: bytes, now: Monotonic) -> Holder | None:
        """Whose token this is; None = nobody's."""
        digest = hashlib.sha256(given).digest()
        found: Holder | None = None
        for holder, file in self.tokens.items():
            if hmac.compare_digest(self._digest(holder, file.now(now)), digest):
                found = found or holder
        return found

    def token_of(self, role: Role, now: Monotonic) -> str:
        """A token of this role, to call another replica with, which has the same; "" = none."""
        for holder, file in self.tokens.items():
            if holder.role is role and (secrets := file.now(now)):
                return secrets[0].decode()
        return ""

    def _digest(self, holder: Holder, secrets: Sequence[bytes]) -> bytes:
        if self._seen.get(holder) is not secrets:
            self._seen[holder] = tuple(secrets)
            self._digests[holder] = hashlib.sha256(secrets[0]).digest() if secrets else b""
        return self._digests[holder]

    def check_distinct(self) -> None:
        """Raises UserError when two files hold the same token: nobody could say whose it is."""
        known: dict[tuple[bytes, ...], SecretFile] = {}
        for file in self.tokens.values():
            other = known.setdefault(file.now(Monotonic(0.0)), file)
            if other is not file:
                raise UserError(f"{other.setting} and {file.setting} hold the same token")
