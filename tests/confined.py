"""Runs a program under the restrictions of a systemd unit, as systemd would: `python -m tests.confined UNIT PROGRAM…`

Capabilities, system calls, address families, namespaces, and memory that is both writable and executable. File system
rules are not included, because they need systemd. Needs libseccomp, as systemd itself does, and systemd-analyze.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

ALLOW, NOT_EQUAL_MASKED = 0x7FFF0000, 7
DENY = 0x00050000 | errno.EPERM
WRITE_AND_EXECUTE, EXECUTE, NAMESPACES = 0x6, 0x4, 0x7E020080
NO_NEW_PRIVILEGES, DROP_BOUND = 38, 24


class Compare(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = [
        ("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64),
    ]  # fmt: skip


@cache
def calls_of(name: str) -> frozenset[str]:
    """The system calls in a set such as @system-service."""
    if not name.startswith("@"):
        return frozenset({name})
    said = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager", name],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    listed = [line.strip() for line in said.splitlines() if re.match(r"\s+[@a-z]", line)]
    return frozenset[str]().union(*(calls_of(one) for one in listed))


def confine(unit: str) -> None:
    """Confine this process and all that it starts from now on."""
    settings = re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE)
    given = dict(settings)
    allowed: set[str] = set()
    for key, value in settings:
        if key == "SystemCallFilter":
            names = frozenset[str]().union(*(calls_of(one) for one in value.lstrip("~").split()))
            allowed = allowed - names if value.startswith("~") else allowed | names
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    filter_ = ctypes.c_void_p(library.seccomp_init(DENY))

    def allow(name: str, *rules: Compare) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            code = library.seccomp_rule_add_array(
                filter_, ALLOW, number, len(rules), (Compare * len(rules))(*rules)
            )
            assert code == 0, (name, code)

    families = [getattr(socket, name) for name in given["RestrictAddressFamilies"].split()]
    for name in sorted(allowed):
        if name in {"socket", "socketpair"}:
            for family in families:
                allow(name, Compare(0, 4, family, 0))
        elif name == "mmap":
            for protection in (0, 2, 4):
                allow(name, Compare(2, NOT_EQUAL_MASKED, WRITE_AND_EXECUTE, protection))
        elif name in {"mprotect", "pkey_mprotect"}:
            allow(name, Compare(2, NOT_EQUAL_MASKED, EXECUTE, 0))
        elif name in {"clone", "unshare"}:
            allow(name, Compare(0, NOT_EQUAL_MASKED, NAMESPACES, 0))
        elif name == "clone3":
            number = library.seccomp_syscall_resolve_name(b"clone3")
            library.seccomp_rule_add_array(filter_, 0x00050000 | errno.ENOSYS, number, 0, None)
        else:
            allow(name)
    libc = ctypes.CDLL(None, use_errno=True)
    assert given["NoNewPrivileges"] == "true"
    assert given["CapabilityBoundingSet"] == ""
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        libc.prctl(DROP_BOUND, capability, 0, 0, 0)
    os.umask(int(given["UMask"], 8))
    assert libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert library.seccomp_load(filter_) == 0


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text())
    os.execvp(sys.argv[2], sys.argv[2:])
