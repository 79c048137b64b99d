"""What TRL's trainers need of a wrapped model: the base for TRL, the wrapper for what is written
to disk, and a reference that a resumed run has too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reft.model import peft_compat as peft_base
from reft.model.ends import listed_ids
from reft.model.reft_model import ReftModel
from reft.train.adapter_trainer import AdapterTrainer, require_reft_model
from reft.train.reference_model import Reference
from reft.train.seeded_init import draw_from_seed


class OnBase(AdapterTrainer):
    """A trainer of TRL's, which is given the transformers model inside the wrapper."""

    def __init__(self, model: ReftModel, **kwargs: Any) -> None:
        self._wrapper = model
        super().__init__(model.get_base_model(), **kwargs)

    def _reft_model(self) -> ReftModel:
        return self._wrapper

    def _taught_ends(self) -> list[int]:
        # TRL puts the tokenizer's end token behind every completion.
        return listed_ids(getattr(self.processing_class, "eos_token_id", None))


class KeepsReference(OnBase):
    """A trainer whose checkpoints hold the reference that its run began with."""

    _reference: Reference | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's. The reference is the adapter as training will find it, before TRL computes
        anything by it."""
        super().create_accelerator_and_postprocess()
        if self._reference is not None:
            draw_from_seed(self._wrapper, self.args.seed)
            self._reference.take()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's."""
        with self._without_dropout():
            return super().compute_loss(*args, **kwargs)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Inside, ``disable_dropout``, where it is said, is for the adapter's dropout too."""
        model = self._wrapper
        if model.active_adapter is None or not self.args.disable_dropout:  # type: ignore[attr-defined]
            yield
            return
        adapter = model._registry.adapter(model.active_adapter)
        trains, adapter.training = adapter.training, False
        try:
            yield
        finally:
            adapter.training = trains

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self._reference is not None and checkpoint and self.args.should_save:
            self._reference.save(folder)

    def _restore(self, checkpoint: str | os.PathLike[str]) -> None:
        if self._reference is None:
            super()._restore(checkpoint)
            return
        stored = self._reference.read(checkpoint, getattr(self, "precompute_ref_logps", False))
        super()._restore(checkpoint)
        self._reference.set(stored)


def check_given(trainer: str, model: object, args: Any, given: dict[str, Any]) -> None:
    """Refuse what none of these trainers can do, before anything is changed.

    Raises:
        TypeError: the model is not a ReftModel.
        ValueError: a ``peft_config``; prompts would be cut where positions count from.
    """
    require_reft_model(model, trainer)
    assert isinstance(model, ReftModel)
    if given.get("peft_config") is not None:
        raise ValueError(
            f"peft_config must be None: {trainer} would freeze the edits under PEFT's layers. PEFT "
            "comes first: reft.get_reft_model(peft.get_peft_model(base, …), …) trains both"
        )
    cuts = getattr(args, "truncation_mode", "keep_start") == "keep_end"
    for config in (model.configs[name] for name in model.active_adapters):
        if cuts and config.parsed_positions.first:
            raise ValueError(
                'truncation_mode must be "keep_start" for positions that count from the start of '
                f'the prompt, which "keep_end" cuts off; the adapter has {config.positions!r}'
            )


def check_reference(model: ReftModel, args: Any) -> None:
    """Refuse what leaves no fixed reference.

    Raises:
        ValueError: no active adapter, PEFT's layers, ``sync_ref_model``.
    """
    if model.active_adapter is None:
        raise ValueError("model must have an active adapter: call set_adapter")
    if peft_base.has_layers(model.get_base_model()):
        raise ValueError(
            "model must have no layers of PEFT in its base: the reference, which has the same "
            "base, would have them as they are trained. Merge them into the base first"
        )
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model must be False: the reference is the adapter as it is now, on the same "
            "base, and TRL has no second model to move. Train in several runs: each begins with "
            "the adapter of the last as its reference"
        )
