"""TRL's trainers for a wrapped model.

TRL replaces the ``forward`` of the model it trains by one with a fused language-model head. It
therefore gets the transformers model inside the wrapper, which carries the edits. The labels passed
to that forward show where prompts end.
"""

from __future__ import annotations

import copy
from typing import Any

from reft.absent import lacks_trl

try:
    from trl import DPOTrainer, KTOTrainer, SFTTrainer
    from trl.data_utils import extract_prompt
except (ImportError, RuntimeError) as error:  # TRL raises RuntimeError for its own missing imports
    raise lacks_trl(error) from error

from reft.model import peft_compat as peft_base
from reft.model.reft_model import ReftModel
from reft.train import sft_datasets
from reft.train.answer_checks import check_single_answer, edits_depend_on_prompt
from reft.train.reference_model import ReferenceModel
from reft.train.trl_base import (
    TrlReferenceTrainer,
    TrlTrainer,
    check_reference,
    check_trl_arguments,
)


class ReftSFTTrainer(TrlTrainer, SFTTrainer):
    """:class:`trl.SFTTrainer` for a :class:`reft.ReftModel`, with the same arguments.

    An example is one prompt and one answer; the prompt ends where the labels begin. With
    ``assistant_only_loss=True`` each answer of a conversation becomes an example, with the prompt
    that generation would have.

    Raises:
        TypeError: the model is not a ReftModel.
        ValueError: a ``peft_config``; packing that loses prompts; data without prompt tokens, or
            with several answers in an example.
    """

    def __init__(
        self,
        model: ReftModel,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        check_trl_arguments(type(self).__name__, model, args, kwargs)
        self._needs_prompts, self._splits = edits_depend_on_prompt(model), False
        if self._needs_prompts:
            sft_datasets.check_packing(args)
            example: dict[str, Any] = next(iter(train_dataset or ()), {})
            if _trains_edits_only(model):
                has_formatting_func = kwargs.get("formatting_func") is not None
                sft_datasets.check_format(example, args, has_formatting_func)
            self._splits = sft_datasets.splits_conversations(example, args)
        if self._splits:
            # After the split the completion is the answer.
            args = copy.copy(args)
            args.assistant_only_loss, args.completion_only_loss = False, True
        super().__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if self._needs_prompts:
            dataset = sft_datasets.with_single_answers(dataset, args[1], self._splits)
        return super()._prepare_dataset(dataset, *args, **kwargs)


def _trains_edits_only(model: ReftModel) -> bool:
    """Return whether neither modules_to_save nor PEFT's layers are trained besides the edits."""
    has_modules = any(model.configs[name].modules_to_save for name in model.active_adapters)
    return not has_modules and not peft_base.has_layers(model.get_base_model())


class _PreferenceTrainer(TrlReferenceTrainer):
    """Base of the trainers whose loss compares the model with its adapter at the start.

    Raises:
        TypeError: the model is not a ReftModel, or a ``ref_model`` is given.
        ValueError: no active adapter; PEFT trains layers in the base, which the reference shares;
            or an option that needs a second model.
    """

    #: Columns that hold answers.
    _answers: tuple[str, ...] = ()

    def __init__(
        self,
        model: ReftModel,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        check_trl_arguments(type(self).__name__, model, args, kwargs)
        if ref_model is not None:
            raise TypeError(
                "ref_model must be None: the reference is the model with its present adapter"
            )
        check_reference(model, args)
        self._reference = ReferenceModel(model)
        super().__init__(
            model,
            ref_model=self._reference,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if edits_depend_on_prompt(self._wrapper):
            example: dict[str, Any] = next(iter(dataset), {})
            if "prompt" not in example and "chosen" in example:
                dataset = dataset.map(extract_prompt)
                example = next(iter(dataset))
            names = [name for name in self._answers if isinstance(example.get(name), list)]
            if names:
                dataset = dataset.filter(check_single_answer, fn_kwargs={"columns": names})
        return super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]


class ReftDPOTrainer(_PreferenceTrainer, DPOTrainer):
    """:class:`trl.DPOTrainer` for a :class:`reft.ReftModel`, with the same arguments but
    ``ref_model``.

    The reference is the model with its present adapter. Checkpoints hold that adapter, so that a
    resumed run keeps its reference.

    Raises:
        TypeError: the model is not a ReftModel, or a ``ref_model`` is given.
        ValueError: a ``peft_config``; PEFT trains layers in the base, which the reference shares;
            ``sync_ref_model``; a completion of several turns.
    """

    _answers = ("chosen", "rejected")


class ReftKTOTrainer(_PreferenceTrainer, KTOTrainer):
    """:class:`trl.KTOTrainer` for a :class:`reft.ReftModel`, see :class:`ReftDPOTrainer`.

    Raises:
        TypeError, ValueError: see :class:`ReftDPOTrainer`.
    """

    _answers = ("chosen", "rejected", "completion")
