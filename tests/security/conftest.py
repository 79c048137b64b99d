"""Where code in a file would leave its mark."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """What :class:`payloads.Harmful` makes when it is executed."""
    path = tmp_path / "executed"
    monkeypatch.setenv("REFT_TEST_TRACE", str(path))
    return path
