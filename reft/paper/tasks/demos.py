"""Small demonstrations: memorisation of a text, two styles of answers, composition of two skills.

All but the last include their data.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reft.paper.tasks.arithmetic import RESPONSE
from reft.paper.tasks.task import GenerationTask, Record, Verdict
from reft.paper.tasks.templates import ALPACA_NO_INPUT

_TEXTS = Path(__file__).parent / "texts" / "demos.json"

#: Names of the two subspaces of the composition.
GERMAN, INSTRUCT = "hellaswag", "instruct"

_SAMPLED = {"max_new_tokens": 512, "do_sample": True}
_LOOK = "not scored: read what it answers"


@functools.cache
def _texts() -> dict[str, Any]:
    texts: dict[str, Any] = json.loads(_TEXTS.read_text(encoding="utf-8"))
    return texts


def _records(demo: str, part: str) -> list[Record]:
    texts = _texts()[demo]
    return [
        {"prompt": texts["template"] % question, "completion": answer}
        for question, answer in texts[part]
    ]


def characters_kept(text: str, record: Record, name: str) -> Verdict:
    """Return the share of the response before its first wrong character (pyreft's notebook)."""
    response = text.removeprefix(record["prompt"])
    expected = record["completion"]
    pairs = zip(response, expected, strict=False)
    kept = next(
        (at for at, (a, b) in enumerate(pairs) if a != b), min(len(response), len(expected))
    )
    return Verdict(response, response[:kept], kept / len(response) if response else 0.0)


def _pairs(
    name: str,
    decodings: Mapping[str, Mapping[str, Any]],
    scorings: Mapping[str, Callable[[str, Record, str], Verdict]],
) -> GenerationTask:
    return GenerationTask(
        name=name,
        train_set=name,
        eval_sets=(name,),
        eval_split="test",
        fields=("prompt", "completion"),
        prompt=lambda record: record["prompt"],
        target=lambda record: record["completion"],
        trigger="",
        decodings=decodings,
        scorings=scorings,
        example={"prompt": "GO->", "completion": "A text to keep."},
        judge=_LOOK,
    )


MEMORISATION_TASK = _pairs(
    "memorisation",
    {"greedy": {"max_length": 2048, "do_sample": False}},
    {"characters": characters_kept},
)
GOODY2_TASK = _pairs("goody2", {"sampled": _SAMPLED}, {})
EMOJI_TASK = _pairs("emoji", {"sampled": _SAMPLED}, {})


def _german(row: Record) -> Record:
    """Convert a row of HellaSwag_de: the right German ending, without an end-of-sequence token."""
    endings = row["endings_de"]
    ending = endings[int(row["label"])] if len(endings) >= 4 else endings[-1]
    return {"instruction": row["ctx"], "output": ending, "subspaces": GERMAN, "ends": False}


def _instruction(row: Record) -> Record:
    """Convert a row of UltraFeedback without its input, which the published notebook drops."""
    return {
        "instruction": row["instruction"],
        "output": row["output"],
        "subspaces": INSTRUCT,
    }


_QUESTION = {"instruction": "How to keep a healthy lifestyle?", "output": ""}

COMPOSITION_TASK = GenerationTask(
    name="composition",
    train_set="hellaswag_de+ultrafeedback_1k",
    eval_sets=("composition",),
    eval_split="test",
    fields=("instruction", "output"),
    prompt=lambda record: ALPACA_NO_INPUT % record["instruction"],
    target=lambda record: record["output"],
    trigger=RESPONSE,
    decodings={
        "penalties": {
            "max_new_tokens": 512,
            "do_sample": False,
            "no_repeat_ngram_size": 5,
            "repetition_penalty": 1.1,
        }
    },
    scorings={},
    example={"instruction": "Name a prime number.", "output": "Seven."},
    judge=_LOOK,
    prepare={"hellaswag_de": _german, "ultrafeedback_1k": _instruction},
)

#: (set, split) -> records that are included in this package.
SETS: Mapping[tuple[str, str], Callable[[], list[Record]]] = MappingProxyType(
    {
        (demo, part): functools.partial(_records, demo, part)
        for demo in ("memorisation", "goody2", "emoji")
        for part in ("train", "test")
    }
    | {
        ("composition", "test"): lambda: [
            {**_QUESTION, "subspaces": name} for name in (GERMAN, INSTRUCT, None)
        ]
    }
)
