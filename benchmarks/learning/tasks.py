"""Tasks: the two demonstrations of the package, with a development part to choose rates on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft import ReftConfig, ReftDataCollator
from reft.demo import causal, encoder

Record = dict[str, Any]


@dataclass(frozen=True)
class LearningTask:
    """A task to finetune on.

    Attributes:
        name: the name of the task.
        title: the description in tables.
        metric: the name of the score.
        load: maps a seed to (a fresh base model, its tokenizer); the seed initialises a new
            classifier.
        records: maps "train" or "heldout" to records.
        score: maps (model, tokenizer, records) to the fraction of correct answers.
        edit: positions, layers and rank of the family's edits.
        head: the name of the head module.
        attention, linear: names of the modules that LoRA adapts: queries and values, or all linear.
        exclude: patterns of modules that LoRA leaves out although their names match.
        peft_task: the task type of PEFT.
        batch_size, steps, points: those of every run; scores are taken at the steps ``points``.
        development: every n-th training record belongs to the development part. n is 7, since the
            records of "messages" cycle through six classes.
    """

    name: str
    title: str
    metric: str
    load: Callable[[int], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    records: Callable[[str], list[Record]]
    score: Callable[[nn.Module, PreTrainedTokenizerBase, Sequence[Record]], float]
    edit: ReftConfig
    head: str
    attention: tuple[str, ...]
    linear: tuple[str, ...]
    exclude: tuple[str, ...]
    peft_task: str
    batch_size: int
    steps: int
    points: tuple[int, ...]
    development: int

    def split(self) -> tuple[list[Record], list[Record], list[Record]]:
        """Training, development and held-out records."""
        records = self.records("train")
        development = records[:: self.development]
        training = [record for index, record in enumerate(records) if index % self.development]
        return training, development, self.records("heldout")

    def data_hash(self) -> str:
        """The SHA-256 of all records."""
        parts = [json.dumps(part, sort_keys=True) for part in self.split()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _facts_score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> float:
    answers = causal.answers_of(model, tokenizer, records)  # type: ignore[arg-type]
    pairs = zip(answers, records, strict=True)
    return sum(bool(a.split() == r["completion"].split()) for a, r in pairs) / len(records)


def _messages_score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> float:
    answers = encoder.answers_of(model, tokenizer, records)
    pairs = zip(answers, records, strict=True)
    return sum(a == encoder.LABELS[r["label"]] for a, r in pairs) / len(records)


TASKS: Mapping[str, LearningTask] = MappingProxyType(
    {
        "facts": LearningTask(
            name="facts",
            title="A language model of 2.2 million parameters learns to answer in another form",
            metric="exact match of greedy answers to 596 held-out questions",
            load=lambda seed: causal.load_base(),
            records=causal.load_records,
            score=_facts_score,
            edit=causal.CONFIG,
            head="lm_head",
            attention=("q_proj", "v_proj"),
            linear=(
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ),
            exclude=(),
            peft_task="CAUSAL_LM",
            batch_size=32,
            steps=160,
            points=(10, 20, 40, 80, 120, 160),
            development=7,
        ),
        "messages": LearningTask(
            name="messages",
            title="MiniLM, a pretrained sentence encoder, learns to sort messages into six classes",
            metric="accuracy on 72 held-out messages",
            load=encoder.load_base,
            records=encoder.load_records,
            score=_messages_score,
            edit=encoder.CONFIG,
            head="classifier",
            attention=("query", "value"),
            linear=("query", "key", "value", "dense"),
            exclude=(".*classifier.*", ".*pooler.*"),
            peft_task="SEQ_CLS",
            batch_size=16,
            steps=72,
            points=(6, 12, 24, 36, 54, 72),
            development=7,
        ),
    }
)


def collate(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> dict[str, Any]:
    """Build a batch; it does not depend on the method."""
    return ReftDataCollator(tokenizer)(records)
