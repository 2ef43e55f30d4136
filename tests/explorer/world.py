"""The steps of the explorer's small world: what may happen next in a state.

The performer is a model that keeps the order of `controllers/agents/executor.py`: fence, then
ensure or retire, then the expectation. All decisions come from the real code (`model`).
"""

from __future__ import annotations

from collections.abc import Iterator

from nomad_watchdog.core.acceptance import AcceptanceKind
from tests.explorer import model
from tests.explorer.guards import Guard
from tests.explorer.model import (
    BURY,
    FIRST,
    NO_VIEW,
    START,
    STOP,
    BrokenError,
    Dev,
    Jobs,
    Rec,
    Rep,
    State,
    check_write,
    learned,
    listed,
    listing_of,
    placed,
    stopped,
    with_device,
    with_hand,
    with_replica,
    with_view,
    worsened,
)

Step = tuple[str, State]


class World:
    """The steps that are possible in a state, with or without some guards."""

    def __init__(self, without: frozenset[Guard] = frozenset()) -> None:
        self.without = without
        self.breaker = Guard.BREAKER not in without

    def has(self, guard: Guard) -> bool:
        """Whether the guard is in place."""
        return guard not in self.without

    def steps(self, state: State, *, calm: bool = False) -> Iterator[Step]:
        """All possible next steps; `calm`: only those that must happen in the end."""
        for d in range(len(state[0])):
            yield from self.by_itself(state, d, calm=calm)
        for r in range(len(state[1])):
            yield from self.by_replica(state, r, calm=calm)
        if not calm and state[2]:
            for d in range(len(state[0])):
                yield from self.requests(state, d)

    def by_replica(self, state: State, r: int, *, calm: bool) -> Iterator[Step]:
        """What a replica reads, does and receives, and its faults. It depends on the other replicas
        only by the starts that they have in hand."""
        yield from self._reads(state, r)
        for d in range(len(state[0])):
            yield from self._acts(state, r, d, calm=calm)
            yield from self._reports(state, r, d)
        if not calm:
            yield from self._replica_faults(state, r)

    # -- steps of scheduler and hosts -----------------------------------------------------------

    def by_itself(self, state: State, d: int, *, calm: bool) -> Iterator[Step]:
        """The steps of the scheduler and of the hosts of a device's agents."""
        rec, jobs, zombies, wire, acked = state[0][d]
        name = model.NAMES[d]
        for epoch in wire:
            rest = tuple(one for one in wire if one != epoch)
            word = f"a late request for {name} at epoch {epoch} arrives"
            arrived = placed((rec, jobs, zombies, rest, acked), epoch, word)
            yield word, with_device(state, d, arrived)
        for at, (epoch, job, number) in enumerate(jobs):

            def become(
                new: str, number: int = number, gone: tuple[int, int] | None = None,
                at: int = at, epoch: int = epoch,
            ) -> Dev:  # fmt: skip
                more = (*zombies, gone) if gone else zombies
                changed = (*jobs[:at], (epoch, new, number), *jobs[at + 1 :])
                return (rec, changed, more, wire, acked)

            if job in "Sl":
                yield f"agent {name}/{epoch} ends", with_device(state, d, become("D"))
            elif job == "L":
                yield f"the node of {name}/{epoch} is back", with_device(state, d, become("R"))
                if not calm and number == 1:
                    moved = become("R", 2, (epoch, 1))
                    yield f"{name}/{epoch} is moved to another node", with_device(state, d, moved)
            elif job == "R" and not calm and state[3]:
                worse = worsened(state)
                yield f"agent {name}/{epoch} exits 0", with_device(worse, d, become("D"))
                yield f"the node of {name}/{epoch} is lost", with_device(worse, d, become("L"))
        for zombie in zombies:
            left = tuple(one for one in zombies if one != zombie)
            ended = with_device(state, d, (rec, jobs, left, wire, acked))
            yield f"the process {name}/{zombie[0]} on the lost node ends", ended

    def requests(self, state: State, d: int) -> Iterator[Step]:
        """A client asks a replica to watch a device, or to stop watching it, and is answered or
        not."""
        rec, *rest = state[0][d]
        fewer = (*state[:2], state[2] - 1, *state[3:])
        present = 0 if rec and rec[0] else 1
        changed = model.registered(d, rec, present, state[4][1])
        word = f"{model.NAMES[d]} is {'registered' if present else 'deregistered'}"
        if not changed:
            return
        acked = 1 if present else 2
        if not self.has(Guard.RETURN_WHEN_STORED):
            kept = (rec, *rest[:-1], acked)
            yield f"{word}, acknowledged, its replica dies", with_device(fewer, d, kept)  # type: ignore[arg-type]  # rest is the other four
        stored = (changed, *rest[:-1], acked)
        for r in range(len(state[1])):
            after = with_device(fewer, d, stored)  # type: ignore[arg-type]  # rest is the other four
            yield f"{word} at r{r}", learned(after, r, d, changed)
        if state[3]:
            unsaid = with_device(worsened(fewer), d, (changed, *rest[:-1], 0))  # type: ignore[arg-type]  # rest is the other four
            yield f"{word}, the answer is lost", unsaid

    # -- reads of a replica ---------------------------------------------------------------------

    def _reads(self, state: State, r: int) -> Iterator[Step]:
        devices, replicas = state[0], state[1]
        read, looked, views, listing, confirmed, twice = replicas[r]
        known = tuple(view[0] for view in views)
        truth = tuple(device[0] for device in devices)
        if not read or known != truth:
            seen = state
            for d, rec in enumerate(truth):
                seen = learned(seen, r, d, rec)
            yield f"r{r} reads the registry", self._rep(seen, r, (1, *seen[1][r][1:]))
        if listing:
            yield f"r{r}'s listing comes", self._rep(state, r, listed(replicas[r]))
            return
        fresh = listed((read, looked, views, listing_of(devices), confirmed, twice))
        if fresh != replicas[r]:
            yield f"r{r} lists the placements", self._rep(state, r, fresh)
        if read and looked:
            _, held, _ = self._plan(replicas[r])
            if set(held) - set(twice):
                yield f"r{r} reads both a second time", self._second_read(state, r)

    def _second_read(self, state: State, r: int) -> State:
        held = self._plan(state[1][r])[1]
        for d, device in enumerate(state[0]):
            state = learned(state, r, d, device[0])
        read, looked, views, _, confirmed, twice = state[1][r]
        rep = listed((read, looked, views, listing_of(state[0]), confirmed, twice))
        confirmed, twice = model.read_again(rep[2], held, rep[4])
        return self._rep(state, r, (*rep[:4], confirmed, twice))

    def _replica_faults(self, state: State, r: int) -> Iterator[Step]:
        if not state[3]:
            return
        worse = worsened(state)
        read, looked, views, listing, confirmed, twice = state[1][r]
        if read or looked:
            empty: Rep = (0, 0, (NO_VIEW,) * len(views), (), (), ())
            yield f"r{r} dies and starts again", with_replica(worse, r, empty)
            for d, view in enumerate(views):
                if view[4] and view[4][0] == START:
                    rec, jobs, zombies, wire, acked = state[0][d]
                    sent = (rec, jobs, zombies, (*wire, view[4][1]), acked)
                    after = with_device(with_replica(worse, r, empty), d, sent)
                    yield f"r{r} dies, its start of {model.NAMES[d]} is on its way", after
        if not listing:
            slow: Rep = (read, looked, views, listing_of(state[0]), confirmed, twice)
            yield f"r{r} asks for a listing that takes long", with_replica(worse, r, slow)
        for d, view in enumerate(views):
            if read and view[0]:
                short = (*views[:d], ((), *view[1:]), *views[d + 1 :])
                partial: Rep = (read, looked, short, listing, confirmed, twice)
                yield (
                    f"r{r}'s registry listing lacks {model.NAMES[d]}",
                    self._rep(worse, r, partial),
                )

    # -- actions of a replica -------------------------------------------------------------------

    def _plan(self, rep: Rep) -> tuple[tuple[tuple[int, int, int], ...], model.Keys, model.Keys]:
        return model.planned(tuple([(v[0], v[1]) for v in rep[2]]), rep[4], self.breaker)

    def _acts(self, state: State, r: int, d: int, *, calm: bool) -> Iterator[Step]:
        rep = state[1][r]
        rec, jobs, unseen, expects, hand = rep[2][d]
        if hand:
            yield from self._act(state, r, d, calm=calm)
            return
        if not (rep[0] and rep[1]) or expects:
            return
        actions, _, going = self._plan(rep)
        for kind, device, epoch in actions:
            if device != d:
                continue
            gone_for_sure = not unseen or not self.has(Guard.FRESHNESS)
            if kind == START and not gone_for_sure:
                continue
            if kind == STOP and len(set(going) - set(rep[4])) > model.LIMITS.breaker_min:
                raise BrokenError(f"S7: r{r} stops {len(going)} agents in one pass")
            yield from self._fence(state, r, d, (kind, epoch), calm=calm)
        if not calm and rec and jobs:
            yield from self._sweep(state, r, d)
        if not calm and rec and state[4][2]:
            yield from self._bury(state, r, d)

    def _fence(
        self, state: State, r: int, d: int, hand: tuple[int, int], *, calm: bool
    ) -> Iterator[Step]:
        """`Fence.pass_all`: commit the epoch, or read the record again."""
        kind, epoch = hand
        known: Rec = state[1][r][2][d][0]
        truth: Rec = state[0][d][0]
        word = f"r{r} fences a {'start' if kind == START else 'stop'} of {model.NAMES[d]}/{epoch}"
        if kind == START and epoch > known[2]:
            if not self.has(Guard.CAS):
                yield f"{word} with nothing", with_hand(state, r, d, hand)
            elif not known[2] and (state[4][0] or state[4][2]):
                word = f"r{r} reads the floor for a start of {model.NAMES[d]}"
                yield word, with_hand(state, r, d, (FIRST, state[4][0]))
            else:
                yield from self._commit(state, r, d, hand, word, calm=calm)
            return
        if known != truth and (kind == START or self.has(Guard.REREAD)):
            yield f"{word}: overtaken", self._news(state, r, d, truth)
            return
        if kind == STOP and truth and truth[0] and truth[2] == epoch:
            raise BrokenError(f"S7: {model.NAMES[d]}/{epoch} is wanted and would be stopped")
        yield word, with_hand(state, r, d, hand)

    def _commit(
        self, state: State, r: int, d: int, hand: tuple[int, int], word: str, *, calm: bool
    ) -> Iterator[Step]:
        known: Rec = state[1][r][2][d][0]
        truth: Rec = state[0][d][0]
        if known != truth and self.has(Guard.FENCE_EACH):
            yield f"{word}: lost", self._news(state, r, d, truth)
            return
        new = model.advanced(d, known, hand[1])
        stored = with_device(state, d, (new, *state[0][d][1:]))
        check_write(state[0][d], stored[0][d], state[4][3][d], word)
        yield word, with_hand(self._news(stored, r, d, new), r, d, hand)
        if state[3] and not calm:
            yield f"{word}, the answer is lost", with_hand(worsened(stored), r, d, ())

    def _first(self, state: State, r: int, d: int, floor: int, *, calm: bool) -> Iterator[Step]:
        known: Rec = state[1][r][2][d][0]
        word = f"r{r} fences the first start of {model.NAMES[d]}"
        if not known:
            yield f"{word}: its record is not known any more", with_hand(state, r, d, ())
            return
        epoch = model.first(d, known, floor) if self.has(Guard.FLOOR) else known[2] + 1
        yield from self._commit(state, r, d, (START, epoch), f"{word}, {epoch}", calm=calm)

    def _act(self, state: State, r: int, d: int, *, calm: bool) -> Iterator[Step]:
        """`ActionExecutor._apply`, and the expectation that it leaves."""
        kind, epoch = state[1][r][2][d][4]
        if kind == FIRST:
            yield from self._first(state, r, d, epoch, calm=calm)
            return
        if kind == BURY:
            yield from self._delete(state, r, d)
            return
        name = f"{model.NAMES[d]}/{epoch}"
        device = state[0][d]
        rec, jobs, unseen, expects, _ = state[1][r][2][d]
        failed = (rec, jobs, unseen, expects, ())
        if kind == START:
            word = f"r{r} starts {name}"
            done = with_device(state, d, placed(device, epoch, word))
            yield word, with_view(done, r, d, (rec, jobs, unseen, 1, ()), late=True)
        else:
            word = f"r{r} stops {name}"
            done = with_device(state, d, stopped(device, epoch))
            marked = tuple(
                (e, "S" if e == epoch and s != "D" else s, number) for e, s, number in jobs
            )
            after = with_view(done, r, d, (rec, marked, unseen, expects, ()))
            yield word, self._rep(after, r, after[1][r])
        if state[3] and not calm:
            worse = worsened(done)
            yield f"{word}, the answer is lost", with_view(worse, r, d, failed)
            if kind == START:
                rec_, jobs_, zombies, wire, acked = worse[0][d]
                twice = with_device(worse, d, (rec_, jobs_, zombies, (*wire, epoch), acked))
                view = (rec, jobs, unseen, 1, ())
                yield f"{word}, and the request is doubled", with_view(twice, r, d, view, late=True)
                sent = with_device(
                    worsened(state), d, (*device[:3], (*device[3], epoch), device[4])
                )
                yield f"{word}, no answer, it is late", with_view(sent, r, d, failed)

    def _sweep(self, state: State, r: int, d: int) -> Iterator[Step]:
        rec, jobs, zombies, wire, acked = state[0][d]
        seen = state[1][r][2][d]
        newest = max((epoch for epoch, _, _ in jobs), default=0)
        for job in jobs:
            epoch, what, _ = job
            if what != "D" or epoch >= newest or job not in seen[1] or epoch >= seen[0][2]:
                continue
            if not self._under_way(state, d, epoch) or not self.has(Guard.REST):
                left = tuple(one for one in jobs if one != job)
                swept = with_device(state, d, (rec, left, zombies, wire, acked))
                yield f"r{r} sweeps {model.NAMES[d]}/{epoch}", swept

    def _under_way(self, state: State, d: int, epoch: int) -> bool:
        """A start request that the scheduler may still receive."""
        return epoch in state[0][d][3] or any(rep[2][d][4] == (START, epoch) for rep in state[1])

    def _bury(self, state: State, r: int, d: int) -> Iterator[Step]:
        """`PeriodicJobs._forget_tombstones`, up to the floor."""
        rec, jobs, *_ = state[1][r][2][d]
        if self.has(Guard.REST) and self._under_way(state, d, rec[2]):
            return
        # Requests in progress arrived long ago, and the listing is younger.
        shown = {job[0] for job in jobs}
        old = any(job[0] not in shown for job in state[0][d][1])
        if (old and self.has(Guard.LISTED)) or not model.due(d, rec, jobs):
            return
        word = f"r{r} raises the floor for the tombstone of {model.NAMES[d]}"
        yield word, with_hand(model.raised(state, d, rec), r, d, (BURY, rec[2]))

    def _delete(self, state: State, r: int, d: int) -> Iterator[Step]:
        """`Registry.forget`, and what is remembered of it."""
        known: Rec = state[1][r][2][d][0]
        word = f"r{r} deletes the tombstone of {model.NAMES[d]}"
        idle = with_hand(state, r, d, ())
        if not known or known != state[0][d][0]:
            yield f"{word}: it has changed", idle
            return
        gone = model.deleted(idle, d)
        yield word, self._news(gone, r, d, ())
        if state[3]:
            yield f"{word}, the answer is lost", worsened(gone)

    def _reports(self, state: State, r: int, d: int) -> Iterator[Step]:
        """`Fleet.report`: only a fresh read may refuse or bind."""
        truth, jobs, zombies, wire, acked = state[0][d]
        speakers = [(epoch, number) for epoch, job, number in jobs if job == "R"]
        for epoch, number in [*speakers, *zombies]:
            known, seen, unseen, _, _ = state[1][r][2][d]
            trusted = self._trusted(state, r, seen, unseen)
            if model.judged(d, known, epoch, number, trusted) is AcceptanceKind.ACCEPTED:
                continue
            after = self._news(state, r, d, truth) if truth else state
            _, seen, unseen, _, _ = after[1][r][2][d]
            trusted = self._trusted(after, r, seen, unseen)
            kind = model.judged(d, truth, epoch, number, trusted)
            other = truth and truth[0] and truth[2] == epoch and truth[3] not in (0, number)
            if other and not self.has(Guard.INSTANCE):
                kind = AcceptanceKind.BIND
            word = f"{model.NAMES[d]}/{epoch}.{number} reports to r{r}: {kind}"
            if kind is AcceptanceKind.BIND:
                new = model.bound(d, truth, epoch, number)
                stored = with_device(after, d, (new, *after[0][d][1:]))
                check_write(after[0][d], stored[0][d], state[4][3][d], word)
                yield word, self._news(stored, r, d, new)
            elif kind is AcceptanceKind.REFUSED:
                left = tuple(one for one in zombies if one != (epoch, number))
                ended = tuple(
                    (e, "D", n) if (e, s, n) == (epoch, "R", number) else (e, s, n)
                    for e, s, n in jobs
                )
                yield word, with_device(after, d, (truth, ended, left, wire, acked))
            elif after != state:
                yield word, after

    def _trusted(self, state: State, r: int, seen: Jobs, unseen: int) -> Jobs:
        """`Fleet._accept`: a listing older than the record does not prove which instance lives."""
        looked = state[1][r][1]
        return seen if looked and not (unseen and self.has(Guard.LISTING)) else ()

    def _news(self, state: State, r: int, d: int, rec: Rec) -> State:
        after = learned(state, r, d, rec)
        return self._rep(after, r, after[1][r])

    def _rep(self, state: State, r: int, rep: Rep) -> State:
        return with_replica(state, r, model.settled(rep, self.breaker))
