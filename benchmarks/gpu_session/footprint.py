"""GPU memory that a session's stages take at most: all processes of a stage together.

Arithmetic, not a measurement; tests compare it with the allocations of small cases on a CPU. A lent
GPU may be shared, so a stage stays within ``LIMIT``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import DTYPES, ModelCase, OpCase, RotationCase
from benchmarks.gpu_session.stages import OP_JOBS, PARITY_JOBS, SWEEP_JOBS
from benchmarks.suites.op import copies

GIB = 2**30
LIMIT = 24 * GIB
#: What a process that uses CUDA holds besides its tensors: context, kernels, workspaces.
CONTEXT = GIB // 2
#: Bytes an element of hidden: float64 tensors of the reference, their gradients and differences
#: (seen on a CPU: 81), with a quarter more for pieces that the allocator cannot join.
_GATE = 100
#: Bytes an element of hidden that a peer's forward and backward take (seen: at most 32 in the
#: element's own size and float32 rows of it).
_RESULT = 40
#: Peers of which the op suite holds a stand, and those of which it captures graphs.
_STANDS, _CAPTURED = 8, 3
#: Numbers of float32 that all models of a step keep for each number of R: W, R, their moments and
#: base points of four of them, and the intermediates of an orthonormal R in float64.
_ADAPTERS = 60


def gate(case: OpCase) -> int:
    """Bytes of a process that checks a candidate or a peer, its tensors included."""
    return CONTEXT + _elements(case) * (2 * _size(case) + _GATE)


def warming(case: OpCase) -> int:
    """Bytes of a process that compiles ahead: each peer once, no check."""
    return CONTEXT + _elements(case) * (2 * _size(case) + _RESULT)


def op(case: OpCase) -> int:
    """Bytes of the process that measures an operator: the gate's, a stand of each peer with output
    and gradient, and three graphs of cold copies of those that are captured."""
    stands = _STANDS * 4 * _size(case)
    graphs = _CAPTURED * copies(case) * (_size(case) + 3 * (2 * _size(case) + 8))
    return gate(case) + _elements(case) * (stands + graphs)


def sweep(case: OpCase) -> int:
    """Bytes of all processes of the sweep: those that judge, and the one with two graphs."""
    graphs = 2 * copies(case) * (2 * _size(case) + 8)
    timing = CONTEXT + _elements(case) * (2 * _size(case) + graphs)
    return SWEEP_JOBS * gate(case) + timing


def step(case: ModelCase) -> int:
    """Bytes of a training step: weights, what every layer keeps for backward, logits, adapters.

    Kept of a layer, a token: inputs of two norms in float32; queries, keys, values and their
    outcome; three of the MLP's width; LoRA's inputs of two projections in float32; one more of the
    width of hidden. Logits, a token: bfloat16, float32, their logarithms and gradients, 12 bytes.
    """
    size = DTYPES[case.dtype].itemsize
    width = case.hidden * (8 + 8 + size * (3 + 2 * case.kv_heads / case.heads))
    layer = width + 3 * size * case.intermediate
    token = case.layers * layer + 12 * case.vocabulary * (case.model == "llama")
    return CONTEXT + weights(case) + int(case.batch * case.sequence * token) + _adapters(case)


def serve(case: ModelCase) -> int:
    """Bytes of serving: weights, the logits of a whole batch, caches of two forwards, one layer's
    activations, and as many adapters of both kinds as the batch has sequences."""
    size, tokens = DTYPES[case.dtype].itemsize, case.batch * case.sequence
    cache = 2 * case.layers * size * case.hidden * case.kv_heads // case.heads
    layer = 4 * case.intermediate * size + 16 * case.hidden
    activations = tokens * (2 * cache + layer + case.vocabulary * size)
    ours = 2 * case.layers * case.rank * case.hidden * 4
    lora = 2 * case.layers * 8 * 2 * case.hidden * 4
    return CONTEXT + weights(case) + activations + case.batch * (2 * ours + lora)


def orthonormal(case: RotationCase) -> int:
    """Bytes of R of all layers: ours, and pyreft's, which completes each to D × D."""
    ours = _ADAPTERS * case.layers * case.rank * case.dim * 4
    few = min(case.layers, 4)
    return CONTEXT + ours + 8 * few * case.dim**2 * 4


def load(case: ModelCase) -> int:
    """Bytes of wrapping and loading: the base's weights are one number each."""
    return CONTEXT + _adapters(case)


def weights(case: ModelCase) -> int:
    """Bytes of the base model: embeddings in and out, and the matrices of each layer."""
    attention = 2 * case.hidden**2 * (1 + case.kv_heads / case.heads)
    matrices = 3 if case.model == "llama" else 2
    layer = attention + matrices * case.hidden * case.intermediate + 16 * case.hidden
    # A classifier has positions and a head instead of a second vocabulary.
    ends = 2 * case.vocabulary if case.model == "llama" else case.vocabulary + 1024 + case.hidden
    return int((case.layers * layer + ends * case.hidden) * DTYPES[case.dtype].itemsize)


def stage(name: str) -> int:
    """Bytes of all processes of a stage at most, the session's own included."""
    from benchmarks import sweep as sweeping
    from benchmarks.suites import suites

    if name == "parity":  # its tensors are small
        return CONTEXT + PARITY_JOBS * (CONTEXT + GIB // 2)
    if name == "offsets":  # two tensors of 8 GiB and little else
        return CONTEXT + CONTEXT + 17 * GIB
    if name == "report":
        return CONTEXT
    if name == "sweep":
        return CONTEXT + max(sweep(case) for case in sweeping.cases("gpu"))
    cases = suites()[name].cases("gpu")
    alone = max(_SUITES[name](case) for case in cases)
    if name == "op":  # while others compile ahead, it holds nothing
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
