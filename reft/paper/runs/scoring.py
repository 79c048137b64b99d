"""Evaluation of a run: answers are generated, stored, and scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from reft.io.atomic_write import write_whole
from reft.model.reft_model import ReftModel
from reft.paper.presets import Preset
from reft.paper.runs.data import TestSet, encode_prompts
from reft.paper.runs.result import write_json
from reft.paper.runs.training import Metrics, predicted
from reft.paper.tasks import GenerationTask, Record, Scoring
from reft.paper.tasks.answers import after_trigger
from reft.train.collate import ReftDataCollator
from reft.train.evaluate import generate_ids
from reft.train.trainer import ReftTrainer

#: Batches between two writes; an interrupted run loses at most these.
BATCHES_AT_A_TIME = 16


def answer(
    model: ReftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: GenerationTask,
    tests: TestSet,
    preset: Preset,
    path: Path,
    *,
    max_length: int,
    seed: int,
    console: Console | None = None,
) -> list[str]:
    """Generate an answer to every record of a set, resuming from an interrupted run.

    ``path`` stores the decoded texts with their prompts as JSON lines, so that another scoring rule
    needs no model. Sampling is seeded again after every write, so that a resumed run has the same
    texts as an uninterrupted one.

    Args:
        model, tokenizer: used in eval mode.
        task, tests, preset: the records and the decoding.
        path: JSONL with the texts so far.
        max_length: maximum tokens of a prompt.
        seed: seed of sampling.
        console: console for the progress; None to show nothing.

    Returns:
        The decoded texts in the order of the records.
    """
    texts = _stored_texts(path)
    at_a_time = BATCHES_AT_A_TIME * preset.eval.batch_size
    settings = task.decodings[str(preset.eval.decoding)]
    pad = ReftDataCollator(tokenizer).pad_id
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(_line(text) for text in texts))
    while len(texts) < len(tests.records):
        begin = len(texts)
        records = tests.records[begin : begin + at_a_time]
        prompts = encode_prompts(task, records, tokenizer, max_length)
        if console is not None:
            console.print(f"{tests.name}: {begin} of {len(tests.records)} answered")
        set_seed(seed + begin)
        answers = generate_ids(
            model,
            prompts,
            pad_id=pad,
            batch_size=preset.eval.batch_size,
            each=_subspaces(records),
            console=console,
            eos_token_id=tokenizer.eos_token_id,
            **settings,
        )
        new = [
            str(tokenizer.decode([*prompt, *ids], skip_special_tokens=True))
            for prompt, ids in zip(prompts, answers, strict=True)
        ]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(text) for text in new))
        texts += new
    return texts[: len(tests.records)]


def score(
    tests: TestSet, texts: Sequence[str], scoring: Scoring, path: Path | None = None
) -> dict[str, Any]:
    """Score the answers to a set.

    Args:
        tests: the records.
        texts: decoded texts, one for each record.
        scoring: the scoring rule.
        path: JSON file for the verdicts; None to write none.

    Returns:
        ``accuracy`` in [0, 1], ``correct`` of ``total``.
    """
    verdicts = [
        scoring(text, record, tests.name) for text, record in zip(texts, tests.records, strict=True)
    ]
    if path is not None:
        rows = [
            {
                "record": record,
                "response": verdict.response,
                "answer": verdict.answer,
                "correct": verdict.correct,
            }
            for record, verdict in zip(tests.records, verdicts, strict=True)
        ]
        write_json(path, rows)
    correct = sum(verdict.correct for verdict in verdicts)
    credit = sum(verdict.credit for verdict in verdicts) / len(verdicts)
    return {"accuracy": credit, "correct": correct, "total": len(verdicts)}


def write_for_judge(
    task: GenerationTask, tests: TestSet, texts: Sequence[str], generator: str, path: Path
) -> None:
    """Write answers in the format of ``alpaca_eval --model_outputs``."""
    rows = [
        {
            "instruction": record.get("instruction", task.prompt(record)),
            "output": after_trigger(text, task.trigger),
            "dataset": tests.name,
            "generator": generator,
        }
        for text, record in zip(texts, tests.records, strict=True)
    ]
    write_json(path, rows)


def classify(
    trainer: ReftTrainer,
    tests: TestSet,
    features: Sequence[Mapping[str, Any]],
    metrics: Metrics,
    path: Path,
) -> dict[str, Any]:
    """Score the classifier on a set, and write its predictions to ``path``.

    Returns:
        The metrics, and ``total``.
    """
    output = trainer.predict(features)
    values = predicted(output.predictions)
    labels = np.asarray(output.label_ids)
    rows = [
        {"prediction": prediction, "label": label}
        for prediction, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]
    write_json(path, rows)
    return {**metrics(values, labels), "total": len(tests.records)}


def _subspaces(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Return the argument ``subspaces`` of records that have this field."""
    if not any("subspaces" in record for record in records):
        return {}
    return {"subspaces": [record.get("subspaces") for record in records]}


def _line(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def _stored_texts(path: Path) -> list[str]:
    """Read the texts of a file, without a last line that was not completed."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["text"] for line in lines]
