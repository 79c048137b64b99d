"""TRL's trainers for a wrapped model.

TRL puts a fused language-model head into the ``forward`` of the model that it is given. So it is
given the transformers model inside the wrapper, on which the edits are, and the labels that it
hands to that forward tell where prompts end.
"""

from __future__ import annotations

import copy
from typing import Any

from reft.absent import lacks_trl

try:
    from trl import DPOTrainer, KTOTrainer, SFTTrainer
    from trl.data_utils import extract_prompt
except (ImportError, RuntimeError) as error:  # TRL makes a RuntimeError of what it lacks itself
    raise lacks_trl(error) from error

from reft.model import peft_compat as peft_base
from reft.model.reft_model import ReftModel
from reft.train import sft_datasets
from reft.train.answer_checks import check_one_answer, counts_from_prompts
from reft.train.reference_model import Reference
from reft.train.trl_base import KeepsReference, OnBase, check_given, check_reference


def _edits_alone(model: ReftModel) -> bool:
    """Whether nothing but edits is trained."""
    heads = any(model.configs[name].modules_to_save for name in model.active_adapters)
    return not heads and not peft_base.has_layers(model.get_base_model())


class ReftSFTTrainer(OnBase, SFTTrainer):
    """:class:`trl.SFTTrainer` for a :class:`reft.ReftModel`, with the same arguments.

    An example is one prompt and one answer; a prompt ends where the labels begin. With
    ``assistant_only_loss=True`` each answer of a conversation becomes an example, behind the
    prompt that generation will have.

    Raises:
        TypeError: the model is not a ReftModel.
        ValueError: a ``peft_config``; packing that loses prompts; data in which no token is a
            prompt, or with several answers in an example.
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
        check_given(type(self).__name__, model, args, kwargs)
        self._counts, self._splits = counts_from_prompts(model), False
        if self._counts:
            sft_datasets.check_arguments(args)
            example: dict[str, Any] = next(iter(train_dataset or ()), {})
            if _edits_alone(model):
                sft_datasets.check_form(example, args, kwargs.get("formatting_func") is not None)
            self._splits = sft_datasets.splits(example, args)
        if self._splits:
            # What TRL calls a completion is the answer.
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
        if self._counts:
            dataset = sft_datasets.one_prompt_each(dataset, args[1], self._splits)
        return super()._prepare_dataset(dataset, *args, **kwargs)


class _AgainstReference(KeepsReference):
    """What trainers need that compare the model with itself as it was.

    Raises:
        TypeError: the model is not a ReftModel, or a ``ref_model`` is given.
        ValueError: no active adapter; PEFT trains layers in the base, which the reference would
            have too; an option that needs a second model.
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
        check_given(type(self).__name__, model, args, kwargs)
        if ref_model is not None:
            raise TypeError(
                "ref_model must be None: the reference is the model as it is now, with its adapter"
            )
        check_reference(model, args)
        self._reference = Reference(model)
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
        if counts_from_prompts(self._wrapper):
            example: dict[str, Any] = next(iter(dataset), {})
            if "prompt" not in example and "chosen" in example:
                dataset = dataset.map(extract_prompt)
                example = next(iter(dataset))
            names = [name for name in self._answers if isinstance(example.get(name), list)]
            if names:
                dataset = dataset.filter(check_one_answer, fn_kwargs={"columns": names})
        return super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]


class ReftDPOTrainer(_AgainstReference, DPOTrainer):
    """:class:`trl.DPOTrainer` for a :class:`reft.ReftModel`, with the same arguments but
    ``ref_model``: the reference is the model with its adapter as it is now. Checkpoints hold that
    adapter, so that a resumed run has the reference that it began with.

    Raises:
        TypeError: the model is not a ReftModel, or a ``ref_model`` is given.
        ValueError: a ``peft_config``; PEFT trains layers in the base, which the reference would
            have too; ``sync_ref_model``; a completion of several turns.
    """

    _answers = ("chosen", "rejected")


class ReftKTOTrainer(_AgainstReference, KTOTrainer):
    """:class:`trl.KTOTrainer` for a :class:`reft.ReftModel`, as :class:`ReftDPOTrainer` is.

    Raises:
        TypeError, ValueError: as :class:`ReftDPOTrainer`.
    """

    _answers = ("chosen", "rejected", "completion")
