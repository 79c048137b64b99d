"""Finding the checkpoint to go on from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint in a folder, None if there is none.

    Trainer writes ``trainer_state.json`` last: a checkpoint without it, or with half of it, is what
    a kill left, and is passed over.
    """
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [
        (int(path.name.removeprefix(prefix)), path)
        for path in Path(folder).glob(f"{prefix}*")
        if path.name.removeprefix(prefix).isdigit() and _is_whole(path)
    ]
    return max(found)[1] if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
