"""The registry's set of class specs in force."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.config import class_set
from nomad_watchdog.config.class_set import ClassSetStore, InForce
from nomad_watchdog.core.config_precedence import ConfigStanding
from nomad_watchdog.errors import DamagedError, StaleError
from nomad_watchdog.model import AgentSpec, Variant
from tests.simulation.fakes import FakeRegistry, Store

WORDS = st.text(max_size=20)
MAPS = st.dictionaries(WORDS, WORDS, max_size=3)
VARIANTS = st.builds(Variant, WORDS, WORDS, MAPS)
SPECS = st.builds(
    AgentSpec, WORDS, WORDS, WORDS, WORDS, WORDS, st.integers(1, 999), variables=MAPS, settings=MAPS,
    on=st.dictionaries(WORDS, VARIANTS, max_size=2), agent_config=st.dictionaries(WORDS, st.one_of(st.integers(0, 9), WORDS, st.lists(WORDS, max_size=2)), max_size=3),
)  # fmt: skip


async def registry() -> FakeRegistry:
    made = FakeRegistry(Store())
    await made.initialise()
    return made


def in_force(specs: dict[str, AgentSpec], number: int = 1) -> InForce:
    digest = class_set.digest(specs)
    return InForce(ConfigStanding(number, digest, ("a", "b")), specs, "replica", 12.5)


@given(st.dictionaries(WORDS, SPECS, max_size=4))
async def test_what_is_written_is_read(specs: dict[str, AgentSpec]) -> None:
    """A spec is read back completely, including its settings, and is not decoded again while unchanged."""
    store = await registry()
    wanted = in_force(specs)
    assert await ClassSetStore(store).write(wanted, None)
    reader = ClassSetStore(store)
    read = await reader.read()
    assert read == wanted
    settings = {name: spec.settings for name, spec in specs.items()}
    assert {name: spec.settings for name, spec in read.specs.items()} == settings
    assert await reader.read() is read


async def parts(store: FakeRegistry) -> tuple[str, ...]:
    head = class_set.HEAD.decode((await store.document("classes")).body)
    assert head is not None
    return head.parts


def large(seed: int) -> dict[str, AgentSpec]:
    text = random.Random(seed).randbytes(100_000).hex()  # does not compress
    return {"a": AgentSpec("a", "1", f"h{seed}", text=text)}


async def test_a_large_set_has_documents_of_its_own() -> None:
    """The parts are written before the document that names them, and emptied when superseded; a reader in between is
    asked to read again."""
    store = await registry()
    writer = ClassSetStore(store)
    assert await writer.write(in_force(large(1)), None)
    first = await parts(store)
    assert len(first) > 1
    assert await ClassSetStore(store).read() == in_force(large(1))
    assert await writer.write(in_force(large(2), 2), writer.in_force)
    for name in first:
        assert (await store.document(name)).body == b""
    assert await ClassSetStore(store).read() == in_force(large(2), 2)
    (part, *_) = await parts(store)
    await store.commit_document(part, replace(await store.document(part), body=b""))
    reader = ClassSetStore(store)
    for _ in range(2):
        with pytest.raises(StaleError):
            await reader.read()


async def test_of_two_writers_one_wins() -> None:
    """The slower writer writes nothing."""
    store = await registry()
    assert await ClassSetStore(store).write(in_force({}), None)
    assert not await ClassSetStore(store).write(in_force(large(1), 2), None)
    assert await ClassSetStore(store).read() == in_force({})


async def test_a_decision_on_an_older_set_is_not_written() -> None:
    """If another task reads a newer set between the decision and the write, the newer one stays in force."""
    store = await registry()
    ours, other = ClassSetStore(store), ClassSetStore(store)
    before = await ours.read()
    assert await other.write(in_force(large(1)), None)
    await ours.read()
    assert not await ours.write(in_force({}, 1), before)
    assert await ClassSetStore(store).read() == in_force(large(1))


@pytest.mark.parametrize("body", ["not base64!", "aGVsbG8=", "YQ"])
async def test_a_damaged_set_is_reported_as_damaged(body: str) -> None:
    """This holds for a body that is not base64, not compressed, or truncated."""
    store = await registry()
    assert await ClassSetStore(store).write(in_force({}), None)
    stored = await store.document("classes")
    fields = json.loads(stored.body)
    try:
        raw = base64.b64decode(body)
    except ValueError:
        raw = b""
    fields |= {"body": body, "sum": class_set._sum(raw)}
    await store.commit_document("classes", replace(stored, body=json.dumps(fields).encode()))
    with pytest.raises(DamagedError, match="classes"):
        await ClassSetStore(store).read()


@given(SPECS)
def test_equal_behaviour_has_an_equal_digest(spec: AgentSpec) -> None:
    """File paths and replica-specific settings make no difference; behaviour and variants do."""
    moved = replace(spec, template="/elsewhere", agent_config={})
    assert class_set.digest({"a": spec}) == class_set.digest({"a": moved})
    assert class_set.differences({"a": spec}, {"a": moved}) == []
    other = replace(spec, spec_hash=spec.spec_hash + "x")
    varied = replace(spec, on={**spec.on, "mars": Variant("x")})
    for one in (other, varied):
        assert class_set.digest({"a": spec}) != class_set.digest({"a": one})
        assert len(class_set.differences({"a": spec}, {"a": one})) == 1
