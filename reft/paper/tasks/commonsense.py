"""Commonsense task: eight test sets after training on LLM-Adapters' ``commonsense_170k``."""

from __future__ import annotations

from reft.paper.tasks.answers import choice, exact
from reft.paper.tasks.task import GenerationTask, Record
from reft.paper.tasks.templates import COMMONSENSE

TRIGGER = "the correct answer is "


def _prompt(record: Record) -> str:
    return str(COMMONSENSE % record["instruction"])


COMMONSENSE_TASK = GenerationTask(
    name="commonsense",
    train_set="commonsense_170k",
    eval_sets=(
        "boolq",
        "piqa",
        "social_i_qa",
        "hellaswag",
        "winogrande",
        "ARC-Easy",
        "ARC-Challenge",
        "openbookqa",
    ),
    eval_split="test",
    fields=("instruction", "answer"),
    prompt=_prompt,
    target=lambda record: TRIGGER + record["answer"],
    trigger=TRIGGER,
    decodings={
        "greedy": {"max_new_tokens": 32, "do_sample": False},
        "sampled": {
            "max_new_tokens": 32,
            "do_sample": True,
            "temperature": 0.1,
            "top_p": 0.75,
            "top_k": 40,
            "num_beams": 4,
            "early_stopping": True,
        },
    },
    scorings={"pyreft": exact(TRIGGER), "llm-adapters": choice(_prompt)},
    example={
        "instruction": "Please answer the following question with true or false, question: is the "
        "sky green?\n\nAnswer format: true/false",
        "input": "",
        "output": "the correct answer is false",
        "answer": "false",
    },
)
