"""Whatever bytes arrive, a parser soon gives a value or its own error, and nothing else."""

from __future__ import annotations

from typing import Any

import dnslib
import trustme
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.probes import command, dns, snmp, tls

QUERY = dns.encode_query("pump.example", 1, b"ab")
REPLY = dnslib.DNSRecord.parse(QUERY).reply()
REPLY.add_answer(dnslib.RR("pump.example", rdata=dnslib.A("10.0.0.7")))
DER = trustme.CA().issue_cert("a.example").cert_chain_pems[0].bytes()


def der() -> bytes:
    import ssl

    return ssl.PEM_cert_to_DER_cert(DER.decode())


def mangled(data: bytes) -> Any:
    """`data` with some bytes changed, and truncated at a random place."""
    change = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255))

    def apply(given: tuple[list[tuple[int, int]], int]) -> bytes:
        out = bytearray(data)
        for at, value in given[0]:
            out[at] = value
        return bytes(out[: given[1]])

    return st.tuples(st.lists(change, max_size=8), st.integers(0, len(data))).map(apply)


@given(st.one_of(st.binary(max_size=600), mangled(REPLY.pack())))
def test_dns(data: bytes) -> None:
    """An answer gives addresses of four bytes, a reason, or DnsError."""
    padded = data.ljust(12, b"\0")
    try:
        found = dns.addresses(padded, QUERY)
    except dns.DnsError:
        return
    assert isinstance(found, str) or all(len(one) == 4 for one in found)


def test_dns_as_another_library_packs_it() -> None:
    """Messages packed by another library are read, and it reads our query."""
    assert dns.addresses(REPLY.pack(), QUERY) == [bytes((10, 0, 0, 7))]
    assert str(dnslib.DNSRecord.parse(QUERY).q.qname) == "pump.example."


SNMP = snmp.tlv(
    0x30,
    snmp.integer(1)
    + snmp.tlv(4, b"public")
    + snmp.tlv(
        0xA2,
        snmp.integer(7)
        + snmp.integer(0)
        + snmp.integer(0)
        + snmp.tlv(
            0x30,
            snmp.tlv(0x30, snmp.tlv(6, snmp.UP_TIME) + b"\x43\x02\x30\x39"),
        ),
    ),
)


@given(st.one_of(st.binary(max_size=300), mangled(SNMP)))
def test_snmp(data: bytes) -> None:
    """An answer gives a time, a reason, nothing of ours, or SnmpError."""
    try:
        found = snmp.up_time(data, 7)
    except snmp.SnmpError:
        return
    assert found is None or isinstance(found, (int, str))


def test_snmp_answer_is_read() -> None:
    """The unmangled answer is read as 12345 hundredths."""
    assert snmp.up_time(SNMP, 7) == 12345
    assert snmp.up_time(SNMP, 8) is None


@given(st.integers(0, 2**31 - 1), st.binary(max_size=400))
def test_snmp_request_has_the_lengths_that_it_says(ident: int, community: bytes) -> None:
    """Whatever the community and the number are, the request reads back unchanged."""
    message, end = snmp.read_element(packet := snmp.get(community, ident), 0, 0x30)
    assert end == len(packet)
    _, at = snmp.number(message, 0)
    assert snmp.read_element(message, at, 4)[0] == community
    pdu, _ = snmp.read_element(message, at + len(snmp.tlv(4, community)), 0xA0)
    assert snmp.number(pdu, 0)[0] == ident


@given(st.one_of(st.binary(max_size=300), mangled(der())))
def test_certificate(data: bytes) -> None:
    """A certificate has an expiry date, or raises CertificateError."""
    try:
        found = tls.expiry(data)
    except tls.CertificateError:
        return
    assert isinstance(found, int | float)


@given(st.datetimes())
def test_seconds_of_a_time(when: Any) -> None:
    """Both time formats give the seconds that the date library gives."""
    import datetime as dt

    when = when.replace(microsecond=0, tzinfo=dt.UTC)
    text = f"{when.year:04}{when:%m%d%H%M%S}Z".encode()
    assert tls.seconds_of(0x18, text) == when.timestamp()
    if 1950 <= when.year < 2050:
        assert tls.seconds_of(0x17, text[2:]) == when.timestamp()


@given(st.binary(max_size=5000))
def test_last_line(output: bytes) -> None:
    """Whatever a command writes, its reason is short and printable."""
    line = command.last_line(output)
    assert len(line) <= 200
    assert line.isprintable()
