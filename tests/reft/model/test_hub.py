"""Adapters on the hub: what is uploaded, what is downloaded, and which arguments reach the hub."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from test_model_card import ADAPTER_FILES, CONFIG, files, snippet, wrap
from tiny_models import llama

from reft import ReftModel
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from reft.model.model_card import CARD_FILE


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder: the calls it received, and the contents of its repositories."""
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() for parameter in trained) * 4
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


def test_an_unknown_adapter_creates_no_repository(hub):
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        wrap().push_to_hub("mine", adapter_name="other")
    assert not hub.calls


def test_an_edited_card_on_the_hub_is_kept(hub):
    model = wrap()
    model.push_to_hub("me/mine")
    model.push_to_hub("me/mine")
    assert hub.calls[-1][1]["files"] == ADAPTER_FILES
    card = hub.store / "me/mine" / CARD_FILE
    card.write_text("license: mit\n" + card.read_text())
    model.push_to_hub("me/mine")
    assert hub.calls[-1][1]["files"] == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_pushed_adapter_is_loaded_by_its_name(hub):
    model = wrap()
    with torch.no_grad():
        model.base_model.reft.adapter("default").bias.normal_()
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
        bias = loaded.base_model.reft.adapter(name).bias
        assert torch.equal(bias, model.base_model.reft.adapter("default").bias)


def test_a_subfolder_on_the_hub(hub, tmp_path):
    model = wrap()
    with torch.no_grad():
        model.base_model.reft.adapter("default").bias.normal_()
    model.save_pretrained(hub.store / "me/mine" / "runs" / "best")
    download = {"cache_dir": str(tmp_path), "local_files_only": True, "force_download": False}
    loaded = ReftModel.from_pretrained(
        llama(), "me/mine", subfolder="runs/best", low_cpu_mem_usage=True, **download
    )
    assert hub.calls == [
        (
            "snapshot_download",
            {
                "repo_id": "me/mine",
                "allow_patterns": [f"runs/best/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)],
                **download,
            },
        )
    ]
    assert torch.equal(
        loaded.base_model.reft.adapter("default").bias,
        model.base_model.reft.adapter("default").bias,
    )
    with pytest.raises(FileNotFoundError, match=r"no such adapter directory.*runs/last"):
        ReftModel.from_pretrained(llama(), "me/mine", subfolder="runs/last")


def test_the_base_pushes_the_adapter(hub):
    model = wrap()
    assert model.get_base_model().push_to_hub("me/mine", private=True) == "the commit"
    assert hub.calls[-1][1]["files"] == ADAPTER_FILES


def test_local_paths_are_not_looked_up_on_the_hub(hub, tmp_path, monkeypatch):
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
