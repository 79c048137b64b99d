"""The forms of data that TRL's SFTTrainer takes, and in which of them an edit has a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl.data_utils import is_conversational_from_value, maybe_convert_to_chatml

from reft.train.answer_checks import MASKS, check_one_answer, check_targets, one_answer_each

_PROMPT = 'give columns "prompt" and "completion", or use positions="all", which need no prompt'


def check_arguments(args: Any) -> None:
    """Refuse ways of packing and cutting that lose prompts.

    Raises:
        ValueError: they are asked for.
    """
    packing = getattr(args, "packing", False)
    evaluating = getattr(args, "eval_packing", None)
    strategy = getattr(args, "packing_strategy", "bfd")
    if (packing or evaluating) and strategy != "bfd":
        raise ValueError(
            f'packing_strategy must be "bfd", got "{strategy}", which cuts sequences anywhere: '
            "nothing in its rows tells where the prompts lie that the adapter edits"
        )
    if evaluating and not packing and not getattr(args, "padding_free", False):
        raise ValueError(
            "eval_packing=True needs packing=True or padding_free=True: TRL would else put several "
            "prompts into a row without saying where they begin"
        )


def check_form(example: Mapping[str, Any], args: Any, formats: bool) -> None:
    """Refuse a training set in which no token is a prompt, by its first example.

    Args:
        example: before TRL has prepared it.
        args: TRL's SFTConfig, or None or transformers' arguments for its defaults.
        formats: there is a ``formatting_func``.

    Raises:
        ValueError: every token is a target.
    """
    skips = (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
    if not example or skips or _has_images(example):
        return
    if "input_ids" in example:
        if "labels" in example or _masks(example, args):
            return
        raise ValueError(
            "tokenised examples must have labels, −100 on the prompt, or a completion_mask, with "
            f"completion_only_loss=True; got {sorted(example)}, where every token is a target and "
            "none a prompt to edit"
        )
    if formats:
        raise ValueError(
            "formatting_func makes plain text, in which every token is a target and none a prompt "
            f"to edit: {_PROMPT}"
        )
    if "prompt" in example and "completion" in example:
        only_completions = getattr(args, "completion_only_loss", None)
        if only_completions is False and not getattr(args, "assistant_only_loss", False):
            raise ValueError(
                "completion_only_loss must be True or None: with False every token is a target and "
                'none a prompt to edit; or use positions="all"'
            )
    elif "messages" in example or "conversations" in example:
        if not getattr(args, "assistant_only_loss", False):
            raise ValueError(
                "assistant_only_loss must be True for messages, which makes each answer of the "
                "assistant an example behind its prompt: else every token is a target and none a "
                f"prompt to edit; or {_PROMPT}"
            )
    else:
        raise ValueError(
            f"the data are plain text (columns {sorted(example)}), in which every token is a "
            f"target and none a prompt to edit: {_PROMPT}"
        )


def splits(example: Mapping[str, Any], args: Any) -> bool:
    """Whether the answers of conversations are made examples: where assistants alone are taught,
    and TRL prepares the data before training."""
    asked = getattr(args, "assistant_only_loss", False)
    return bool(asked) and "input_ids" not in example and not _has_images(example)


def one_prompt_each(dataset: Any, args: Any, splits: bool) -> Any:
    """A training or evaluation set whose examples have one prompt and one answer.

    Args:
        dataset: before TRL has prepared it.
        args: TRL's SFTConfig.
        splits: make each answer of a conversation an example.

    Raises:
        ValueError: an example with several answers that cannot be split.
    """
    example: dict[str, Any] = next(iter(dataset), {})
    if "input_ids" in example:
        columns = ["labels"] if "labels" in example else _masks(example, args)
        whole = hasattr(dataset, "select_columns") and hasattr(dataset, "_data")
        if columns and whole and "seq_lengths" not in example:
            check_targets(dataset, columns)
        return dataset
    if is_conversational_from_value(example):
        dataset = dataset.map(maybe_convert_to_chatml, remove_columns="conversations")
        example = next(iter(dataset))
    if splits:
        turns = "messages" if "messages" in example else "completion"
        old = ["messages"] if turns == "messages" else ["prompt", "completion"]
        if isinstance(example.get(turns), list):
            return dataset.map(one_answer_each, batched=True, remove_columns=old)
    elif isinstance(example.get("completion"), list):
        return dataset.filter(check_one_answer, fn_kwargs={"columns": ["completion"]})
    return dataset


def _masks(example: Mapping[str, Any], args: Any) -> list[str]:
    """The columns of masks of which TRL makes labels."""
    read = {name for name in MASKS if name in example}
    if not getattr(args, "completion_only_loss", None):
        read.discard("completion_mask")
    return sorted(read)


def _has_images(example: Mapping[str, Any]) -> bool:
    return "image" in example or "images" in example
