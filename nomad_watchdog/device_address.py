"""Addresses of devices from outside, in the form that is stored and that agents take.

The rule is the agent's own (`watchdog_agent.runtime.address`), so that none is stored that an agent would reject.
Names with other characters than ASCII become what the DNS knows (IDNA 2008 with the mapping of UTS #46).
"""

from __future__ import annotations

from watchdog_agent.runtime import address

from nomad_watchdog.errors import UserError


def device_address(text: str) -> str:
    """The address as it is stored. Raises UserError that says what to write."""
    if not text.isprintable() or any(c.isspace() for c in text):
        raise UserError(f"{text[:80]!a} holds a blank or control character")
    try:
        return address.checked(text if text.isascii() else _ascii(text))
    except address.AddressError as error:
        raise UserError(str(error)) from None


def endpoint(text: str) -> str:
    """HOST:PORT as an agent listens there, checked to be that alone. Raises UserError."""
    try:
        address.endpoint(text)
    except address.AddressError as error:
        raise UserError(str(error)) from None
    return text


def _ascii(text: str) -> str:
    """A name with its labels as xn--…; raises UserError when it has no such form."""
    import idna  # noqa: PLC0415  # costs a command 10 ms, and few addresses need it

    if set(text) & set("/:@%[]"):
        raise UserError(
            f"{text[:80]!a} is not a host name; write the name alone, without scheme, port or path"
        )
    try:
        labels = idna.uts46_remap(text, std3_rules=False).split(".")
        return ".".join(one if one.isascii() else idna.alabel(one).decode() for one in labels)
    except UnicodeError as error:  # IDNAError is one
        raise UserError(
            f"{text[:80]!a} is not an international host name: {ascii(str(error))[1:-1]}; "
            "write its ASCII form (xn--…) or an IP address"
        ) from None
