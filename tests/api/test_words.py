"""An invalid request is answered in plain words, like an invalid configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from nomad_watchdog import device_fields
from nomad_watchdog.api import schemas
from nomad_watchdog.config.problems import PATTERNS
from tests.api.conftest import ServedApi
from tests.config.test_problems import LIBRARYS_WORDS

BODIES: list[type[BaseModel]] = [
    device_fields.DeviceIn,
    schemas.BulkEnvelope,
    schemas.WebhookIn,
    schemas.HeartbeatsIn,
    schemas.PauseIn,
    schemas.MigrateIn,
    schemas.RebalanceIn,
    schemas.ConfirmIn,
    schemas.PoolScaleIn,
    schemas.ReportIn,
    schemas.ReplicatedReportsIn,
    schemas.EventsIn,
]
DEVICE = {"id": "a", "address": "10.0.0.1"}


def said(body: object, model: type[BaseModel]) -> str:
    """The error for this body."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(body if isinstance(body, bytes) else json.dumps(body))
    return device_fields.problem(caught.value, model)


@pytest.mark.parametrize(
    ("body", "model", "words"),
    [
        ({"event": "conected", "device": DEVICE}, schemas.WebhookIn,
         'event: found "conected"; did you mean connected? expected one of "connected", "disconnected"'),
        ({"event": "connected", "device": {"id": 7}}, schemas.WebhookIn,
         "device.id: found 7; expected text between double quotes"),
        ({"event": "connected", "device": "a"}, schemas.WebhookIn,
         'device: found "a"; expected an object { ... }'),
        ({"event": "connected", "device": DEVICE, "adress": 1}, schemas.WebhookIn,
         "adress: no such field; allowed here: event, device"),
        ({"event": "connected"}, schemas.WebhookIn, "device: is missing"),
        ({"address": "a", "clas": "b"}, device_fields.DeviceIn,
         "clas: no such field; did you mean class? allowed here: class, address, labels, ttl"),
        ({"address": "a", "labels": []}, device_fields.DeviceIn,
         'labels: found []; expected an object such as {"name": "value"}, at most 32 entries'),
        ({"address": "a", "labels": {"k": 1}}, device_fields.DeviceIn,
         "labels.k: found 1; expected text between double quotes"),
        ({"from": "2026-01-31", "devices": ["a"]}, schemas.PauseIn,
         'from: found "2026-01-31"; expected a time with its zone, such as "2026-01-31T05:00:00Z"'),
        ({"from": "A", "to": "b"}, schemas.MigrateIn, 'from: found "A"; expected the name of a scheduler'),
        ({"from": "a", "to": "b", "shards": [256]}, schemas.MigrateIn,
         "shards.0: found 256; expected a whole number from 0 to 255"),
        ({"max": -1}, schemas.RebalanceIn, "max: found -1; expected a whole number from 0 to 100000"),
        ({"ids": "a"}, schemas.HeartbeatsIn, 'ids: found "a"; expected a list of text'),
        (b"{", schemas.PoolScaleIn, "it is not valid JSON: EOF while parsing an object at line 1"),
        ([], schemas.PoolScaleIn, "found []; expected an object { ... }"),
        ({"count": 1.5}, schemas.PoolScaleIn, "count: found 1.5; expected a whole number from 0 to"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_told_what_was_found_and_expected(
    body: object, model: type[BaseModel], words: str
) -> None:
    """The error names the field, what was found, what was expected, and what was probably meant."""
    assert said(body, model).startswith(words)


texts = st.text(st.characters(exclude_categories=("Lu", "Ll", "Cs")), max_size=8)
"""Without letters: none of the library's words is in the request itself."""
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(BODIES), st.data())
def test_no_wrong_value_is_answered_in_the_librarys_words(
    model: type[BaseModel], data: st.DataObject
) -> None:
    """Whatever value is in whatever field of whatever request, the error is printable and in our own words."""
    names = [field.alias or name for name, field in model.model_fields.items()]
    body = data.draw(st.dictionaries(st.sampled_from(names), json_values) | json_values)
    try:
        model.model_validate_json(json.dumps(body))
    except ValidationError as error:
        text = device_fields.problem(error, model)
        # what was found may be any text
        ours = "; ".join(part.partition(" expected ")[2] for part in text.split("; found"))
        assert text.isprintable()
        assert not LIBRARYS_WORDS.search(ours), text


def patterns(model: type[BaseModel]) -> Iterator[str]:
    """The patterns of a model's fields, at any depth."""
    for field in model.model_fields.values():
        yield from _patterns(field)


def _patterns(note: Any) -> Iterator[str]:
    if isinstance(note, FieldInfo):
        for one in (*note.metadata, note.annotation):
            yield from _patterns(one)
    elif isinstance(note, type) and issubclass(note, BaseModel):
        yield from patterns(note)
    elif pattern := getattr(note, "pattern", None):
        yield str(pattern)
    for one in get_args(note):
        yield from _patterns(one)


def test_every_pattern_of_a_body_has_words() -> None:
    """Every pattern of a request body has its own description."""
    found = {pattern for model in BODIES for pattern in patterns(model)}
    assert found
    assert found <= PATTERNS.keys()


async def test_the_answer_of_the_api_says_it(served_api: ServedApi) -> None:
    """For single and bulk requests."""
    wrong = {"address": "10.0.0.1", "ttl": 5}
    words = "ttl: found 5; expected text between double quotes, at most 32 characters"
    status, answer = await served_api.ask("PUT", "/v1/devices/x", json=wrong)
    assert (status, answer["error"]["message"]) == (400, words)
    _, answer = await served_api.ask(
        "POST", "/v1/devices:bulk", json={"devices": [{"id": "x", **wrong}]}
    )
    assert answer["results"][0]["error"] == words
