"""Gates and gated attention against closed forms, finite differences and plain attention."""

import math

import pytest
import torch
import torch.nn.functional as F

import gates
from gates import GATES, Bernoulli, HardConcrete, attention_stats, gated_attention, head_penalty

BOTH = pytest.mark.parametrize("gate", [HardConcrete(), Bernoulli()], ids=["hard_concrete", "bernoulli"])
LOG_ALPHAS = [-4.0, -2.4, -1.0, 0.0, 0.7, 3.0]


def qkv(B=2, H=3, T=5, D=4, dtype=torch.float32):
    return [torch.randn(B, H, T, D, dtype=dtype) for _ in range(3)]


@BOTH
@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_open_probability_is_the_frequency_of_nonzero_samples(gate, log_alpha):
    n = 200_000
    frequency = (gate.sample(torch.full((n,), log_alpha)) != 0).double().mean().item()
    p = gate.open_probability(torch.tensor(log_alpha)).item()
    assert abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / n), "not the gate of open_probability()"


def test_bernoulli_is_zero_or_one():
    assert set(Bernoulli().sample(torch.randn(10_000)).tolist()) == {0.0, 1.0}


def test_hard_concrete_follows_the_paper_formula():
    """Louizos et al. 2018, equations 10 and 11, written out with math."""
    beta, gamma, zeta = 2 / 3, -0.1, 1.1
    for u, log_alpha in [(0.3, 0.5), (0.9, -1.0), (0.5, 4.0), (0.05, -3.0)]:
        s = 1 / (1 + math.exp(-(math.log(u / (1 - u)) + log_alpha) / beta))
        z = min(1.0, max(0.0, s * (zeta - gamma) + gamma))
        got = HardConcrete().sample(*torch.tensor([log_alpha, u], dtype=torch.float64)).item()
        assert got == pytest.approx(z, abs=1e-12)
        s = 1 / (1 + math.exp(-log_alpha))
        z = min(1.0, max(0.0, s * (zeta - gamma) + gamma))
        got = HardConcrete().deterministic(torch.tensor(log_alpha, dtype=torch.float64)).item()
        assert got == pytest.approx(z, abs=1e-12)


def test_the_models_hard_concrete_gate_is_open_where_bernoullis_is():
    """The cutoff of one half changes nothing but the deterministic gates up to it."""
    gate, plain, log_alpha = GATES["hard_concrete"](), HardConcrete(), torch.linspace(-6, 6, 2401)
    z = gate.deterministic(log_alpha)
    assert torch.equal(z > 0, Bernoulli().deterministic(log_alpha) > 0)
    assert torch.equal(z[z > 0], plain.deterministic(log_alpha)[z > 0]) and z[z > 0].min() >= 0.5
    u = torch.rand(2401)
    assert torch.equal(gate.sample(log_alpha, u), plain.sample(log_alpha, u))


def test_noise_at_the_ends_of_the_unit_interval_is_harmless():
    for gate in (HardConcrete(), Bernoulli()):
        log_alpha = torch.tensor([0.0, 0.0], requires_grad=True)
        z = gate.sample(log_alpha, torch.tensor([0.0, 1.0]))
        z.sum().backward()
        assert z.tolist() == [0.0, 1.0] and log_alpha.grad.isfinite().all()


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_wide_open_gates_give_plain_attention(gate, training):
    q, k, v = qkv()
    y, stats = gated_attention(q, k, v, torch.full((3,), 100.0), gate, training)
    assert (y - F.scaled_dot_product_attention(q, k, v, is_causal=True)).abs().max() < 1e-6
    assert (stats.hard_edges == 1).all() and (stats.empty_rows == 0).all()
    assert stats.mass_removed.abs().max() < 1e-6


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_closed_gates_write_zero_and_have_finite_gradients(gate, training):
    inputs = [t.requires_grad_() for t in qkv()] + [torch.full((3,), -100.0, requires_grad=True)]
    y, stats = gated_attention(*inputs, gate, training)
    (y.square().sum() + stats.penalty.sum()).backward()
    assert (y == 0).all()
    assert all(t.grad.isfinite().all() for t in inputs)
    assert (stats.hard_edges == 0).all() and (stats.empty_rows == 1).all()
    assert torch.allclose(stats.mass_removed, torch.ones(3))


@BOTH
def test_no_position_sees_a_later_one(gate):
    q, k, v = qkv()
    u = torch.rand(2, 3, 5, 5)
    bias = torch.ones(3)
    y, _ = gated_attention(q, k, v, bias, gate, True, u)
    for t in (q, k, v):
        t[:, :, 3:] += 10
    changed, _ = gated_attention(q, k, v, bias, gate, True, u)
    assert torch.equal(y[:, :, :3], changed[:, :, :3])
    assert not torch.equal(y[:, :, 3:], changed[:, :, 3:])


@pytest.mark.parametrize("training", [True, False])
def test_hard_concrete_gradients_are_those_of_finite_differences(training):
    gate = HardConcrete()
    q, k, v = qkv(1, 2, 4, 3, torch.float64)
    bias = torch.tensor([0.3, -0.5], dtype=torch.float64)
    u = torch.rand(1, 2, 4, 4, dtype=torch.float64)

    def scalar(q, k, v, bias):
        y, stats = gated_attention(q, k, v, bias, gate, training, u)
        return (y * weights).sum() + stats.penalty.sum()

    weights = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (q, k, v, bias)]
    assert torch.autograd.gradcheck(scalar, inputs, eps=1e-6, atol=1e-6)


def test_bernoulli_gradient_is_that_of_its_surrogate():
    """The stated surrogate: forward 1[x > 0], backward as if z were sigmoid(x). So d/dz of the rest is taken
    at the hard gates, and dz/dx is sigmoid'(x)."""
    q, k, v = qkv(1, 2, 4, 3, torch.float64)
    bias = torch.tensor([0.3, -0.5], dtype=torch.float64)
    u = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    weights = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (q, k, v, bias)]
    y, _ = gated_attention(*inputs, Bernoulli(), True, u)
    got = torch.autograd.grad((y * weights).sum(), inputs)

    scores = q @ k.transpose(-2, -1) / math.sqrt(3)
    pattern = scores.masked_fill(~torch.ones(4, 4).tril().bool(), -math.inf).softmax(-1)
    x = (scores + bias[:, None, None] + torch.log(u / (1 - u))).detach()
    hard, slope = (x > 0).double(), torch.sigmoid(x) * (1 - torch.sigmoid(x))
    log_alpha = scores + bias[:, None, None]
    z = hard + slope * (log_alpha - log_alpha.detach())  # linear in the score
    expected = torch.autograd.grad(((pattern * z) @ v * weights).sum(), inputs)
    for a, b in zip(got, expected):
        assert torch.allclose(a, b, atol=1e-12)
    assert got[3].abs().max() > 0


def test_statistics_by_hand():
    """Two positions, three causal pairs: (0,0) open, (1,0) closed with weight 3/4, (1,1) open."""
    gate = Bernoulli()
    log_alpha = torch.tensor([[[[2.0, -1e30], [-1.0, 1.0]]]])
    pattern = torch.tensor([[[[1.0, 0.0], [0.75, 0.25]]]])
    stats = attention_stats(pattern, log_alpha, gate)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    price = lambda x: sigmoid(x) + math.log1p(math.exp(x))
    assert stats.penalty.item() == pytest.approx((price(2) + price(-1) + price(1)) / 3)
    assert stats.hard_edges.item() == pytest.approx(2 / 3)
    assert stats.expected_edges.item() == pytest.approx((sigmoid(2) + sigmoid(-1) + sigmoid(1)) / 3)
    assert stats.empty_rows.item() == 0
    assert stats.mass_removed.item() == pytest.approx(0.75 / 2)
    gate.open_probability = lambda x: torch.full_like(x, 0.5)  # one's own, which is not zero far below
    assert attention_stats(pattern, log_alpha, gate).expected_edges.item() == pytest.approx(0.5)


def test_edges_cost_less_in_one_head_than_shared_out_over_two():
    edges = torch.tensor([0.0, 0.01, 0.02, 1.0], requires_grad=True)
    cost = head_penalty(edges, price=0.06)
    (slope,) = torch.autograd.grad(cost.sum(), edges)
    assert slope[0].item() == pytest.approx(21) and (slope.diff() < 0).all() and (slope > 1).all()
    assert cost[0] == 0 and cost[2] < 2 * cost[1]
    assert torch.equal(head_penalty(edges, price=0.0), edges)


@BOTH
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_statistics_count_causal_pairs_only(gate, scale):
    """Against a loop over the pairs, also for huge scores."""
    q, k, v = qkv(2, 1, 4, 2)
    q = q * scale
    y, stats = gated_attention(q, k, v, torch.tensor([-0.5]), gate, False)
    logits = q @ k.transpose(-2, -1) / math.sqrt(2) - 0.5
    pairs = [logits[b, 0, i, j] for b in range(2) for i in range(4) for j in range(i + 1)]
    hard = [gate.deterministic(x).item() > 0 for x in pairs]
    expected = [gate.open_probability(x).item() for x in pairs]
    assert stats.hard_edges.item() == pytest.approx(sum(hard) / 20)
    assert stats.expected_edges.item() == pytest.approx(sum(expected) / 20, abs=1e-6)
    assert y.isfinite().all() and all(figure.isfinite().all() for figure in stats)


def test_a_penalty_that_does_not_vanish_counts_causal_pairs_only(monkeypatch):
    monkeypatch.setattr(gates, "edge_penalty", lambda gate, log_alpha: (log_alpha + 4).abs())
    q, k, v = (torch.zeros(2, 3, 5, 4) for _ in range(3))
    bias = torch.ones(3, requires_grad=True)
    _, stats = gated_attention(q, k, v, bias, HardConcrete(), True)
    stats.penalty.sum().backward()
    assert stats.penalty.tolist() == [5, 5, 5] and torch.allclose(bias.grad, torch.ones(3))


@BOTH
def test_half_precision_scores_are_gated_in_float32(gate):
    q, k, v = (t.bfloat16() for t in qkv())
    y, stats = gated_attention(q, k, v, torch.zeros(3), gate, True)
    assert y.dtype == torch.bfloat16 and stats.penalty.dtype == torch.float32
