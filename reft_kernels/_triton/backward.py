"""Backward kernels, for upstream v on an edited row:

    ds = R v    du = ds · act′(u)    dh = v + Aᵀ du − σ Rᵀ ds
    dA = Σ du hᵀ    db = Σ du    dR = Σ s vᵀ − σ Σ ds hᵀ

``edit_rows_grad_kernel`` computes du and ds, r numbers a row, on the grid of the forward kernel.
Bytes: n·D·e read; flops 2·n·r·D.

``edit_params_grad_kernel`` computes dA, db, dR and dh. A program owns BLOCK_D columns of one group
and loops over its rows. Each v is read once, for dR and for dh, which is written over it. Nothing
is added atomically: two runs agree bit for bit. Bytes: 2·n·D·e read, n·D·e written, 2·r·D·4 written
per split of the row loop; flops 6·n·r·D, three times that on the matrix units. The partial sums of
one split follow those of another in memory, and PyTorch adds them in one reduction, in a fixed
order.

Together 4·n·D·e: v twice, h once, dh once. Ranks above BLOCK_R (32) are taken in passes, and each
pass reads v and h again.
"""

import triton
import triton.language as tl

from reft_kernels._triton.primitives import (
    activation_slope,
    expand,
    group_bounds,
    load_matrix,
    project,
)


@triton.jit(do_not_specialize=["group_size"])
def edit_rows_grad_kernel(
    grad_ptr,  # (N, D) upstream v
    grad_stride_row,
    grad_stride_dim,
    rows_ptr,  # (n,) int64, −1 for none
    offsets_ptr,  # (g + 1,) int64, if HAS_OFFSETS
    group_size,  # rows of every group, if not
    decode_ptr,  # (g, r, D)
    u_ptr,  # (n, r)
    du_ptr,  # (n, r) out
    ds_ptr,  # (n, r) out
    loop_end,  # D, see primitives
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_DU: tl.constexpr,
    SAVE_DS: tl.constexpr,
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
    if first >= end:
        return
    index = first + tl.arange(0, BLOCK_N)
    inside = index < end
    rows = tl.load(rows_ptr + index, mask=inside, other=-1)
    live = rows >= 0
    bases = tl.where(live, rows, 0) * grad_stride_row
    ranks = tl.arange(0, BLOCK_R)
    m_coeffs = inside[:, None] & (ranks < RANK)[None, :]
    matrix = group * RANK * DIM

    # Missing rows read as 0: their ds and du are 0 and add nothing to any gradient.
    b_ds = project(
        grad_ptr, bases, grad_stride_dim, live, decode_ptr + matrix, grad_ptr, index, inside,
        loop_end, DIM, RANK, False, BLOCK_N, BLOCK_R, BLOCK_D, DOT, PRECISION, STAGES, ACC,
    )  # fmt: skip
    coeffs = index[:, None] * RANK + ranks[None, :]
    if ACTIVATION == "":
        b_du = b_ds
    else:
        b_u = tl.load(u_ptr + coeffs, mask=m_coeffs, other=0.0)
        b_du = b_ds * activation_slope(b_u, ACTIVATION)
    if SAVE_DU:
        tl.store(du_ptr + coeffs, b_du, mask=m_coeffs)
    if SAVE_DS:
        tl.store(ds_ptr + coeffs, b_ds, mask=m_coeffs)


@triton.jit
def _outer_sum(
    total, b_coeffs, b_rows, DOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """total + coeffsᵀ rows: [BLOCK_R, BLOCK_D] from [BLOCK_N, BLOCK_R] and [BLOCK_N, BLOCK_D]."""
    if DOT:
        return tl.dot(tl.trans(b_coeffs), b_rows, total, input_precision=PRECISION, out_dtype=ACC)
    else:
        return total + tl.sum(b_coeffs[:, :, None] * b_rows[:, None, :], axis=0)


@triton.jit
def _params_pass(
    grad_ptr,
    grad_stride_row,
    grad_stride_dim,
    out_ptr,
    rows_ptr,
    encode_ptr,  # (r, D) of this group
    decode_ptr,  # (r, D) of this group
    x_ptr,
    s_ptr,
    du_ptr,
    ds_ptr,
    d_encode_ptr,  # (r, D) out, of this group and split
    d_bias_ptr,  # (r,) out, of this group and split
    d_decode_ptr,  # (r, D) out, of this group and split
    first,  # first index of this split
    end,  # one past the last index of the group
    rank_start,  # first of the BLOCK_R ranks of this pass
    rank_end,  # r, as a run-time number
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    WANT_ENCODE: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    WANT_DECODE: tl.constexpr,
    SUBTRACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute the gradients of BLOCK_R ranks in BLOCK_D columns from all rows of a split, and with
    WRITE_ROWS also dh, from all ranks."""
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_dims = (dims < DIM)[None, :]
    ranks = rank_start + tl.arange(0, BLOCK_R)
    m_ranks = (ranks < RANK)[None, :]
    if WRITE_ROWS and RANK <= BLOCK_R:
        b_a = load_matrix(encode_ptr, ranks, dims, DIM, RANK, ACC)
        if SUBTRACT:
            b_r = load_matrix(decode_ptr, ranks, dims, DIM, RANK, ACC)

    b_da = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    b_dr = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    b_db = tl.zeros((BLOCK_R,), ACC)
    for start in tl.range(first, end, BLOCK_N * tl.num_programs(2), num_stages=STAGES):
        index = start + tl.arange(0, BLOCK_N)
        inside = index < end
        coeffs = index[:, None] * RANK + ranks[None, :]
        m_coeffs = inside[:, None] & m_ranks
        if WANT_ENCODE or WANT_BIAS or WRITE_ROWS:
            b_du = tl.load(du_ptr + coeffs, mask=m_coeffs, other=0.0)
        if WANT_BIAS:
            b_db += tl.sum(b_du, axis=0)
        if SUBTRACT:
            b_ds = tl.load(ds_ptr + coeffs, mask=m_coeffs, other=0.0)
        if WANT_ENCODE or (SUBTRACT and WANT_DECODE):
            b_x = tl.load(
                x_ptr + index[:, None] * DIM + dims[None, :],
                mask=inside[:, None] & m_dims,
                other=0.0,
            ).to(ACC)
        if WANT_ENCODE:
            b_da = _outer_sum(b_da, b_du, b_x, DOT, PRECISION, ACC)
        if WANT_DECODE or WRITE_ROWS:
            rows = tl.load(rows_ptr + index, mask=inside, other=-1)
            live = rows >= 0
            safe_rows = tl.where(live, rows, 0)
            m_row = live[:, None] & m_dims
            b_v = tl.load(
                grad_ptr
                + safe_rows[:, None] * grad_stride_row
                + dims.to(tl.int64)[None, :] * grad_stride_dim,
                mask=m_row,
                other=0.0,
            )
        if WANT_DECODE:
            b_s = tl.load(s_ptr + coeffs, mask=m_coeffs, other=0.0)
            b_dr = _outer_sum(b_dr, b_s, b_v.to(ACC), DOT, PRECISION, ACC)
            if SUBTRACT:
                b_dr = _outer_sum(b_dr, -b_ds, b_x, DOT, PRECISION, ACC)
        if WRITE_ROWS:
            b_dh = b_v.to(ACC)
            if RANK <= BLOCK_R:
                b_dh += expand(b_du, b_a, BLOCK_R, DOT, PRECISION, ACC)
                if SUBTRACT:
                    b_dh -= expand(b_ds, b_r, BLOCK_R, DOT, PRECISION, ACC)
            else:
                for part in tl.range(0, rank_end, BLOCK_R, num_stages=1):
                    part_ranks = part + tl.arange(0, BLOCK_R)
                    part_coeffs = index[:, None] * RANK + part_ranks[None, :]
                    m_part = inside[:, None] & (part_ranks < RANK)[None, :]
                    b_coeffs = tl.load(du_ptr + part_coeffs, mask=m_part, other=0.0)
                    b_m = load_matrix(encode_ptr, part_ranks, dims, DIM, RANK, ACC)
                    b_dh += expand(b_coeffs, b_m, BLOCK_R, DOT, PRECISION, ACC)
                    if SUBTRACT:
                        b_coeffs = tl.load(ds_ptr + part_coeffs, mask=m_part, other=0.0)
                        b_m = load_matrix(decode_ptr, part_ranks, dims, DIM, RANK, ACC)
                        b_dh -= expand(b_coeffs, b_m, BLOCK_R, DOT, PRECISION, ACC)
            # No other program reads these columns of these rows, and v is not needed any more.
            tl.store(
                out_ptr + safe_rows[:, None] * DIM + dims[None, :], b_dh.to(b_v.dtype), mask=m_row
            )

    element = ranks.to(tl.int64)[:, None] * DIM + dims[None, :]
    m_element = (ranks < RANK)[:, None] & m_dims
    if WANT_ENCODE:
        tl.store(d_encode_ptr + element, b_da, mask=m_element)
    if WANT_DECODE:
        tl.store(d_decode_ptr + element, b_dr, mask=m_element)
    if WANT_BIAS and tl.program_id(0) == 0:
        tl.store(d_bias_ptr + ranks, b_db, mask=ranks < RANK)


@triton.jit(do_not_specialize=["group_size", "rank_end"])
def edit_params_grad_kernel(
    grad_ptr,  # (N, D) upstream v
    grad_stride_row,
    grad_stride_dim,
    out_ptr,  # (N, D) contiguous, v or a copy of v; its edited rows become dh
    rows_ptr,  # (n,) int64, −1 for none
    offsets_ptr,  # (g + 1,) int64, if HAS_OFFSETS
    group_size,  # rows of every group, if not
    encode_ptr,  # (g, r, D)
    decode_ptr,  # (g, r, D)
    x_ptr,  # (n, D) rows before the edit
    s_ptr,  # (n, r)
    du_ptr,  # (n, r)
    ds_ptr,  # (n, r)
    d_encode_ptr,  # (g, r, D) out, of the first split
    d_bias_ptr,  # (g, r) out
    d_decode_ptr,  # (g, r, D) out
    split_stride,  # elements from the sums of one split to those of the next
    rank_end,  # r, see primitives on loop_end
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    WANT_ENCODE: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    WANT_DECODE: tl.constexpr,
    SUBTRACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    first, end = group_bounds(offsets_ptr, group, group_size, HAS_OFFSETS)
    first += split * BLOCK_N
    matrix = group * RANK * DIM
    sums = split * split_stride
    # Only the last pass writes dh: the earlier ones still need v.
    last: tl.constexpr = (RANK - 1) // BLOCK_R * BLOCK_R
    if last > 0:
        for start in tl.range(0, rank_end - BLOCK_R, BLOCK_R, num_stages=1):
            _params_pass(
                grad_ptr, grad_stride_row, grad_stride_dim, out_ptr, rows_ptr, encode_ptr + matrix,
                decode_ptr + matrix, x_ptr, s_ptr, du_ptr, ds_ptr, d_encode_ptr + sums + matrix,
                d_bias_ptr + sums + group * RANK, d_decode_ptr + sums + matrix, first, end, start,
                rank_end, DIM, RANK, False, WANT_ENCODE, WANT_BIAS, WANT_DECODE, SUBTRACT, BLOCK_N,
                BLOCK_R, BLOCK_D, DOT, PRECISION, STAGES, ACC,
            )  # fmt: skip
    _params_pass(
        grad_ptr, grad_stride_row, grad_stride_dim, out_ptr, rows_ptr, encode_ptr + matrix,
        decode_ptr + matrix, x_ptr, s_ptr, du_ptr, ds_ptr, d_encode_ptr + sums + matrix,
        d_bias_ptr + sums + group * RANK, d_decode_ptr + sums + matrix, first, end, last, rank_end,
        DIM, RANK, WRITE_ROWS, WANT_ENCODE, WANT_BIAS, WANT_DECODE, SUBTRACT, BLOCK_N, BLOCK_R,
        BLOCK_D, DOT, PRECISION, STAGES, ACC,
    )  # fmt: skip
