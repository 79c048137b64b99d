"""Training runs: one method at one learning rate with one seed, and the choice of the rate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import get_linear_schedule_with_warmup

from benchmarks.learning.methods import METHODS, trainable_parameters
from benchmarks.learning.results import (
    FIRST_SEED,
    FORMAT,
    Result,
    best_rate,
    read_results,
    results_file,
    store_result,
)
from benchmarks.learning.tasks import TASKS, LearningTask, collate
from benchmarks.machine import default_device, describe, installed

#: The training settings of every method.
TRAINING = {
    "optimizer": "AdamW",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "schedule": "linear",
    "warmup": 0.1,
}


@dataclass(frozen=True)
class Plan:
    """The configuration of a run; two runs with equal plans give equal results.

    Attributes:
        task, method: their names.
        rate: the peak learning rate.
        seed: seeds the initialisation and the order of the data.
        steps, batch_size, points: those of the task, unless the run is shortened.
        records: the largest number of records to score per part; None for all.
        data: the hash of the records.
        training: the training settings of every method.
        setup: the settings of the method.
    """

    task: str
    method: str
    rate: float
    seed: int
    steps: int
    batch_size: int
    points: tuple[int, ...]
    records: int | None
    data: str
    training: dict[str, Any]
    setup: dict[str, Any]


def make_plan(
    task: LearningTask, method: str, rate: float, seed: int, steps: int | None, records: int | None
) -> Plan:
    """Build the plan of a run; ``steps`` shortens it."""
    points = task.points if steps is None else (max(1, steps // 2), steps)
    return Plan(
        task=task.name,
        method=method,
        rate=rate,
        seed=seed,
        steps=steps or task.steps,
        batch_size=task.batch_size,
        points=points,
        records=records,
        data=task.data_hash(),
        training=dict(TRAINING),
        setup=METHODS[method].setup(task),
    )


def plan_as_json(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as JSON has it, without the format version of a configuration.

    The format version does not change what a run computes, so plans are compared without it.
    """
    setup = {name: value for name, value in plan["setup"].items() if name != "format_version"}
    plain: dict[str, Any] = json.loads(json.dumps({**plan, "setup": setup}))
    return plain


def run_once(plan: Plan, folder: Path) -> Result:
    """Return the stored result of a plan, or train and store it if there is none."""
    file = results_file(folder, plan.task)
    plan_json = plan_as_json(asdict(plan))
    for stored in read_results(file):
        if plan_as_json(stored["plan"]) == plan_json:
            return stored
    result = {"format": FORMAT, "plan": plan_json, **_train(plan)}
    store_result(file, result)
    return result


def run_method(
    task: LearningTask,
    method: str,
    seeds: Sequence[int],
    folder: Path,
    *,
    rates: Sequence[float] | None = None,
    steps: int | None = None,
    records: int | None = None,
) -> Iterator[Result]:
    """Run every learning rate with the first seed, then the best rate with the other seeds."""
    tried: dict[float, Result] = {}
    for rate in rates or METHODS[method].rates:
        tried[rate] = run_once(make_plan(task, method, rate, FIRST_SEED, steps, records), folder)
        yield tried[rate]
    best = best_rate(tried)
    for seed in seeds:
        if seed != FIRST_SEED:
            yield run_once(make_plan(task, method, best, seed, steps, records), folder)


def _train(plan: Plan) -> Result:
    task = TASKS[plan.task]
    training, development, heldout = task.split()
    development, heldout = development[: plan.records], heldout[: plan.records]
    base, tokenizer = task.load(plan.seed)
    total = base.num_parameters()
    before = task.score(base, tokenizer, heldout)
    torch.manual_seed(plan.seed)
    model = METHODS[plan.method].prepare(base, plan.setup).train()
    step = _optimizer_step(plan, model)
    scores: dict[str, list[float]] = {"development": [], "heldout": [], "loss": []}
    seconds, losses = 0.0, []
    for number, batch in enumerate(_batches(plan, training, tokenizer), start=1):
        began = time.perf_counter()
        losses.append(step(batch))
        seconds += time.perf_counter() - began
        if number in plan.points:
            model.eval()
            scores["development"].append(task.score(model, tokenizer, development))
            scores["heldout"].append(task.score(model, tokenizer, heldout))
            scores["loss"].append(sum(losses) / len(losses))
            losses = []
            model.train()
    return {
        "before": before,
        **scores,
        "trained": trainable_parameters(model),
        "base": total,
        "seconds": seconds,
        "counts": [len(training), len(development), len(heldout)],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**describe(default_device()), "peft": installed("peft")},
    }


def _optimizer_step(plan: Plan, model: Any) -> Callable[[Mapping[str, Any]], float]:
    """A function that trains on one batch and returns its loss."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=plan.rate,
        weight_decay=plan.training["weight_decay"],
    )
    warmup = int(plan.training["warmup"] * plan.steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, plan.steps)

    def step(batch: Mapping[str, Any]) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.training["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _batches(plan: Plan, training: Sequence[Any], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Batches in an order that depends on the seed alone, reshuffled every epoch."""
    generator = torch.Generator().manual_seed(plan.seed)
    order: list[int] = []
    for _ in range(plan.steps):
        if len(order) < plan.batch_size:
            order = torch.randperm(len(training), generator=generator).tolist()
        batch, order = order[: plan.batch_size], order[plan.batch_size :]
        yield collate(tokenizer, [training[index] for index in batch])
