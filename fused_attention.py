"""
Gated attention, fused: what gates.gated_attention computes, in Triton, in memory that grows with T, not T^2.

Nothing of shape (T, T) is ever stored. A program of the forward pass holds BLOCK queries and walks over the
keys up to the diagonal, STEP at a time. The softmax runs over all keys, whatever the gates say, so its
maximum m and denominator l are plain attention's, and only the sum of values is gated (FlashAttention-2 with
a z in it; Dao 2023, arXiv 2307.08691):

    m'   = max(m, max_j s_j)
    l'   = l   * e^(m - m') + sum_j e^(s_j - m')
    acc' = acc * e^(m - m') + sum_j e^(s_j - m') z_j v_j            after the last key: y = acc / l

Only y and lse = m + log(l) are kept; two backward passes, one over keys and one over queries, compute P =
e^(s - lse) anew. With s = q.k / sqrt(D), a = log_alpha = s + bias, z = z(a, u), y = sum_j P z v, and the
row's penalty C = sum_j c(a):

    d(Pz) = dy . v              dP = d(Pz) * z              dz = d(Pz) * P              dv = sum_i P z dy
    da    = dz * z'(a) + dC * c'(a)                         both derivatives at this edge alone
    ds    = P * (dP - sum_j P dP) = P * (dP - dy . y)       softmax, ungated; sum_j P z (dy . v) = dy . y
    dq    = sum_j (ds + da) k / sqrt(D),    dk = sum_i (ds + da) q / sqrt(D),    dbias = sum da

    here    s      a          z, z'     P z     C        c'             dC         l      dy . y  e^(m - m')
    there   score  score + b  z, slope  weight  penalty  penalty_slope  d_penalty  total  delta   shrink

(score, b and lse in units of log 2, since a GPU computes powers of two.) The noise u of an edge is a hash of
the seed and the edge's position: every pass draws the same again, whatever its blocks, and keeps nothing.

It exists for HardConcrete and Bernoulli, and for edge_penalty as gates.py has it: who edits these there edits
`gate_of` and `penalty_of` here, too, or takes --attention=reference; `disagreement` finds out.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl

import gates
from gates import AttentionStats, Bernoulli, HardConcrete
from support.command_line import UserError

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: on a CPU, slowly
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# ------------------------------------------------------------------------------------------------------------
# One edge: noise, gate, penalty. All elementwise, on tiles of any shape.


@triton.jit
def log2(x):
    if INTERPRET:
        return tl.log2(x)
    return tl.extra.libdevice.fast_log2f(x)  # one instruction; tl.log2 takes thirty


@triton.jit
def reciprocal(x):
    if INTERPRET:
        return 1 / x
    return tl.extra.libdevice.fast_dividef(1.0, x)  # likewise; 1 / x takes seven


@triton.jit
def mix(x):
    """A bijection of 32-bit integers: every bit of x moves every bit of the result (Wellons: lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed, row):
    """Two 32-bit keys of a row of edges. seed: int64; row: (batch * H + head) * T + query."""
    row, low, high = row.to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return mix(mix(row ^ low) + high), mix(mix(row ^ high ^ 0x5BD1E995) + low)


@triton.jit
def uniform(key, key2, j):
    """The noise of edges to the keys j: (2 n + 1) / 2^24 with 23 random bits n, never 0, 1/2 or 1."""
    x = key + j.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16) ^ key2) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    bits = (x >> 9) | 0x3F800000  # of a float in [1, 2)
    return bits.to(tl.float32, bitcast=True) - 0.99999994  # 1 - 2^-24; all these differences are exact


@triton.jit
def gate_of(log2_alpha, key, key2, j, GATE: tl.constexpr, TRAINING: tl.constexpr):
    """The gate z and its derivative by log_alpha. log2_alpha: log_alpha / log(2)."""
    BETA: tl.constexpr = GATE[0]
    GAMMA: tl.constexpr = GATE[1]
    ZETA: tl.constexpr = GATE[2]
    x = log2_alpha
    if TRAINING:
        u = uniform(key, key2, j)
        x = (x + (log2(u) - log2(1 - u))) * (1 / BETA)
    s = reciprocal(1 + tl.exp2(-x))
    if GATE[5] != 0:  # Bernoulli
        z = tl.where(x > 0, 1.0, 0.0)
        slope = s * (1 - s) if TRAINING else tl.zeros_like(s)
    else:
        stretched = s * (ZETA - GAMMA) + GAMMA
        z = tl.minimum(tl.maximum(stretched, 0.0), 1.0)
        factor = (ZETA - GAMMA) / BETA if TRAINING else ZETA - GAMMA
        slope = tl.where(z == stretched, s * (1 - s) * factor, 0.0)
        if not TRAINING:
            is_open = log2_alpha > GATE[3]
            z, slope = tl.where(is_open, z, 0.0), tl.where(is_open, slope, 0.0)
    return z, slope


@triton.jit
def penalty_of(log2_alpha, GATE: tl.constexpr):
    """The two parts of gates.edge_penalty, P(open) and softplus(log_alpha), the latter over log 2, and the
    derivative of their sum by log_alpha, p (1 - p) + sigmoid(log_alpha).

    No power of anything positive: with e = e^-|a|, sigmoid(a) = 1 / (1 + e) for a > 0, else e / (e + 1)."""
    K: tl.constexpr = GATE[4]
    e = tl.exp2(-tl.abs(log2_alpha))
    above, below = tl.where(log2_alpha > 0, 1.0, e), tl.where(log2_alpha > 0, e, 1.0)
    total, total_p = 1 + e, above + K * below
    series = e * (1 - e * (0.5 - e * (0.33333333 - e * 0.25))) * LOG2E  # log2(1 + e) for a small e
    softplus = tl.maximum(log2_alpha, 0.0) + tl.where(e < 0.05, series, log2(total))
    both = reciprocal(total * total_p)  # one reciprocal for two
    r = both * total
    return above * reciprocal(total_p), softplus, above * (K * below * r * r + both * total_p)


@triton.jit
def edge_gradients(
    score, b, d_weight, i, j, query, GATE: tl.constexpr, TRAINING: tl.constexpr, MASKED: tl.constexpr
):
    """A tile of edges -> weight = P z, ds + da, and da. b: the bias; query: from load_queries. i and what
    belongs to the queries have shape (M, 1) and j (1, N), or the other way round."""
    key, key2, lse, delta, d_penalty = query
    if MASKED:
        score = tl.where(j <= i, score, float("-inf"))  # as in forward_kernel
    p = tl.exp2(tl.minimum(score - lse, 0.0))  # another order of sums than forward: huge scores may differ
    z, slope = gate_of(score + b, key, key2, j, GATE, TRAINING)
    _, _, penalty_slope = penalty_of(score + b, GATE)
    dz = d_weight * p
    da = dz * slope + d_penalty * penalty_slope
    return p * z, dz * z - p * delta + da, da


# ------------------------------------------------------------------------------------------------------------
# The passes. A program is one head of one sequence (axis 0) and one block of its queries or keys (axis 1).

@triton.jit
def as_int(n):
    """n, as a loop takes it: the interpreter's own numbers are arrays, which NumPy 2.4 turns into no int."""
    if INTERPRET and isinstance(n, tl.tensor):
        return n.handle.data.item()
    return n


@triton.jit
def load_rows(x, i, stride, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i of a (T, D) matrix, zeros beyond its edges -> (len(i), BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(x + i[:, None] * stride + d, mask=(i[:, None] < T) & (d < D), other=0.0)


@triton.jit
def store_rows(x, value, i, stride, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(x + i[:, None] * stride + d, cast(value, x.dtype.element_ty), mask=(i[:, None] < T) & (d < D))


@triton.jit
def cast(x, dtype: tl.constexpr):
    if INTERPRET and dtype == tl.bfloat16:  # it cuts off the last bits: round them first
        x = ((x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b):
    """The matrix product, summed in float32."""
    if INTERPRET:  # it multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")  # of float32: as exact, on tensor cores


@triton.jit
def load_queries(seed, rows, head, i, T):
    """What edge_gradients takes of the queries i, in the shape of i; past the end zeros, which add nothing.
    rows: (3, B, H, T), namely lse, delta and d_penalty."""
    row, n_rows, inside = head * T + i, tl.num_programs(0) * T, i < T
    key, key2 = row_keys(tl.load(seed), row)
    lse = tl.load(rows + row, mask=inside, other=0.0)
    delta = tl.load(rows + n_rows + row, mask=inside, other=0.0)
    return key, key2, lse, delta, tl.load(rows + 2 * n_rows + row, mask=inside, other=0.0)


@triton.jit
def head_of(bias, stride_b, stride_h, H, T, D):
    """This program's head as batch * H + head, its bias, and where its matrices begin: in q, k and v, and in
    what these kernels write, which is laid out (B, T, H, D): strides T H D, D and, of a row, H D."""
    head = tl.program_id(0)
    batch, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    b = tl.load(bias + h).to(tl.float32) * LOG2E
    return head, b, batch * stride_b + h * stride_h, batch * (T * H * D) + h * D


@triton.jit
def forward_kernel(
    q, k, v, bias, seed, y, lse, penalty, figures, stride_b, stride_h, stride_t, H, T, scale,
    GATE: tl.constexpr, TRAINING: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """BLOCK queries: y, lse, and per query the sums over its keys of penalty; figures[0..2]: P(open), hard
    edges, softmax weight on hard edges."""
    head, b, at, y_at = head_of(bias, stride_b, stride_h, H, T, D)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK  # the longest rows first, for a short tail
    i = start + tl.arange(0, BLOCK)
    q_i = load_rows(q + at, i, stride_t, T, D, BLOCK_D)
    key, key2 = row_keys(tl.load(seed), head * T + i)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    zeros = tl.zeros([BLOCK], tl.float32)
    total, kept, hard, expected, cost = zeros, zeros, zeros, zeros, zeros
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    diagonal, end = start // STEP * STEP, tl.minimum(start + BLOCK, T)
    for MASKED in tl.static_range(2):  # blocks of keys before all these queries, then those on the diagonal
        for first in range(as_int(diagonal if MASKED else 0), as_int(end if MASKED else diagonal), STEP):
            j = first + tl.arange(0, STEP)
            k_j = load_rows(k + at, j, stride_t, T, D, BLOCK_D)
            v_j = load_rows(v + at, j, stride_t, T, D, BLOCK_D)
            score = dot(q_i, tl.trans(k_j)) * scale
            if MASKED:  # later keys: no weight, a closed gate, no penalty
                score = tl.where(j[None, :] <= i[:, None], score, float("-inf"))
            z, _ = gate_of(score + b, key[:, None], key2[:, None], j[None, :], GATE, TRAINING)
            p, softplus, _ = penalty_of(score + b, GATE)
            is_open = tl.where(score + b > GATE[3], 1.0, 0.0)
            m_new = tl.maximum(m, tl.max(score, 1))
            shrink = tl.exp2(m - m_new)
            e = tl.exp2(score - m_new[:, None])
            acc = acc * shrink[:, None] + dot(cast(e * z, v_j.dtype), v_j)
            total = total * shrink + tl.sum(e, 1)
            kept = kept * shrink + tl.sum(e * is_open, 1)
            hard += tl.sum(is_open, 1)
            expected += tl.sum(p, 1)
            cost += tl.sum(softplus, 1)
            m = m_new
    store_rows(y + y_at, acc / total[:, None], i, H * D, T, D, BLOCK_D)
    row, n_rows, inside = head * T + i, tl.num_programs(0) * T, i < T
    tl.store(lse + row, m + log2(total), mask=inside)
    tl.store(penalty + row, expected + cost * LN2, mask=inside)
    tl.store(figures + row, expected, mask=inside)
    tl.store(figures + n_rows + row, hard, mask=inside)
    tl.store(figures + 2 * n_rows + row, kept / total, mask=inside)


@triton.jit
def keys_kernel(
    q, k, v, bias, seed, dy, rows, dk, dv, dbias, stride_b, stride_h, stride_t, H, T, scale,
    GATE: tl.constexpr, TRAINING: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK keys, over the queries from the diagonal on: dk, dv, and dbias summed per key. Tiles
    are (keys, queries) here, so that the products need no transposed tile."""
    head, b, at, y_at = head_of(bias, stride_b, stride_h, H, T, D)
    start = tl.program_id(1) * BLOCK  # the first keys have the most queries
    j = start + tl.arange(0, BLOCK)
    k_j = load_rows(k + at, j, stride_t, T, D, BLOCK_D)
    v_j = load_rows(v + at, j, stride_t, T, D, BLOCK_D)
    dk_j, dv_j = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dbias_j = tl.zeros([BLOCK], tl.float32)
    diagonal = tl.cdiv(tl.minimum(start + BLOCK, T), STEP) * STEP  # queries from here on see all these keys
    for MASKED in tl.static_range(2):
        low, high = (start // STEP * STEP, diagonal) if MASKED else (diagonal, T)
        for first in range(as_int(low), as_int(high), STEP):
            i = first + tl.arange(0, STEP)
            q_i = load_rows(q + at, i, stride_t, T, D, BLOCK_D)
            dy_i = load_rows(dy + y_at, i, H * D, T, D, BLOCK_D)
            query = load_queries(seed, rows, head, i[None, :], T)
            score = dot(k_j, tl.trans(q_i)) * scale
            d_weight = dot(v_j, tl.trans(dy_i))
            weight, ds, da = edge_gradients(
                score, b, d_weight, i[None, :], j[:, None], query, GATE, TRAINING, MASKED
            )
            dv_j += dot(cast(weight, dy_i.dtype), dy_i)
            dk_j += dot(cast(ds, q_i.dtype), q_i)
            dbias_j += tl.sum(da, 1)
    store_rows(dk + y_at, dk_j * (scale * LN2), j, H * D, T, D, BLOCK_D)
    store_rows(dv + y_at, dv_j, j, H * D, T, D, BLOCK_D)
    tl.store(dbias + head * T + j, dbias_j, mask=j < T)


@triton.jit
def queries_kernel(
    q, k, v, bias, seed, dy, rows, dq, stride_b, stride_h, stride_t, H, T, scale,
    GATE: tl.constexpr, TRAINING: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK queries, over the keys up to the diagonal: dq."""
    head, b, at, y_at = head_of(bias, stride_b, stride_h, H, T, D)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK
    i = start + tl.arange(0, BLOCK)
    q_i = load_rows(q + at, i, stride_t, T, D, BLOCK_D)
    dy_i = load_rows(dy + y_at, i, H * D, T, D, BLOCK_D)
    query = load_queries(seed, rows, head, i[:, None], T)
    dq_i = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    diagonal, end = start // STEP * STEP, tl.minimum(start + BLOCK, T)
    for MASKED in tl.static_range(2):
        for first in range(as_int(diagonal if MASKED else 0), as_int(end if MASKED else diagonal), STEP):
            j = first + tl.arange(0, STEP)
            k_j = load_rows(k + at, j, stride_t, T, D, BLOCK_D)
            v_j = load_rows(v + at, j, stride_t, T, D, BLOCK_D)
            score = dot(q_i, tl.trans(k_j)) * scale
            d_weight = dot(dy_i, tl.trans(v_j))
            _, ds, _ = edge_gradients(
                score, b, d_weight, i[:, None], j[None, :], query, GATE, TRAINING, MASKED
            )
            dq_i += dot(cast(ds, k_j.dtype), k_j)
    store_rows(dq + y_at, dq_i * (scale * LN2), i, H * D, T, D, BLOCK_D)


@triton.jit
def noise_kernel(seed, u, n_rows, T, BLOCK: tl.constexpr):
    row, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key, key2 = row_keys(tl.load(seed), row)
    inside = (row[:, None] < n_rows) & (j[None, :] < T)
    noise = uniform(key[:, None], key2[:, None], j[None, :])
    tl.store(u + row[:, None].to(tl.int64) * T + j[None, :], noise, mask=inside)


# ------------------------------------------------------------------------------------------------------------
# From tensors to kernels

# By bytes per number: BLOCK, a program's own queries or keys, and STEP, what it walks over at a time: of
# those tried on an H200 the fastest or near it; in float32 small, to fit 100 kB of shared memory.
BLOCKS = {2: (64, 32), 4: (32, 32)}


def launch(kernel, inputs, others, gate, training):
    """Run a kernel for every head and every block of positions. inputs: q, k, v, bias, seed; others: the
    tensors that follow; gate: numbers_of(gate)."""
    q = inputs[0]
    B, H, T, D = q.shape
    block, step = BLOCKS[q.element_size()]
    columns = max(16, triton.next_power_of_2(D))  # of a tile that matrix products can take
    how = dict(GATE=tuple(gate), TRAINING=training, D=D, BLOCK_D=columns, BLOCK=block, STEP=step)
    grid = (B * H, triton.cdiv(T, block))
    numbers = *q.stride()[:3], H, T, D**-0.5 * LOG2E.value
    with torch.cuda.device_of(q):
        kernel[grid](*inputs, *others, *numbers, **how, num_warps=4, num_stages=2)


def alike(*tensors):
    """The tensors with the same strides, the last one 1: as they are if a model cut them from one matrix."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and all(t.stride() == strides for t in tensors):
        return tensors
    return [t.contiguous() for t in tensors]


def output_like(x):
    """Uninitialised (B, H, T, D), laid out (B, T, H, D): a model's next step then needs no copy."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


# Custom operators: torch.compile, which cannot look inside, learns from the fake versions what comes out.

INPUTS = "Tensor q, Tensor k, Tensor v, Tensor bias, Tensor seed, float[] gate, bool training"
FOUR = "(Tensor, Tensor, Tensor, Tensor)"
custom_op = partial(torch.library.custom_op, mutates_args=())


@custom_op("nanosparse::gated_attention", schema=f"({INPUTS}) -> {FOUR}")
def forward(q, k, v, bias, seed, gate, training):
    outputs = empty_outputs(q, k, v, bias, seed, gate, training)
    launch(forward_kernel, (*alike(q, k, v), bias, seed), outputs, gate, training)
    return outputs


@forward.register_fake
def empty_outputs(q, k, v, bias, seed, gate, training):
    """y (B, H, T, D), lse and penalty (B, H, T), figures (3, B, H, T)."""
    new = lambda *shape: q.new_empty(shape, dtype=torch.float32)
    return output_like(q), new(*q.shape[:3]), new(*q.shape[:3]), new(3, *q.shape[:3])


@custom_op(
    "nanosparse::gated_attention_backward",
    schema=f"({INPUTS}, Tensor y, Tensor lse, Tensor dy, Tensor d_penalty) -> {FOUR}",
)
def backward(q, k, v, bias, seed, gate, training, y, lse, dy, d_penalty):
    dq, dk, dv, _ = empty_gradients(q, k, v, bias)
    dbias, delta = torch.empty_like(lse), (dy.float() * y.float()).sum(dim=-1)  # (B, H, T) each
    rows = torch.stack([lse, delta, d_penalty])
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2)  # laid out as y
    inputs = (*alike(q, k, v), bias, seed)
    launch(keys_kernel, inputs, (dy, rows, dk, dv, dbias), gate, training)
    launch(queries_kernel, inputs, (dy, rows, dq), gate, training)
    return dq, dk, dv, dbias.sum(dim=(0, 2)).to(bias.dtype)


@backward.register_fake
def empty_gradients(q, k, v, bias, *others):
    return *map(output_like, (q, k, v)), torch.empty_like(bias)


def remember(ctx, inputs, output):
    *tensors, ctx.gate, ctx.training = inputs
    ctx.save_for_backward(*tensors, *output[:2])


def differentiate(ctx, dy, d_lse, d_penalty, d_figures):
    *tensors, y, lse = ctx.saved_tensors
    gradients = backward(*tensors, ctx.gate, ctx.training, y, lse, dy, d_penalty)
    return *gradients, None, None, None


forward.register_autograd(differentiate, setup_context=remember)


# ------------------------------------------------------------------------------------------------------------
# What the rest of the project calls


def gated_attention(q, k, v, bias, gate, training, seed=None):
    """gates.gated_attention, with noise drawn from seed: (1,) int64 on q's device, by default from PyTorch's
    generator there, so different in every layer, step and rank, and the same again under checkpointing.

    q, k, v: (B, H, T, D) with D <= 128, float32, bfloat16 or float16, and as many queries as keys. Sums are
    float32. Returns y: (B, H, T, D) and AttentionStats. Raises UserError for what the kernels do not know."""
    problem = unsupported(q, gate)
    if problem:
        raise UserError(f"fused attention {problem}: choose --attention=reference")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    if seed is None:
        seed = new_seed(q.device) if training else torch.zeros(1, dtype=torch.int64, device=q.device)
    y, _, penalty, figures = forward(q, k, v, bias.contiguous(), seed, numbers_of(gate), training)
    n_pairs = q.size(0) * q.size(2) * (q.size(2) + 1) // 2
    mean_over_pairs = lambda rows: rows.sum(dim=(0, 2)) / n_pairs  # (B, H, T) -> (H,)
    expected, hard, kept = figures.detach()
    empty, removed = (hard == 0).float().mean(dim=(0, 2)), 1 - kept.mean(dim=(0, 2))
    return y, AttentionStats(*map(mean_over_pairs, (penalty, expected, hard)), empty, removed)


def new_seed(device):
    return torch.randint(2**63 - 1, (1,), device=device)


def uniforms(seed, B, H, T):
    """The noise that gated_attention draws from seed, for gates.gated_attention: (B, H, T, T) float32."""
    u = torch.empty(B, H, T, T, device=seed.device)
    with torch.cuda.device_of(seed):
        noise_kernel[(triton.cdiv(B * H * T, 64), triton.cdiv(T, 64))](seed, u, B * H * T, T, BLOCK=64)
    return u


def numbers_of(gate):
    """A gate's constants: beta, gamma, zeta, the log_alpha above which it is open while evaluating (in units
    of log 2), K of its P(open) = sigmoid(log_alpha - log K), and whether it is Bernoulli."""
    if type(gate) is Bernoulli:
        return [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    s = (max(gate.cutoff, 0.0) - gate.gamma) / (gate.zeta - gate.gamma)  # the sigmoid at the cutoff
    threshold = math.log2(s / (1 - s)) if gate.cutoff < 1 else math.inf
    return [gate.beta, gate.gamma, gate.zeta, threshold, (-gate.gamma / gate.zeta) ** gate.beta, 0.0]


def unsupported(q, gate):
    """Why the kernels cannot be used, to be continued with what to do; empty if they can."""
    if q.device.type == "cpu" and not INTERPRET:
        return "needs a GPU"
    if type(gate) not in (HardConcrete, Bernoulli):
        return f"knows the gates HardConcrete and Bernoulli, not {type(gate).__name__}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.size(-1) > 128:
        return f"takes heads of up to 128 dimensions, not {q.size(-1)}"
    return ""


def disagreement(gate, device):
    """A sentence if the kernels do not compute what gates.py does, since that was edited; else empty."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dy = torch.randn(4, 1, 2, 16, 16, generator=generator, device=device)
    bias, seed = torch.tensor([-0.5, 0.5], device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def figures(attend, dtype, **noise):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v, bias)]
        y, stats = attend(*inputs, gate, True, **noise)
        gradients = torch.autograd.grad((y * dy).sum() + stats.penalty.sum(), inputs)
        return [y, *stats, *gradients, attend(*inputs, gate, False)[0]]

    ours = figures(gated_attention, torch.float32, seed=seed)
    theirs = figures(gates.gated_attention, torch.float64, u=uniforms(seed, 1, 2, 16).double())
    if all((a - b).abs().max() <= 1e-3 * b.abs().max() for a, b in zip(ours, theirs)):
        return ""
    return "computes another gate or penalty than gates.py, which was edited"
