"""Adapters on the Hugging Face Hub: upload a saved adapter, download one."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from torch import nn

from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from reft.io.hub_status import is_hub_name
from reft.model.model_card import CARD_FILE, is_generated, write_card
from reft.model.peft_compat import transformers_model
from reft.model.registry import AdapterRegistry
from reft.model.save_load import save_adapters


def push_adapter(
    registry: AdapterRegistry,
    base_model: nn.Module,
    name: str,
    repo_id: str,
    *,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
    commit_description: str | None,
) -> CommitInfo:
    """Save an adapter and upload it; see :meth:`reft.ReftModel.push_to_hub`.

    Args:
        registry: the adapters of the model.
        base_model: the base model, in PEFT's wrapper if it has one.
        name: name of the adapter.
        repo_id: "name" or "namespace/name".
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(registry, base_model, folder, [name])
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        write_card(folder, registry, transformers_model(base_model), name, source=repo_id)
        keep_card = _has_edited_card(api, repo_id, revision)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[CARD_FILE] if keep_card else None,
        )


def local_folder(
    path: str | os.PathLike[str], subfolder: str | None = None, **download: Any
) -> Path:
    """The folder of an adapter: a local one, or a downloaded one.

    Args:
        path: a local folder, or the name of a repository on the hub. A local folder or file of that
            name takes precedence.
        subfolder: the adapter's folder in it; None or "" for ``path`` itself.
        download: arguments of :func:`huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: the hub does not have it, or cannot be reached.
    """
    folder, inside = Path(path), PurePosixPath(subfolder or "")
    if folder.exists() or not isinstance(path, str) or not is_hub_name(path):
        return folder / inside
    patterns = [(inside / name).as_posix() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        downloaded = snapshot_download(path, allow_patterns=patterns, **download)
    except OSError as error:
        message = f"no such adapter directory, and the hub does not give it ({error})"
        raise FileNotFoundError(errno.ENOENT, message, path) from error
    return Path(downloaded) / inside


def _has_edited_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has a model card that this library did not write."""
    if not api.file_exists(repo_id, CARD_FILE, revision=revision):
        return False
    return not is_generated(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision)))
