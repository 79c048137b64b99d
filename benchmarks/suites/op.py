"""Suite "op": the edit alone, forward and backward, on hidden states that need a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, OpCase
from benchmarks.gate import OpGate, result_of
from benchmarks.machine import copy_bandwidth
from benchmarks.peers import Operator
from benchmarks.result_rows import Row
from benchmarks.suites import Options, Suite, blank_row, first_line
from benchmarks.timing import Clock, Run, Samples, graph_run, interleave
from reft_kernels import RowPlan
from reft_kernels.devtools.testing import Edit

#: Bytes that a captured graph touches before it repeats: more than the L2 cache holds (50 MB on an
#: H100, 60 MB on an H200).
_COLD = 128 * 2**20
_NO_CAPTURE = "a CUDA graph cannot hold it: a call synchronises with the device"
_DIFFERENCE = "backward from CUDA graphs is a difference: both phases minus forward and feeding"


def cases(size: str) -> list[OpCase]:
    """Both ends of the prompt in small and large batches, and every row."""
    if size == "ci":
        return [OpCase("f7+l7", 2, 32, 64, 4), OpCase("all", 1, 64, 64, 4, groups=1)]
    if size == "cpu":
        return [
            *(OpCase("f7+l7", batch, 256, 2048, 8) for batch in (1, 8)),
            *(OpCase("f7+l7", 8, 256, dim, 8) for dim in (768, 4096)),
            *(OpCase("f7+l7", 8, 256, 2048, rank) for rank in (1, 4, 32)),
            OpCase("f7+l7", 8, 256, 2048, 8, "bf16"),
            OpCase("f7+l7", 8, 256, 2048, 8, groups=2),
            OpCase("all", 8, 256, 2048, 8),
            OpCase("all", 8, 256, 2048, 32),
        ]
    return _gpu_cases()


def _gpu_cases() -> list[OpCase]:
    """Cases in order of importance, since a session on a GPU is short.

    Prompt ends lie in sequences of 16, of which 14 rows are edited; longer sequences are the same
    work in more memory. Hidden states take at most 128 MiB.
    """

    def ends(batch: int, dim: int, rank: int, dtype: str = "bf16", groups: int = 1) -> OpCase:
        return OpCase("f7+l7", batch, 16, dim, rank, dtype, groups)

    def all_rows(dim: int, rank: int, dtype: str = "bf16") -> OpCase:
        return OpCase("all", 16, 512, dim, rank, dtype)

    return [
        ends(32, 4096, 8),
        all_rows(4096, 8),
        all_rows(4096, 32),
        *(ends(batch, 2048, 8) for batch in (32, 8, 1)),
        all_rows(2048, 8),
        *(ends(batch, 4096, 8) for batch in (8, 1)),
        *(ends(32, 4096, rank) for rank in (4, 32, 1)),
        all_rows(4096, 4),
        ends(32, 4096, 8, groups=2),
        ends(32, 4096, 8, "fp32"),
        all_rows(4096, 8, "fp32"),
        ends(32, 4096, 128),
        all_rows(4096, 128),
        ends(32, 8192, 8),
        ends(32, 768, 1, "fp32"),
        all_rows(768, 1, "fp32"),
        ends(32, 2048, 8, "fp32"),
        all_rows(2048, 8, "fp32"),
        ends(32, 4096, 32, "fp32"),
    ]


def tensors(case: OpCase, device: torch.device) -> Edit:
    """Random tensors of a case; the rows of R are orthonormal."""
    random = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=random) * scale

    size = (case.batch, case.sequence, case.dim)
    stack = (case.groups,) if case.groups > 1 else ()
    starts = torch.arange(case.batch).unsqueeze(1) * case.sequence
    positions = torch.arange(case.sequence)
    if case.positions != "all":
        positions = torch.cat([positions[:7], positions[-7:]])
    rows = (starts + positions).reshape(-1)
    groups = None
    if case.groups == 2:
        groups = (positions >= case.sequence // 2).long().expand(case.batch, -1).reshape(-1)
    rotation = torch.linalg.qr(normal(*stack, case.dim, case.rank)).Q.mT.contiguous()
    return Edit(
        hidden=normal(*size).to(device, dtype),
        plan=RowPlan.from_rows(rows, groups, case.groups).to(device),
        encode=normal(*stack, case.rank, case.dim, scale=case.dim**-0.5).to(device),
        bias=normal(*stack, case.rank).to(device),
        decode=rotation.to(device),
        upstream=normal(*size).to(device, dtype),
        options={"subtract": True, "activation": None},
    )


class _Alias(torch.autograd.Function):
    """View of a leaf as a non-leaf tensor, like the output of a block, at no cost."""

    @staticmethod
    def forward(ctx: Any, source: Tensor) -> Tensor:
        return source.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Feed(torch.autograd.Function):
    """A loss whose gradient is the tensor in a list; autograd then owns it, as in a model."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None


@dataclass(eq=False)
class Workload:
    """An operator with its own copy of the inputs: forward, feeding of the gradient, backward."""

    operator: Operator
    hidden: Tensor
    upstream: Tensor

    def __post_init__(self) -> None:
        self.hidden = self.hidden.clone().requires_grad_()
        self._out = self._loss = self.hidden

    def forward(self) -> None:
        """Call the operator."""
        alias = _Alias.apply(self.hidden)  # type: ignore[no-untyped-call]
        self._out = self.operator.call(alias)

    def feed(self) -> None:
        """Prepare the upstream gradient; this is not work of the operator."""
        self._loss = _Feed.apply(  # type: ignore[no-untyped-call]
            self._out, [self.upstream.clone()]
        )

    def backward(self) -> tuple[Tensor, ...]:
        """Compute the gradients of hidden states and leaves."""
        return torch.autograd.grad(self._loss, [self.hidden, *self.operator.leaves.values()])

    def whole(self) -> None:
        """Run forward, feed and backward; discard the gradients."""
        self.forward()
        self.feed()
        self.backward()

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the gradients by name of a call."""
        self.forward()
        out = self._out.detach().clone()
        self.feed()
        return out, dict(zip(("hidden", *self.operator.leaves), self.backward(), strict=True))


def run(case: OpCase, options: Options) -> Iterator[Row]:
    """Yield rows "forward" and "backward" of every peer.

    On a GPU, "graph_…" rows are timed from CUDA graphs and "host_…" rows until the launch.
    """
    device = options.device
    edit = tensors(case, device)
    gate, clock = OpGate(case, edit), Clock(device)
    bandwidth = copy_bandwidth(device)
    runs: dict[str, Run] = {}
    blanks: dict[str, Row] = {}
    graphs: dict[str, Run] = {}
    for peer in options.peers:
        if peer.edit is None:
            continue
        blank = blank_row("op", case, "", "s", peer, options)
        try:
            operator = peer.edit(case, edit)
            result = result_of(*Workload(operator, edit.hidden, edit.upstream).result())
            checked = gate.check(result, within_budget=operator.within_budget)
        except Exception as error:  # of the peer or its compiler; the other peers go on
            yield from _without_number(blank, absent=first_line(error))
            continue
        blank = dataclasses.replace(blank, gate=checked, baseline="ours")
        if not checked.passed:
            yield from _without_number(blank, absent="the gate did not pass")
            continue
        runs[peer.name] = calls_of(clock, Workload(operator, edit.hidden, edit.upstream))
        blanks[peer.name] = blank
        if device.type == "cuda":
            try:
                graphs[peer.name] = graphs_of(case, operator, edit)
            except RuntimeError as error:
                yield from _without_number(blank, "graph_", absent=first_line(error))
    samples = interleave(runs, options.effort)
    if graphs:
        for name, phases in interleave(graphs, options.effort).items():
            samples[name] |= phases
    yield from _rows(case, blanks, samples, bandwidth)


def _rows(
    case: OpCase, blanks: Mapping[str, Row], samples: Samples, bandwidth: float
) -> Iterator[Row]:
    """Fill in times, ratios to ours, and the needed bytes and flops of each phase."""
    for name, blank in blanks.items():
        for metric, seconds in samples[name].items():
            row = dataclasses.replace(blank, metric=metric)
            if metric == "graph_backward":
                note = "; ".join(note for note in (blank.note, _DIFFERENCE) if note)
                row = dataclasses.replace(row, note=note)
            if not metric.startswith("host"):
                phase = metric.split("_")[-1]
                row = dataclasses.replace(
                    row, bytes=case.bytes(phase), flops=case.flops(phase), bandwidth=bandwidth
                )
            yield row.with_rounds(seconds, samples.get("ours", {}).get(metric))


def calls_of(clock: Clock, workload: Workload) -> Run:
    """Time eager calls of forward and backward."""

    def run() -> Mapping[str, float]:
        times = clock(forward=workload.forward, feed=workload.feed, backward=workload.backward)
        return {phase: seconds for phase, seconds in times.items() if "feed" not in phase}

    return run


def cold_workloads(case: OpCase, operator: Operator, edit: Edit) -> list[Workload]:
    """Enough workloads to outgrow the L2 cache."""
    return [Workload(operator, edit.hidden, edit.upstream) for _ in range(copies(case))]


def copies(case: OpCase) -> int:
    """Number of copies of a case that outgrow the L2 cache, at most 64."""
    touched = case.rows * case.dim * DTYPES[case.dtype].itemsize
    return max(2, min(_COLD // touched + 1, 64))


def graphs_of(case: OpCase, operator: Operator, edit: Edit) -> Run:
    """Time forward, and forward with backward, from CUDA graphs.

    The time of backward is the difference of two graphs and has the noise of both.

    Raises:
        RuntimeError: the operator cannot be captured.
    """
    if not operator.capturable:
        raise RuntimeError(_NO_CAPTURE)
    workloads = cold_workloads(case, operator, edit)

    def fed(workload: Workload) -> None:
        workload.forward()
        workload.feed()

    alone, before, both = (
        graph_run("seconds", [partial(step, workload) for workload in workloads])
        for step in (Workload.forward, fed, Workload.whole)
    )

    def run() -> Mapping[str, float]:
        backward = both()["seconds"] - before()["seconds"]
        return {"graph_forward": alone()["seconds"], "graph_backward": backward}

    return run


def _without_number(blank: Row, prefix: str = "", *, absent: str) -> Iterator[Row]:
    for phase in ("forward", "backward"):
        yield dataclasses.replace(blank, metric=prefix + phase, absent=absent)


def warm(case: OpCase, options: Options) -> None:
    """Compile the builds of every peer in a case into the caches of Triton and inductor."""
    edit = tensors(case, options.device)
    for peer in options.peers:
        if peer.edit is None:
            continue
        with suppress(Exception):  # the measurement reports the error
            Workload(peer.edit(case, edit), edit.hidden, edit.upstream).result()


SUITE = Suite(
    "op", "the edit, forward and backward, on prompt ends and on every row", cases, run, warm
)
