"""The memory of refused reports: bounded, per device and address, and only to explain a silence."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core.agent_token import TokenClaim, claim_of, claimed, issue
from nomad_watchdog.fleet.refused_reports import LATELY_S, MOST, RefusedReport, RefusedReports
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Epoch, Monotonic

CAM = slug_of(DeviceId("cam"))
NOW = Monotonic(1_000.0)


def refused(status: int = 401, epoch: int | None = 3, peer: str = "10.0.0.7") -> RefusedReport:
    return RefusedReport(status, None if epoch is None else Epoch(epoch), peer, NOW)


def test_a_refusal_explains_the_silence_of_its_own_agent_only() -> None:
    """It is found by device and epoch; a refusal of an older agent, an old one, or one before an
    accepted report does not count."""
    memory = RefusedReports()
    memory.note(CAM, refused())
    assert memory.of(CAM, Epoch(3), [], NOW) == (
        "HTTP 401 from 10.0.0.7: its credential or token is unknown here; was api.agent_key_file or the token "
        "replaced?"
    )
    assert memory.of(CAM, Epoch(4), [], NOW) == ""
    assert memory.of(slug_of(DeviceId("other")), Epoch(3), ["10.0.0.7"], NOW) == ""
    assert memory.of(CAM, Epoch(3), [], Monotonic(NOW + LATELY_S + 1)) == ""
    memory.accepted(CAM)
    assert memory.of(CAM, Epoch(3), [], NOW) == ""


def test_who_names_no_device_is_known_by_the_address() -> None:
    """An agent with a token of its own names no device; its address is where the device's agent
    listens."""
    memory = RefusedReports()
    memory.note(None, refused(403, None))
    assert memory.of(CAM, Epoch(3), ["10.0.0.7"], NOW).startswith("HTTP 403 from 10.0.0.7: ")
    assert memory.of(CAM, Epoch(3), ["10.0.0.8"], NOW) == ""


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 50))
def test_memory_is_bounded(more: int) -> None:
    """A sender that invents devices and addresses only pushes out the oldest entries."""
    memory = RefusedReports()
    for number in range(MOST + more):
        memory.note(Slug(f"s{number}"), refused())
        memory.note(None, refused(peer=f"p{number}"))
    assert len(memory._by_slug) == len(memory._by_peer) == MOST


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**62))
def test_what_a_credential_claims_is_read_without_its_key(key: bytes, epoch: int) -> None:
    """The claim of a credential signed with another key is readable, but not valid."""
    claim = TokenClaim(CAM, Epoch(epoch))
    given_ = issue(key, claim)
    assert claimed(given_) == claim
    assert claim_of([key], given_) == claim
    assert claim_of([bytes(32) if key != bytes(32) else b"x" * 32], given_) is None
