"""Estimates of the GPU memory of a session's stages, summed over the processes of a stage.

The tests compare these estimates with the allocations of small cases on a CPU. A lent GPU may be
shared, so each stage must stay within ``LIMIT``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import DTYPES, ModelCase, OpCase, RotationCase
from benchmarks.gpu_session.stages import OP_JOBS, PARITY_JOBS, SWEEP_JOBS
from benchmarks.suites.op import copies

GIB = 2**30
LIMIT = 24 * GIB
#: Bytes of a CUDA process besides its tensors: context, kernels, workspaces.
CONTEXT = GIB // 2
#: Bytes of a gate per element of hidden: float64 tensors of the reference, gradients, differences.
#: 81 were measured on a CPU; the rest is for fragments that the allocator cannot merge.
_GATE = 100
#: Bytes of a peer's forward and backward per element of hidden, at most. 32 were measured.
_RESULT = 40
#: Number of peers in the suite "op", and of peers of which it captures CUDA graphs.
_WORKLOADS, _CAPTURED = 8, 3
#: Numbers in float32 that all models of a step keep per number of R: W, R, moments and base points
#: of four models, and intermediates of an orthonormal R in float64.
_ADAPTERS = 60


def gate(case: OpCase) -> int:
    """Bytes of a process that checks a candidate or a peer."""
    return CONTEXT + _elements(case) * (2 * _size(case) + _GATE)


def warming(case: OpCase) -> int:
    """Bytes of a process that compiles ahead: it runs each peer once, without a check."""
    return CONTEXT + _elements(case) * (2 * _size(case) + _RESULT)


def op(case: OpCase) -> int:
    """Bytes of the process that measures an operator.

    It holds the gate, a workload per peer with output and gradient, and three graphs of cold copies
    per captured peer.
    """
    workloads = _WORKLOADS * 4 * _size(case)
    graphs = _CAPTURED * copies(case) * (_size(case) + 3 * (2 * _size(case) + 8))
    return gate(case) + _elements(case) * (workloads + graphs)


def sweep(case: OpCase) -> int:
    """Bytes of all processes of the sweep: those that check, and the one that times two graphs."""
    graphs = 2 * copies(case) * (2 * _size(case) + 8)
    timing = CONTEXT + _elements(case) * (2 * _size(case) + graphs)
    return SWEEP_JOBS * gate(case) + timing


def step(case: ModelCase) -> int:
    """Bytes of a training step: weights, saved activations, logits and adapters.

    A layer saves per token: inputs of two norms in float32; queries, keys, values and the output of
    attention; three tensors of the MLP's width; LoRA's inputs of two projections in float32; one
    more tensor of the width of hidden. Logits take 12 bytes each: bfloat16, float32, their
    logarithms and gradients.
    """
    size = DTYPES[case.dtype].itemsize
    width = case.hidden * (8 + 8 + size * (3 + 2 * case.kv_heads / case.heads))
    layer = width + 3 * size * case.intermediate
    token = case.layers * layer + 12 * case.vocabulary * (case.model == "llama")
    return CONTEXT + weights(case) + int(case.batch * case.sequence * token) + _adapters(case)


def serve(case: ModelCase) -> int:
    """Bytes of serving.

    They are weights, the logits of a batch, the caches of two forwards, the activations of a layer,
    and one adapter of each kind per sequence.
    """
    size, tokens = DTYPES[case.dtype].itemsize, case.batch * case.sequence
    cache = 2 * case.layers * size * case.hidden * case.kv_heads // case.heads
    layer = 4 * case.intermediate * size + 16 * case.hidden
    activations = tokens * (2 * cache + layer + case.vocabulary * size)
    ours = 2 * case.layers * case.rank * case.hidden * 4
    lora = 2 * case.layers * 8 * 2 * case.hidden * 4
    return CONTEXT + weights(case) + activations + case.batch * (2 * ours + lora)


def orthonormal(case: RotationCase) -> int:
    """Bytes of R of all layers: ours, and that of pyreft, which completes each R to D × D."""
    ours = _ADAPTERS * case.layers * case.rank * case.dim * 4
    few = min(case.layers, 4)
    return CONTEXT + ours + 8 * few * case.dim**2 * 4


def load(case: ModelCase) -> int:
    """Bytes of wrapping and loading; each weight of the base is an expanded scalar."""
    return CONTEXT + _adapters(case)


def weights(case: ModelCase) -> int:
    """Bytes of the base model: input and output embeddings, and the matrices of each layer."""
    attention = 2 * case.hidden**2 * (1 + case.kv_heads / case.heads)
    matrices = 3 if case.model == "llama" else 2
    layer = attention + matrices * case.hidden * case.intermediate + 16 * case.hidden
    # A classifier has position embeddings and a head instead of output embeddings.
    ends = 2 * case.vocabulary if case.model == "llama" else case.vocabulary + 1024 + case.hidden
    return int((case.layers * layer + ends * case.hidden) * DTYPES[case.dtype].itemsize)


def stage(name: str) -> int:
    """Largest number of bytes of all processes of a stage, the session itself included."""
    from benchmarks import sweep as sweep_command
    from benchmarks.suites import suites

    if name == "parity":  # small tensors
        return CONTEXT + PARITY_JOBS * (CONTEXT + GIB // 2)
    if name == "offsets":  # it holds two tensors of 8 GiB
        return CONTEXT + CONTEXT + 17 * GIB
    if name == "report":
        return CONTEXT
    if name == "sweep":
        return CONTEXT + max(sweep(case) for case in sweep_command.cases("gpu"))
    cases = suites()[name].cases("gpu")
    alone = max(_SUITES[name](case) for case in cases)
    if name == "op":  # it holds no tensors while other processes compile ahead
        alone = max(alone, CONTEXT + OP_JOBS * max(warming(case) for case in cases))
    return CONTEXT + alone


_SUITES: dict[str, Callable[[Any], int]] = {
    "op": op,
    "orthonormal": orthonormal,
    "layer": step,
    "step": step,
    "memory": step,
    "generate": step,
    "load": load,
    "serve": serve,
}


def _elements(case: OpCase) -> int:
    return case.batch * case.sequence * case.dim


def _size(case: OpCase) -> int:
    return DTYPES[case.dtype].itemsize


def _adapters(case: ModelCase) -> int:
    return _ADAPTERS * len(case.edited_layers) * case.rank * case.hidden * 4
