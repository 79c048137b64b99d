"""``transformers.Trainer`` for a wrapped model.

Trainer reads signatures and class names to find out about labels, losses and data columns, and
saves whole models. Here the answers come from the base model, and checkpoints hold the adapter
alone.
"""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import can_return_loss, find_labels, is_accelerate_available

from reft.model.reft_model import ReftModel
from reft.nn.bank import Bank
from reft.train.collate import IGNORED, ReftDataCollator
from reft.train.lora import load_lora, save_lora

logger = logging.getLogger(__name__)

#: Names of data columns that the wrapper understands beside those of the base model.
_WRAPPER_COLUMNS = ("prompt_lengths", "adapter_names", "label", "label_ids")


def require_accelerate() -> None:
    """Raise ImportError, saying what to install, if accelerate is not there."""
    if not is_accelerate_available():
        raise ImportError("training needs accelerate: pip install 'reft[train]'")


class ReftTrainer(Trainer):
    """:class:`transformers.Trainer` for a :class:`reft.ReftModel`, with the same arguments.

    Without a ``data_collator``, a ``processing_class`` that is a tokenizer makes a
    :class:`reft.ReftDataCollator`.

    Checkpoints hold the adapter with its training state, so that a resumed run continues bit for
    bit; ``save_model`` into any other directory writes the adapter as it is published.

    Raises:
        ImportError: accelerate is not installed.
        TypeError: the model is not a ReftModel.
    """

    def __init__(
        self,
        model: ReftModel | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        require_accelerate()
        if model is not None:
            _require_reft_model(model)
            if getattr(model, "is_quantized", False):
                # Trainer's word for "this quantised model carries an adapter". On the wrapper
                # alone: on the base, transformers would look for PEFT's layers.
                model._hf_peft_config_loaded = True  # type: ignore[assignment]
        if args is None:
            args = TrainingArguments("tmp_trainer")
        if args.n_gpu > 1:
            logger.warning(
                "%d devices are visible, one is used: edits and DataParallel do not mix; start one "
                "process a device, with torchrun or accelerate launch",
                args.n_gpu,
            )
            args._n_gpu = 1
        if args.ddp_find_unused_parameters is None:
            # An edit runs on every rank, rows or none. Trainer would search every step, because
            # the wrapper is no PreTrainedModel, and reentrant checkpointing breaks under the
            # search.
            args.ddp_find_unused_parameters = False
        if data_collator is None and isinstance(processing_class, PreTrainedTokenizerBase):
            data_collator = ReftDataCollator(processing_class)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs
        )
        base = self._base_model()
        forward = inspect.signature(base.forward).parameters
        self.model_accepts_loss_kwargs = getattr(
            base,
            "accepts_loss_kwargs",
            any(one.kind == inspect.Parameter.VAR_KEYWORD for one in forward.values()),
        )
        if self.args.label_names is None:
            self.label_names = find_labels(type(base))
        self.can_return_loss = can_return_loss(type(base))
        self._is_causal = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        if self.label_smoother is not None and self._is_causal:
            # Trainer decides by the class name of the wrapper, which is no language model's.
            self.label_smoother = _Shifted(self.label_smoother)  # type: ignore[assignment]

    # ---------------------------------------------------------------- the model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; what ``model_init`` returns must be a ReftModel."""
        model = super().call_model_init(trial)
        _require_reft_model(model)
        return model

    def _reft_model(self) -> ReftModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _base_model(self) -> nn.Module:
        return self._reft_model().get_base_model()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, without the coordinates of orthonormal R: the rows of R have length 1
        wherever these go, so that decay would shrink nothing and only drag R back to its start."""
        coordinates = {
            f"{path}.free" for path, module in model.named_modules() if isinstance(module, Bank)
        }
        return [
            name for name in super().get_decay_parameter_names(model) if name not in coordinates
        ]

    # ---------------------------------------------------------------- data and loss

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            columns = [
                *inspect.signature(self._base_model().forward).parameters,
                *_WRAPPER_COLUMNS,
                *self.label_names,
                # What the collator turns into the model's arguments must reach the collator.
                *getattr(self.data_collator, "columns", ()),
            ]
            self._signature_columns = list(dict.fromkeys(columns))  # type: ignore[assignment]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's. Where it withholds the labels, the prompts are measured first."""
        keeps_labels = self.label_smoother is not None or self.compute_loss_func is not None
        if keeps_labels and self._is_causal and "prompt_lengths" not in inputs:
            lengths = _prompt_lengths(inputs.get("labels"), inputs.get("attention_mask"))
            if lengths is not None:
                inputs = {**inputs, "prompt_lengths": lengths}
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ---------------------------------------------------------------- disk

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's. Under an engine that shards parameters the adapter is restored before it
        does: the base point of R is no parameter, so that no engine's own checkpoint has it."""
        if resume_from_checkpoint and self._is_sharded():
            path = resume_from_checkpoint
            if path is True:
                path = get_last_checkpoint(str(self.args.output_dir))
            if isinstance(path, str):
                self._reft_model().restore(path)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. Of a model sharded by FSDP2, what is trained is gathered and no more."""
        model = self._reft_model()
        if not any(isinstance(one, DTensor) for one in model.parameters()):
            super().save_model(output_dir, _internal_call)
            return
        frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
        # On every rank, as gathering needs.
        state = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in model.state_dict().items()
            if name not in frozen
        }
        self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter and the tokenizer, never the base model."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        # An engine that shards parameters has gathered them; every rank was needed for that.
        self._reft_model().save_pretrained(
            folder, training_state=checkpoint, state_dict=state_dict or None
        )
        save_lora(self._reft_model(), folder, state_dict or None)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str | os.PathLike[str], model: nn.Module | None = None
    ) -> None:
        if not self._is_sharded():
            self._reft_model().restore(resume_from_checkpoint)
            load_lora(self._reft_model(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._is_sharded():  # the base point is still that of this run
            super()._load_best_model()
        else:
            self._reft_model().restore(str(self.state.best_model_checkpoint))
            load_lora(self._reft_model(), str(self.state.best_model_checkpoint))


class _Shifted:
    """A label smoother that lets position i predict label i + 1."""

    def __init__(self, smoother: Any) -> None:
        self.smoother = smoother

    def __call__(self, outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.smoother(outputs, labels, **{**kwargs, "shift_labels": True})


def _require_reft_model(model: object) -> None:
    if not isinstance(model, ReftModel):
        raise TypeError(
            "ReftTrainer trains a ReftModel, from reft.get_reft_model(base_model, config); got "
            f"{type(model).__name__}"
        )


def _prompt_lengths(labels: Any, mask: Any) -> Tensor | None:
    """Attended tokens before the first counted label, int64 (B,); None for labels of sequences."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    answered = (labels != IGNORED).cumsum(1) > 0
    before = ~answered if mask is None else ~answered & mask.bool()
    return before.sum(1)
