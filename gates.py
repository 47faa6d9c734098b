"""
Gates on attention edges: which query may read which key, learned edge by edge.

An edge is one (layer, head, query i, key j <= i). Its gate is a random number z in [0, 1] that multiplies
the edge's attention weight after the softmax:

    y_i = sum_j softmax(scores)_ij * z_ij * v_j,        scores_ij = q_i . k_j / sqrt(D)

The gate's logit is the attention score itself plus a bias per head. So the gates add one parameter per head,
and the model opens and closes an edge by moving the query and the key:

    log_alpha_ij = scores_ij + bias

The softmax runs over all keys and nothing is renormalised: a query with no open edge reads nothing, and its
head writes zero. (Sparse Attention Post-Training for Mechanistic Interpretability, arXiv 2512.05865)
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F


class HardConcrete:
    """A noisy sigmoid, stretched to (gamma, zeta) and clipped to [0, 1]: exact zeros and ones, each with
    positive probability, and a gradient in between. (Louizos, Welling, Kingma 2018, arXiv 1712.01312)

    Methods work elementwise on log_alpha, of any shape. cutoff is ours: in evaluation, gates up to it close;
    `GATES` takes 0.5."""

    def __init__(self, beta=2 / 3, gamma=-0.1, zeta=1.1, cutoff=0.0):
        self.beta, self.gamma, self.zeta, self.cutoff = beta, gamma, zeta, cutoff

    def stretch(self, s):
        return F.hardtanh(s * (self.zeta - self.gamma) + self.gamma, 0, 1)  # clamp, but faster backward

    def sample(self, log_alpha, u=None):
        """The gate in training: z = stretch(sigmoid((logit(u) + log_alpha) / beta)), u uniform on (0, 1)."""
        u = torch.rand_like(log_alpha) if u is None else u
        return self.stretch(torch.sigmoid((torch.logit(u) + log_alpha) / self.beta))

    def deterministic(self, log_alpha):
        """The gate in evaluation: no noise, no temperature; zero up to the cutoff. Open means above zero."""
        return F.threshold(self.stretch(torch.sigmoid(log_alpha)), self.cutoff, 0.0)

    def open_probability(self, log_alpha):
        """P(z != 0) = sigmoid(log_alpha - beta * log(-gamma / zeta))."""
        return torch.sigmoid(log_alpha - self.beta * math.log(-self.gamma / self.zeta))


class Bernoulli:
    """The paper's own gate: a coin that is 1 with probability sigmoid(log_alpha). Same methods."""

    def sample(self, log_alpha, u=None):
        """The gate in training: 1[x > 0] with x = log_alpha + logit(u), u uniform on (0, 1). A step has no
        gradient: the backward pass takes that of sigmoid(x) instead (straight-through)."""
        u = torch.rand_like(log_alpha) if u is None else u
        x = log_alpha + torch.logit(u)
        soft = torch.sigmoid(x)
        return (x > 0).to(soft.dtype) + (soft - soft.detach())  # the bracket is zero, its gradient is not

    def deterministic(self, log_alpha):
        """The gate in evaluation: 1[log_alpha > 0]."""
        return (log_alpha > 0).to(log_alpha.dtype)

    def open_probability(self, log_alpha):
        """P(z = 1) = sigmoid(log_alpha)."""
        return torch.sigmoid(log_alpha)


# What --gate chooses from; add your own. With a cutoff of 1/2 both are open where log_alpha > 0.
GATES = {"hard_concrete": partial(HardConcrete, cutoff=0.5), "bernoulli": Bernoulli}


def edge_penalty(gate, log_alpha):
    """What one edge costs: P(open) + softplus(log_alpha). Same shape as log_alpha.

    The probability is the paper's penalty, but it is flat near 1: gates that start wide open would feel no
    pull. The softplus is ours. It pulls there with slope 1, and fades where the gate is closed anyway."""
    return gate.open_probability(log_alpha) + F.softplus(log_alpha)


def head_penalty(cost, price, scale=0.003):
    """What a head costs whose edges cost `cost` on average: cost + price * log(1 + cost / scale). Same shape
    as cost.

    The logarithm is ours (a log-sum penalty: Candes, Wakin, Boyd 2008, arXiv 0711.1612): where few edges are
    open, one more costs most. So what two heads do with a few edges each moves into one of them, and the
    other closes as a whole."""
    return cost + price * torch.log1p(cost / scale)


class AttentionStats(NamedTuple):
    """Figures of one layer's gates, each (H,): means over the batch, edges as fractions of causal pairs."""

    penalty: torch.Tensor  # mean edge_penalty, the only one with a gradient: head_penalty makes it a cost
    expected_edges: torch.Tensor  # mean P(open)
    hard_edges: torch.Tensor  # fraction whose deterministic gate is above zero: the number to quote
    empty_rows: torch.Tensor  # fraction of queries with no open edge
    mass_removed: torch.Tensor  # mean attention weight per query that closed edges take away


def causal_scores(q, k):
    """q . k / sqrt(D), (B, H, Tq, Tk), at least float32; hugely negative where the key is later."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()  # the gates' noise needs more than 8 bits
    hugely_negative = torch.full_like(scores[0, 0], torch.finfo(scores.dtype).min / 2)
    return scores + hugely_negative.triu(k.size(-2) - q.size(-2) + 1)  # faster backward than masked_fill


def attention_pattern(q, k, bias):
    """q: (B, H, Tq, D), k: (B, H, Tk, D), bias: (H,) -> the softmax before any gate, and log_alpha, both
    (B, H, Tq, Tk). Where the key is later, the weight is zero and log_alpha hugely negative: never open."""
    scores = causal_scores(q, k)
    return scores.softmax(dim=-1), scores + bias[:, None, None]


def gated_attention(q, k, v, bias, gate, training, u=None):
    """Causal attention with a gate on every edge; the reference for every faster path.

    q, k, v: (B, H, T, D); bias: (H,); gate: an instance of one of GATES; training: sample the gates, or take
    the deterministic ones; u: (B, H, T, T) uniforms to sample with, drawn if None. q may hold the last
    positions only. Returns y (B, H, T, D) and AttentionStats."""
    pattern, log_alpha = attention_pattern(q, k, bias)
    z = gate.sample(log_alpha, u) if training else gate.deterministic(log_alpha)  # (B, H, T, T)
    y = (pattern * z).to(v.dtype) @ v
    return y, attention_stats(pattern, log_alpha, gate)


def attention_stats(pattern, log_alpha, gate):
    """AttentionStats of what attention_pattern returned."""
    B, H, Tq, Tk = log_alpha.shape
    n_pairs = B * Tq * (2 * Tk - Tq + 1) // 2
    mean_over_pairs = lambda x: x.tril(Tk - Tq).sum(dim=(0, 2, 3)) / n_pairs  # (H,)
    penalty = mean_over_pairs(edge_penalty(gate, log_alpha))
    with torch.no_grad():
        edges = gate.deterministic(log_alpha).sign()  # 1 open, 0 closed
        expected, hard = mean_over_pairs(gate.open_probability(log_alpha)), mean_over_pairs(edges)
        empty = 1 - edges.amax(dim=-1).mean(dim=(0, 2))
        removed = 1 - (pattern * edges).sum(dim=-1).mean(dim=(0, 2))
    return AttentionStats(penalty, expected, hard, empty, removed)
