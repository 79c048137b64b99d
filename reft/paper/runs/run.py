"""One run of a preset, from its data to ``result.json``; killed, it can be continued.

OUTPUT/seed-42/run.json         what the run is
               checkpoint-…     while it trains
               adapter/         as it is published
               training.json    steps, seconds, tokens, memory, curve
               answers/         of each test set: texts, verdicts
               result.json      all of it; the run is done
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from reft.adapter.parameters import AdapterParameters
from reft.model.reft_model import ReftModel, get_reft_model
from reft.paper.presets import Preset
from reft.paper.runs import scoring
from reft.paper.runs.data import RunData, encode_training, read_data, without_label
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
from reft.paper.tasks import ClassificationTask, Task, get_task, metrics
from reft.train.checkpoints import last_checkpoint, remove_checkpoints
from reft.train.evaluate import context_length
from reft.train.trainer import ReftTrainer

TRAINING_FILE = "training.json"
ADAPTER_FOLDER = "adapter"
ANSWERS_FOLDER = "answers"

#: Loads the base model and its tokenizer anew; called once a run, after the seed was set.
MakeBase = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Place:
    """Where a run lies, and whether it may go on from what is there."""

    folder: Path
    resume: bool = False
    overwrite: bool = False

    def enter(self, identity: dict[str, Any]) -> None:
        """Make the folder this run's own.

        Raises:
            FileExistsError: it holds a run, and neither ``resume`` nor ``overwrite`` is set.
            ValueError: it holds a run of other settings or data, with the first differences.
        """
        path = self.folder / RUN_FILE
        if path.exists() and self.overwrite:
            shutil.rmtree(self.folder)
        elif path.exists() and not self.resume:
            raise FileExistsError(
                f"{self.folder} holds a run already; --resume continues it, --overwrite begins anew"
            )
        elif path.exists():
            found = list(differences(settings_of(read_json(path)), settings_of(identity)))
            if found:
                shown = "; ".join(found[:4]) + ("; …" if len(found) > 4 else "")
                raise ValueError(f"{self.folder} holds a run of other settings: {shown}")
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
        preset: with whatever the user changed.
        make_base: loads the base model; for a task of classes with as many labels as it has.
        data: folder of the task's sets; None for the hub.
        output: folder of the runs; this one's is ``seed-<seed>`` in it.
        model_name: of the base model, for the record.
        seed: of everything random.
        resume: continue what lies there, or return its result if it is done.
        overwrite: replace what lies there.
        console: where progress is shown; None for silence.

    Returns:
        What ``result.json`` holds.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: data or settings that cannot be used, or a
            folder with another run, before the model is loaded.
    """
    task, folder = get_task(preset.task), output / f"seed-{seed}"
    found = read_data(preset, data, seed)
    begun = (folder / RUN_FILE).exists() and not overwrite
    identity = {
        "format_version": FORMAT_VERSION,
        "preset": preset.to_dict(),
        "model": model_name,
        "seed": seed,
        "data": found.sources,
    }
    Place(folder, resume, overwrite).enter(identity)
    if (folder / RESULT_FILE).exists():
        return read_json(folder / RESULT_FILE)

    say = console.print if console is not None else _silence
    set_seed(seed)
    base, tokenizer = make_base()
    base_parameters = base.num_parameters()
    max_length = min(preset.train.max_length, context_length(base) or preset.train.max_length)
    config = preset.reft_config(base_model_name_or_path=model_name)
    trained = (folder / TRAINING_FILE).exists()
    wrapped = (
        ReftModel.from_pretrained(base, folder / ADAPTER_FOLDER, is_trainable=True)
        if trained
        else get_reft_model(base, config)
    )
    parameters = _parameters(wrapped, base_parameters)
    label_dtype = preset.train.label_dtype
    features = encode_training(task, found.training, tokenizer, max_length, label_dtype)
    say(
        f"seed {seed}: {len(features)} records; {parameters['adapter']:,} parameters "
        f"({parameters['percent']:.4f} % of the base model's)"
        + (f" and a head of {parameters['head']:,}" if parameters["head"] else "")
        + f" on {base.device}"
    )
    if begun and not trained and last_checkpoint(folder) is None:
        say("the run was ended before its first checkpoint: it begins anew")
    silent = without_label(features)
    if silent:
        say(f"{silent} of them are prompts of max_length {max_length} or more: nothing to learn")
    trainer = make_trainer(
        preset,
        wrapped,
        tokenizer,
        folder=folder,
        seed=seed,
        training=features,
        selection=encode_training(task, found.selection, tokenizer, max_length) or None,
        metrics=_metrics(task),
        console=console,
    )
    if trained:
        done = read_json(folder / TRAINING_FILE)["training"]
    else:
        done = train(trainer, folder).to_dict()
        wrapped.save_pretrained(folder / ADAPTER_FOLDER)
        write_json(folder / TRAINING_FILE, {"format_version": FORMAT_VERSION, "training": done})
    began = time.perf_counter()
    scores = _evaluate(
        preset, trainer, wrapped, tokenizer, found, folder, seed, max_length, console
    )
    result = {
        **identity,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "max_length": max_length,
        "parameters": parameters,
        "orthonormality_error": wrapped.orthonormality_error(),
        "training": done,
        "evaluation": {"seconds": time.perf_counter() - began, "scores": scores},
        "scores": _headline(task, scores),
    }
    write_json(folder / RESULT_FILE, result)
    remove_checkpoints(folder)
    return result


def _silence(text: str) -> None:
    """Where no console is."""


def _parameters(model: ReftModel, base: int) -> dict[str, Any]:
    """Counts as the paper gives them: the adapter's share of the base, the head apart."""
    trained, _ = model.get_nb_trainable_parameters()
    adapter = sum(
        one.numel()
        for bank in model.modules()
        if isinstance(bank, AdapterParameters)
        for one in bank.parameters()
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


def _evaluate(
    preset: Preset,
    trainer: ReftTrainer,
    model: ReftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    folder: Path,
    seed: int,
    max_length: int,
    console: Console | None,
) -> dict[str, dict[str, Any]]:
    """Scores of each test set; of one that only a judge can score, how to have it judged."""
    task, answers = data.task, folder / ANSWERS_FOLDER
    if isinstance(task, ClassificationTask):
        [tests] = data.tests
        measure = _metrics(task)
        assert measure is not None
        features = encode_training(task, tests.records, tokenizer, max_length)
        path = answers / f"{tests.name}.json"
        return {tests.name: scoring.classify(trainer, tests, features, measure, path)}
    scores: dict[str, dict[str, Any]] = {}
    for tests in data.tests:
        texts = scoring.answer(
            model,
            tokenizer,
            task,
            tests,
            preset,
            answers / f"{tests.name}.texts.jsonl",
            max_length=max_length,
            seed=seed,
            console=console,
        )
        path = answers / f"{tests.name}.json"
        if preset.eval.scoring is None:
            scoring.write_for_judge(task, tests, texts, f"{preset.name} seed {seed}", path)
            scores[tests.name] = {"judge": task.judge.format(path=path), "total": len(texts)}
        else:
            scores[tests.name] = scoring.score(
                tests, texts, task.scorings[preset.eval.scoring], path
            )
    return scores


def _headline(task: Task, scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """One number a test set, times 100 as the paper prints it, and their average."""
    name = task.metric if isinstance(task, ClassificationTask) else "accuracy"
    found = {which: 100 * one[name] for which, one in scores.items() if name in one}
    return {**found, "average": sum(found.values()) / len(found)} if found else {}
