"""Which kernel builds each stage of a session on a GPU asks for, asked of a driver that launches
nothing.

A :class:`Request` is something that a stage does, small enough for one process: a launch that a
test made, a case of the operator, a candidate of the sweep, a step of a model. :func:`build` does
it with the library's own code under ``stub_driver`` and returns the builds that were not in
Triton's cache. Models have as many parameters as they need for their edits: blocks return what they
get, all weights are one number.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import sweep
from benchmarks.cases import DTYPES, ModelCase, OpCase
from benchmarks.peers.ours import wrap
from benchmarks.suites import generate, memory, models, op, serve
from benchmarks.suites.load import hollow
from reft_kernels import RowPlan, lowrank_edit_, tuning
from reft_kernels.launch_recorder import replay
from reft_kernels.stub_driver import launching_nothing

#: Layers of a model that stands for one of more: pointers to the parameters of four layers have
#: every alignment that those of more have.
LAYERS = 4
_TARGET = "cuda:90"
#: How the failure of a build begins that compiled, and that Hopper may compute wrong.
HAZARD = "wgmma with an operand in registers"


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that a stage does.

    Attributes:
        stage: its name.
        kind: "launch", "op", "candidate", "step" or "serve".
        subject: a line of ``launch_recorder``, a case, or (case, kernel, settings).
        label: what to call it.
    """

    stage: str
    kind: str
    subject: Any
    label: str


@dataclass(frozen=True, slots=True)
class Built:
    """What a request needed: CPU seconds of each build, and why it failed, if it did."""

    request: Request
    seconds: tuple[float, ...]
    failed: str | None = None


def of_launches(lines: Sequence[str]) -> Iterator[Request]:
    """The launches that ``launch_recorder`` wrote, each once, without float64, which PyTorch
    computes on a GPU."""
    seen = set()
    for line in lines:
        written = json.loads(line)
        test = written.pop("test")
        key = json.dumps(written)
        double = "float64" in key or written.get("constants", {}).get("ACC") == "fp64"
        if key not in seen and not double:
            seen.add(key)
            yield Request("parity", "launch", line, test)


def of_suites() -> Iterator[Request]:
    """Every case that the suites measure on a GPU."""
    for case in op.cases("gpu"):
        yield Request("op", "op", case, str(case))
    for stage, cases in (
        ("step", models.step_cases("gpu")),
        ("layer", models.layer_cases("gpu")),
        ("memory", memory.cases("gpu")),
        ("generate", generate.cases("gpu")),
    ):
        yield from (Request(stage, "step", case, str(case)) for case in cases)
    yield from (Request("serve", "serve", case, str(case)) for case in serve.cases("gpu"))


def of_sweep(count: int) -> Iterator[Request]:
    """The candidates of the first ``count`` cases of the sweep."""
    for case in sweep.cases("gpu")[:count]:
        shape: dict[str, Any] = {
            "dim": case.dim, "rank": case.rank, "num_rows": case.rows,
            "dtype": DTYPES[case.dtype], "target": _TARGET,
        }  # fmt: skip
        for kernel in tuning.KERNELS:
            for settings in tuning.candidates(kernel, **shape):
                label = f"{case} {kernel} {tuning.label(settings)}"
                yield Request("sweep", "candidate", (case, kernel, settings), label)


def build(request: Request) -> Built:
    """Do what the request says, launching nothing; a build that Hopper may compute wrong fails."""
    failed = None
    with launching_nothing(_TARGET) as journal:
        try:
            _DO[request.kind](request.subject)
        except Exception as error:  # a compiler's or launcher's own
            failed = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if journal.register_wgmma:
        failed = f"{HAZARD}: {', '.join(journal.register_wgmma)}"
    return Built(request, tuple(seconds for _, seconds in journal.builds), failed)


def _launch(line: str) -> None:
    replay(json.loads(line))


def _operator(case: OpCase) -> None:
    """Forward and backward of LoReFT on as many rows as the case edits."""
    groups = (case.groups,) if case.groups > 1 else ()
    owners = torch.arange(case.rows) * case.groups // case.rows
    plan = RowPlan.from_rows(torch.arange(case.rows), owners, case.groups)
    parameters = [
        torch.zeros(shape).requires_grad_()
        for shape in (
            (*groups, case.rank, case.dim),
            (*groups, case.rank),
            (*groups, case.rank, case.dim),
        )
    ]
    hidden = torch.zeros(case.rows, case.dim, dtype=DTYPES[case.dtype]).requires_grad_()
    out = lowrank_edit_(hidden * 1, plan, *parameters, subtract=True, backend="triton")
    out.sum().backward()


def _candidate(subject: tuple[OpCase, str, tuning.KernelConfig]) -> None:
    case, kernel, settings = subject
    with tuning.trial(kernel, settings):
        _operator(case)


def _small(case: ModelCase) -> ModelCase:
    """The same edits in a model of a few blocks and next to no vocabulary."""
    edited = None if case.edited is None else min(case.edited, LAYERS)
    layers = min(case.layers, LAYERS)
    return case.but(layers=layers, edited=edited, intermediate=64, vocabulary=64)


def _passed_through() -> Any:
    """Blocks of Llama and RoBERTa that return what they get."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.roberta.modeling_roberta import RobertaLayer

    def forward(block: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return hidden_states * 1

    return mock.patch.multiple(LlamaDecoderLayer, forward=forward), mock.patch.multiple(
        RobertaLayer, forward=forward
    )


def _model_step(case: ModelCase) -> None:
    """A training step and a forward without gradients, tied and untied."""
    case = _small(case)
    llama, roberta = _passed_through()
    with llama, roberta:
        for tied in (True, False) if "+" in case.positions else (True,):
            wrapped = wrap(tied, hollow(case, torch.device("cpu")), case)
            batch = models.make_batch(case, torch.device("cpu"))
            models.step(wrapped, batch)()
            wrapped.model.eval()
            with torch.no_grad():
                wrapped.loss(batch)


def _mixed_batch(case: ModelCase) -> None:
    """A forward of every number of adapters that the suite mixes in a batch."""
    from reft import ReftModel

    case = _small(case)
    llama, roberta = _passed_through()
    with llama, roberta, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        counts = [number for number in serve.counts(case, serve.ADAPTERS) if number]
        serve.write_adapters(case, Path(folder), max(counts))
        model = ReftModel(hollow(case, torch.device("cpu")).eval())
        model.pool.capacity = max(counts)
        for number in range(max(counts)):
            model.pool.add(f"user{number}", Path(folder) / f"user{number}")
        prompts = torch.randint(3, case.vocabulary, (case.batch, case.sequence))
        for number in counts:
            model(input_ids=prompts, adapter_names=serve.names(case, number))


_DO: dict[str, Callable[[Any], None]] = {
    "launch": _launch,
    "op": _operator,
    "candidate": _candidate,
    "step": _model_step,
    "serve": _mixed_batch,
}


def seconds_by_stage(built: Sequence[Built]) -> dict[str, tuple[float, ...]]:
    """Stage -> CPU seconds of its builds."""
    found: dict[str, tuple[float, ...]] = {}
    for each in built:
        found[each.request.stage] = found.get(each.request.stage, ()) + each.seconds
    return found


def longest(built: Sequence[Built]) -> dict[str, float]:
    """Stage -> seconds of builds that wait for one another, in one test or one candidate."""
    sums: dict[tuple[str, str], float] = {}
    for each in built:
        key = (each.request.stage, each.request.label)
        sums[key] = sums.get(key, 0.0) + sum(each.seconds)
    found: dict[str, float] = {}
    for (stage, _), seconds in sums.items():
        found[stage] = max(found.get(stage, 0.0), seconds)
    return found
