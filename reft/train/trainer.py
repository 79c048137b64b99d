"""``transformers.Trainer`` for a wrapped model.

Trainer reads the model's signature and class name to choose labels, losses and data columns, and it
saves whole models. This subclass reads them from the base model and saves only the adapter.
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
from reft.model.end_tokens import listed_ids
from reft.model.reft_model import ReftModel
from reft.positions import IGNORED
from reft.train.adapter_trainer import require_reft_model
from reft.train.collate import ReftDataCollator
from reft.train.predict_with_generate import GeneratingTrainer

logger = logging.getLogger(__name__)

#: Data columns that the wrapper reads besides those of the base model.
_WRAPPER_COLUMNS = (*OPTIONS, "label", "label_ids")


def require_accelerate() -> None:
    """Raise ImportError with an install command if accelerate is missing."""
    if not is_accelerate_available():
        raise ImportError("training needs accelerate: pip install 'reft[train]'")


class ReftTrainer(GeneratingTrainer):
    """:class:`transformers.Trainer` for a :class:`reft.ReftModel`, with the same arguments; with
    ``Seq2SeqTrainingArguments`` it is a :class:`transformers.Seq2SeqTrainer`.

    The default ``data_collator`` is a :class:`reft.ReftDataCollator` of the ``processing_class``,
    if that is a tokenizer.

    A new adapter is initialised from ``args.seed``, see
    :func:`reft.train.seeded_init.initialise_from_seed`.

    Checkpoints hold the adapter with its training state, so that a resumed run continues bit for
    bit. ``save_model`` writes the adapter in its published format into any other folder.

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
            _check_model(model)
        if args is None:
            args = TrainingArguments("tmp_trainer")
        if not isinstance(args, TrainingArguments):
            raise TypeError(
                f"args must be transformers.TrainingArguments, got {type(args).__name__}; pass the "
                "other arguments by name: data_collator=, train_dataset=, processing_class="
            )
        if args.n_gpu > 1:
            logger.warning(
                "%d devices are visible, one is used: edits do not support DataParallel; start one "
                "process per device, with torchrun or accelerate launch",
                args.n_gpu,
            )
            args._n_gpu = 1
        if args.ddp_find_unused_parameters is None:
            # An edit uses its parameters on every rank, with or without edited rows. Trainer's
            # default for a model that is no PreTrainedModel searches unused parameters in every
            # step, and reentrant checkpointing breaks under that search.
            args.ddp_find_unused_parameters = False
        if args.ddp_broadcast_buffers is None:
            # Buffers are equal on all ranks at the start, and training an adapter changes none.
            args.ddp_broadcast_buffers = False
        if data_collator is None and isinstance(processing_class, PreTrainedTokenizerBase):
            data_collator = ReftDataCollator(processing_class)
        if data_collator is None:
            _refuse_untokenized(train_dataset)
        if not hasattr(args, "generation_config"):
            # Seq2SeqTrainer reads it from arguments of any class.
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
            any(argument.kind == inspect.Parameter.VAR_KEYWORD for argument in forward.values()),
        )
        if self.args.label_names is None:
            self.label_names = find_labels(type(base))
        self.can_return_loss = can_return_loss(type(base))
        self._is_causal = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        if self.label_smoother is not None and self._is_causal:
            # Trainer shifts labels by the model's class name; the wrapper's is no language model's.
            self.label_smoother = _ShiftedLabelSmoother(self.label_smoother)  # type: ignore[assignment]

    # ---------------------------------------------------------------- the model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Create a model with ``model_init`` and check that it is a ReftModel."""
        model = super().call_model_init(trial)
        _check_model(model)
        return model

    def _prepare_model(self) -> None:
        if self.model_init is not None:
            self._use_generation_config()
        super()._prepare_model()

    def _trained_end_tokens(self) -> list[int]:
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
                # Columns that the collator turns into arguments of the model must reach it.
                *getattr(self.data_collator, "columns", ()),
            ]
            self._signature_columns = list(dict.fromkeys(columns))  # type: ignore[assignment]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss as Trainer does; if Trainer withholds the labels from the model, add
        ``prompt_lengths``, which the labels would show."""
        withholds_labels = self.label_smoother is not None or self.compute_loss_func is not None
        if withholds_labels and self._is_causal and "prompt_lengths" not in inputs:
            lengths = _prompt_lengths(inputs.get("labels"), inputs.get("attention_mask"))
            if lengths is not None:
                inputs = {**inputs, "prompt_lengths": lengths}
        return super().compute_loss(model, inputs, *args, **kwargs)


def _check_model(model: object) -> None:
    require_reft_model(model, "ReftTrainer")
    if getattr(model, "is_quantized", False):
        # Trainer trains a quantised model only with this attribute, which marks an adapter. On the
        # base it would make transformers look for PEFT's layers.
        model._hf_peft_config_loaded = True  # type: ignore[attr-defined]


def _refuse_untokenized(examples: Any) -> None:
    """Refuse examples of text when there is no collator to tokenise them.

    Raises:
        ValueError: the first example has text and no tokens.
    """
    is_indexable = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
    first = examples[0] if is_indexable and len(examples) else None
    if not isinstance(first, Mapping) or "input_ids" in first:
        return
    fields = sorted({"prompt", "completion", "text", "messages"}.intersection(first))
    if fields:
        raise ValueError(
            "data_collator must be given, reft.ReftDataCollator(tokenizer), or processing_class="
            f"tokenizer: the examples hold {', '.join(fields)} and no tokens"
        )


class _ShiftedLabelSmoother:
    """A label smoother in which position i predicts label i + 1."""

    def __init__(self, smoother: Any) -> None:
        self.smoother = smoother

    def __call__(self, outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        loss: Tensor = self.smoother(outputs, labels, **{**kwargs, "shift_labels": True})
        return loss


def _prompt_lengths(labels: Any, mask: Any) -> Tensor | None:
    """Return the attended tokens before the first target of each sequence, int64 (B,).

    None for labels of whole sequences.
    """
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    in_answer = (labels != IGNORED).cumsum(1) > 0
    in_prompt = ~in_answer if mask is None else ~in_answer & mask.bool()
    return in_prompt.sum(1)
