"""Base classes of the trainers that wrap TRL's: TRL trains the base model with the edits on it,
checkpoints hold the adapter, and a reference for the loss that survives resuming."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reft.model import peft_compat as peft_base
from reft.model.end_tokens import listed_ids
from reft.model.reft_model import ReftModel
from reft.train.adapter_trainer import AdapterTrainer, require_reft_model
from reft.train.reference_model import ReferenceModel
from reft.train.seeded_init import initialise_from_seed


class TrlTrainer(AdapterTrainer):
    """An :class:`AdapterTrainer` to put before a TRL trainer among the bases of a class.

    TRL gets the transformers model inside the wrapper.
    """

    def __init__(self, model: ReftModel, **kwargs: Any) -> None:
        self._wrapper = model
        super().__init__(model.get_base_model(), **kwargs)

    def _reft_model(self) -> ReftModel:
        return self._wrapper

    def _trained_end_tokens(self) -> list[int]:
        # TRL appends the tokenizer's end token to every completion.
        return listed_ids(getattr(self.processing_class, "eos_token_id", None))


class TrlReferenceTrainer(TrlTrainer):
    """A :class:`TrlTrainer` whose loss may compare with a reference model.

    Checkpoints hold the reference with which the run began.
    """

    _reference: ReferenceModel | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and copy the initialised adapter into the reference before TRL
        computes anything with it."""
        super().create_accelerator_and_postprocess()
        if self._reference is not None:
            initialise_from_seed(self._wrapper, self.args.seed)
            self._reference.copy_adapter()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss; ``disable_dropout`` also disables the adapter's dropout."""
        with self._without_dropout():
            return super().compute_loss(*args, **kwargs)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Disable the adapter's dropout inside, if the arguments set ``disable_dropout``."""
        model = self._wrapper
        if model.active_adapter is None or not self.args.disable_dropout:  # type: ignore[attr-defined]
            yield
            return
        adapter = model._registry.adapter(model.active_adapter)
        training, adapter.training = adapter.training, False
        try:
            yield
        finally:
            adapter.training = training

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self._reference is not None and is_checkpoint and self.args.should_save:
            self._reference.save(folder)

    def _restore(self, checkpoint: str | os.PathLike[str]) -> None:
        if self._reference is None:
            super()._restore(checkpoint)
            return
        precomputed = getattr(self, "precompute_ref_logps", False)
        stored = self._reference.read(checkpoint, precomputed)
        super()._restore(checkpoint)
        self._reference.set(stored)


def check_trl_arguments(trainer: str, model: object, args: Any, options: dict[str, Any]) -> None:
    """Refuse arguments that no trainer of this kind supports, before anything is changed.

    Args:
        trainer: the name of the trainer's class, for the message.
        model: the model to train.
        args: TRL's configuration, or None.
        options: the trainer's further keyword arguments.

    Raises:
        TypeError: the model is not a ReftModel.
        ValueError: a ``peft_config``; or prompts would be truncated at the end from which positions
            count.
    """
    require_reft_model(model, trainer)
    assert isinstance(model, ReftModel)
    if options.get("peft_config") is not None:
        raise ValueError(
            f"peft_config must be None: {trainer} would freeze the edits under PEFT's layers. Wrap "
            "with PEFT first: reft.get_reft_model(peft.get_peft_model(base, …), …) trains both"
        )
    cuts_start = getattr(args, "truncation_mode", "keep_start") == "keep_end"
    for config in (model.configs[name] for name in model.active_adapters):
        if cuts_start and config.parsed_positions.first:
            raise ValueError(
                'truncation_mode must be "keep_start" for positions that count from the start of '
                f'the prompt, which "keep_end" cuts off; the adapter has {config.positions!r}'
            )


def check_reference(model: ReftModel, args: Any) -> None:
    """Refuse a model or options that leave no fixed reference.

    Raises:
        ValueError: no active adapter, layers of PEFT in the base, or ``sync_ref_model``.
    """
    if model.active_adapter is None:
        raise ValueError("model must have an active adapter: call set_adapter")
    if peft_base.has_layers(model.get_base_model()):
        raise ValueError(
            "model must have no layers of PEFT in its base: the reference shares the base and "
            "would change as they are trained. Merge them into the base first"
        )
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model must be False: the reference is the present adapter on the same base, "
            "so TRL has no second model to update. Train in several runs: each begins with the "
            "adapter of the previous run as its reference"
        )
