"""Scoring rules on hand-made answers, including the peculiarities of each rule."""

from __future__ import annotations

import pytest

from reft.paper.tasks import TASKS, ClassificationTask, get_task
from reft.paper.tasks.answers import last_number

BEGIN = "the correct answer is "

#: (set, right answer, response) -> (right by pyreft's rule, right by LLM-Adapters' rule)
COMMONSENSE = [
    ("boolq", "true", f"{BEGIN}true", True, True),
    ("boolq", "true", f"{BEGIN}false", False, False),
    ("boolq", "true", f"{BEGIN}  true \n", True, True),
    ("boolq", "true", f"{BEGIN}true.", False, True),  # a full stop is part of an exact match
    ("boolq", "true", "true", False, True),  # no trigger
    ("boolq", "true", f"{BEGIN}True", False, False),  # both look at case
    ("boolq", "true", f"{BEGIN}false, no, true", False, False),  # the first choice counts
    ("boolq", "false", f"it is true that {BEGIN}false", True, False),
    ("boolq", "true", f"{BEGIN}true {BEGIN}true", False, True),
    ("boolq", "true", "", False, False),
    ("boolq", "true", BEGIN, False, False),
    ("ARC-Easy", "answer5", f"{BEGIN}answer5", True, True),
    ("ARC-Easy", "answer1", f"{BEGIN}answer12", False, True),
    ("piqa", "solution2", f"{BEGIN}solution2", True, True),
    ("hellaswag", "ending4", f"{BEGIN}ending4", True, True),
    ("winogrande", "option1", f"{BEGIN}option2", False, False),
    ("social_i_qa", "answer3", f"{BEGIN}answer3", True, True),
]

#: (right answer, response) -> right
ARITHMETIC = [
    ("18.0", "The answer is 18.", True),
    ("18.0", "The answer is 18.0005", True),
    ("18.0", "The answer is 18.01", False),
    ("1234.5", "It costs $1,234.50.", True),
    ("-4", "3-4", True),  # read as 3 and −4
    ("-5.0", "It is -5 degrees", True),
    ("25", "That is 25%", True),
    ("7.0", "7 apples, 3 more than 4", False),  # the last number counts
    ("4.0", "7 apples, 3 more than 4", True),
    ("0.5", "a half, .5", False),  # without a digit in front it is 5
    ("5", "a half, .5", True),
    ("3.0", "three", False),
    ("3.0", "", False),
    ("B", "The answer is (B).", True),
    ("B", "The answer is (b).", False),
    ("B", "A shopkeeper sells B", False),  # its A comes first
    ("A", "A shopkeeper sells B", True),
    ("C", "", False),
]

#: (right answer, response) -> right
GSM8K = [
    ("He has 7.\n#### 7", "The final answer is: 7", True),
    ("It is so.\n#### 150,000", "150000", True),
    ("It is so.\n#### 150,000", "150", False),
    ("It is so.\n#### -5", "minus 5", False),
    ("It is so.\n#### -5", "-5", True),
    ("no number\n#### none", "none", False),
]


@pytest.mark.parametrize(("name", "answer", "generated", "pyreft", "adapters"), COMMONSENSE)
def test_commonsense(name, answer, generated, pyreft, adapters):
    task = get_task("commonsense")
    record = {"instruction": f"Is it {answer}? Answer format: true/false", "answer": answer}
    text = task.prompt(record) + generated
    verdicts = {rule: task.scorings[rule](text, record, name).correct for rule in task.scorings}
    assert verdicts == {"pyreft": pyreft, "llm-adapters": adapters}


def test_a_trigger_in_the_question_comes_first():
    task = get_task("commonsense")
    record = {"instruction": f"Who said that {BEGIN}true?", "answer": "true"}
    text = f"{task.prompt(record)}{BEGIN}true"
    verdict = task.scorings["pyreft"](text, record, "boolq")
    assert verdict.response.startswith("true?")
    assert not verdict.correct
    assert task.scorings["llm-adapters"](text, record, "boolq").correct


@pytest.mark.parametrize(("answer", "generated", "right"), ARITHMETIC)
@pytest.mark.parametrize("rule", ["pyreft", "llm-adapters"])
def test_arithmetic(answer, generated, right, rule):
    task = get_task("arithmetic")
    record = {"instruction": "How many, 99 or A?", "output": "", "answer": answer}
    text = task.prompt(record) + generated
    # The number and the letter of the question are before the trigger.
    assert task.scorings[rule](text, record, "mawps").correct is right


def test_an_answer_that_was_cut_off_is_wrong():
    task = get_task("arithmetic")
    record = {"instruction": "How many?", "output": "", "answer": "7"}
    assert not task.scorings["pyreft"]("Below is an instruction 7", record, "gsm8k").correct


@pytest.mark.parametrize(("answer", "generated", "right"), GSM8K)
@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-original"])
def test_gsm8k(answer, generated, right, name):
    task = get_task(name)
    record = {"question": "How many are 3 and 4?", "answer": answer}
    text = f"{task.prompt(record)}{generated}"
    assert task.scorings["pyreft"](text, record, "gsm8k").correct is right


def test_memorisation_counts_characters():
    task = get_task("memorisation")
    record = {"prompt": "GO->", "completion": "abcdef"}

    def credit(generated: str) -> float:
        return task.scorings["characters"](f"GO->{generated}", record, "memorisation").credit

    # The share of the response, as in the notebook.
    assert [credit(text) for text in ("abcdef", "abc", "abxdef", "xbc", "", "abcdefgh")] == [
        1.0,
        1.0,
        2 / 6,
        0.0,
        0.0,
        6 / 8,
    ]


def test_no_number_is_no_number():
    assert last_number("nothing") == float("inf")


def test_a_set_without_choices_is_refused():
    rule = get_task("commonsense").scorings["llm-adapters"]
    with pytest.raises(ValueError, match=r"choices of 'mawps' are unknown, .* boolq"):
        rule("x", {"instruction": "Q", "answer": "true"}, "mawps")


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.train_set == "commonsense_170k"])
def test_the_target_of_a_record_is_right(name):
    task = get_task(name)
    record = {"instruction": "Is it so?", "answer": "true"}
    text = task.prompt(record) + task.target(record)
    assert all(rule(text, record, "boolq").correct for rule in task.scorings.values())


def test_names():
    with pytest.raises(ValueError, match=r"no task 'glue/cole' \(did you mean 'glue/cola'"):
        get_task("glue/cole")
    assert all(task.name == name for name, task in TASKS.items())
    for task in TASKS.values():
        if isinstance(task, ClassificationTask):
            assert task.metric in ("accuracy", "matthews_correlation", "pearson")
        else:
            assert task.decodings
            assert task.scorings or task.judge
