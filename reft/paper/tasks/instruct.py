"""Instruction tuning on UltraFeedback and Alpaca, evaluated on AlpacaEval."""

from __future__ import annotations

from reft.paper.tasks.arithmetic import RESPONSE
from reft.paper.tasks.task import GenerationTask, Record
from reft.paper.tasks.templates import ALPACA, ALPACA_NO_INPUT


def _prompt(record: Record) -> str:
    if not record.get("input"):
        return str(ALPACA_NO_INPUT % record["instruction"])
    return ALPACA % (record["instruction"], record["input"])


def _task(name: str, train_set: str) -> GenerationTask:
    return GenerationTask(
        name=name,
        train_set=train_set,
        eval_sets=("alpaca_eval",),
        eval_split="eval",
        fields=("instruction", "output"),
        prompt=_prompt,
        target=lambda record: record["output"],
        trigger=RESPONSE,
        # max_length includes the prompt.
        decodings={
            "penalties": {
                "max_length": 2048,
                "do_sample": False,
                "no_repeat_ngram_size": 5,
                "repetition_penalty": 1.1,
            },
            "greedy": {"max_length": 2048, "do_sample": False},
        },
        # alpaca_eval scores the answers with a judge.
        scorings={},
        example={"instruction": "Name a prime number.", "input": "", "output": "Seven."},
        judge="not scored here: alpaca_eval --model_outputs {path} --annotators_config "
        "alpaca_eval_gpt4 --reference_outputs text_davinci_003/model_outputs.json",
    )


ULTRAFEEDBACK_TASK = _task("ultrafeedback", "ultrafeedback")
ALPACA_TASK = _task("alpaca", "alpaca_data_cleaned")
