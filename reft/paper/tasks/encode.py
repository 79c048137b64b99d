"""Records as token ids, as the published code makes them.

Prompt and target are tokenised as one text, whose first tokens, as many as the prompt alone has,
are the prompt. A tokenizer that joins the last character of a prompt with the first of a target
would count one token wrong; all the templates end in a line break, which no tokenizer joins. Both
are cut at ``max_length``: a prompt that fills it leaves nothing to learn from.

The published code also gives each text a token more that nothing attends to, onto which it puts
positions that a short prompt does not have. Here these positions are −1, and no such token is
needed.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from reft.paper.tasks.task import ClassificationTask, GenerationTask, Record, Task

#: The label that no loss counts.
IGNORED = -100


def encode_prompt(
    task: GenerationTask, record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[int]:
    """The token ids of a record's prompt, cut at ``max_length``."""
    return _ids(tokenizer, task.prompt(record), max_length=max_length)


def encode_example(
    task: Task, record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """A record to train on.

    Returns:
        ``input_ids``, and ``labels`` of the same length with −100 on the prompt; for a
        classification ``input_ids`` and ``label``, a class or a number. A record's ``subspaces``
        come along; with ``ends`` false no end-of-sequence token follows its target.
    """
    if isinstance(task, ClassificationTask):
        texts = [record[key] for key in task.keys if key is not None]
        return {
            "input_ids": _ids(tokenizer, *texts, max_length=max_length),
            "label": record["label"] if task.labels else float(record["label"]),
        }
    prompt = task.prompt(record)
    begun = len(_ids(tokenizer, prompt, max_length=max_length))
    end = (tokenizer.eos_token or "") if record.get("ends", True) else ""
    text = f"{prompt}{task.target(record)}{end}"
    ids = _ids(tokenizer, text, max_length=max_length)
    feature: dict[str, Any] = {"input_ids": ids, "labels": [IGNORED] * begun + ids[begun:]}
    if "subspaces" in record:
        feature["subspaces"] = record["subspaces"]
    return feature


def _ids(tokenizer: PreTrainedTokenizerBase, *texts: str, max_length: int) -> list[int]:
    return list(tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"])
