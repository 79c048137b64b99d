"""One run: one method, one rate, one seed; and all of them in the order that chooses rates."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import get_linear_schedule_with_warmup

from benchmarks.learning.methods import METHODS, seeded, trained_parameters
from benchmarks.learning.tasks import TASKS, Learning, collate
from benchmarks.machine import default_device, describe, installed

FORMAT = 1

#: How every method is trained.
TRAINING = {
    "optimizer": "AdamW",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "schedule": "linear",
    "warmup": 0.1,
}

#: The seed with which rates are chosen.
FIRST_SEED = 0


@dataclass(frozen=True)
class Plan:
    """What a run is; two runs of one plan are the same.

    Attributes:
        task, method: names.
        rate: learning rate at its highest.
        seed: of the first values and of the order of the data.
        steps, batch_size, points: of the task, unless shortened.
        records: at most so many of each part are scored; None for all.
        data: hash of the records.
        training: how every method is trained.
        setup: the method's own settings.
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

    @property
    def file(self) -> str:
        """Name of its result."""
        return f"{self.task}/{self.method}-{self.rate:g}-seed{self.seed}.json"


def plan(
    task: Learning, method: str, rate: float, seed: int, steps: int | None, records: int | None
) -> Plan:
    """A plan; with ``steps`` a shortened one."""
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


def stored(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as JSON has it, without the number of the form in which a configuration was written:
    that changes nothing of what is computed."""
    setup = {name: value for name, value in plan["setup"].items() if name != "format_version"}
    found: dict[str, Any] = json.loads(json.dumps({**plan, "setup": setup}))
    return found


def run_once(wanted: Plan, folder: Path) -> dict[str, Any]:
    """The result of a plan: read, where it lies in the folder already, else made and written."""
    path = folder / wanted.file
    own = stored(asdict(wanted))
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if stored(found["plan"]) == own:
            return found
    result = {"format": FORMAT, "plan": own, **_train(wanted)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
    return result


def best_rate(results: Mapping[float, Mapping[str, Any]]) -> float:
    """The rate with the best score on the development part at the end; of equals the one whose
    mean over all points is best there, which is who learnt sooner; of equals the smallest.

    Neither the held-out part nor the loss of training has a say.
    """

    def merit(rate: float) -> tuple[float, float, float]:
        scores = results[rate]["development"]
        return scores[-1], sum(scores) / len(scores), -rate

    return max(results, key=merit)


def run_method(
    task: Learning,
    method: str,
    seeds: Sequence[int],
    folder: Path,
    *,
    rates: Sequence[float] | None = None,
    steps: int | None = None,
    records: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Every rate with the first seed, then every further seed with the best of them."""
    tried: dict[float, dict[str, Any]] = {}
    for rate in rates or METHODS[method].rates:
        tried[rate] = run_once(plan(task, method, rate, FIRST_SEED, steps, records), folder)
        yield tried[rate]
    chosen = best_rate(tried)
    for seed in seeds:
        if seed != FIRST_SEED:
            yield run_once(plan(task, method, chosen, seed, steps, records), folder)


def _train(wanted: Plan) -> dict[str, Any]:
    task = TASKS[wanted.task]
    training, development, heldout = task.split()
    development, heldout = development[: wanted.records], heldout[: wanted.records]
    base, tokenizer = task.load(wanted.seed)
    total = base.num_parameters()
    before = task.score(base, tokenizer, heldout)
    seeded(wanted.seed)
    model = METHODS[wanted.method].prepare(base, wanted.setup).train()
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad],
        lr=wanted.rate,
        weight_decay=wanted.training["weight_decay"],
    )
    warmup = int(wanted.training["warmup"] * wanted.steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, wanted.steps)
    scores: dict[str, list[float]] = {"development": [], "heldout": [], "loss": []}
    seconds, losses = 0.0, []
    for number, batch in enumerate(_batches(wanted, training, tokenizer), start=1):
        began = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.training["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        seconds += time.perf_counter() - began
        if number in wanted.points:
            model.eval()
            scores["development"].append(task.score(model, tokenizer, development))
            scores["heldout"].append(task.score(model, tokenizer, heldout))
            scores["loss"].append(sum(losses) / len(losses))
            losses = []
            model.train()
    return {
        "before": before,
        **scores,
        "trained": trained_parameters(model),
        "base": total,
        "seconds": seconds,
        "counts": [len(training), len(development), len(heldout)],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**describe(default_device()), "peft": installed("peft")},
    }


def _batches(wanted: Plan, training: Sequence[Any], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Shuffled anew each epoch, by the seed alone: the same for every method."""
    generator = torch.Generator().manual_seed(wanted.seed)
    order: list[int] = []
    for _ in range(wanted.steps):
        if len(order) < wanted.batch_size:
            order = torch.randperm(len(training), generator=generator).tolist()
        chosen, order = order[: wanted.batch_size], order[wanted.batch_size :]
        yield collate(tokenizer, [training[at] for at in chosen])
