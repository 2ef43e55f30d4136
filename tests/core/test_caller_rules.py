"""The pure parts of the API boundary: roles, credentials, signatures, event order, rates."""

from __future__ import annotations

import base64
import string
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core import event_order, presence
from nomad_watchdog.core.agent_token import TokenClaim, claim_of, issue
from nomad_watchdog.core.rate_limit import Buckets
from nomad_watchdog.core.roles import Right, Role, may, roles_with
from nomad_watchdog.core.webhook_signature import (
    TOLERANCE_S,
    ReplayWindow,
    Seen,
    SignatureError,
    SignatureHeaders,
    secret_of,
    sign,
    verify,
)
from nomad_watchdog.errors import OutOfDateError, TransientError
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Departure, Device, DeviceRecord, Epoch, Presence, WallTime

KEY, OLD = b"k" * 32, b"o" * 32
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
"""The secret of the published test vector."""
BODY = b'{"test": 2432232314}'
HEADERS = (
    "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "1614265330",
    "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
)
SENT = 1614265330.0

IDS = st.text(string.ascii_letters + string.digits + "-/ ", min_size=1, max_size=30).filter(
    lambda text: text == text.strip()
)
CLAIMS = st.builds(
    lambda name, epoch: TokenClaim(slug_of(DeviceId(name)), Epoch(epoch)),
    IDS,
    st.integers(0, 2**62),
)


@pytest.mark.parametrize(
    ("role", "rights"),
    [
        (Role.VIEWER, {Right.READ}),
        (Role.DEVICE, {Right.CHANGE}),
        (Role.AGENT, {Right.REPORT}),
        (Role.OPERATOR, set(Right)),
    ],
)
def test_what_each_role_may_do(role: Role, rights: set[Right]) -> None:
    """Each role has its own rights and no other; each right names the roles that have it."""
    assert {right for right in Right if may(role, right)} == rights
    assert {right for right in Right if role in roles_with(right)} == rights


@given(CLAIMS)
def test_a_credential_is_good_for_its_claim_under_any_of_the_keys(claim: TokenClaim) -> None:
    """A credential is accepted with the key that issued it, also among other keys, and with no other key."""
    given_one = issue(KEY, claim)
    assert claim_of([KEY], given_one) == claim
    assert claim_of([OLD, KEY], given_one) == claim
    assert claim_of([OLD], given_one) is None
    assert claim_of([], given_one) is None


@given(CLAIMS, CLAIMS)
def test_a_credential_does_not_turn_into_another(one: TokenClaim, other: TokenClaim) -> None:
    """The MAC of one device or epoch does not match the name of another."""
    mac = issue(KEY, one).rpartition(".")[2]
    forged = f"wda1.{other.slug}.{other.epoch}.{mac}"
    assert claim_of([KEY], forged) == (other if one == other else None)


@given(CLAIMS, st.data())
def test_no_change_of_a_credential_is_accepted(claim: TokenClaim, data: st.DataObject) -> None:
    """A credential with one character changed, added or removed is rejected."""
    good = issue(KEY, claim)
    at = data.draw(st.integers(0, len(good) - 1))
    other = data.draw(st.text(max_size=2))
    changed = good[:at] + other + good[at + 1 :]
    assert claim_of([KEY], changed) == (claim if changed == good else None)


@given(st.text(max_size=300))
def test_any_text_is_no_credential(text: str) -> None:
    """Any text in place of a credential is rejected without an exception."""
    assert claim_of([KEY], text) is None
    assert claim_of([KEY], f"wda1.{text}") is None
    assert claim_of([KEY], f"wda1.a-abc.{text}.x") is None


def test_the_published_vector_of_standard_webhooks() -> None:
    """The signature of the scheme's own test vector is reproduced and accepted."""
    signed = SignatureHeaders(HEADERS[0], int(HEADERS[1]))
    assert sign(secret_of(SECRET), signed, BODY) == HEADERS[2]
    assert verify([secret_of(SECRET)], HEADERS, BODY, SENT) == signed


def test_one_good_signature_among_others_is_enough() -> None:
    """With several secrets and several signatures, one matching pair is accepted."""
    others = "v1a,xx v2,AAAA v1,!! v1, , v1,AAAA"
    many = (HEADERS[0], HEADERS[1], f"{others} {HEADERS[2]}")
    assert verify([b"x" * 32, secret_of(SECRET)], many, BODY, SENT).at == 1614265330


@pytest.mark.parametrize("now", [SENT - TOLERANCE_S - 1, SENT + TOLERANCE_S + 1])
def test_an_old_or_future_signature_is_refused(now: float) -> None:
    """A signature one second beyond the tolerance, before or after, is rejected; at the limit it is accepted."""
    with pytest.raises(SignatureError, match="from our clock"):
        verify([secret_of(SECRET)], HEADERS, BODY, now)
    edge = now + 1 if now < SENT else now - 1
    assert verify([secret_of(SECRET)], HEADERS, BODY, edge)


@given(st.sampled_from([0, 1, 2, 3]), st.data())
def test_no_change_of_a_signed_call_is_accepted(part: int, data: st.DataObject) -> None:
    """Any change of the id, the time, the signature or the body is a SignatureError and nothing else."""
    parts = [*HEADERS, BODY.decode()]
    text = parts[part]
    at = data.draw(st.integers(0, len(text) - 1))
    parts[part] = text[:at] + data.draw(st.text(max_size=3)) + text[at + 1 :]
    if parts[part] == text:
        return
    body = parts[3].encode("utf-8", "surrogatepass")
    signatures = {one.strip() for one in parts[2].split(" ")}
    if part == 2 and HEADERS[2] in signatures:
        return  # a bad one beside the good one
    with pytest.raises(SignatureError):
        verify([secret_of(SECRET)], (parts[0], parts[1], parts[2]), body, SENT)


def test_a_signature_is_written_in_one_way() -> None:
    """Base64 has unused bits in its last character; another value of them is not accepted."""
    assert HEADERS[2].endswith("=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = alphabet.index(HEADERS[2][-2])
    assert last % 4 == 0
    for unused in (1, 2, 3):
        changed = f"{HEADERS[2][:-2]}{alphabet[last + unused]}="
        with pytest.raises(SignatureError):
            verify([secret_of(SECRET)], (HEADERS[0], HEADERS[1], changed), BODY, SENT)


@given(st.text(max_size=80), st.text(max_size=30), st.text(max_size=200), st.binary(max_size=50))
def test_any_headers_are_refused_in_words(one: str, two: str, three: str, body: bytes) -> None:
    """Hostile headers and bodies raise a SignatureError that does not repeat them."""
    with pytest.raises(SignatureError) as caught:
        verify([secret_of(SECRET)], (one, two, three), body, SENT)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsec_",
        "whsec_!",
        "whsec_AAAA",
        "whsec_" + base64.b64encode(b"x" * 65).decode(),
    ],
)
def test_weak_or_wrong_secrets_are_refused(text: str) -> None:
    """A secret without the prefix, with bad base64, too short or too long is rejected."""
    with pytest.raises(ValueError):
        secret_of(text)


def test_a_window_tells_new_busy_done_and_other() -> None:
    """An ID is new once, busy until it is settled, and done after that; another body is detected; after a failure the
    ID is new again."""
    window, signed = ReplayWindow(), SignatureHeaders("m", 1000)
    assert window.claim(signed, b"a", 1000.0) is Seen.NEW
    assert window.claim(signed, b"a", 1000.0) is Seen.BUSY
    window.settle(signed, done=False)
    assert window.claim(signed, b"a", 1000.0) is Seen.NEW
    window.settle(signed, done=True)
    assert window.claim(signed, b"a", 1001.0) is Seen.DONE
    assert window.claim(signed, b"b", 1001.0) is Seen.OTHER


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 900)), max_size=60))
def test_a_window_is_bounded_and_keeps_what_could_be_replayed(calls: list[tuple[int, int]]) -> None:
    """The window never exceeds its bound, and while it is not full, an applied event is not accepted again for twice as
    long as its signature is valid."""
    small, large = ReplayWindow(most=5), ReplayWindow()
    applied: dict[int, int] = {}
    for number, later in sorted(calls, key=lambda call: call[1]):
        at = applied.get(number, later)
        signed = SignatureHeaders(str(number), at)
        small.claim(signed, b"", float(later))
        assert len(small) <= 5
        if abs(later - at) > TOLERANCE_S:
            continue
        seen = large.claim(signed, b"", float(later))
        assert seen is (Seen.DONE if number in applied else Seen.NEW)
        large.settle(signed, done=True)
        applied[number] = at


DEVICE = Device(DeviceId("d"), "default", "10.0.0.1")


def step(
    stored: DeviceRecord | None, connected: bool, event: event_order.SignedEvent | None, now: float
) -> DeviceRecord | None:
    """The record after a change, as the ledger makes it."""
    if connected:
        wanted = presence.register(stored, DEVICE, WallTime(now))
    elif stored is not None:
        wanted = presence.deregister(stored, WallTime(now))
    else:
        return None
    return event_order.stamp(stored, wanted, event, WallTime(now)) or stored


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=12), st.data())
def test_s5_no_replay_of_an_event_changes_a_record(
    steps: list[tuple[bool, int]], data: st.DataObject
) -> None:
    """After any history of signed and unsigned changes in order, resending an event that changed the record has no
    effect, even on a process without memory."""
    stored: DeviceRecord | None = None
    now = 1000.0
    applied: list[tuple[bool, event_order.SignedEvent]] = []
    for number, (connected, gap) in enumerate(steps):
        now += gap
        event = (
            event_order.SignedEvent(f"m{number}", int(now)) if data.draw(st.booleans()) else None
        )
        try:
            after = step(stored, connected, event, now)
        except OutOfDateError:
            # Signed in the second of an unsigned change, or a disconnect in the second of another event.
            assert event is not None
            assert stored is not None
            assert stored.event_at == 0 or (stored.event_at == event.at and not connected)
            continue
        if event is not None and after is not stored:
            applied.append((connected, event))
        stored = after
    for connected, event in applied:
        try:
            again = step(stored, connected, event, now + 1)
        except OutOfDateError:
            continue
        assert again == stored


def test_events_are_ordered_by_their_senders_time() -> None:
    """A later event is applied, an earlier one rejected, each once."""
    first = step(None, True, event_order.SignedEvent("a", 98), 103.0)
    assert first is not None
    gone = step(first, False, event_order.SignedEvent("b", 100), 103.1)
    assert gone is not None
    assert (gone.presence, gone.event_at, len(gone.event_marks)) == (Presence.ABSENT, 100, 1)
    assert event_order.is_replay(gone, event_order.SignedEvent("b", 100))
    with pytest.raises(OutOfDateError, match="1 s before"):
        step(gone, True, event_order.SignedEvent("c", 99), 104.0)
    back = step(gone, True, event_order.SignedEvent("d", 101), 104.0)
    assert back is not None
    assert back.presence is Presence.PRESENT


def test_w1_an_event_older_than_one_that_changed_nothing_is_late() -> None:
    """After a connect at -10 and one at -2 that changes nothing, a disconnect at -3 does not remove the device;
    conversely, a late connect does not bring back a device that was reported gone twice."""
    stored = step(None, True, event_order.SignedEvent("a", 90), 100.0)
    again = step(stored, True, event_order.SignedEvent("b", 98), 100.0)
    assert again is not None
    assert event_order.is_mark_only(stored, again)
    with pytest.raises(OutOfDateError, match="1 s before"):
        step(again, False, event_order.SignedEvent("c", 97), 100.0)
    gone = step(again, False, event_order.SignedEvent("d", 110), 111.0)
    gone = step(gone, False, event_order.SignedEvent("e", 120), 121.0)
    with pytest.raises(OutOfDateError):
        step(gone, True, event_order.SignedEvent("f", 115), 122.0)


def test_w1_an_unsigned_request_that_changes_nothing_makes_older_events_late() -> None:
    """Where events are signed, a PUT that confirms a device counts as its last event, and is written once per second;
    where none were signed it causes no write."""
    stored = step(None, True, event_order.SignedEvent("a", 90), 100.0)
    confirmed = step(stored, True, None, 105.5)
    assert confirmed is not None
    assert (confirmed.event_at, confirmed.event_marks) == (105, ())
    assert step(confirmed, True, None, 105.9) is confirmed
    with pytest.raises(OutOfDateError):
        step(confirmed, False, event_order.SignedEvent("b", 104), 106.0)
    plain = step(None, True, None, 100.0)
    assert step(plain, True, None, 200.0) is plain


@given(st.permutations(["connected", "disconnected", "again"]), st.booleans())
def test_events_of_one_second_leave_the_device_watched_in_any_order(
    order: list[str], watched: bool
) -> None:
    """If a connect is among the events of one second, the device is watched afterwards, whatever their order and
    whether or not it was present before; a replay of any of them has no effect."""
    stored = step(None, True, event_order.SignedEvent("first", 10), 10.0)
    stored = stored if watched else step(stored, False, event_order.SignedEvent("gone", 20), 20.0)
    for name in order * 2:
        try:
            stored = step(stored, name != "disconnected", event_order.SignedEvent(name, 100), 100.0)
        except OutOfDateError:
            assert name == "disconnected"
    assert stored is not None
    assert stored.presence is Presence.PRESENT


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_newest_event_decides_in_whatever_order_they_arrive(
    arrivals: list[tuple[bool, int]],
) -> None:
    """After arrivals in any order the device is in the state of the newest event; connected, if the newest second has
    events of both kinds."""
    stored = step(None, True, event_order.SignedEvent("start", 1), 1.0)
    for number, (connected, at) in enumerate(arrivals):
        with suppress(OutOfDateError):
            stored = step(stored, connected, event_order.SignedEvent(str(number), 100 + at), 200.0)
    assert stored is not None
    newest = max(at for _, at in arrivals)
    expected = any(connected for connected, at in arrivals if at == newest)
    assert (stored.presence is Presence.PRESENT) is expected


def test_a_blink_reported_in_the_second_of_an_expiry_is_watched() -> None:
    """If a device expired, or was disconnected unsigned, in the second in which a connect was signed, it is watched; if
    it was removed, it is not."""
    first = step(None, True, None, 50.0)
    assert first is not None
    for left, back in ((Departure.EXPIRED, True), (Departure.REMOVED, False)):
        gone = event_order.stamp(
            first, presence.deregister(first, WallTime(100.7), left), None, WallTime(100.7)
        )
        if back:
            there = step(gone, True, event_order.SignedEvent("a", 100), 101.0)
            assert there is not None
            assert there.presence is Presence.PRESENT
        else:
            with pytest.raises(OutOfDateError):
                step(gone, True, event_order.SignedEvent("a", 100), 101.0)


def test_a_change_by_hand_is_dated_by_our_clock() -> None:
    """After an operator's change, events signed before it are rejected, later ones applied; a sender whose clock is
    ahead cannot replay its own event."""
    first = step(None, True, event_order.SignedEvent("a", 100), 100.0)
    by_hand = step(first, False, None, 150.0)
    assert by_hand is not None
    assert (by_hand.event_at, by_hand.event_marks) == (0, ())
    with pytest.raises(OutOfDateError):
        step(by_hand, True, event_order.SignedEvent("b", 149), 151.0)
    assert step(by_hand, True, event_order.SignedEvent("c", 151), 151.0) != by_hand
    ahead = step(None, True, event_order.SignedEvent("f", 300), 100.0)
    gone = step(ahead, False, None, 150.0)
    assert step(gone, True, event_order.SignedEvent("f", 300), 151.0) is gone


def test_a_restored_wish_is_guarded_as_it_was() -> None:
    """When a backup's desired state replaces an older one, replaying the event that caused it has no effect."""
    old = step(None, True, event_order.SignedEvent("a", 100), 100.0)
    saved = step(old, False, event_order.SignedEvent("b", 200), 200.0)
    assert saved is not None
    restored = presence.restore(old, saved)
    assert restored is not None
    with pytest.raises(OutOfDateError):
        step(restored, True, event_order.SignedEvent("a", 100), 300.0)
    assert step(restored, False, event_order.SignedEvent("b", 200), 300.0) is restored
    confirmed = step(saved, False, event_order.SignedEvent("c", 250), 250.0)
    assert confirmed is not None
    assert presence.restore(saved, confirmed) == replace(
        saved, event_at=250, event_marks=confirmed.event_marks
    )


def test_a_device_that_flaps_within_a_second_is_told_to_wait() -> None:
    """The seventeenth change within one second is rejected temporarily, not permanently."""
    stored: DeviceRecord | None = None
    for number in range(event_order.MAX_AT_ONCE):
        device = replace(DEVICE, address=f"10.0.0.{number}")
        wanted = presence.register(stored, device, WallTime(100.0))
        stored = event_order.stamp(
            stored, wanted, event_order.SignedEvent(str(number), 100), WallTime(100.0)
        )
    with pytest.raises(TransientError):
        step(stored, True, event_order.SignedEvent("one more", 100), 100.0)


def test_an_event_that_changes_nothing_writes_its_mark_and_no_more() -> None:
    """An old event, and a replay, are not written at all; a newer one writes only its signing time, at most sixteen
    times per second of its sender's clock."""
    stored = step(None, True, event_order.SignedEvent("a", 100), 100.0)
    for event in (event_order.SignedEvent("old", 1), event_order.SignedEvent("a", 100)):
        assert step(stored, True, event, 201.0) is stored
    writes = 0
    for number in range(3 * event_order.MAX_AT_ONCE):
        after = step(stored, True, event_order.SignedEvent(f"b{number}", 200), 201.0)
        writes += after is not stored
        stored = after
        assert stored is not None
        assert (stored.generation, stored.event_at) == (1, 200)
    assert writes == event_order.MAX_AT_ONCE


@given(
    st.floats(0.1, 100),
    st.integers(1, 50),
    st.lists(st.floats(0, 5), min_size=1, max_size=100),
)
def test_a_client_never_gets_more_than_burst_and_rate(
    rate: float, burst: int, gaps: list[float]
) -> None:
    """In any period at most burst + rate × time requests of a client pass, and one that waits as requested passes."""
    buckets, now, passed = Buckets(rate, burst), 0.0, 0
    for number, gap in enumerate(gaps):
        now += gap
        wait = buckets.take("a", now)
        passed += not wait
        assert passed <= burst + rate * now + 1e-6
        if wait:
            assert buckets.take(f"one who has not asked before {number}", now) == 0.0
            now += wait + 1e-9
            assert buckets.take("a", now) == 0.0
            passed += 1


@given(st.lists(st.text(max_size=3), max_size=80))
def test_the_table_of_clients_is_bounded(clients: list[str]) -> None:
    """However many clients connect, the table never exceeds its bound."""
    buckets = Buckets(1.0, 1.0, most=8)
    for now, client in enumerate(clients):
        buckets.take(client, float(now))
        assert len(buckets) <= 8
