"""Forward kernel: the whole edit of BLOCK_N rows of one group.

    u = A h + b        s = act(u) − σ R h        h' = h + Rᵀ s

Group k is edited with entry k of the parameters, or with entry ``slots[k]`` of a table, times
``scales[k]``.

Grid: (tiles of the largest group, g). Programs past the end of their group, and those of groups
without an entry, return at once.
Bytes: n·D·e read twice and written once, n·D·e more if the rows are saved, and 2·r·D·4 of
parameters a tile. The second read comes from the L2 cache as long as the concurrent tiles fit there
(see primitives). So do the parameters, and their traffic limits how few rows a tile may hold.
Flops: 4·n·r·D, 6·n·r·D with σ and an activation; three times that on the matrix units.
"""

import triton
import triton.language as tl

from reft_kernels._triton.primitives import activate, expand, group_bounds, load_matrix, project


@triton.jit(do_not_specialize=["group_size"])
def edit_rows_kernel(
    hidden_ptr,  # (N, D), edited in place
    stride_row,
    stride_dim,
    rows_ptr,  # (n,) int64, −1 for none
    offsets_ptr,  # (g + 1,) int64, if HAS_OFFSETS
    group_size,  # rows of every group, if not
    slots_ptr,  # (g,) int64, the entry of the parameters that each group uses, −1 for none
    scales_ptr,  # (g,)
    encode_ptr,  # (g, r, D), or a table with any number of entries
    bias_ptr,  # (g, r)
    decode_ptr,  # (g, r, D)
    x_ptr,  # (n, D) out
    s_ptr,  # (n, r) out
    u_ptr,  # (n, r) out
    loop_end,  # D, see primitives
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_ENCODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SUBTRACT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_X: tl.constexpr,
    SAVE_S: tl.constexpr,
    SAVE_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    first, end = group_bounds(offsets_ptr, group, group_size, HAS_OFFSETS)
    first += tl.program_id(0) * BLOCK_N
    entry = group
    if HAS_SLOTS:
        entry = tl.load(slots_ptr + group)
        end = tl.where(entry < 0, 0, end)
    if first >= end:
        return
    index = first + tl.arange(0, BLOCK_N)
    inside = index < end
    rows = tl.load(rows_ptr + index, mask=inside, other=-1)
    live = rows >= 0
    bases = tl.where(live, rows, 0) * stride_row
    ranks = tl.arange(0, BLOCK_R)
    m_coeffs = inside[:, None] & (ranks < RANK)[None, :]
    matrix = entry * RANK * DIM

    if HAS_ENCODE:
        b_u = project(
            hidden_ptr, bases, stride_dim, live, encode_ptr + matrix, x_ptr, index, inside,
            loop_end, DIM, RANK, SAVE_X, BLOCK_N, BLOCK_R, BLOCK_D, DOT, PRECISION, STAGES, ACC,
        )  # fmt: skip
    else:
        b_u = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + entry * RANK + ranks, mask=ranks < RANK, other=0.0)
        b_u += bias.to(ACC)[None, :]
    b_s = activate(b_u, ACTIVATION)
    if SUBTRACT:
        b_s -= project(
            hidden_ptr, bases, stride_dim, live, decode_ptr + matrix, x_ptr, index, inside,
            loop_end, DIM, RANK, False, BLOCK_N, BLOCK_R, BLOCK_D, DOT, PRECISION, STAGES, ACC,
        )  # fmt: skip
    if HAS_SCALES:
        b_s *= tl.load(scales_ptr + group).to(ACC)
    coeffs = index[:, None] * RANK + ranks[None, :]
    if SAVE_U:
        tl.store(u_ptr + coeffs, b_u, mask=m_coeffs)
    if SAVE_S:
        # A missing row must add nothing to dR.
        tl.store(s_ptr + coeffs, tl.where(live[:, None], b_s, 0.0), mask=m_coeffs)

    for start in tl.range(0, loop_end, BLOCK_D, num_stages=STAGES):
        dims = start + tl.arange(0, BLOCK_D)
        m_row = live[:, None] & (dims < DIM)[None, :]
        target = hidden_ptr + bases[:, None] + dims.to(tl.int64)[None, :] * stride_dim
        b_h = tl.load(target, mask=m_row, other=0.0)
        b_r = load_matrix(decode_ptr + matrix, ranks, dims, DIM, RANK, ACC)
        b_y = b_h.to(ACC) + expand(b_s, b_r, BLOCK_R, DOT, PRECISION, ACC)
        tl.store(target, b_y.to(b_h.dtype), mask=m_row)
