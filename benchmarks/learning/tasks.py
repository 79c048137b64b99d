"""What is learnt: the two demonstrations of the package, with a part of the training data held back
on which learning rates are chosen."""

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
class Learning:
    """One task.

    Attributes:
        name: of the task.
        title: for people.
        metric: what the score is.
        load: seed -> (a fresh base model, its tokenizer); a new classifier is drawn from the seed.
        records: "train" or "heldout" -> records.
        score: (model, tokenizer, records) -> share that is right.
        edit: where the family edits, with which rank.
        head: the module that is the head.
        attention, linear: names of the modules that LoRA adapts: the usual two, and all.
        beside: patterns of modules that are none of these, whatever their names end in.
        peft_task: PEFT's name of the task.
        batch_size, steps, points: of every run; at how many points the score is taken.
        development: every so-manieth training record is held back. Seven, since the messages go
            round their six classes in turn.
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
    beside: tuple[str, ...]
    peft_task: str
    batch_size: int
    steps: int
    points: tuple[int, ...]
    development: int

    def split(self) -> tuple[list[Record], list[Record], list[Record]]:
        """(training, development, held-out records)."""
        every = self.records("train")
        held = every[:: self.development]
        rest = [one for at, one in enumerate(every) if at % self.development]
        return rest, held, self.records("heldout")

    def data_hash(self) -> str:
        """SHA-256 of all records."""
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


TASKS: Mapping[str, Learning] = MappingProxyType(
    {
        "facts": Learning(
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
            beside=(),
            peft_task="CAUSAL_LM",
            batch_size=32,
            steps=160,
            points=(10, 20, 40, 80, 120, 160),
            development=7,
        ),
        "messages": Learning(
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
            beside=(".*classifier.*", ".*pooler.*"),
            peft_task="SEQ_CLS",
            batch_size=16,
            steps=72,
            points=(6, 12, 24, 36, 54, 72),
            development=7,
        ),
    }
)


def collate(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> dict[str, Any]:
    """One batch, the same for every method."""
    return ReftDataCollator(tokenizer)(records)
