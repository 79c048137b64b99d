"""The edit itself, forward and backward, on hidden states that autograd follows."""

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
from benchmarks.peers import Operator, Peer
from benchmarks.result_rows import Row
from benchmarks.suites import Options, Suite, row
from benchmarks.timing import Clock, Run, graph_run, interleave, paired_ratio, quantiles
from reft_kernels import RowPlan
from reft_kernels.testing import Edit

#: Bytes that a captured graph walks through, so that the L2 cache (50 MB on an H100, 60 on an H200)
#: never holds what comes next.
_COLD = 128 * 2**20
_NO_CAPTURE = "a CUDA graph cannot hold it: a call waits for the device"
_DIFFERENCE = "backward from CUDA graphs is a difference: both phases less forward and its feeding"


def cases(size: str) -> list[OpCase]:
    """Prompt ends of small and large batches, and every row."""
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
    """What matters most comes first: a session on a GPU has minutes.

    Prompt ends lie in sequences of 16, of which 14 rows are edited: longer ones are the same work
    in more memory. No hidden takes more than 128 MiB.
    """

    def ends(batch: int, dim: int, rank: int, dtype: str = "bf16", groups: int = 1) -> OpCase:
        return OpCase("f7+l7", batch, 16, dim, rank, dtype, groups)

    def whole(dim: int, rank: int, dtype: str = "bf16") -> OpCase:
        return OpCase("all", 16, 512, dim, rank, dtype)

    return [
        ends(32, 4096, 8),
        whole(4096, 8),
        whole(4096, 32),
        *(ends(batch, 2048, 8) for batch in (32, 8, 1)),
        whole(2048, 8),
        *(ends(batch, 4096, 8) for batch in (8, 1)),
        *(ends(32, 4096, rank) for rank in (4, 32, 1)),
        whole(4096, 4),
        ends(32, 4096, 8, groups=2),
        ends(32, 4096, 8, "fp32"),
        whole(4096, 8, "fp32"),
        ends(32, 4096, 128),
        whole(4096, 128),
        ends(32, 8192, 8),
        ends(32, 768, 1, "fp32"),
        whole(768, 1, "fp32"),
        ends(32, 2048, 8, "fp32"),
        whole(2048, 8, "fp32"),
        ends(32, 4096, 32, "fp32"),
    ]


def tensors(case: OpCase, device: torch.device) -> Edit:
    """Random tensors of a case; R has orthonormal rows."""
    random = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=random) * scale

    size = (case.batch, case.sequence, case.dim)
    stack = (case.groups,) if case.groups > 1 else ()
    starts = torch.arange(case.batch).unsqueeze(1) * case.sequence
    whole = torch.arange(case.sequence)
    columns = whole if case.positions == "all" else torch.cat([whole[:7], whole[-7:]])
    rows = (starts + columns).reshape(-1)
    groups = None
    if case.groups == 2:
        groups = (columns >= case.sequence // 2).long().expand(case.batch, -1).reshape(-1)
    drawn = torch.linalg.qr(normal(*stack, case.dim, case.rank)).Q.mT.contiguous()
    return Edit(
        hidden=normal(*size).to(device, dtype),
        plan=RowPlan.from_rows(rows, groups, case.groups).to(device),
        encode=normal(*stack, case.rank, case.dim, scale=case.dim**-0.5).to(device),
        bias=normal(*stack, case.rank).to(device),
        decode=drawn.to(device),
        upstream=normal(*size).to(device, dtype),
        options={"subtract": True, "activation": None},
    )


class _Alias(torch.autograd.Function):
    """The same memory as a tensor that is no leaf, as a block's output is none, for nothing."""

    @staticmethod
    def forward(ctx: Any, source: Tensor) -> Tensor:
        return source.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Feed(torch.autograd.Function):
    """A loss whose gradient is what lies in a box: autograd then owns it, as it does in a model."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.box.pop(), None


@dataclass(eq=False)
class Stand:
    """One operator on memory of its own: forward, feed, backward; feeding is not its work."""

    operator: Operator
    hidden: Tensor
    upstream: Tensor

    def __post_init__(self) -> None:
        self.hidden = self.hidden.clone().requires_grad_()
        self._out = self._loss = self.hidden

    def forward(self) -> None:
        alias = _Alias.apply(self.hidden)  # type: ignore[no-untyped-call]
        self._out = self.operator.call(alias)

    def feed(self) -> None:
        self._loss = _Feed.apply(  # type: ignore[no-untyped-call]
            self._out, [self.upstream.clone()]
        )

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._loss, [self.hidden, *self.operator.leaves.values()])

    def whole(self) -> None:
        """Forward, feed and backward; the gradients are dropped."""
        self.forward()
        self.feed()
        self.backward()

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(output, gradients by name) of one call."""
        self.forward()
        out = self._out.detach().clone()
        self.feed()
        return out, dict(zip(("hidden", *self.operator.leaves), self.backward(), strict=True))


def run(case: OpCase, options: Options) -> Iterator[Row]:
    """Rows "forward" and "backward" of every peer; on a GPU also of graphs and of the host."""
    device = options.device
    edit = tensors(case, device)
    gate, clock = OpGate(case, edit), Clock(device)
    bandwidth = copy_bandwidth(device)
    runs: dict[str, Run] = {}
    kept: dict[str, tuple[Peer, Row]] = {}
    graphs: dict[str, Run] = {}
    for peer in options.peers:
        if peer.edit is None:
            continue
        blank = row("op", case, "", "s", peer, options)
        try:
            operator = peer.edit(case, edit)
            checked = gate.check(
                result_of(*Stand(operator, edit.hidden, edit.upstream).result()), own=operator.own
            )
        except Exception as error:  # a peer's or a compiler's own: the others go on
            yield from _without_number(blank, absent=first_line(error))
            continue
        blank = dataclasses.replace(blank, gate=checked, baseline="ours")
        if not checked.passed:
            yield from _without_number(blank, absent="the gate did not pass")
            continue
        stand = Stand(operator, edit.hidden, edit.upstream)
        runs[peer.name] = calls_of(clock, stand)
        kept[peer.name] = peer, blank
        if device.type != "cuda":
            continue
        if not operator.capturable:
            yield from _without_number(blank, "graph_", absent=_NO_CAPTURE)
            continue
        try:
            graphs[peer.name] = graphs_of(case, operator, edit)
        except RuntimeError as error:
            yield from _without_number(blank, "graph_", absent=first_line(error))
    samples = interleave(runs, options.effort)
    if graphs:
        for name, found in interleave(graphs, options.effort).items():
            samples[name] |= found
    for name, (_, blank) in kept.items():
        for phase, seconds in samples[name].items():
            reference = samples.get("ours", {}).get(phase)
            work = phase.split("_")[-1]
            counted = dataclasses.replace(blank, metric=phase, bandwidth=None)
            if phase == "graph_backward":
                note = "; ".join(one for one in (blank.note, _DIFFERENCE) if one)
                counted = dataclasses.replace(counted, note=note)
            if not phase.startswith("host"):
                counted = dataclasses.replace(
                    counted,
                    bytes=case.bytes(work),
                    flops=case.flops(work),
                    bandwidth=bandwidth,
                )
            yield counted.timed(
                quantiles(seconds), None if reference is None else paired_ratio(seconds, reference)
            )


def calls_of(clock: Clock, stand: Stand) -> Run:
    """Forward and backward one after the other, as eager PyTorch runs them."""

    def run() -> Mapping[str, float]:
        times = clock(forward=stand.forward, feed=stand.feed, backward=stand.backward)
        return {phase: seconds for phase, seconds in times.items() if "feed" not in phase}

    return run


def cold_stands(case: OpCase, operator: Operator, edit: Edit) -> list[Stand]:
    """Enough copies to leave the L2 cache cold."""
    return [Stand(operator, edit.hidden, edit.upstream) for _ in range(copies(case))]


def copies(case: OpCase) -> int:
    """How many copies of a case outgrow the L2 cache, at most 64."""
    touched = case.rows * case.dim * DTYPES[case.dtype].itemsize
    return max(2, min(_COLD // touched + 1, 64))


def graphs_of(case: OpCase, operator: Operator, edit: Edit) -> Run:
    """Forward alone and both together from CUDA graphs. Backward has no graph of its own: it is
    the difference of two, and as noisy as both."""
    stands = cold_stands(case, operator, edit)

    def fed(stand: Stand) -> None:
        stand.forward()
        stand.feed()

    alone, before, both = (
        graph_run("seconds", [partial(step, stand) for stand in stands])
        for step in (Stand.forward, fed, Stand.whole)
    )

    def run() -> Mapping[str, float]:
        backward = both()["seconds"] - before()["seconds"]
        return {"graph_forward": alone()["seconds"], "graph_backward": backward}

    return run


def _without_number(blank: Row, prefix: str = "", *, absent: str) -> Iterator[Row]:
    for phase in ("forward", "backward"):
        yield dataclasses.replace(blank, metric=prefix + phase, absent=absent)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def warm(case: OpCase, options: Options) -> None:
    """Compile what every peer launches in this case: Triton and inductor keep it on disk."""
    edit = tensors(case, options.device)
    for peer in options.peers:
        if peer.edit is None:
            continue
        with suppress(Exception):  # the run itself will report it
            Stand(peer.edit(case, edit), edit.hidden, edit.upstream).result()


SUITE = Suite(
    "op", "the edit, forward and backward, on prompt ends and on every row", cases, run, warm
)
