"""Data sets for TRL's SFTTrainer: which formats have a prompt to edit, and conversations split into
examples of one prompt and one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl.data_utils import is_conversational_from_value, maybe_convert_to_chatml

from reft.train.answer_checks import check_single_answer, check_tokenized_dataset

_PROMPT = 'give columns "prompt" and "completion", or use positions="all", which need no prompt'

#: Columns of tokenised examples that are 1 at the tokens of answers.
_MASKS = ("assistant_masks", "completion_mask")


# ---------------------------------------------------------------- checks


def check_packing(args: Any) -> None:
    """Refuse ways of packing that cut sequences or hide where prompts begin.

    Raises:
        ValueError: TRL's arguments request such a packing.
    """
    packing = getattr(args, "packing", False)
    evaluating = getattr(args, "eval_packing", None)
    strategy = getattr(args, "packing_strategy", "bfd")
    if (packing or evaluating) and strategy != "bfd":
        raise ValueError(
            f'packing_strategy must be "bfd", got "{strategy}", which cuts sequences anywhere: '
            "its rows do not show where the prompts lie that the adapter edits"
        )
    if evaluating and not packing and not getattr(args, "padding_free", False):
        raise ValueError(
            "eval_packing=True needs packing=True or padding_free=True: otherwise TRL puts several "
            "prompts into a row without marking where they begin"
        )


def check_format(example: Mapping[str, Any], args: Any, has_formatting_func: bool) -> None:
    """Refuse a training set without prompt tokens, by its first example.

    Args:
        example: the example, before TRL has prepared it.
        args: TRL's SFTConfig; None or transformers' TrainingArguments for SFTConfig's defaults.
        has_formatting_func: whether TRL's trainer gets a ``formatting_func``.

    Raises:
        ValueError: every token is a target.
    """
    skips = (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
    if not example or skips or _has_images(example):
        return
    if "input_ids" in example:
        if "labels" in example or _mask_columns(example, args):
            return
        raise ValueError(
            "tokenised examples must have labels, −100 on the prompt, or a completion_mask, with "
            f"completion_only_loss=True; got {sorted(example)}, where every token is a target and "
            "none a prompt to edit"
        )
    if has_formatting_func:
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
                "assistant an example with its own prompt. Otherwise every token is a target and "
                f"none a prompt to edit; or {_PROMPT}"
            )
    else:
        raise ValueError(
            f"the data are plain text (columns {sorted(example)}), in which every token is a "
            f"target and none a prompt to edit: {_PROMPT}"
        )


# ---------------------------------------------------------------- one prompt and one answer


def splits_conversations(example: Mapping[str, Any], args: Any) -> bool:
    """Return whether conversations are split into one example for each answer: the loss counts the
    assistant's tokens only, and TRL tokenises the data before training."""
    assistant_only = getattr(args, "assistant_only_loss", False)
    return bool(assistant_only) and "input_ids" not in example and not _has_images(example)


def with_single_answers(dataset: Any, args: Any, split: bool) -> Any:
    """Return a training or evaluation set whose examples have one prompt and one answer.

    Args:
        dataset: the data set, before TRL has prepared it.
        args: TRL's SFTConfig.
        split: whether to make each answer of a conversation an example.

    Raises:
        ValueError: an example with several answers that cannot be split.
    """
    example: dict[str, Any] = next(iter(dataset), {})
    if "input_ids" in example:
        columns = ["labels"] if "labels" in example else _mask_columns(example, args)
        in_memory = hasattr(dataset, "select_columns") and hasattr(dataset, "_data")
        if columns and in_memory and "seq_lengths" not in example:
            check_tokenized_dataset(dataset, columns)
        return dataset
    if is_conversational_from_value(example):
        dataset = dataset.map(maybe_convert_to_chatml, remove_columns="conversations")
        example = next(iter(dataset))
    if split:
        turns = "messages" if "messages" in example else "completion"
        old = ["messages"] if turns == "messages" else ["prompt", "completion"]
        if isinstance(example.get(turns), list):
            return dataset.map(split_conversations, batched=True, remove_columns=old)
    elif isinstance(example.get("completion"), list):
        return dataset.filter(check_single_answer, fn_kwargs={"columns": ["completion"]})
    return dataset


def split_conversations(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Split conversations into examples of one prompt and one answer.

    An answer is a run of the assistant's messages; its prompt is every message before it, earlier
    answers included. A conversation of K answers becomes K examples. Messages after the last answer
    are dropped, and the assistant's messages that open a conversation are no answer.

    Args:
        rows: columns of a data set: ``messages``, or ``prompt`` and ``completion``, of which only
            ``completion`` holds answers. Other columns are repeated for each example.

    Returns:
        The columns ``prompt``, ``completion`` and the others.

    Raises:
        ValueError: no conversation has an answer.
    """
    name = "messages" if "messages" in rows else "completion"
    others = [column for column in rows if column not in ("messages", "prompt", "completion")]
    examples: dict[str, list[Any]] = {column: [] for column in ("prompt", "completion", *others)}
    for index, messages in enumerate(rows[name]):
        before = list(rows["prompt"][index]) if name == "completion" else []
        conversation = [*before, *messages]
        for begin, end in answer_spans(conversation, len(before)):
            examples["prompt"].append(conversation[:begin])
            examples["completion"].append(conversation[begin:end])
            for column in others:
                examples[column].append(rows[column][index])
    if not examples["prompt"]:
        roles = sorted({str(turn.get("role")) for messages in rows[name] for turn in messages})
        raise ValueError(
            f'{name} must hold answers, messages of the role "assistant" after another message; '
            f"got only the roles {roles}"
        )
    return examples


def answer_spans(messages: Sequence[Mapping[str, Any]], start: int = 0) -> list[tuple[int, int]]:
    """Return [begin, end) of each answer from message ``start`` on, see
    :func:`split_conversations`."""
    is_assistant = [message.get("role") == "assistant" for message in messages]
    opening = is_assistant.index(False) if False in is_assistant else len(messages)
    spans: list[tuple[int, int]] = []
    for index in range(start or opening, len(messages)):
        if is_assistant[index] and spans and spans[-1][1] == index:
            spans[-1] = (spans[-1][0], index + 1)
        elif is_assistant[index]:
            spans.append((index, index + 1))
    return spans


def _mask_columns(example: Mapping[str, Any], args: Any) -> list[str]:
    """Return the mask columns from which TRL makes labels."""
    masks = {name for name in _MASKS if name in example}
    if not getattr(args, "completion_only_loss", None):
        masks.discard("completion_mask")
    return sorted(masks)


def _has_images(example: Mapping[str, Any]) -> bool:
    return "image" in example or "images" in example
