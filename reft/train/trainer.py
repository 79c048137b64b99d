"""``transformers.Trainer`` for a wrapped model.

Trainer reads signatures and class names to find out about labels, losses and data columns, and
saves whole models. Here the answers come from the base model, and checkpoints hold the adapter
alone.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_loss, find_labels, is_accelerate_available

from reft.model.call_state import OPTIONS
from reft.model.ends import listed_ids
from reft.model.reft_model import ReftModel
from reft.train.adapter_trainer import require_reft_model
from reft.train.collate import ReftDataCollator
from reft.train.labels import IGNORED
from reft.train.predict_with_generate import GeneratingTrainer

logger = logging.getLogger(__name__)

#: Names of data columns that the wrapper understands beside those of the base model.
_WRAPPER_COLUMNS = (*OPTIONS, "label", "label_ids")


def require_accelerate() -> None:
    """Raise ImportError, saying what to install, if accelerate is not there."""
    if not is_accelerate_available():
        raise ImportError("training needs accelerate: pip install 'reft[train]'")


class ReftTrainer(GeneratingTrainer):
    """:class:`transformers.Trainer` for a :class:`reft.ReftModel`, with the same arguments; with
    ``Seq2SeqTrainingArguments`` it is :class:`transformers.Seq2SeqTrainer`.

    Without a ``data_collator``, a ``processing_class`` that is a tokenizer makes a
    :class:`reft.ReftDataCollator`.

    A new adapter gets its first values from ``args.seed``, see
    :func:`reft.train.seeded_init.draw_from_seed`.

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
            _accept(model)
        if args is None:
            args = TrainingArguments("tmp_trainer")
        if not isinstance(args, TrainingArguments):
            raise TypeError(
                f"args must be transformers.TrainingArguments, got {type(args).__name__}; give the "
                "others by name: data_collator=, train_dataset=, processing_class="
            )
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
        if args.ddp_broadcast_buffers is None:
            # Nothing writes buffers while an adapter is trained, and all ranks began with the same.
            args.ddp_broadcast_buffers = False
        if data_collator is None and isinstance(processing_class, PreTrainedTokenizerBase):
            data_collator = ReftDataCollator(processing_class)
        if data_collator is None:
            _refuse_text(train_dataset)
        if not hasattr(args, "generation_config"):
            # Seq2SeqTrainer asks any arguments for it.
            args.generation_config = None  # type: ignore[attr-defined]
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs
        )
        self._use_generation_config()
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
        _accept(model)
        return model

    def _begin(self) -> None:
        if self.model_init is not None:
            self._use_generation_config()
        super()._begin()

    def _taught_ends(self) -> list[int]:
        collator = self.data_collator
        if not self._is_causal or not isinstance(collator, ReftDataCollator):
            return []
        return listed_ids(collator.tokenizer.eos_token_id) if collator.append_eos else []

    def _base_model(self) -> nn.Module:
        return self._reft_model().get_base_model()

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


def _accept(model: object) -> None:
    require_reft_model(model, "ReftTrainer")
    if getattr(model, "is_quantized", False):
        # Trainer's word for "this quantised model carries an adapter". On the wrapper alone: on the
        # base, transformers would look for PEFT's layers.
        model._hf_peft_config_loaded = True  # type: ignore[attr-defined]


def _refuse_text(examples: Any) -> None:
    """Refuse examples of text where nothing makes tokens of them.

    Raises:
        ValueError: the first example has text and no tokens.
    """
    picked = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
    first = examples[0] if picked and len(examples) else None
    if not isinstance(first, Mapping) or "input_ids" in first:
        return
    text = sorted({"prompt", "completion", "text", "messages"}.intersection(first))
    if text:
        raise ValueError(
            "data_collator must be given, reft.ReftDataCollator(tokenizer), or processing_class="
            f"tokenizer: the examples hold {', '.join(text)} and no tokens"
        )


class _Shifted:
    """A label smoother that lets position i predict label i + 1."""

    def __init__(self, smoother: Any) -> None:
        self.smoother = smoother

    def __call__(self, outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        loss: Tensor = self.smoother(outputs, labels, **{**kwargs, "shift_labels": True})
        return loss


def _prompt_lengths(labels: Any, mask: Any) -> Tensor | None:
    """Attended tokens before the first counted label, int64 (B,); None for labels of sequences."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    answered = (labels != IGNORED).cumsum(1) > 0
    before = ~answered if mask is None else ~answered & mask.bool()
    return before.sum(1)
