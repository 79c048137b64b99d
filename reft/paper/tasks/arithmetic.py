"""Arithmetic tasks: seven test sets after training on LLM-Adapters' ``math_10k``, and GSM8K.

The paper reports four of the seven sets: AddSub, MultiArith and SingleEq leak into ``math_10k``.
"""

from __future__ import annotations

from reft.paper.tasks.answers import number_after_hashes, number_or_letter
from reft.paper.tasks.task import GenerationTask, Record
from reft.paper.tasks.templates import ALPACA, ALPACA_NO_INPUT, GSM8K_QUESTION

RESPONSE = "### Response:"

ARITHMETIC_TASK = GenerationTask(
    name="arithmetic",
    train_set="math_10k",
    eval_sets=("MultiArith", "gsm8k", "SVAMP", "mawps", "AddSub", "AQuA", "SingleEq"),
    eval_split="test",
    fields=("instruction", "output", "answer"),
    prompt=lambda record: ALPACA_NO_INPUT % record["instruction"],
    target=lambda record: record["output"],
    trigger=RESPONSE,
    decodings={
        "greedy": {"max_new_tokens": 512, "do_sample": False},
        "sampled": {
            "max_new_tokens": 512,
            "do_sample": True,
            "temperature": 0.3,
            "top_p": 0.75,
            "top_k": 40,
            "num_beams": 4,
            "early_stopping": True,
        },
    },
    # Both libraries have the same rule.
    scorings={
        "pyreft": number_or_letter(RESPONSE),
        "llm-adapters": number_or_letter(RESPONSE),
    },
    example={
        "instruction": "Tom has 3 apples and buys 4 more. How many has he?",
        "input": "",
        "output": "He has 3 + 4 = 7 apples. The answer is 7.",
        "answer": "7.0",
    },
)

_GSM8K_EXAMPLE = {
    "question": "Tom has 3 apples and buys 4 more. How many has he?",
    "answer": "He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7",
}


def _final(record: Record) -> str:
    answer: str = record["answer"]
    return answer.replace("####", "The final answer is: ")


def _gsm8k(
    name: str, prompt: str, order: tuple[str, ...], trigger: str, temperature: float
) -> GenerationTask:
    parts = {"instruction": GSM8K_QUESTION}
    return GenerationTask(
        name=name,
        train_set="gsm8k",
        eval_sets=("gsm8k",),
        eval_split="test",
        fields=("question", "answer"),
        prompt=lambda record: prompt % tuple({**parts, **record}[field] for field in order),
        target=_final,
        trigger=trigger,
        decodings={
            "greedy": {"max_new_tokens": 256, "do_sample": False},
            "sampled": {
                "max_new_tokens": 256,
                "do_sample": True,
                "temperature": temperature,
                "top_p": 0.95,
                "top_k": 40,
            },
        },
        scorings={"pyreft": number_after_hashes(trigger)},
        example=_GSM8K_EXAMPLE,
    )


#: GSM8K of pyreft's examples/loreft, whose README has the command.
GSM8K_TASK = _gsm8k(
    "gsm8k",
    f"%s\n{GSM8K_QUESTION}\n",
    ("question",),
    "First think step by step and then answer the final number.\n",
    0.1,
)

#: GSM8K of pyreft's examples/loreft/original_code, which chose the settings of the paper.
GSM8K_ORIGINAL_TASK = _gsm8k("gsm8k-original", ALPACA, ("instruction", "question"), RESPONSE, 0.8)
