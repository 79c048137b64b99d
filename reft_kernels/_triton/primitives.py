"""Device functions that the kernels share: two passes over D, and the activations.

A row kernel holds BLOCK_N rows. Pass one (``project``) reads the rows in chunks of BLOCK_D and
reduces them to BLOCK_R coefficients each. Pass two (``expand``) reads the chunks again and writes
them back with R's combination of the coefficients added. Everything is accumulated in ACC and
rounded once at the store.

Pass two finds the rows in the L2 cache if everything that the running programs hold fits there: 448
rows of 4096 in bfloat16 take 4 MB of the 50 MB of an H100. 8192 such rows take 64 MB, and their
copies for backward as much again, so most of pass two reads memory again.

Both passes end at ``loop_end``, which is D as a run-time number. The compiler unrolls loops of
known length completely, and then hoists loads until it runs out of registers. ``tl.range`` with
STAGES keeps the next chunks in flight during the work on one (asynchronous copies to shared memory
on NVIDIA). The launch option of that name does so for matrix products only.

Names: ``b_`` for tiles, with their shape in a comment, ``m_`` for masks, ``index`` for indices into
the plan's rows. Row offsets are int64 before they are multiplied.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """Compute act(u); the identity for an empty name."""
    if ACTIVATION == "relu":
        return tl.maximum(u, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * u * (1.0 + tl.erf(u * _SQRT_HALF))
    elif ACTIVATION == "silu":
        return u / (1.0 + tl.exp(-u))
    elif ACTIVATION == "tanh":
        return _tanh(u)
    else:
        return u


@triton.jit
def activation_slope(u, ACTIVATION: tl.constexpr):
    """Compute act'(u); relu'(0) = 0 as in PyTorch."""
    if ACTIVATION == "relu":
        return tl.where(u > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        normal = 0.5 * (1.0 + tl.erf(u * _SQRT_HALF))
        return normal + u * _INV_SQRT_2PI * tl.exp(-0.5 * u * u)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        return sigmoid * (1.0 + u * (1.0 - sigmoid))
    elif ACTIVATION == "tanh":
        t = _tanh(u)
        return 1.0 - t * t
    else:
        return tl.full(u.shape, 1.0, u.dtype)


@triton.jit
def _tanh(u):
    decay = tl.exp(-2.0 * tl.abs(u))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(u < 0.0, -size, size)


@triton.jit
def group_bounds(offsets_ptr, group, group_size, HAS_OFFSETS: tl.constexpr):
    """Return the first and the end index of a group's rows, from ``offsets_ptr`` (g + 1,) or from
    ``group_size``."""
    if HAS_OFFSETS:
        first = tl.load(offsets_ptr + group)
        end = tl.load(offsets_ptr + group + 1)
    else:
        first = group * group_size
        end = first + group_size
    return first, end


@triton.jit
def load_matrix(ptr, ranks, dims, DIM: tl.constexpr, RANK: tl.constexpr, ACC: tl.constexpr):
    """Load rows ``ranks`` and columns ``dims`` of a contiguous (r, D) parameter, 0 outside:
    [BLOCK_R, BLOCK_D]."""
    mask = (ranks < RANK)[:, None] & (dims < DIM)[None, :]
    return tl.load(ptr + ranks[:, None] * DIM + dims[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def project(
    source_ptr,  # first row of the source
    bases,  # [BLOCK_N] int64, element offset of each row
    stride_dim,
    live,  # [BLOCK_N]
    matrix_ptr,  # (r, D) of this group
    copy_ptr,  # (n, D), destination of the rows, if COPY
    index,  # [BLOCK_N] int64, row numbers in copy_ptr
    inside,  # [BLOCK_N]
    loop_end,  # D, as a run-time number
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute x Mᵀ: [BLOCK_N, BLOCK_R]. Missing rows read as 0 and are copied as 0."""
    ranks = tl.arange(0, BLOCK_R)
    if DOT:
        total = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    else:
        partial = tl.zeros((BLOCK_N, BLOCK_R, BLOCK_D), ACC)
    for start in tl.range(0, loop_end, BLOCK_D, num_stages=STAGES):
        dims = start + tl.arange(0, BLOCK_D)
        m_dims = (dims < DIM)[None, :]
        b_x = tl.load(
            source_ptr + bases[:, None] + dims.to(tl.int64)[None, :] * stride_dim,
            mask=live[:, None] & m_dims,
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        if COPY:
            tl.store(
                copy_ptr + index[:, None] * DIM + dims[None, :], b_x, mask=inside[:, None] & m_dims
            )
        b_x = b_x.to(ACC)
        b_m = load_matrix(matrix_ptr, ranks, dims, DIM, RANK, ACC)
        if DOT:
            total = tl.dot(b_x, tl.trans(b_m), total, input_precision=PRECISION, out_dtype=ACC)
        else:
            partial += b_x[:, None, :] * b_m[None, :, :]
    if DOT:
        return total
    else:
        return tl.sum(partial, axis=2)


@triton.jit
def expand(
    b_s,
    b_m,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute s M from coefficients s [BLOCK_N, BLOCK_R] and a chunk M [BLOCK_R, BLOCK_D]:
    [BLOCK_N, BLOCK_D]."""
    if DOT:
        return tl.dot(b_s, b_m, input_precision=PRECISION, out_dtype=ACC)
    else:
        # The matrix comes first. Triton makes a tf32 tl.dot of a sum over the reverse product, if a
        # tile has 16 rows. With fewer than 8 ranks that dot is wrong: it adds each rank again to
        # fill the 8 of an instruction (seen on an H100 with Triton 3.6).
        return tl.sum(b_m[None, :, :] * b_s[:, :, None], axis=1)
