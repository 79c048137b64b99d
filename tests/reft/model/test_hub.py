"""What is published: the adapter and a card that says what it is, never the base model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from tiny_models import bert, llama
from transformers import AutoModelForCausalLM

from reft import ReftConfig, ReftModel, get_reft_model
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from reft.model.model_card import CARD_FILE

ADAPTER_FILES = [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE]
CONFIG = ReftConfig(rank=3, positions="f2+l1", layers=[0, 2])

#: Names that a base model could have, or somebody could give it, to leave its place in a card.
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


def run(code: str, folder: Path) -> str:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------ the card


def test_what_a_card_says(tmp_path):
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


def test_heads_are_counted_and_named(tmp_path):
    model = wrap(ReftConfig(rank=2, task_type="SEQ_CLS"), bert())
    model.save_pretrained(tmp_path)
    text = (tmp_path / CARD_FILE).read_text()
    assert f"{model.get_nb_trainable_parameters()[0]:,d} trained parameters" in text
    assert "those of `classifier` included" in text
    assert metadata(tmp_path)["pipeline_tag"] == "text-classification"


def test_the_snippet_of_a_language_model_runs(word_llama, word_tokenizer, tmp_path):
    word_llama.save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    model = wrap(ReftConfig(rank=2, init="identity"), base)
    model.save_pretrained(tmp_path / "adapter")
    assert "base_model" not in metadata(tmp_path / "adapter")  # a folder is no name on the hub
    inputs = word_tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
    want = word_tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
    assert want in run(snippet(tmp_path / "adapter"), tmp_path / "adapter")


def test_the_snippet_of_a_classifier_runs(word_tokenizer, tmp_path):
    bert().save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    base = type(bert()).from_pretrained(tmp_path / "base")
    wrap(ReftConfig(rank=2, task_type="SEQ_CLS"), base).save_pretrained(tmp_path / "adapter")
    assert "num_labels=3" in snippet(tmp_path / "adapter")
    assert "logits=tensor" in run(snippet(tmp_path / "adapter"), tmp_path / "adapter")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_name_leaves_its_place(tmp_path, name):
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
    # In the text the name is one code span: its fence is not among the backticks inside.
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
def test_a_card_of_somebody_else_is_left_alone(tmp_path, content):
    (tmp_path / CARD_FILE).write_bytes(content)
    wrap().save_pretrained(tmp_path)
    assert (tmp_path / CARD_FILE).read_bytes() == content
    assert files(tmp_path) == ADAPTER_FILES


def test_checkpoints_have_no_card(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=6)
    trainer.train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / WEIGHTS_FILE).exists()
    assert not (checkpoint / CARD_FILE).exists()
    trainer.save_model(str(tmp_path / "published"))
    assert (tmp_path / "published" / CARD_FILE).exists()


# ------------------------------------------------------------------------ up and down


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder: what was asked of it, and what is in its repositories."""
    calls: list[tuple[str, dict]] = []
    store = tmp_path / "hub"

    def create_repo(self, repo_id, **arguments):
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        calls.append(("create_repo", {"repo_id": repo_id, "token": self.token, **arguments}))
        (store / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, **arguments):
        calls.append(("create_branch", {"repo_id": repo_id, **arguments}))

    def file_exists(self, repo_id, filename, **arguments):
        calls.append(("file_exists", {"repo_id": repo_id, **arguments}))
        return (store / repo_id / filename).exists()

    def hf_hub_download(self, repo_id, filename, **arguments):
        return str(store / repo_id / filename)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, **arguments):
        uploaded = [
            name for name in files(Path(folder_path)) if name not in (ignore_patterns or ())
        ]
        calls.append(("upload_folder", {"repo_id": repo_id, "files": uploaded, **arguments}))
        for name in uploaded:
            shutil.copy(Path(folder_path) / name, store / repo_id / name)
        return "the commit"

    def snapshot_download(repo_id, **arguments):
        calls.append(("snapshot_download", {"repo_id": repo_id, **arguments}))
        if not (store / repo_id).exists():
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError(f"404 {repo_id}", response=response)
        return str(store / repo_id)

    for fake in (create_repo, create_branch, file_exists, hf_hub_download, upload_folder):
        monkeypatch.setattr(HfApi, fake.__name__, fake)
    monkeypatch.setattr("reft.model.hub.snapshot_download", snapshot_download)
    return SimpleNamespace(calls=calls, store=store, named=lambda: [name for name, _ in calls])


def test_only_the_adapter_is_uploaded(hub):
    model = wrap()
    assert model.push_to_hub("mine", private=True, token="secret") == "the commit"
    assert hub.named() == ["create_repo", "file_exists", "upload_folder"]
    assert hub.calls[0][1] == {
        "repo_id": "me/mine", "token": "secret", "private": True, "exist_ok": True,
    }  # fmt: skip
    assert hub.calls[-1][1] == {
        "repo_id": "me/mine",
        "files": ADAPTER_FILES,
        "commit_message": "Upload adapter",
        "commit_description": None,
        "revision": None,
        "create_pr": False,
    }
    stored = sum((hub.store / "me/mine" / name).stat().st_size for name in ADAPTER_FILES)
    weights = sum(one.numel() for one in model.parameters() if one.requires_grad) * 4
    assert stored < 3 * weights + 20_000


def test_arguments_reach_the_hub(hub):
    model = wrap()
    model.add_adapter("wide", replace(CONFIG, rank=5))
    settings = {"commit_message": "one", "commit_description": "two", "revision": "v2"}
    model.push_to_hub("org/mine", adapter_name="wide", **settings)
    branch = {"repo_id": "org/mine", "branch": "v2", "exist_ok": True}
    assert ("create_branch", branch) in hub.calls
    assert hub.calls[-1][1] | settings == hub.calls[-1][1]
    assert "rank=5" not in snippet(hub.store / "org/mine")
    assert "| `rank` | `5` |" in (hub.store / "org/mine" / CARD_FILE).read_text()
    hub.calls.clear()
    model.push_to_hub("org/mine", revision="v2", create_pr=True)
    assert "create_branch" not in hub.named()
    assert hub.calls[-1][1]["create_pr"] is True
    with pytest.raises(TypeError, match="max_shard_size"):
        model.push_to_hub("org/mine", max_shard_size="5GB")


def test_nothing_is_made_on_the_hub_for_an_adapter_that_is_not_there(hub):
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        wrap().push_to_hub("mine", adapter_name="other")
    assert not hub.calls


def test_a_card_on_the_hub_is_left_alone_once_edited(hub):
    model = wrap()
    model.push_to_hub("me/mine")
    model.push_to_hub("me/mine")
    assert hub.calls[-1][1]["files"] == ADAPTER_FILES
    card = hub.store / "me/mine" / CARD_FILE
    card.write_text("license: mit\n" + card.read_text())
    model.push_to_hub("me/mine")
    assert hub.calls[-1][1]["files"] == [CONFIG_FILE, WEIGHTS_FILE]


def test_what_was_pushed_is_loaded_by_its_name(hub):
    model = wrap()
    with torch.no_grad():
        model.base_model.reft.bank("default").bias.normal_()
    model.push_to_hub("me/mine")
    assert "ReftModel.from_pretrained(base, 'me/mine')" in snippet(hub.store / "me/mine")
    hub.calls.clear()
    loaded = ReftModel.from_pretrained(llama(), "me/mine", revision="v1", token="secret")
    loaded.load_adapter("me/mine", "second")
    assert hub.calls[0] == (
        "snapshot_download",
        {
            "repo_id": "me/mine",
            "revision": "v1",
            "token": "secret",
            "allow_patterns": [CONFIG_FILE, WEIGHTS_FILE],
        },
    )
    for name in ("default", "second"):
        found = loaded.base_model.reft.bank(name).bias
        assert torch.equal(found, model.base_model.reft.bank("default").bias)


def test_a_subfolder_on_the_hub(hub, tmp_path):
    model = wrap()
    with torch.no_grad():
        model.base_model.reft.bank("default").bias.normal_()
    model.save_pretrained(hub.store / "me/mine" / "runs" / "best")
    told = {"cache_dir": str(tmp_path), "local_files_only": True, "force_download": False}
    loaded = ReftModel.from_pretrained(
        llama(), "me/mine", subfolder="runs/best", low_cpu_mem_usage=True, **told
    )
    assert hub.calls == [
        (
            "snapshot_download",
            {
                "repo_id": "me/mine",
                "allow_patterns": [f"runs/best/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)],
                **told,
            },
        )
    ]
    assert torch.equal(
        loaded.base_model.reft.bank("default").bias, model.base_model.reft.bank("default").bias
    )
    with pytest.raises(FileNotFoundError, match=r"no such adapter directory.*runs/last"):
        ReftModel.from_pretrained(llama(), "me/mine", subfolder="runs/last")


def test_the_base_pushes_the_adapter(hub):
    model = wrap()
    assert model.get_base_model().push_to_hub("me/mine", private=True) == "the commit"
    assert hub.calls[-1][1]["files"] == ADAPTER_FILES


def test_what_is_here_is_not_looked_for_there(hub, tmp_path, monkeypatch):
    wrap().save_pretrained(tmp_path / "run" / "adapter")
    monkeypatch.chdir(tmp_path)
    ReftModel.from_pretrained(llama(), "run/adapter")
    for path in (Path("run/missing"), "a/b/c", "/run/missing", "./missing"):
        with pytest.raises(FileNotFoundError, match="no such adapter directory"):
            ReftModel.from_pretrained(llama(), path)
    assert not hub.calls
    with pytest.raises(FileNotFoundError, match=r"and the hub does not give it.*404.*run/missing"):
        ReftModel.from_pretrained(llama(), "run/missing")
    with pytest.raises(TypeError, match="is_trainble"):
        ReftModel.from_pretrained(llama(), "run/adapter", is_trainble=True)
