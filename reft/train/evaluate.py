"""Greedy generation in left-padded batches, and how many answers are right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedTokenizerBase

from reft.io.atomic_write import write_whole
from reft.model.ends import listed_ids
from reft.train import tokenization
from reft.train.collate import ReftDataCollator

#: (generated, expected) -> whether the answer counts.
Scorer = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What became of one record: its prompt, the expected and the generated completion."""

    prompt: str
    completion: str
    prediction: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All predictions, in the order of the records."""

    predictions: tuple[Prediction, ...]

    @property
    def correct(self) -> int:
        """How many are right."""
        return sum(one.correct for one in self.predictions)

    @property
    def score(self) -> float:
        """The share that is right, in [0, 1]."""
        return self.correct / len(self.predictions)

    def write(self, path: str | os.PathLike[str], base: Evaluation | None = None) -> None:
        """Write the predictions as JSONL, replacing the file in one step; those that the base made
        of the same records as ``base_prediction`` and ``base_correct``."""
        rows = [asdict(one) for one in self.predictions]
        if base is not None:
            for row, one in zip(rows, base.predictions, strict=True):
                row |= {"base_prediction": one.prediction, "base_correct": one.correct}
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def exact_match(generated: str, expected: str) -> bool:
    """Whether two answers are the same but for white space."""
    return generated.split() == expected.split()


def context_length(model: nn.Module) -> int | None:
    """The most tokens the model has positions for, None if its configuration does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def generate_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    console: Console | None = None,
    **generate: Any,
) -> list[str]:
    """Complete prompts, greedily unless told otherwise.

    Args:
        model: a wrapped or a plain causal language model. Evaluated in eval mode, and left as it
            was.
        tokenizer: of the base model; tokens are those that :class:`ReftDataCollator` trains on. Its
            end token, which training teaches, ends a completion as those of the model's (or the
            given) generation config do, unless ``eos_token_id`` is given.
        prompts: what to complete.
        batch_size, console: as :func:`generate_ids`, which does the work.
        max_new_tokens: the most tokens of a completion.
        generate: further arguments of the model's own ``generate``.

    Returns:
        The completions, up to their end and without special tokens, in the order of the prompts.

    Raises:
        ValueError: a prompt without tokens or as long as the model's positions; a size below 1.
    """
    collator = ReftDataCollator(tokenizer)
    ids = [collator.prompt_ids(prompt) for prompt in prompts]
    ends = _ends(model, tokenizer, generate)
    limit = context_length(model)
    for prompt, asked in zip(prompts, ids, strict=True):
        if limit is not None and len(asked) >= limit:
            raise ValueError(
                f"the prompt has {len(asked)} tokens and the model has {limit} positions: no room "
                f"for a completion. The prompt begins {prompt[:60]!r}"
            )
    answers = generate_ids(
        model,
        ids,
        pad_id=collator.pad_id,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        console=console,
        **{**generate, "eos_token_id": ends or None},
    )
    return [tokenization.answer_text(tokenizer, one, ends) for one in answers]


def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    each: Mapping[str, Sequence[Any]] | None = None,
    console: Console | None = None,
    **generate: Any,
) -> list[list[int]]:
    """Complete prompts of token ids, greedily unless told otherwise.

    Prompts of similar length share a batch, padded on the left. A batch near the end of the model's
    positions generates fewer tokens.

    Args:
        model: as :func:`generate_completions`.
        prompts: token ids, shorter than the model's positions.
        pad_id: what fills the batch; masked.
        batch_size: sequences at a time.
        max_new_tokens: the most tokens of a completion; None for the model's own default.
        max_length: the most tokens of padding, prompt and completion together.
        each: arguments of ``generate`` with one entry a prompt, such as ``adapter_names``.
        console: where to show progress; None for silence.
        generate: further arguments of the model's own ``generate``.

    Returns:
        The new tokens of each prompt, in order, padded after the end of a completion.

    Raises:
        ValueError: a size below 1; both limits at once.
    """
    sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "max_length": max_length}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(
            f"max_new_tokens and max_length exclude each other, got {max_new_tokens} and "
            f"{max_length}"
        )
    limit = context_length(model)
    # Sampling settings of a chat model's own generation_config would only warn here.
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    settings = {**({} if generate.get("do_sample") else greedy), "pad_token_id": pad_id, **generate}
    device = next(model.parameters()).device
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    with _evaluating(model), _progress(console, len(prompts)) as advance:
        for begin in range(0, len(prompts), batch_size):
            batch = longest_first[begin : begin + batch_size]
            width = len(prompts[batch[0]])
            gaps = [width - len(prompts[index]) for index in batch]
            padded = [
                [pad_id] * gap + list(prompts[index])
                for gap, index in zip(gaps, batch, strict=True)
            ]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            rooms = (max_new_tokens, max_length and max_length - width, limit and limit - width)
            room = min((one for one in rooms if one is not None), default=None)
            output = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                **({} if room is None else {"max_new_tokens": max(room, 1)}),
                **{name: [one[index] for index in batch] for name, one in (each or {}).items()},
                **settings,
            )
            for index, row in zip(batch, output[:, width:].tolist(), strict=True):
                answers[index] = row
            advance(len(batch))
    return answers


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    scorer: Scorer = exact_match,
    **generate: Any,
) -> Evaluation:
    """Complete the prompts of records and compare with their completions.

    Args:
        model, tokenizer: as :func:`generate_completions`.
        records: with ``prompt`` and ``completion``.
        scorer: (generated, expected) -> whether it counts. A completion that holds an end token or
            special tokens is compared as generation would show it.
        generate: every other argument of :func:`generate_completions`.

    Raises:
        ValueError: no record; as :func:`generate_completions`.
    """
    if not records:
        raise ValueError("there must be at least one record to evaluate, got none")
    prompts = [record["prompt"] for record in records]
    answers = generate_completions(model, tokenizer, prompts, **generate)
    ends = _ends(model, tokenizer, generate)
    predictions = []
    for record, answer in zip(records, answers, strict=True):
        prompt, completion = record["prompt"], record["completion"]
        expected = tokenization.expected_text(tokenizer, completion, ends)
        predictions.append(Prediction(prompt, completion, answer, scorer(answer, expected)))
    return Evaluation(tuple(predictions))


def _ends(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, generate: Mapping[str, Any]
) -> list[int]:
    """The tokens that end a completion, with these arguments of ``generate``."""
    if generate.get("eos_token_id") is not None:
        return listed_ids(generate["eos_token_id"])
    configured = generate.get("generation_config") or getattr(model, "generation_config", None)
    return tokenization.end_ids(configured, tokenizer)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode of every submodule is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` prompts; yields what advances it."""
    if console is None or not console.is_terminal:
        yield lambda count: None
        return
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda count: progress.advance(task, count)
