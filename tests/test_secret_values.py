"""Known secrets are found in any text, in any form and cut at any place."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog import logs, secret_values
from nomad_watchdog.errors import TransientError, UserError
from nomad_watchdog.secret_values import REDACTED, hide, hide_in, know, know_url

printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=64)


@given(printable, st.text(max_size=40), st.text(max_size=40), st.integers(8, 64))
def test_a_known_secret_is_hidden_in_every_form(
    secret: str, before: str, after: str, cut: int
) -> None:
    """Verbatim, in JSON, in a repr, in a URL, and cut off anywhere beyond its first half."""
    secret_values.forget()
    know(secret)
    for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe="")):
        assert form not in hide(f"{before}{form}{after}") or form in before + REDACTED + after
    half = (len(secret) + 1) // 2
    piece = secret[: max(secret_values.MIN_HEAD, half, cut)]
    assert piece not in hide(f"~{piece}") or piece in REDACTED


def test_of_several_secrets_none_leaves_a_part() -> None:
    """Even if one is the beginning of another, or both begin alike."""
    know(
        "operator-of-the-north-1",
        "operator-of-the-north",
        "operator-of-the-south-2",
        b"bytes-are-known-too",
    )
    text = "a operator-of-the-north-1 b operator-of-the-south-2 c operator-of-the-north d bytes-are-known-too"
    assert hide(text) == f"a {REDACTED} b {REDACTED} c {REDACTED} d {REDACTED}"
    assert hide("the operator of the north") == "the operator of the north"


def test_short_values_and_passwords_of_addresses() -> None:
    """Values of five characters are not hidden, because they occur in ordinary words; the password in a URL is
    hidden."""
    know("every", "")
    know_url("http://user:p%40ssw0rd!@proxy:3128/")
    know_url("http://[broken")
    assert hide("every p@ssw0rd! and p%40ssw0rd!") == f"every {REDACTED} and {REDACTED}"


def test_errors_and_documents_hide_by_themselves() -> None:
    """Secrets are hidden in the message of each of our errors, and in every text in parsed JSON."""
    know("a-secret-that-is-known")
    assert str(UserError("x a-secret-that-is-known y")) == f"x {REDACTED} y"
    assert str(TransientError("a-secret-that-is-known", retry_after_s=1.0)) == REDACTED
    assert hide_in({"a": ["a-secret-that-is-known", 1, None]}) == {"a": [REDACTED, 1, None]}


@pytest.mark.parametrize("at", [1_980, 3_990, 4_010, 4_020, 4_050])
def test_a_text_that_is_cut_shows_no_part_of_a_secret(at: int) -> None:
    """Wherever the limit of a log value falls, and wherever hidden secrets before it moved it."""
    secret = "0123456789abcdefghijklmnopqrstuvwxyz"
    know(secret)
    for text in (
        "-" * at + secret + "-" * 9_000,
        (secret * 200)[: at // 36 * 36] + "-" * (at % 36) + secret + "." * 9_000,
    ):
        shown = logs.clean_text(text)
        assert not any(secret[:size] in shown for size in range(6, 37))


def test_a_presented_token_of_any_bytes() -> None:
    """Even a token that is not text is hidden while its request is handled."""
    token = "no-\udcff-text-" + "t" * 20
    secret_values.present(token)
    try:
        assert hide(f"from {token} at {token[:-4]}") == f"from {REDACTED} at {REDACTED}"
    finally:
        secret_values.present("")


def test_only_so_many_are_kept() -> None:
    """Of rotating values, the least recently read are forgotten; a value that is read once is kept."""
    know("read-at-the-start")
    know("the-first-of-all", "still-in-use-today", rotates=True)
    for number in range(secret_values.MOST):
        know(f"secret-number-{number:06d}", rotates=True)
        know("still-in-use-today", rotates=True)
    shown = hide("the-first-of-all still-in-use-today read-at-the-start")
    assert shown == f"the-first-of-all {REDACTED} {REDACTED}"


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("nomad-watchdog-operator-2026", "nomad-watchdog is ready"),
        ("site-a-gateway-0", "device site-a-gw-7"),
        ("password1", "the passwords of the site"),
    ],
)
def test_ordinary_words_that_begin_a_secret_are_shown(secret: str, text: str) -> None:
    """Only a long part of a value is treated like the value itself."""
    know(secret)
    assert hide(text) == text
