"""Fixture for the marker that executed code in a file would create."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """Return the path that :class:`payloads.Harmful` creates when it is executed."""
    path = tmp_path / "executed"
    monkeypatch.setenv("REFT_TEST_TRACE", str(path))
    return path
