"""
Gates on attention edges: which query may read which key, learned as a yes-or-no per edge.

An edge is one (layer, head, query i, key j <= i). Its gate is a random number z in [0, 1] that multiplies the attention
weight of the edge after the softmax:

    y_i = sum_j softmax(scores)_ij * z_ij * v_j,        scores_ij = q_i . k_j / sqrt(D).

The gate's logit says how likely it is open. It is the attention score itself plus a bias per head,

    log_alpha_ij = scores_ij + bias,

so the gates add no parameters but these, and the model opens and closes an edge by moving the query and the key. The
softmax runs over all keys and nothing is renormalised afterwards: a query may end with no edge at all, and then its head
writes zero. (Sparse Attention Post-Training for Mechanistic Interpretability, arXiv 2512.05865)

The gates may also see a query and a key of their own, of R dimensions per head (gate_q, gate_k below). That leaves fewer edges
open but lets a model close an edge and still learn from the key how much of the softmax it takes (results/gates.md).

A gate of your own is a class with the three methods of HardConcrete, added to GATES and chosen with --gate=NAME; its
`deterministic` must return exact zeros, or no edge ever counts as closed.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F


class HardConcrete:
    """A sigmoid with noise, stretched to (gamma, zeta) and clipped to [0, 1]: exact zeros and exact ones, each with
    positive probability, and a gradient in between. (Louizos, Welling, Kingma 2018, arXiv 1712.01312, section 2.2)

    All methods work elementwise on log_alpha, a float tensor of any shape, and return a tensor of that shape.
    cutoff is ours: while evaluating, a gate no larger than that counts as closed, and is.
    """

    def __init__(self, beta=2 / 3, gamma=-0.1, zeta=1.1, cutoff=0.0):
        self.beta, self.gamma, self.zeta, self.cutoff = beta, gamma, zeta, cutoff

    def _stretch(self, s):
        return F.hardtanh(s * (self.zeta - self.gamma) + self.gamma, 0, 1)  # clamp, with a cheaper backward pass

    def sample(self, log_alpha, u=None):
        """The gate while training: z = stretch(sigmoid((logit(u) + log_alpha) / beta)), u uniform on (0, 1)."""
        u = torch.rand_like(log_alpha) if u is None else u
        return self._stretch(torch.sigmoid((torch.logit(u) + log_alpha) / self.beta))

    def deterministic(self, log_alpha):
        """The gate while evaluating: no noise and no temperature. The edge is open where it is above zero."""
        return F.threshold(self._stretch(torch.sigmoid(log_alpha)), self.cutoff, 0.0)  # zero up to the cutoff

    def open_probability(self, log_alpha):
        """P(z != 0) = sigmoid(log_alpha - beta * log(-gamma / zeta)); summed over edges, their expected number."""
        return torch.sigmoid(log_alpha - self.beta * math.log(-self.gamma / self.zeta))


class Bernoulli:
    """The paper's own gate: a fair coin weighted by sigmoid(log_alpha), 0 or 1 in the forward pass, with the gradient of
    the sigmoid in the backward pass (straight-through). Same methods and shapes as HardConcrete."""

    def sample(self, log_alpha, u=None):
        """The gate while training: 1[x > 0] with x = log_alpha + logit(u), u uniform on (0, 1). Its gradient is not that
        of the step, which is zero, but that of sigmoid(x)."""
        u = torch.rand_like(log_alpha) if u is None else u
        x = log_alpha + torch.logit(u)
        soft = torch.sigmoid(x)
        return (x > 0).to(soft.dtype) + (soft - soft.detach())  # the bracket is zero, but its gradient is not

    def deterministic(self, log_alpha):
        """The gate while evaluating: 1[log_alpha > 0]."""
        return (log_alpha > 0).to(log_alpha.dtype)

    def open_probability(self, log_alpha):
        """P(z = 1) = sigmoid(log_alpha)."""
        return torch.sigmoid(log_alpha)


# With a cutoff of 1/2 both call an edge open where log_alpha > 0 (results/gates.md compares them).
GATES = {"hard_concrete": partial(HardConcrete, cutoff=0.5), "bernoulli": Bernoulli}


def edge_penalty(gate, log_alpha):
    """What one edge costs: its probability of being open, plus softplus(log_alpha) = log(1 + exp(log_alpha)). Same shape as
    log_alpha.

    The probability is the paper's penalty and what we want to be small, but it is flat near 1, and gates that start wide
    open would feel no pull. The softplus is ours: it pulls there with slope 1 and vanishes, like the probability, once the
    gate is closed."""
    return gate.open_probability(log_alpha) + F.softplus(log_alpha)


class AttentionStats(NamedTuple):
    """Figures of one layer's gates, each of shape (H,). Edges are fractions of the causal pairs, means over the batch."""

    penalty: torch.Tensor  # mean edge_penalty: what training lowers, the only one with a gradient
    expected_edges: torch.Tensor  # mean P(z != 0)
    hard_edges: torch.Tensor  # fraction whose deterministic gate is above zero: the number to quote
    empty_rows: torch.Tensor  # fraction of queries with no open edge
    mass_removed: torch.Tensor  # mean attention weight per query that closed edges took away


def causal_mask(n_queries, n_keys, device=None):
    """(n_queries, n_keys) bool, True where the key is not later than the query. The queries are the last n_queries of the
    n_keys positions, so that generation can ask for one new row."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def causal_scores(q, k):
    """q . k / sqrt(D) of every causal pair, (B, H, Tq, Tk), at least float32; hugely negative where causality forbids."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()  # the gates' noise needs more than 8 bits
    hugely_negative = torch.full(scores.shape[-2:], torch.finfo(scores.dtype).min / 2, dtype=scores.dtype, device=q.device)
    return scores + hugely_negative.triu(k.size(-2) - q.size(-2) + 1)  # faster than masked_fill, the backward pass above all


def attention_pattern(q, k, bias, gate_q=None, gate_k=None):
    """Softmax attention and the gates' logits, before any gate is applied.

    q: (B, H, Tq, D), k: (B, H, Tk, D), bias: (H,), gate_q, gate_k: (B, H, Tq or Tk, R) or None, as gated_attention takes
    them -> pattern, log_alpha, both (B, H, Tq, Tk). Where causality forbids an edge the pattern is zero and log_alpha hugely
    negative: a closed gate in every count.
    """
    scores = causal_scores(q, k)
    seen = scores if gate_q is None else causal_scores(gate_q, gate_k)
    return scores.softmax(dim=-1), seen + bias[:, None, None]


def gated_attention(q, k, v, bias, gate, training, u=None, gate_q=None, gate_k=None):
    """Causal attention with a gate on every edge; the reference that any faster path must reproduce.

    q, k, v: (B, H, T, D); bias: (H,); gate: one of GATES, an instance; training: sample the gates (True) or take the
    deterministic ones; u: (B, H, T, T) uniforms in (0, 1) to sample with, drawn if None; gate_q, gate_k: (B, H, T, R), what
    the gates see. The gates' logits are gate_q . gate_k / sqrt(R) + bias, or, without these, the scores q . k / sqrt(D) + bias.
    Returns y: (B, H, T, D) and AttentionStats. During generation q and gate_q may hold only the last positions.
    """
    pattern, log_alpha = attention_pattern(q, k, bias, gate_q, gate_k)
    z = gate.sample(log_alpha, u) if training else gate.deterministic(log_alpha)  # (B, H, T, T)
    y = (pattern * z).to(v.dtype) @ v
    return y, attention_stats(pattern, log_alpha, gate)


def attention_stats(pattern, log_alpha, gate):
    """AttentionStats of what attention_pattern returned."""
    B, H, Tq, Tk = log_alpha.shape
    n_pairs = B * Tq * (2 * Tk - Tq + 1) // 2

    def mean_over_pairs(x):
        return x.sum(dim=(0, 2, 3)) / n_pairs  # (H,); pairs that causality forbids are closed gates and add nothing

    # tril, since a penalty of yours need not vanish where a gate is closed
    penalty = mean_over_pairs(edge_penalty(gate, log_alpha).tril(Tk - Tq))
    with torch.no_grad():
        open_edges = gate.deterministic(log_alpha).sign()  # 1 open, 0 closed
        return AttentionStats(
            penalty=penalty,
            expected_edges=mean_over_pairs(gate.open_probability(log_alpha)),
            hard_edges=mean_over_pairs(open_edges),
            empty_rows=1 - open_edges.amax(dim=-1).mean(dim=(0, 2)),
            mass_removed=1 - (pattern * open_edges).sum(dim=-1).mean(dim=(0, 2)),
        )
