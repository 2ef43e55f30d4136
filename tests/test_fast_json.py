"""JSON that is written many times per second."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.fast_json import as_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab\u00e4"), inner),
    max_leaves=8,
)


@given(VALUES)
def test_whatever_is_written_is_read_again(value: Any) -> None:
    """Including integers that the fast writer refuses; the output has no insignificant space."""
    assert json.loads(as_json(value)) == value
    assert as_json({"a": [1, value]}).startswith(b'{"a":[1,')


def test_half_a_character_is_refused() -> None:
    """A lone surrogate is not text: it must not reach a server as something else."""
    with pytest.raises(ValueError, match="surrogates"):
        as_json({"a": "\ud800"})
