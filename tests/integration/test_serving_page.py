"""The examples of docs/serving.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def _examples(heading: str) -> str:
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    return "\n".join(re.findall(r"```python\n(.*?)```", sections[heading], re.DOTALL))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "heading", ["One batch, many adapters", "transformers' continuous batching"]
)
def test_the_example_runs(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = _examples(heading)
    assert code
    found = {}
    exec(compile(code, heading, "exec"), found)
    if "out" in found:
        assert found["out"].shape[0] == 3 and found["model"].pool.names == ["bob"]
    if "answers" in found:
        assert found["answers"] == _answers(found)
        assert found["text"] == found["answers"][0], "streamed"


def _answers(found):
    """Those of ``generate`` with the same settings, each prompt alone; they end early."""
    answers = []
    for ids, name in zip(found["inputs"], found["names"], strict=True):
        whole = found["model"].generate(
            torch.tensor([ids]),
            generation_config=found["settings"],
            adapter_names=[name],
        )
        answers.append(found["tokenizer"].decode(whole[0, len(ids) :]))
    return answers


def test_the_settings_of_the_page_are_those_of_the_plugin():
    from reft.serving.vllm.settings import Settings

    text = PAGE.read_text()
    for name in Settings.__dataclass_fields__:
        assert f"`{name}`" in text or f'"{name}"' in text, name
    for name in ("resident", "hosted", "max_rank"):
        assert f"`{name}` ({getattr(Settings('.'), name)})" in text, name
    from reft.serving.vllm.compatibility import REFUSED

    assert len(REFUSED) == 16
