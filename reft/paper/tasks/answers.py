"""What counts as an answer, and which answers are right.

Two sets of rules. "pyreft" is that of pyreft's ``compute_metrics.py``, with which the paper's ReFT
rows were made. "llm-adapters" is that of LLM-Adapters' ``commonsense_evaluate.py`` and
``evaluate.py``, with which the rows of the other methods were made. Where the two read a text
differently, both are kept as they are, oddities included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from reft.paper.tasks.task import Record, Scoring, Verdict

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"[ABCDE]")

#: Two numbers this close are the same.
_CLOSE = 0.001

#: test set -> what LLM-Adapters looks for in an answer.
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
    """What follows the first trigger, without white space in front; "" where there is none: the
    prompt was cut, or generation never came to it. All of the text for an empty trigger."""
    if not trigger:
        return text
    _, found, rest = text.partition(trigger)
    return rest.lstrip() if found else ""


def last_number(text: str) -> float:
    """The last number in a text without its commas, infinity if there is none. "3-4" ends in −4."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else math.inf


def first_letter(text: str) -> str:
    """The first capital A to E, wherever it stands: the A of "A shopkeeper" too."""
    found = _LETTER.search(text)
    return found[0] if found else ""


def exact(trigger: str) -> Scoring:
    """The whole response is the record's ``answer``."""

    def rule(text: str, record: Record, name: str) -> Verdict:
        response = after_trigger(text, trigger)
        return Verdict(
            response, response.strip(), float(response.strip() == record["answer"].strip())
        )

    return rule


def choice(prompt: Callable[[Record], str]) -> Scoring:
    """The first choice of the set that is named after the prompt is the record's ``answer``. Where
    the decoded text does not begin with the prompt, because that was cut, all of it is looked at.
    """

    def rule(text: str, record: Record, name: str) -> Verdict:
        response = text.removeprefix(prompt(record)).lstrip()
        pattern = _CHOICES.get(name)
        if pattern is None:
            raise ValueError(f"no choices are known of {name!r}, only of {', '.join(_CHOICES)}")
        found = pattern.search(response)
        answer = found[0] if found else ""
        return Verdict(response, answer, float(answer == record["answer"]))

    return rule


def number_or_letter(trigger: str) -> Scoring:
    """The last number of the response is the record's ``answer``; where that is no number, as in
    AQuA, the first letter is."""

    def rule(text: str, record: Record, name: str) -> Verdict:
        response = after_trigger(text, trigger)
        wanted = str(record["answer"]).strip()
        if _is_float(wanted):
            number = last_number(response)
            return Verdict(response, _shown(number), float(abs(float(wanted) - number) <= _CLOSE))
        letter = first_letter(response)
        return Verdict(response, letter, float(letter == wanted))

    return rule


def number_after_hashes(trigger: str) -> Scoring:
    """The last number of the response is that behind the "####" of GSM8K's ``answer``."""

    def rule(text: str, record: Record, name: str) -> Verdict:
        response = after_trigger(text, trigger)
        number = last_number(response)
        wanted = last_number(record["answer"].split("####")[-1].strip())
        # Of two answers without a number the difference is nan: wrong.
        return Verdict(response, _shown(number), float(abs(wanted - number) <= _CLOSE))

    return rule


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(number: float) -> str:
    return "" if math.isinf(number) else repr(number)
