"""Scoring rules: extraction of an answer from a decoded text, and comparison with the record.

There are two sets of rules. "pyreft" follows pyreft's ``compute_metrics.py``, which scored the
paper's ReFT results. "llm-adapters" follows LLM-Adapters' ``commonsense_evaluate.py`` and
``evaluate.py``, which scored the other methods. Both are reproduced exactly where they differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from reft.paper.tasks.task import Record, Scoring, Verdict

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"[ABCDE]")

#: Largest difference of equal numbers.
_CLOSE = 0.001

#: Test set -> the answers that LLM-Adapters searches for.
_CHOICES = {
    "boolq": re.compile("true|false"),
    "piqa": re.compile("solution1|solution2"),
    "social_i_qa": re.compile("answer[1-5]"),
    "hellaswag": re.compile("ending[1-4]"),
    "winogrande": re.compile("option1|option2"),
    "ARC-Easy": re.compile("answer[1-5]"),
    "ARC-Challenge": re.compile("answer[1-5]"),
    "openbookqa": re.compile("answer[1-5]"),
}


def after_trigger(text: str, trigger: str) -> str:
    """Return the text after the first trigger, without leading white space.

    It is "" if the trigger is missing, because the prompt was truncated or generation ended early,
    and the whole text for an empty trigger.
    """
    if not trigger:
        return text
    _, separator, rest = text.partition(trigger)
    return rest.lstrip() if separator else ""


def last_number(text: str) -> float:
    """Return the last number in a text, ignoring commas; infinity if none. "3-4" ends in −4."""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return float(numbers[-1]) if numbers else math.inf


def first_letter(text: str) -> str:
    """Return the first capital A to E in a text, even in "A shopkeeper"; "" if none."""
    match = _LETTER.search(text)
    return match[0] if match else ""


def exact(trigger: str) -> Scoring:
    """Require the whole response to equal the record's ``answer``."""

    def rule(text: str, record: Record, name: str) -> Verdict:
        response = after_trigger(text, trigger)
        return Verdict(
            response, response.strip(), float(response.strip() == record["answer"].strip())
        )

    return rule


def choice(prompt: Callable[[Record], str]) -> Scoring:
    """Require the first choice after the prompt to equal the record's ``answer``.

    If the prompt was truncated and the text does not start with it, all of it is searched.
    """

    def rule(text: str, record: Record, name: str) -> Verdict:
        response = text.removeprefix(prompt(record)).lstrip()
        pattern = _CHOICES.get(name)
        if pattern is None:
            raise ValueError(
                f"the choices of {name!r} are unknown, known are those of {', '.join(_CHOICES)}"
            )
        match = pattern.search(response)
        answer = match[0] if match else ""
        return Verdict(response, answer, float(answer == record["answer"]))

    return rule


def number_or_letter(trigger: str) -> Scoring:
    """Require the last number of the response to equal the record's ``answer``.

    If the answer is not a number, as in AQuA, the first letter must equal it.
    """

    def rule(text: str, record: Record, name: str) -> Verdict:
        response = after_trigger(text, trigger)
        expected = str(record["answer"]).strip()
        if _is_float(expected):
            number = last_number(response)
            return Verdict(response, _shown(number), float(abs(float(expected) - number) <= _CLOSE))
        letter = first_letter(response)
        return Verdict(response, letter, float(letter == expected))

    return rule


def number_after_hashes(trigger: str) -> Scoring:
    """Require the last number of the response to equal the number after "####" in ``answer``."""

    def rule(text: str, record: Record, name: str) -> Verdict:
        response = after_trigger(text, trigger)
        number = last_number(response)
        expected = last_number(record["answer"].split("####")[-1].strip())
        # If neither has a number, the difference is NaN, which is not a match.
        return Verdict(response, _shown(number), float(abs(expected - number) <= _CLOSE))

    return rule


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(number: float) -> str:
    return "" if math.isinf(number) else repr(number)
