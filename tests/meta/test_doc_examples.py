"""The Python examples of every guide run, page by page, in the order of the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

#: Page -> packages that its examples need beside the library's own dependencies.
NEEDS = {
    "evaluation.md": ("lm_eval",),
    "from-peft.md": ("peft",),
    "training.md": ("peft", "bitsandbytes"),
    "trl.md": ("trl",),
}
#: Two ways to do the same, compared in tests/reft/interop.
TESTED_ELSEWHERE = {"from-pyreft.md"}

_EXAMPLE = re.compile(r"^(<!-- not run.*?-->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _code(page: str) -> str:
    """The examples of a page, each on its own lines, so that a traceback names the right one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = [""] * len(text.splitlines())
    for example in _EXAMPLE.finditer(text):
        if example[1] is None:
            first = text.count("\n", 0, example.start(2))
            block = example[2].splitlines()
            lines[first : first + len(block)] = block
    return "\n".join(lines)


PAGES = [
    path.name
    for path in sorted(DOCS.glob("*.md"))
    if path.name not in TESTED_ELSEWHERE and _code(path.name).strip()
]


def _check_models(names: dict[str, Any]) -> None:
    assert names["answers"].shape[0] == 2
    assert names["output"].requires_grad


def _check_positions(names: dict[str, Any]) -> None:
    assert names["answers"].shape[0] == 2
    assert names["loss"].isfinite()


def _check_serving(names: dict[str, Any]) -> None:
    """Answers of continuous batching are those of ``generate``, prompt by prompt."""
    assert names["mixed"].shape[0] == 3
    assert names["pool_names"] == ["bob"]
    for answer, ids, name in zip(names["answers"], names["inputs"], names["names"], strict=True):
        output = names["model"].generate(
            torch.tensor([ids]), generation_config=names["settings"], adapter_names=[name]
        )
        assert answer == names["tokenizer"].decode(output[0, len(ids) :])
    assert names["text"] == names["answers"][0]


def _check_loading(names: dict[str, Any]) -> None:
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in Path("adapter").iterdir()} == files


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "loading-and-sharing.md": _check_loading,
    "models.md": _check_models,
    "positions.md": _check_positions,
    "serving.md": _check_serving,
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(_code(page), str(DOCS / page), "exec"), names)
    if page in CHECKS:
        CHECKS[page](names)


def test_the_vllm_settings_are_those_of_the_plugin() -> None:
    from reft.serving.vllm.settings import Settings

    text = (DOCS / "vllm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`(?: \((.*?)\))? \|", text, re.MULTILINE)
    fields = Settings.__dataclass_fields__
    assert [name for name, _ in rows] == list(fields)
    for name, default in rows:
        if default:
            assert default.strip('"') == str(fields[name].default), name


def test_the_vllm_page_names_everything_that_the_plugin_refuses() -> None:
    from reft.serving.vllm.compatibility import UNSUPPORTED

    text = (DOCS / "vllm.md").read_text(encoding="utf-8")
    section = text[text.index("## Refused settings") :]
    listed = re.findall(r"^- (.+?)[;.]$", section, re.MULTILINE)
    assert {name for line in listed for name in line.split(", ")} == set(UNSUPPORTED)
