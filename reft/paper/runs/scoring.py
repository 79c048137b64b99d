"""The evaluation of a run: answers are generated, kept, and scored from what was kept."""

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

#: Batches between two writes: what a kill loses.
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
    """Generate an answer to every record of a set, going on where a killed run stopped.

    The texts lie in ``path`` as JSON lines, whole as they were decoded, prompt included, so that
    another scoring needs no model. Sampling begins anew with the seed at every write: a run that
    was continued has the texts of one that was not.

    Args:
        model, tokenizer: the model in use; evaluated in eval mode.
        task, tests, preset: what to answer and how.
        path: JSONL with what was answered so far.
        max_length: of prompts, in tokens.
        seed: of sampling.
        console: where the progress is shown; None for silence.

    Returns:
        The whole texts, in the order of the records.
    """
    texts = _kept(path)
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
            each=_parts(records),
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
        texts: whole decoded texts, one a record.
        scoring: of the task.
        path: JSON in which every verdict is written, None for nowhere.

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
                "response": one.response,
                "answer": one.answer,
                "correct": one.correct,
            }
            for record, one in zip(tests.records, verdicts, strict=True)
        ]
        write_json(path, rows)
    correct = sum(one.correct for one in verdicts)
    credit = sum(one.credit for one in verdicts) / len(verdicts)
    return {"accuracy": credit, "correct": correct, "total": len(verdicts)}


def write_for_judge(
    task: GenerationTask, tests: TestSet, texts: Sequence[str], generator: str, path: Path
) -> None:
    """Write answers as ``alpaca_eval --model_outputs`` reads them."""
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
    """Score the classifier on a set; every prediction goes into ``path``.

    Returns:
        The metrics, and ``total``.
    """
    found = trainer.predict(features)
    values = predicted(found.predictions)
    labels = np.asarray(found.label_ids)
    rows = [
        {"prediction": prediction, "label": label}
        for prediction, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]
    write_json(path, rows)
    return {**metrics(values, labels), "total": len(tests.records)}


def _parts(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Of records that name a part of the adapter: these."""
    if not any("subspaces" in record for record in records):
        return {}
    return {"subspaces": [record.get("subspaces") for record in records]}


def _line(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def _kept(path: Path) -> list[str]:
    """The whole lines of a file that may end in half a line."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["text"] for line in lines]
