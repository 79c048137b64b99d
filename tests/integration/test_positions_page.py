"""The examples of docs/positions.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "positions.md"


def test_the_examples_run():
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names: dict = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["answers"].shape[0] == 2
    assert names["loss"].isfinite()
