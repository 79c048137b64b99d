"""The kernel builds of each stage of a session, compiled with a driver that launches nothing.

A :class:`Request` is a part of a stage that fits one process: a launch of a test, a case of the
operator, a candidate of the sweep, a step of a model. :func:`build` runs it with the library's own
code under ``stub_driver`` and returns the builds that were not in Triton's cache. Models have
parameters only for their edits: blocks return their input, and each weight is an expanded scalar.
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
from benchmarks.suites.load import hollow_model
from reft_kernels import RowPlan, lowrank_edit_
from reft_kernels.devtools import tuning
from reft_kernels.devtools.launch_recorder import replay
from reft_kernels.devtools.stub_driver import launching_nothing

#: Layers of the model that stands in for a deeper one. Pointers to the parameters of four layers
#: have every alignment that more layers have.
LAYERS = 4
_TARGET = "cuda:90"
#: First words of the failure of a build that compiles but may compute wrongly on Hopper.
HAZARD = "wgmma with an operand in registers"


@dataclass(frozen=True, slots=True)
class Request:
    """A part of a stage.

    Attributes:
        stage: the name of the stage.
        kind: "launch", "op", "candidate", "step" or "serve".
        subject: a line of ``launch_recorder``, a case, or (case, kernel, settings).
        label: a readable name.
    """

    stage: str
    kind: str
    subject: Any
    label: str


@dataclass(frozen=True, slots=True)
class Built:
    """The result of a request: CPU seconds of each build, and the error, if there was one."""

    request: Request
    seconds: tuple[float, ...]
    failed: str | None = None


def launch_requests(lines: Sequence[str]) -> Iterator[Request]:
    """Requests for the launches that ``launch_recorder`` wrote, each once.

    Launches in float64 are left out: on a GPU, PyTorch computes them.
    """
    seen = set()
    for line in lines:
        launch = json.loads(line)
        test = launch.pop("test")
        key = json.dumps(launch)
        double = "float64" in key or launch.get("constants", {}).get("ACC") == "fp64"
        if key not in seen and not double:
            seen.add(key)
            yield Request("parity", "launch", line, test)


def suite_requests() -> Iterator[Request]:
    """Requests for every case that the suites measure on a GPU."""
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


def sweep_requests(count: int) -> Iterator[Request]:
    """Requests for the candidates of the first ``count`` cases of the sweep."""
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
    """Compile a request without launching; a build that Hopper may compute wrongly fails."""
    failed = None
    with launching_nothing(_TARGET) as journal:
        try:
            _BUILDERS[request.kind](request.subject)
        except Exception as error:  # of the compiler or the launcher
            failed = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if journal.register_wgmma:
        failed = f"{HAZARD}: {', '.join(journal.register_wgmma)}"
    return Built(request, tuple(seconds for _, seconds in journal.builds), failed)


def _launch(line: str) -> None:
    replay(json.loads(line))


def _operator(case: OpCase) -> None:
    """Run forward and backward of LoReFT on the edited rows of a case."""
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
    """A case with the same edits in a model of few blocks and a tiny vocabulary."""
    edited = None if case.edited is None else min(case.edited, LAYERS)
    layers = min(case.layers, LAYERS)
    return case.but(layers=layers, edited=edited, intermediate=64, vocabulary=64)


def _identity_blocks() -> Any:
    """Patches that make blocks of Llama and RoBERTa return their input."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.roberta.modeling_roberta import RobertaLayer

    def forward(block: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return hidden_states * 1

    return mock.patch.multiple(LlamaDecoderLayer, forward=forward), mock.patch.multiple(
        RobertaLayer, forward=forward
    )


def _model_step(case: ModelCase) -> None:
    """Run a training step and a forward without gradients, tied and untied."""
    case = _small(case)
    llama, roberta = _identity_blocks()
    with llama, roberta:
        for tied in (True, False) if "+" in case.positions else (True,):
            wrapped = wrap(tied, hollow_model(case, torch.device("cpu")), case)
            batch = models.make_batch(case, torch.device("cpu"))
            models.training_step(wrapped, batch)()
            wrapped.model.eval()
            with torch.no_grad():
                wrapped.loss(batch)


def _mixed_batch(case: ModelCase) -> None:
    """Run a forward with every number of adapters that the suite mixes in a batch."""
    from reft import ReftModel

    case = _small(case)
    llama, roberta = _identity_blocks()
    with llama, roberta, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        counts = [number for number in serve.adapter_counts(case) if number]
        serve.write_adapters(case, Path(folder), max(counts))
        model = ReftModel(hollow_model(case, torch.device("cpu")).eval())
        model.pool.capacity = max(counts)
        for number in range(max(counts)):
            model.pool.add(f"user{number}", Path(folder) / f"user{number}")
        prompts = torch.randint(3, case.vocabulary, (case.batch, case.sequence))
        for number in counts:
            model(input_ids=prompts, adapter_names=serve.adapter_names(case, number))


_BUILDERS: dict[str, Callable[[Any], None]] = {
    "launch": _launch,
    "op": _operator,
    "candidate": _candidate,
    "step": _model_step,
    "serve": _mixed_batch,
}


def longest_sequence(built: Sequence[Built]) -> dict[str, float]:
    """Map each stage to the seconds of its longest sequence of builds, in a test or candidate."""
    sums: dict[tuple[str, str], float] = {}
    for each in built:
        key = (each.request.stage, each.request.label)
        sums[key] = sums.get(key, 0.0) + sum(each.seconds)
    longest_of: dict[str, float] = {}
    for (stage, _), seconds in sums.items():
        longest_of[stage] = max(longest_of.get(stage, 0.0), seconds)
    return longest_of
