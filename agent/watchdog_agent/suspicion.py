"""Probe results → what is believed of the device. Pure: no clock, no I/O.

ok → (k misses in a row) → suspect → (an independent confirmation failed too) → offline.
One success of a probe leads back to ok. A device that never answered is suspected for ever, never
called offline: it may not be there yet (S6).
"""


class Suspicion:
    """The belief about one device. `need`: misses in a row of one probe that make it suspect."""

    def __init__(self, need, *, was_ready=False):
        self.need = need
        self.state = "ok"
        self.was_ready = was_ready
        self.confirmed = False
        self.reason = "no probe has answered yet"
        self._misses = {}

    def restore(self, state, reason):
        """Go on from what an earlier run believed, so that a restart is not taken for a recovery."""
        if self.was_ready and state in ("suspect", "offline"):
            self.state, self.confirmed = state, state == "offline"
            self.reason = reason if isinstance(reason, str) else "as before the restart"

    @property
    def misses(self):
        """Most misses in a row of any probe."""
        return max(self._misses.values(), default=0)

    def probed(self, name, ok, reason, need=None):
        """Take one result of probe `name` (unique among the probes); true when the state changed."""
        before = self.state
        if ok:
            self._misses[name] = 0
            self.was_ready = True
            if not any(self._misses.values()):
                self.state, self.confirmed, self.reason = "ok", False, reason
        else:
            self._misses[name] = self._misses.get(name, 0) + 1
            if self._misses[name] >= (need or self.need):
                if self.state == "ok":
                    self.state = "suspect"
                if self.state == "suspect":
                    self.reason = f"{reason}, {self._misses[name]} times"
        return self.state != before

    def wants_confirmation(self):
        """Whether an independent probe should be asked now."""
        return self.state == "suspect" and self.was_ready and not self.confirmed

    def confirmation(self, name, ok, reason):
        """Take the result of the independent probe; true when the state changed."""
        if not self.wants_confirmation():
            return False
        if ok:
            self.reason = f"{self.reason.partition('; ')[0]}; but {name} answers"
            return False
        self.confirmed = True
        self.state = "offline"
        self.reason = f"{self.reason.partition('; ')[0]}; {name}: {reason}"
        return True
