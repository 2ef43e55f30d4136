"""How plugins are found."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from watchdog_agent.runtime import plugins

GROUP = "watchdog_agent.tests"


def install(folder: Path, name: str, module: str) -> None:
    """A distribution with one entry point."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}:start\n")


def test_all_that_is_installed_is_read_once_a_minute_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing plugin, one whose module can't be imported and one that is installed cause one scan each; a missing one
    is found after a minute."""
    monkeypatch.setattr(plugins, "_points", {})
    monkeypatch.setattr(plugins, "_missing", {})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "is_there.py").write_text("def start(): pass\n")
    install(tmp_path, "good", "is_there")
    install(tmp_path, "bad", "is_not_there")
    read = metadata.entry_points
    looked = []

    def counted(**wanted: Any) -> Any:
        looked.append(wanted)
        return read(**wanted)

    monkeypatch.setattr(metadata, "entry_points", counted)
    for _ in range(3):
        assert plugins.load(GROUP, "good").__module__ == "is_there"
        with pytest.raises(ModuleNotFoundError):
            plugins.load(GROUP, "bad")
        with pytest.raises(LookupError, match="no plugin late is installed; installed: bad, good"):
            plugins.load(GROUP, "late")
    assert len(looked) == 3
    install(tmp_path, "late", "is_there")
    now = plugins.time.monotonic()
    with monkeypatch.context() as later:
        later.setattr(plugins.time, "monotonic", lambda: now + plugins.AGAIN_S + 1)
        assert plugins.load(GROUP, "late").__module__ == "is_there"
    assert len(looked) == 4
