"""The model card that is written with an adapter: its contents, its code, and whose card it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_models import bert, llama
from transformers import AutoModelForCausalLM

from reft import ReftConfig, ReftModel, get_reft_model
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from reft.model.model_card import CARD_FILE

ADAPTER_FILES = [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE]
CONFIG = ReftConfig(rank=3, positions="f2+l1", layers=[0, 2])

#: Names of base models with characters that could break out of their place in a card.
ODD_NAMES = [
    'quo"te: [yaml, {list',
    "tag: !!python/object/apply:os.system ['true']",
    "two\nlines\n---\nlicense: mit",
    "``` fence ```",
    "```\nimport os\n```",
    "a | b | c",
    "<script>alert(1)</script> -->",
    "`",
    "''' \\",
    "näme\u2028",
    "{% raw %} {{ x }}",
    "",
]


def wrap(config: ReftConfig = CONFIG, base=None) -> ReftModel:
    return get_reft_model(llama() if base is None else base, config)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def metadata(folder: Path) -> dict:
    return ModelCard.load(folder / CARD_FILE).data.to_dict()


def snippet(folder: Path) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / CARD_FILE).read_text(), re.M | re.S)
    return code


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a card's code in its folder, with no names defined and no network; return its output."""

    def run(folder: Path) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        capsys.readouterr()
        exec(compile(snippet(folder), "card", "exec"), {})
        return capsys.readouterr().out

    return run


def test_the_contents_of_a_card(tmp_path):
    config = replace(CONFIG, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    model = wrap(config)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == ADAPTER_FILES
    assert metadata(tmp_path) == {
        "library_name": "reft",
        "base_model": "meta-llama/Llama-3.2-1B",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["reft", "representation-finetuning", "loreft"],
    }
    text = (tmp_path / CARD_FILE).read_text()
    trained, total = model.get_nb_trainable_parameters()
    assert f"{trained:,d} trained parameters" in text
    assert f"{100 * trained / total:.4f} % of the model's {total:,d}" in text
    for name, value in config.to_dict().items():
        if name not in ("base_model_name_or_path", "format_version"):
            assert f"| `{name}` | `{value!a}` |" in text


def test_modules_to_save_are_counted_and_named(tmp_path):
    model = wrap(ReftConfig(rank=2, task_type="SEQ_CLS"), bert())
    model.save_pretrained(tmp_path)
    text = (tmp_path / CARD_FILE).read_text()
    assert f"{model.get_nb_trainable_parameters()[0]:,d} trained parameters" in text
    assert "those of `classifier` included" in text
    assert metadata(tmp_path)["pipeline_tag"] == "text-classification"


def test_the_code_for_a_language_model_runs(word_llama, word_tokenizer, run, tmp_path):
    word_llama.save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    model = wrap(ReftConfig(rank=2, init="identity"), base)
    model.save_pretrained(tmp_path / "adapter")
    assert "base_model" not in metadata(tmp_path / "adapter")  # a folder is no name on the hub
    inputs = word_tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
    expected = word_tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
    assert expected in run(tmp_path / "adapter")


def test_the_code_for_a_classifier_runs(word_tokenizer, run, tmp_path):
    bert().save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    base = type(bert()).from_pretrained(tmp_path / "base")
    wrap(ReftConfig(rank=2, task_type="SEQ_CLS"), base).save_pretrained(tmp_path / "adapter")
    assert "num_labels=3" in snippet(tmp_path / "adapter")
    assert "logits=tensor" in run(tmp_path / "adapter")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_name_breaks_out_of_its_place(tmp_path, name):
    wrap(replace(CONFIG, base_model_name_or_path=name)).save_pretrained(tmp_path)
    text = (tmp_path / CARD_FILE).read_text()
    _, block, body = text.split("---\n", 2)
    assert set(yaml.safe_load(block)) == {"library_name", "pipeline_tag", "tags"}
    assert metadata(tmp_path)["library_name"] == "reft"
    code = snippet(tmp_path)
    (line,) = [line for line in code.splitlines() if line.startswith("name = ")]
    scope: dict = {}
    exec(compile(line, "card", "exec"), scope)
    assert scope["name"] == name or not name
    compile(code, "card", "exec")
    # In the text the name is a single code span: its fence is not among the backticks inside.
    (span,) = re.findall(r"^A \[.*\) adapter of (.*), for the Python package `reft`", body, re.M)
    if name:
        span = span.removesuffix(" (`LlamaForCausalLM`)")
        fence, shown = re.fullmatch(r"(`+)(.*[^`])\1", span).groups()
        assert fence not in re.findall("`+", shown)
        assert shown in (name, f" {name} ", ascii(name))


def test_a_card_is_rewritten_until_it_is_edited(tmp_path):
    card = tmp_path / CARD_FILE
    model = wrap()
    model.save_pretrained(tmp_path)
    first = card.read_text()
    model.add_adapter("wide", replace(CONFIG, rank=5))
    model.save_pretrained(tmp_path, adapter_name="wide")
    second = card.read_text()
    assert "| `rank` | `3` |" in first
    assert "| `rank` | `5` |" in second
    edited = second.replace("library_name: reft", "library_name: reft\nlicense: mit")
    card.write_text(edited)
    model.save_pretrained(tmp_path)
    assert card.read_text() == edited


@pytest.mark.parametrize("content", [b"# Mine\n", b"", b"\xff\xfe not text"])
def test_a_card_of_somebody_else_is_kept(tmp_path, content):
    (tmp_path / CARD_FILE).write_bytes(content)
    wrap().save_pretrained(tmp_path)
    assert (tmp_path / CARD_FILE).read_bytes() == content
    assert files(tmp_path) == ADAPTER_FILES


def test_a_training_state_has_no_card(tmp_path):
    model = wrap()
    model.save_pretrained(tmp_path / "checkpoint", training_state=True)
    assert files(tmp_path / "checkpoint") == [CONFIG_FILE, WEIGHTS_FILE]
    model.save_pretrained(tmp_path / "published")
    assert files(tmp_path / "published") == ADAPTER_FILES
