"""Tokenization of records, as in the published code.

Prompt and target are tokenized as one text. The prompt is its first n tokens, where n is the number
of tokens of the prompt alone. A tokenizer that merges the last character of a prompt with the first
of a target would make n wrong; all templates end in a line break, which no tokenizer merges. Both
are truncated to ``max_length``, so that a prompt of this length leaves no label.

The published code appends a padding token to each text, for positions that a short prompt does not
have. Here these positions are −1, and the token is not needed.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from reft.paper.tasks.task import ClassificationTask, GenerationTask, Record, Task
from reft.positions import IGNORED


def encode_prompt(
    task: GenerationTask, record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[int]:
    """Encode the prompt of a record, truncated to ``max_length`` tokens."""
    return _ids(tokenizer, task.prompt(record), max_length=max_length)


def encode_example(
    task: Task, record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Encode a record for training.

    Returns:
        ``input_ids``, and ``labels`` of the same length with −100 on the prompt; for a
        classification ``input_ids`` and ``label``, a class or a number. ``subspaces`` of a record
        are copied. If ``ends`` is false, no end-of-sequence token follows the target.
    """
    if isinstance(task, ClassificationTask):
        texts = [record[key] for key in task.keys if key is not None]
        return {
            "input_ids": _ids(tokenizer, *texts, max_length=max_length),
            "label": record["label"] if task.labels else float(record["label"]),
        }
    prompt = task.prompt(record)
    prompt_length = len(_ids(tokenizer, prompt, max_length=max_length))
    end = (tokenizer.eos_token or "") if record.get("ends", True) else ""
    text = f"{prompt}{task.target(record)}{end}"
    ids = _ids(tokenizer, text, max_length=max_length)
    feature: dict[str, Any] = {
        "input_ids": ids,
        "labels": [IGNORED] * prompt_length + ids[prompt_length:],
    }
    if "subspaces" in record:
        feature["subspaces"] = record["subspaces"]
    return feature


def _ids(tokenizer: PreTrainedTokenizerBase, *texts: str, max_length: int) -> list[int]:
    return list(tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"])
