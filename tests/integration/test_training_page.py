"""The examples of docs/training.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"

#: heading -> what its example needs beside the library.
NEEDS = {"Beside LoRA": "peft", "Quantised bases": "bitsandbytes", "TRL": "trl"}


def _sections() -> dict[str, str]:
    """Heading -> the code under it; of the page's title, what all the others start with."""
    parts = re.split(r"^##? (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        heading: "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


_FIRST, *_REST = _sections()


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("heading", [name for name in _REST if _sections()[name]])
def test_the_example_runs(heading, tmp_path, monkeypatch):
    if heading in NEEDS:
        pytest.importorskip(NEEDS[heading])
    monkeypatch.chdir(tmp_path)
    sections = _sections()
    exec(compile(sections[_FIRST] + sections[heading], heading, "exec"), {})
