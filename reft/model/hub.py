"""Adapters on the Hugging Face hub: the folder of one, up and down."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, snapshot_download

from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from reft.io.hub_status import is_hub_name
from reft.model.model_card import CARD_FILE, is_ours, write_card

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel


def push_to_hub(
    self: ReftModel,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    commit_message: str = "Upload adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload an adapter, never the base model: what :meth:`ReftModel.save_pretrained` writes.

    A card that the repository has already stays as it is, unless this library wrote it.

    Args:
        repo_id: "name" or "namespace/name"; the repository is made if it is not there.
        adapter_name: None for the active one.
        commit_message: of the upload.
        commit_description: of the upload.
        private: of a new repository; None for the account's default.
        token: of the hub; None or True for the one that is logged in.
        revision: branch to upload to, made if it is not there; None for "main".
        create_pr: open a pull request instead.

    Returns:
        The commit, with its address and that of the pull request.

    Raises:
        ValueError: there is no such adapter. Nothing was uploaded.
        OSError: the hub refused, or cannot be reached.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, adapter_name=adapter_name)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        name = self.active_adapter if adapter_name is None else adapter_name
        assert name is not None  # it was saved
        write_card(folder, self, name, source=repo_id)
        keep_card = _has_own_card(api, repo_id, revision)
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
    """The folder of an adapter: ``path``, or if that is no file or folder here but can be a name on
    the hub, what was downloaded from there.

    Args:
        path: as above.
        subfolder: the adapter's folder in it; None or "" for ``path`` itself.
        download: what :func:`huggingface_hub.snapshot_download` is told.

    Raises:
        FileNotFoundError: the hub does not have it, or cannot be reached.
    """
    folder, inside = Path(path), PurePosixPath(subfolder or "")
    if folder.exists() or not isinstance(path, str) or not is_hub_name(path):
        return folder / inside
    wanted = [(inside / name).as_posix() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        found = snapshot_download(path, allow_patterns=wanted, **download)
    except OSError as error:
        message = f"no such adapter directory, and the hub does not give it ({error})"
        raise FileNotFoundError(errno.ENOENT, message, path) from error
    return Path(found) / inside


def _has_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    if not api.file_exists(repo_id, CARD_FILE, revision=revision):
        return False
    return not is_ours(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision)))
