"""The shared secrets of a cluster's hosts are created completely or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FAILING = """#!/bin/sh
# Fails at the call number $AT, as a full disk makes it: with half a file.
echo x >>"$CALLS"
[ "$(wc -l <"$CALLS")" -ne "$AT" ] && exec "$OPENSSL" "$@"
while [ $# -gt 0 ]; do
  case $1 in -out|-keyout) printf half >"$2" ;; esac
  shift
done
printf half
exit 1
"""


def make(folder: Path, **environ: str) -> int:
    argv = ["bash", str(ROOT / "jobs/cluster/secrets.sh"), str(folder), "server:s1=10.0.0.1"]
    env = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run(argv, env=env, capture_output=True, timeout=60, check=False).returncode


def whole(folder: Path) -> None:
    """Each file is as it should be, and there are no other files."""
    names = {one.name for one in folder.iterdir()}
    assert not [name for name in names if name.endswith((".new", ".csr"))]
    tokens = {"api.token", "prometheus.token", "agent.keys"}
    assert all(len((folder / name).read_text()) == 65 for name in tokens)
    assert all(len((folder / f"gossip-{name}").read_text()) == 45 for name in ("consul", "nomad"))
    uuids = {n for n in names if n.startswith(("consul-", "nomad-"))}
    assert len(uuids) == 6
    assert all(len((folder / name).read_text()) == 37 for name in uuids)
    said = subprocess.run(
        ["openssl", "verify", "-CAfile", "ca.pem", "s1.pem"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == "s1.pem: OK\n"
    for name in ("ca", "s1"):
        keys = [
            subprocess.run(
                ["openssl", *words], cwd=folder, capture_output=True, text=True, check=True
            ).stdout
            for words in (
                ["x509", "-in", f"{name}.pem", "-noout", "-pubkey"],
                ["pkey", "-in", f"{name}-key.pem", "-pubout"],
            )
        ]
        assert keys[0] == keys[1]


def test_what_failed_is_made_by_the_next_run(tmp_path: Path) -> None:
    """If a call of openssl fails and leaves an incomplete file, the next run creates all that is missing; another run
    changes nothing."""
    found = shutil.which("openssl")
    assert found is not None
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "openssl"
    fake.write_text(FAILING)
    fake.chmod(0o755)
    failed = 0
    for at in range(1, 50):
        folder, calls = tmp_path / f"secrets-{at}", tmp_path / f"calls-{at}"
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        code = make(folder, PATH=path, OPENSSL=found, CALLS=str(calls), AT=str(at))
        if code == 0:
            break
        failed += 1
        assert make(folder) == 0
        whole(folder)
    assert failed == 8
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    assert make(folder) == 0
    assert before == {one.name: one.read_bytes() for one in folder.iterdir()}
