"""The rule for a device's address: which are accepted, in which form, and the errors for the rest."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.config import document as config
from watchdog_agent.errors import ConfigError
from watchdog_agent.runtime import address
from watchdog_agent.runtime.address import AddressError, checked

from nomad_watchdog.device_address import device_address
from nomad_watchdog.errors import UserError
from tests.agent.world import document, probe

TAKEN = {
    "10.0.0.9": "10.0.0.9",
    "127.255.255.255": "127.255.255.255",
    "[::1]": "::1",
    "::0001": "::1",
    "FD00:0:0::A": "fd00::a",
    "::ffff:10.0.0.9": "10.0.0.9",
    "fe80::1%lo": "fe80::1%lo",
    "[FE80::1%eth0.100]": "fe80::1%eth0.100",
    "febf::1%br-lan_2": "febf::1%br-lan_2",
    "pump-7": "pump-7",
    "Pump_7.Example": "Pump_7.Example",
    "dev.test.": "dev.test.",
    "_x.a1": "_x.a1",
    "1.0.0.127.in-addr.arpa": "1.0.0.127.in-addr.arpa",
    "xn--gert-noa.local": "xn--gert-noa.local",
    "a" * 63 + ".b": "a" * 63 + ".b",
    ".".join(["a" * 49] * 5) + ".": ".".join(["a" * 49] * 5) + ".",
}

REFUSED = [
    # URLs
    ("http://10.0.0.9", "is a URL; write 10.0.0.9"),
    ("https://user:pw@dev.test:8443/a?b#c", "is a URL; write dev.test"),
    ("http://[::1]:80/", "is a URL; write ::1"),
    ("modbus://", "is a URL; write a host name or an IP address"),
    # ports
    ("10.0.0.9:8080", "has a port; write 10.0.0.9 (a port belongs to the probe)"),
    ("dev.test:80", "has a port; write dev.test"),
    ("[::1]:80", "has a port; write ::1"),
    # networks and paths
    ("10.0.0.0/24", "is a network; write the address of one device"),
    ("fd00::/64", "is a network"),
    ("10.0.0.0/255.255.255.0", "is a network"),
    ("10.0.0.9/status", "has a path; write 10.0.0.9"),
    ("10.0.0.9/", "has a path; write 10.0.0.9"),
    # not IPv4 addresses
    ("127.10.1.999", "is not an IPv4 address; write four numbers from 0 to 255"),
    ("256.1.1.1", "is not an IPv4 address"),
    ("10.0.0", "is not an IPv4 address"),
    ("10.0.0.9.1", "is not an IPv4 address"),
    ("010.0.0.9", "without leading zeros"),
    ("10.0.0.9.", "is not an IPv4 address"),
    ("0x7f.1", "is not an IPv4 address"),
    ("0x7f000001", "is not an IPv4 address"),
    ("2130706433", "is not an IPv4 address"),
    ("[10.0.0.9]", "is not a host name"),
    ("0.0.0.0", "is the address of no device"),
    # not IPv6 addresses
    ("::", "is the address of no device"),
    ("::ffff:0.0.0.0", "is the address of no device"),
    ("fd00::1::2", "is not an IPv6 address"),
    ("12345::1", "is not an IPv6 address"),
    ("00:11:22:aa:bb:cc", "is not an IPv6 address"),
    ("[::1", "is not an IPv6 address"),
    # zones
    ("::1%lo", "only a link-local address (fe80::…) has a zone; write ::1"),
    ("fd00::1%eth0", "write fd00::1"),
    ("10.0.0.9%eth0", "write 10.0.0.9"),
    ("dev.test%eth0", "is not a host name"),
    ("fe80::1%", "is not the name of a network interface; write fe80::1%eth0"),
    ("fe80::1%a b", "without blanks"),
    ("fe80::1%../../x", "is not the name of a network interface"),
    ("fe80::1%" + "e" * 16, "is not the name of a network interface"),
    ("fe80::1", "write the network interface of the agent's host with it, as fe80::1%eth0"),
    # not names
    ("a..b", "is not a host name; each part between dots must have 1 to 63 characters"),
    (".a", "each part between dots"),
    (".", "each part between dots"),
    ("a..", "each part between dots"),
    ("a" * 64, "each part between dots"),
    (".".join(["a" * 50] * 5), "the name at most 253"),
    ("-x", "no - at the beginning or end of a part"),
    ("x-", "no - at the beginning"),
    ("a.-b.c", "no - at the beginning"),
    ("a,b", "use letters, digits, - and _"),
    ("user@dev", "use letters"),
    ("*", "use letters"),
    ("a\\b", "use letters"),
    ("$(reboot)", "use letters"),
    ("", "there is no address; write a host name or an IP address"),
    ("a b", "without blanks"),
    ("h\r\nX: y", "without blanks"),
    ("gerät.local", "write the name as xn--"),
]


@pytest.mark.parametrize(("text", "wanted"), TAKEN.items())
def test_what_is_an_address_is_taken_in_one_form(text: str, wanted: str) -> None:
    """Names and IP addresses are accepted on both sides, IPv6 without brackets and in its short form."""
    assert checked(text) == wanted
    assert checked(wanted) == wanted
    assert device_address(text) == wanted
    assert config.check(document(address=text, probes=[probe(80)]))["address"] == wanted


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_what_is_none_is_refused_with_what_to_write(text: str, words: str) -> None:
    """Anything else is rejected by the agent, with a short printable message that says what to write."""
    with pytest.raises(AddressError) as caught:
        checked(text)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError, match=r"^address: "):
        config.check(document(address=text, probes=[probe(80)]))
    if text.isascii() and text.isprintable() and " " not in text:
        with pytest.raises(UserError) as told:
            device_address(text)
        assert str(told.value) == str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("gerät.local", "xn--gert-noa.local"),
        ("GERÄT.local.", "xn--gert-noa.local."),
        ("gera\u0308t.my_site", "xn--gert-noa.my_site"),
        ("例え。jp", "xn--r8jz45g.jp"),
        ("１０.0.0.9", "10.0.0.9"),
    ],
)
def test_international_names_become_what_the_dns_knows(text: str, wanted: str) -> None:
    """The control plane converts a name with other letters, composed or not, to the form that agents accept."""
    assert device_address(text) == wanted
    assert checked(wanted) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("☃.net", "is not an international host name"),
        ("gerät.local:80", "write the name alone"),
        ("ä" * 100, "is not an international host name"),
        ("-ä.x", "is not an international host name"),
        ("http://gerät.local", "write the name alone, without scheme, port or path"),
        ("ä..b", "each part between dots|international"),
        ("１０.0.0.999", "is not an IPv4 address"),
        ("\ud800", "blank or control character"),
        ("a\u00a0b", "blank or control character"),
        ("ä\u200bb", "blank or control character"),
    ],
)
def test_international_names_that_have_no_such_form(text: str, words: str) -> None:
    """Names that cannot be converted are rejected with a printable message."""
    with pytest.raises(UserError) as caught:
        device_address(text)
    assert any(one in str(caught.value) for one in words.split("|"))
    assert str(caught.value).isprintable()


@given(
    st.text(max_size=60)
    | st.text(alphabet="0123456789abcdefx:.%[]/-_@?# Äß。\u200d", max_size=40)
    | st.sampled_from([*TAKEN, *(one for one, _ in REFUSED)])
)
def test_whatever_is_taken_can_be_asked_for(text: str) -> None:
    """Any text is rejected with a message, or converted to a form that the agent accepts unchanged: ASCII, without
    blanks, slashes, brackets or ports."""
    try:
        found = device_address(text)
    except UserError as error:
        assert str(error).isprintable()
        return
    assert checked(found) == found
    assert found.isascii()
    assert not set(found) & set(" /[]@?#")
    assert ":" not in found or socket.inet_pton(socket.AF_INET6, found.partition("%")[0])


@pytest.mark.parametrize(
    ("label", "given", "wanted"),
    [
        ("[::1]", {}, "::1"),
        ("fe80::1%eth0", {}, "fe80::1%eth0"),
        ("10.0.0.1", {"address": "10.0.0.2"}, "10.0.0.1"),
        ("gw-north", {"address": "[fd00::1]"}, "fd00::1"),
        ("fe80::1", {}, None),
        ("127.0.0.1", {}, None),
        (5, {}, None),
    ],
)
def test_a_gateway_has_an_address_of_either_version(
    label: object, given: dict, wanted: str
) -> None:
    """A label that is an IP address, also with a zone or in brackets, takes precedence over the class's gateway. A
    label that is a name does not, and a device is not its own gateway."""
    part = document(labels={"gateway": label}, gateway=given, probes=[probe(80)])
    found = config.check(part).get("gateway")
    assert (found and found["address"]) == wanted
    assert address.literal("gw-north") == address.literal(None) == ""
