"""Greedy generation in left-padded batches, and the share of correct completions."""

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
from reft.model.end_tokens import listed_ids
from reft.train import tokenization
from reft.train.collate import ReftDataCollator

#: (generated, expected) -> whether the completion is correct.
Scorer = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A record's prompt, its expected and its generated completion, and whether they agree."""

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
        """The number of correct predictions."""
        return sum(prediction.correct for prediction in self.predictions)

    @property
    def score(self) -> float:
        """The share of correct predictions, in [0, 1]."""
        return self.correct / len(self.predictions)

    def write(self, path: str | os.PathLike[str], base: Evaluation | None = None) -> None:
        """Write the predictions as JSONL, replacing the file in one step.

        Args:
            path: the file.
            base: the base model's predictions for the same records, written as ``base_prediction``
                and ``base_correct``.
        """
        rows = [asdict(prediction) for prediction in self.predictions]
        if base is not None:
            for row, baseline in zip(rows, base.predictions, strict=True):
                row |= {"base_prediction": baseline.prediction, "base_correct": baseline.correct}
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def exact_match(generated: str, expected: str) -> bool:
    """Return whether two completions are equal except for white space."""
    return generated.split() == expected.split()


def context_length(model: nn.Module) -> int | None:
    """Return the number of positions of a model, None if its configuration has no such limit."""
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
    """Complete prompts, with greedy decoding by default.

    Args:
        model: a wrapped or a plain causal language model. It runs in eval mode; its modes are
            restored.
        tokenizer: the base model's tokenizer; a prompt has the same tokens as with
            :class:`ReftDataCollator`. Without ``eos_token_id`` a completion ends at the tokenizer's
            end token, with which training ends completions, and at those of the generation config.
        prompts: the texts to complete.
        batch_size: sequences per batch.
        max_new_tokens: the maximum number of tokens of a completion.
        console: where to show progress; None for no progress bar.
        generate: further arguments of the model's ``generate``.

    Returns:
        The completions, up to their end and without special tokens, in the order of the prompts.

    Raises:
        ValueError: a prompt without tokens, or as long as the model's positions; or a size below 1.
    """
    collator = ReftDataCollator(tokenizer)
    ids = [collator.prompt_ids(prompt) for prompt in prompts]
    ends = _ends(model, tokenizer, generate)
    limit = context_length(model)
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        if limit is not None and len(prompt_ids) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens and the model has {limit} positions: no "
                f"room for a completion. The prompt begins {prompt[:60]!r}"
            )
    completions = generate_ids(
        model,
        ids,
        pad_id=collator.pad_id,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        console=console,
        **{**generate, "eos_token_id": ends or None},
    )
    return [tokenization.completion_text(tokenizer, row, ends) for row in completions]


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
    """Complete prompts of token ids, with greedy decoding by default.

    Prompts of similar length share a batch, padded on the left. A batch whose prompts nearly fill
    the model's positions generates fewer tokens.

    Args:
        model: see :func:`generate_completions`.
        prompts: token ids, fewer than the model's positions.
        pad_id: the token id for padding, which is masked.
        batch_size: sequences per batch.
        max_new_tokens: the maximum number of tokens of a completion; None for the model's default.
        max_length: the maximum number of tokens of padding, prompt and completion together.
        each: arguments of ``generate`` with one entry per prompt, such as ``adapter_names``.
        console: where to show progress; None for no progress bar.
        generate: further arguments of the model's ``generate``.

    Returns:
        The new tokens of each prompt, in order, padded after the end of a completion.

    Raises:
        ValueError: a size below 1, or both limits at once.
    """
    sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "max_length": max_length}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(
            "max_new_tokens and max_length exclude each other, got max_new_tokens="
            f"{max_new_tokens} and max_length={max_length}"
        )
    limit = context_length(model)
    # Greedy decoding warns about sampling settings that a chat model's generation_config has.
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    settings = {**({} if generate.get("do_sample") else greedy), "pad_token_id": pad_id, **generate}
    device = next(model.parameters()).device
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    completions: list[list[int]] = [[] for _ in prompts]
    with _eval_mode(model), _progress(console, len(prompts)) as advance:
        for begin in range(0, len(prompts), batch_size):
            batch = longest_first[begin : begin + batch_size]
            width = len(prompts[batch[0]])
            gaps = [width - len(prompts[index]) for index in batch]
            padded = [
                [pad_id] * gap + list(prompts[index])
                for gap, index in zip(gaps, batch, strict=True)
            ]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            limits = (max_new_tokens, max_length and max_length - width, limit and limit - width)
            new_tokens = min((bound for bound in limits if bound is not None), default=None)
            output = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                **({} if new_tokens is None else {"max_new_tokens": max(new_tokens, 1)}),
                **{name: [row[index] for index in batch] for name, row in (each or {}).items()},
                **settings,
            )
            for index, row in zip(batch, output[:, width:].tolist(), strict=True):
                completions[index] = row
            advance(len(batch))
    return completions


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
        model: see :func:`generate_completions`.
        tokenizer: see :func:`generate_completions`.
        records: mappings with ``prompt`` and ``completion``.
        scorer: (generated, expected) -> whether the completion is correct. An expected completion
            with end or special tokens is compared as generation would show it.
        generate: every other argument of :func:`generate_completions`.

    Raises:
        ValueError: there is no record; or see :func:`generate_completions`.
    """
    if not records:
        raise ValueError("there must be at least one record to evaluate, got none")
    prompts = [record["prompt"] for record in records]
    completions = generate_completions(model, tokenizer, prompts, **generate)
    ends = _ends(model, tokenizer, generate)
    predictions = []
    for record, generated in zip(records, completions, strict=True):
        prompt, completion = record["prompt"], record["completion"]
        expected = tokenization.expected_text(tokenizer, completion, ends)
        correct = scorer(generated, expected)
        predictions.append(Prediction(prompt, completion, generated, correct))
    return Evaluation(tuple(predictions))


def _ends(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, generate: Mapping[str, Any]
) -> list[int]:
    """Return the tokens that end a completion with these arguments of ``generate``."""
    if generate.get("eos_token_id") is not None:
        return listed_ids(generate["eos_token_id"])
    configured = generate.get("generation_config") or getattr(model, "generation_config", None)
    return tokenization.end_ids(configured, tokenizer)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode without gradients, and restore the mode of every submodule on exit."""
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
    """Show a progress bar over ``total`` prompts; yield a function that advances it."""
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
