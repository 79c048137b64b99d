"""Backward kernels, for upstream v on an edited row:

    ds = R v    du = ds · act′(u)    dh = v + Aᵀ du − σ Rᵀ ds
    dA = Σ du hᵀ    db = Σ du    dR = Σ s vᵀ − σ Σ ds hᵀ

``edit_codes_grad_kernel`` finds du and ds, r numbers a row, with the grid of the forward kernel.
Bytes: n·D·e read; flops 2·n·r·D.
``edit_columns_grad_kernel`` does the rest: a program owns BLOCK_D columns of one group and walks
over its rows, so each v is read once, for dR and for dh, which replaces it where it stands, and
nothing is added atomically: two runs agree bit for bit. Bytes: 2·n·D·e read, n·D·e written,
2·r·D·4 written (times the number of splits of the row loop; their partial sums lie behind one
another, and PyTorch adds them in one reduction, in a fixed order); flops 6·n·r·D. Together 4·n·D·e:
v twice, h once, dh once.
"""

import triton
import triton.language as tl

from reft_kernels._triton.primitives import activation_slope, decoded, load_matrix, project


@triton.jit
def edit_codes_grad_kernel(
    grad_ptr,  # (N, D) upstream v
    grad_stride_row,
    grad_stride_dim,
    rows_ptr,  # (n,) int64, −1 for none
    offsets_ptr,  # (g + 1,) int64
    decode_ptr,  # (g, r, D)
    u_ptr,  # (n, r)
    du_ptr,  # (n, r) out
    ds_ptr,  # (n, r) out
    loop_end,  # D, see primitives
    DIM: tl.constexpr,
    RANK: tl.constexpr,
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
    end = tl.load(offsets_ptr + group + 1)
    places = tl.load(offsets_ptr + group) + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = places < end
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    rows = tl.load(rows_ptr + places, mask=inside, other=-1)
    live = rows >= 0
    bases = tl.where(live, rows, 0) * grad_stride_row
    ranks = tl.arange(0, BLOCK_R)
    m_code = inside[:, None] & (ranks < RANK)[None, :]
    matrix = group * RANK * DIM

    # Rows that are not live read as 0, so their ds and du are 0 and add nothing to any gradient.
    b_ds = project(
        grad_ptr, bases, grad_stride_dim, live, decode_ptr + matrix, grad_ptr, places, inside,
        loop_end, DIM, RANK, False, BLOCK_N, BLOCK_R, BLOCK_D, DOT, PRECISION, STAGES, ACC,
    )  # fmt: skip
    code = places[:, None] * RANK + ranks[None, :]
    if ACTIVATION == "":
        b_du = b_ds
    else:
        b_u = tl.load(u_ptr + code, mask=m_code, other=0.0)
        b_du = b_ds * activation_slope(b_u, ACTIVATION)
    if SAVE_DU:
        tl.store(du_ptr + code, b_du, mask=m_code)
    if SAVE_DS:
        tl.store(ds_ptr + code, b_ds, mask=m_code)


@triton.jit
def _outer_sum(
    total, b_code, b_rows, DOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """total + codeᵀ rows: [BLOCK_R, BLOCK_D] from [BLOCK_N, BLOCK_R] and [BLOCK_N, BLOCK_D]."""
    if DOT:
        return tl.dot(tl.trans(b_code), b_rows, total, input_precision=PRECISION, out_dtype=ACC)
    else:
        return total + tl.sum(b_code[:, :, None] * b_rows[:, None, :], axis=0)


@triton.jit
def edit_columns_grad_kernel(
    grad_ptr,  # (N, D) upstream v
    grad_stride_row,
    grad_stride_dim,
    out_ptr,  # (N, D) contiguous, v itself or a copy of it, whose edited rows become dh
    rows_ptr,  # (n,) int64, −1 for none
    offsets_ptr,  # (g + 1,) int64
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
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    first = tl.load(offsets_ptr + group) + split * BLOCK_N
    end = tl.load(offsets_ptr + group + 1)
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_dims = (dims < DIM)[None, :]
    ranks = tl.arange(0, BLOCK_R)
    m_ranks = (ranks < RANK)[None, :]
    matrix = group * RANK * DIM
    if WRITE_ROWS:
        b_a = load_matrix(encode_ptr + matrix, dims, DIM, RANK, BLOCK_R, ACC)
        if SUBTRACT:
            b_r = load_matrix(decode_ptr + matrix, dims, DIM, RANK, BLOCK_R, ACC)

    b_da = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    b_dr = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    b_db = tl.zeros((BLOCK_R,), ACC)
    for start in tl.range(first, end, BLOCK_N * tl.num_programs(2), num_stages=STAGES):
        places = start + tl.arange(0, BLOCK_N)
        inside = places < end
        code = places[:, None] * RANK + ranks[None, :]
        m_code = inside[:, None] & m_ranks
        if WANT_ENCODE or WANT_BIAS or WRITE_ROWS:
            b_du = tl.load(du_ptr + code, mask=m_code, other=0.0)
        if WANT_BIAS:
            b_db += tl.sum(b_du, axis=0)
        if SUBTRACT:
            b_ds = tl.load(ds_ptr + code, mask=m_code, other=0.0)
        if WANT_ENCODE or (SUBTRACT and WANT_DECODE):
            b_x = tl.load(
                x_ptr + places[:, None] * DIM + dims[None, :],
                mask=inside[:, None] & m_dims,
                other=0.0,
            ).to(ACC)
        if WANT_ENCODE:
            b_da = _outer_sum(b_da, b_du, b_x, DOT, PRECISION, ACC)
        if WANT_DECODE or WRITE_ROWS:
            rows = tl.load(rows_ptr + places, mask=inside, other=-1)
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
            b_s = tl.load(s_ptr + code, mask=m_code, other=0.0)
            b_dr = _outer_sum(b_dr, b_s, b_v.to(ACC), DOT, PRECISION, ACC)
            if SUBTRACT:
                b_dr = _outer_sum(b_dr, -b_ds, b_x, DOT, PRECISION, ACC)
        if WRITE_ROWS:
            b_dh = b_v.to(ACC) + decoded(b_du, b_a, BLOCK_R, DOT, PRECISION, ACC)
            if SUBTRACT:
                b_dh -= decoded(b_ds, b_r, BLOCK_R, DOT, PRECISION, ACC)
            # No other program reads these columns of these rows.
            tl.store(
                out_ptr + safe_rows[:, None] * DIM + dims[None, :], b_dh.to(b_v.dtype), mask=m_row
            )

    sums = split * split_stride
    element = sums + matrix + ranks.to(tl.int64)[:, None] * DIM + dims[None, :]
    m_element = (ranks < RANK)[:, None] & m_dims
    if WANT_ENCODE:
        tl.store(d_encode_ptr + element, b_da, mask=m_element)
    if WANT_DECODE:
        tl.store(d_decode_ptr + element, b_dr, mask=m_element)
    if WANT_BIAS and tl.program_id(0) == 0:
        tl.store(d_bias_ptr + sums + group * RANK + ranks, b_db, mask=ranks < RANK)
