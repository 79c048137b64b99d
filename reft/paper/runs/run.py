"""A run of a preset with a seed, from its data to ``result.json``; it can be resumed.

OUTPUT/seed-42/run.json         identity of the run
               checkpoint-…     during training
               adapter/         the trained adapter
               training.json    steps, seconds, tokens, memory, curve
               answers/         texts and verdicts of each test set
               result.json      all results; the run is finished
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from reft.adapter.parameters import AdapterParameters
from reft.model.reft_model import ReftModel, get_reft_model
from reft.paper.presets import Preset
from reft.paper.runs import scoring
from reft.paper.runs.data import RunData, count_without_label, encode_training, read_data
from reft.paper.runs.result import (
    FORMAT_VERSION,
    RESULT_FILE,
    RUN_FILE,
    differences,
    environment,
    read_json,
    settings_of,
    write_json,
)
from reft.paper.runs.training import Metrics, make_trainer, train
from reft.paper.tasks import ClassificationTask, Record, Task, metrics
from reft.train.checkpoints import last_checkpoint, remove_checkpoints
from reft.train.evaluate import context_length
from reft.train.trainer import ReftTrainer

TRAINING_FILE = "training.json"
ADAPTER_FOLDER = "adapter"
ANSWERS_FOLDER = "answers"

#: Loads the base model and its tokenizer; called once in a run, after seeding.
MakeBase = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, and whether an existing run in it may be resumed or replaced."""

    folder: Path
    resume: bool = False
    overwrite: bool = False

    def claim(self, identity: dict[str, Any]) -> None:
        """Write the identity of the run into the folder.

        Raises:
            FileExistsError: the folder holds a run, and neither ``resume`` nor ``overwrite`` is
                set.
            ValueError: it holds a run with other settings or data; the message lists differences.
        """
        path = self.folder / RUN_FILE
        if path.exists() and self.overwrite:
            shutil.rmtree(self.folder)
        elif path.exists() and not self.resume:
            raise FileExistsError(
                f"{self.folder} holds a run already; --resume continues it, --overwrite replaces it"
            )
        elif path.exists():
            changes = list(differences(settings_of(read_json(path)), settings_of(identity)))
            if changes:
                listed = "; ".join(changes[:4]) + ("; …" if len(changes) > 4 else "")
                raise ValueError(f"{self.folder} holds a run with other settings: {listed}")
        write_json(path, identity)


def run(
    preset: Preset,
    make_base: MakeBase,
    data: Path | None,
    output: Path,
    *,
    model_name: str,
    seed: int,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train and evaluate a preset with one seed.

    Args:
        preset: the preset with the changes of the user.
        make_base: loads the base model; for a classification task with its number of labels.
        data: folder of the task's data sets; None for the hub.
        output: folder of the runs; the folder of this run is ``seed-<seed>`` in it.
        model_name: name of the base model, for ``run.json``.
        seed: seed of all random numbers.
        resume: continue a run in the folder, or return its result if it is finished.
        overwrite: replace a run in the folder.
        console: console for the progress; None to show nothing.

    Returns:
        The content of ``result.json``.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: unusable data or settings, or a folder with
            another run. The model is not loaded.
    """
    folder = output / f"seed-{seed}"
    run_data = read_data(preset, data, seed)
    started = (folder / RUN_FILE).exists() and not overwrite
    identity = {
        "format_version": FORMAT_VERSION,
        "preset": preset.to_dict(),
        "model": model_name,
        "seed": seed,
        "data": run_data.sources,
    }
    RunFolder(folder, resume, overwrite).claim(identity)
    if (folder / RESULT_FILE).exists():
        return read_json(folder / RESULT_FILE)

    set_seed(seed)
    base, tokenizer = make_base()
    base_parameters = base.num_parameters()
    trained = (folder / TRAINING_FILE).exists()
    if trained:
        model = ReftModel.from_pretrained(base, folder / ADAPTER_FOLDER, is_trainable=True)
    else:
        model = get_reft_model(base, preset.reft_config(base_model_name_or_path=model_name))
    max_length = min(preset.train.max_length, context_length(base) or preset.train.max_length)
    loaded = _LoadedRun(preset, model, tokenizer, run_data, folder, seed, max_length, console)
    parameters = _count_parameters(model, base_parameters)
    loaded.print(_describe(seed, len(run_data.training), parameters, base.device))
    if started and not trained and last_checkpoint(folder) is None:
        loaded.print("the run has no checkpoint yet: it starts from the beginning")
    trainer = loaded.make_trainer()
    if trained:
        training = read_json(folder / TRAINING_FILE)["training"]
    else:
        training = train(trainer, folder).to_dict()
        model.save_pretrained(folder / ADAPTER_FOLDER)
        content = {"format_version": FORMAT_VERSION, "training": training}
        write_json(folder / TRAINING_FILE, content)
    start = time.perf_counter()
    scores = loaded.evaluate(trainer)
    result = {
        **identity,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "max_length": max_length,
        "parameters": parameters,
        "orthonormality_error": model.orthonormality_error(),
        "training": training,
        "evaluation": {"seconds": time.perf_counter() - start, "scores": scores},
        "scores": _headline(run_data.task, scores),
    }
    write_json(folder / RESULT_FILE, result)
    remove_checkpoints(folder)
    return result


@dataclass(frozen=True)
class _LoadedRun:
    """A run after its data and its model were loaded."""

    preset: Preset
    model: ReftModel
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    folder: Path
    seed: int
    max_length: int
    console: Console | None

    def print(self, line: str) -> None:
        """Print a line if there is a console."""
        if self.console is not None:
            self.console.print(line)

    def encode(self, records: Sequence[Record], label_dtype: str | None = None) -> list[Any]:
        """Encode records as features."""
        return encode_training(
            self.data.task, records, self.tokenizer, self.max_length, label_dtype
        )

    def make_trainer(self) -> ReftTrainer:
        """Encode the records and make the trainer."""
        features = self.encode(self.data.training, self.preset.train.label_dtype)
        unlabelled = count_without_label(features)
        if unlabelled:
            self.print(
                f"{unlabelled} of them have no label to learn, because their prompts have "
                f"max_length {self.max_length} tokens or more"
            )
        return make_trainer(
            self.preset,
            self.model,
            self.tokenizer,
            folder=self.folder,
            seed=self.seed,
            training=features,
            selection=self.encode(self.data.selection) or None,
            metrics=_metrics(self.data.task),
            console=self.console,
        )

    def evaluate(self, trainer: ReftTrainer) -> dict[str, dict[str, Any]]:
        """Score each test set; for a set that needs a judge, return the command instead."""
        task, answers = self.data.task, self.folder / ANSWERS_FOLDER
        if isinstance(task, ClassificationTask):
            [tests] = self.data.tests
            measure = _metrics(task)
            assert measure is not None
            features = self.encode(tests.records)
            path = answers / f"{tests.name}.json"
            return {tests.name: scoring.classify(trainer, tests, features, measure, path)}
        rule = self.preset.eval.scoring
        scores: dict[str, dict[str, Any]] = {}
        for tests in self.data.tests:
            texts = scoring.answer(
                self.model,
                self.tokenizer,
                task,
                tests,
                self.preset,
                answers / f"{tests.name}.texts.jsonl",
                max_length=self.max_length,
                seed=self.seed,
                console=self.console,
            )
            path = answers / f"{tests.name}.json"
            if rule is None:
                generator = f"{self.preset.name} seed {self.seed}"
                scoring.write_for_judge(task, tests, texts, generator, path)
                scores[tests.name] = {"judge": task.judge.format(path=path), "total": len(texts)}
            else:
                scores[tests.name] = scoring.score(tests, texts, task.scorings[rule], path)
        return scores


def _describe(seed: int, records: int, parameters: dict[str, Any], device: torch.device) -> str:
    head = f" and a head of {parameters['head']:,}" if parameters["head"] else ""
    return (
        f"seed {seed}: {records} records; {parameters['adapter']:,} parameters "
        f"({parameters['percent']:.4f} % of the base model's){head} on {device}"
    )


def _count_parameters(model: ReftModel, base: int) -> dict[str, Any]:
    """Count parameters as the paper does: in percent of the base, without the head."""
    trained, _ = model.get_nb_trainable_parameters()
    adapter = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, AdapterParameters)
        for parameter in module.parameters()
    )
    return {
        "adapter": adapter,
        "head": trained - adapter,
        "base": base,
        "percent": 100 * adapter / base,
    }


def _metrics(task: Task) -> Metrics | None:
    if not isinstance(task, ClassificationTask):
        return None
    metric = task.metric
    return lambda predictions, labels: metrics.compute(metric, predictions, labels)


def _headline(task: Task, scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the score of each test set in percent, as in the paper, and their average."""
    name = task.metric if isinstance(task, ClassificationTask) else "accuracy"
    percent = {tests: 100 * score[name] for tests, score in scores.items() if name in score}
    return {**percent, "average": sum(percent.values()) / len(percent)} if percent else {}
