"""Fused gated attention against gates.py in float64 with the same noise; on a CPU in Triton's interpreter."""

import copy
import math
import re

import pytest
import torch
import torch._inductor.config
from torch.utils.checkpoint import checkpoint

import gates
from constrained import LossBound
from gates import GATES, HardConcrete
from model import GPT, GPTConfig
from support.command_line import UserError
from tests.conftest import ROOT
from train import training_step

pytest.importorskip("triton", reason="triton is not installed: `make test` installs it")
import fused_attention as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not fused.INTERPRET, reason="no GPU; triton was imported for one"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # NumPy's: 1 / infinity is right, 0
]
GATE = {name: gate() for name, gate in GATES.items()}
BOTH = pytest.mark.parametrize("gate", GATE.values(), ids=GATE.keys())
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
WIDE = HardConcrete(0.5, -0.4, 1.3, cutoff=0.2)


def randn(*shape):
    """The same numbers on every device."""
    return torch.randn(shape).to(DEVICE)


def inputs_of(B=1, H=1, T=37, D=16, dtype=torch.float32, scale=1.0):
    """q, k, v and bias, as leaves."""
    qkv = [(scale * randn(B, H, T, D)).to(dtype) for _ in range(3)]
    return [t.requires_grad_() for t in (*qkv, scale * randn(H))]


def run(attend, inputs, gate, training, dy, d_penalty, **noise):
    """{name: tensor} of everything that attention returns and of all gradients."""
    y, stats = attend(*inputs, gate, training, **noise)
    gradients = torch.autograd.grad((y * dy).sum() + (stats.penalty * d_penalty).sum(), inputs)
    return {"y": y, **stats._asdict(), **dict(zip(("dq", "dk", "dv", "dbias"), gradients))}


def check(inputs, gate, training):
    """Errors are relative to the tensor's largest value where that is above 1. With these inputs and this
    noise no gate is so close to its threshold that rounding moves it over. New inputs that fail by much more
    than the tolerance may have such a gate."""
    (B, H, T, _), dtype = inputs[0].shape, inputs[0].dtype
    dy, d_penalty, seed = randn(*inputs[0].shape).to(dtype), randn(H), new_seed(1)
    ours = run(fused.gated_attention, inputs, gate, training, dy, d_penalty, seed=seed)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    u = fused.uniforms(seed, B, H, T).double()
    theirs = run(gates.gated_attention, exact, gate, training, dy.double(), d_penalty.double(), u=u)
    assert ours["y"].dtype == dtype
    for name, tensor in ours.items():
        error = (tensor - theirs[name]).abs().max().item() / max(theirs[name].abs().max().item(), 1.0)
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e}"  # NaN fails, too


def new_seed(number):
    return torch.tensor([number], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("gate", [*GATE.values(), WIDE], ids=[*GATE, "wide"])
def test_everything_is_that_of_the_float64_reference(gate, training, dtype):
    check(inputs_of(dtype=dtype), gate, training)


@pytest.mark.parametrize("B, H, T, D", [(2, 3, 1, 16), (1, 1, 33, 128), (2, 2, 19, 20), (1, 1, 70, 32)])
def test_shapes(B, H, T, D):
    check(inputs_of(B, H, T, D), GATE["hard_concrete"], True)


@BOTH
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_closed_heads_and_rows(gate, training):
    """One head closed altogether, one where all rows but a few are closed, one wide open."""
    inputs = inputs_of(H=3, T=21)
    with torch.no_grad():
        inputs[0][:, 1, 4:] = 0
        inputs[3].copy_(torch.tensor([-60.0, -30.0, 60.0]))
    check(inputs, gate, training)
    y, stats = fused.gated_attention(*inputs, gate, training)
    assert (y[:, 0] == 0).all() and stats.empty_rows[0] == 1 and stats.mass_removed[2] < 1e-6


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale, names", [(30.0, ("y", "dv", "penalty")), (1e4, ("penalty",))])
def test_huge_logits(gate, training, scale, names):
    """No infinity, no NaN, and what float32 still knows: its scores of 1e3 to 1e-4, those of 1e8 to 10."""
    inputs = inputs_of(T=20, scale=scale)
    others = gate, training, randn(1, 1, 20, 16), torch.ones(1, device=DEVICE)
    ours = run(fused.gated_attention, inputs, *others, seed=new_seed(1))
    theirs = run(gates.gated_attention, inputs, *others, u=fused.uniforms(new_seed(1), 1, 1, 20))
    assert all(t.isfinite().all() for t in ours.values())
    for name in names:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-3 * theirs[name].abs().max()


@pytest.mark.slow
def test_inputs_that_are_not_contiguous():
    """As a model cuts them from one matrix, with other strides each, and with a strided last dimension."""
    B, H, T, D = 2, 2, 18, 16
    whole = randn(B, T, 3 * H * D)
    model_like = [t.view(B, T, H, D).transpose(1, 2) for t in whole.split(H * D, dim=2)]
    mixed = [randn(T, H, B, D).permute(2, 1, 0, 3), *model_like[1:]]
    strided = [randn(B, H, T, 2 * D)[..., ::2] for _ in range(3)]
    bias = randn(2 * H)[::2]
    for tensors in (model_like, mixed, strided):
        inputs = [t.detach().requires_grad_() for t in (*tensors, bias)]
        assert not all(t.is_contiguous() for t in inputs)
        check(inputs, GATE["hard_concrete"], True)


@pytest.mark.parametrize("of", ["y", "penalty"])
def test_gradients_of_the_output_alone_and_of_the_penalty_alone(of):
    inputs, gate = inputs_of(T=9), GATE["hard_concrete"]

    def gradients(attend, **noise):
        y, stats = attend(*inputs, gate, True, **noise)
        loss = y.square().sum() if of == "y" else stats.penalty.sum()
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    ours = gradients(fused.gated_attention, seed=new_seed(3))
    theirs = gradients(gates.gated_attention, u=fused.uniforms(new_seed(3), 1, 1, 9))
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-5 * max(b.abs().max().item(), 1e-3)


# The noise


def noise(seed=7, B=2, H=2, T=128):
    return fused.uniforms(new_seed(seed), B, H, T).double().cpu()


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 1, 2**63 - 2])
def test_noise_is_uniform(seed):
    """Kolmogorov-Smirnov: sqrt(n) times the largest distance to the uniform distribution exceeds 1.95 once in
    1,000 draws."""
    u = noise(seed).flatten().sort().values
    n = len(u)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((steps[1:] - u).max(), (u - steps[:-1]).max()) * math.sqrt(n) < 1.95
    assert 0 < u[0] and u[-1] < 1


@pytest.mark.slow
def test_noise_is_independent_between_positions_and_seeds():
    """Of positions, and of their distances from the middle: a correlation of n pairs has a standard deviation
    of 1 / sqrt(n)."""
    u = noise()
    pairs = [(f"seed {seed}", u, noise(seed)) for seed in (6, 8, 7 + 2**32, 7 + 2**62)]
    for dim, name in enumerate(("batch", "head", "query", "key")):
        for lag in (1, 2, 16, 64) if dim > 1 else (1,):
            n = u.size(dim) - lag
            pairs.append((f"{name} {lag} apart", u.narrow(dim, 0, n), u.narrow(dim, lag, n)))
    later = torch.ones(128, 128, dtype=torch.bool).triu(1)
    pairs.append(("transposed", u[..., later], u.mT[..., later]))
    for name, a, b in pairs:
        for measure in (lambda x: x - 0.5, lambda x: (x - 0.5).abs() - 0.25):
            a0, b0 = measure(a).flatten(), measure(b).flatten()
            r = (a0 * b0).mean() / (a0.square().mean() * b0.square().mean()).sqrt()
            assert abs(r) * math.sqrt(len(a0)) < 4.5, f"noise is correlated: {name}"


@pytest.mark.parametrize("blocks", [pytest.param((16, 32), marks=pytest.mark.slow), (32, 16), (64, 64)])
def test_blocks_change_nothing_not_the_noise_either(blocks, monkeypatch):
    """Bernoulli gates: one other draw would change a whole edge."""
    monkeypatch.setattr(fused, "BLOCKS", {4: blocks})
    check(inputs_of(T=50), GATE["bernoulli"], True)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes the interpreter minutes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_shape_of_gpt2(dtype):
    check(inputs_of(H=12, T=1024, D=64, dtype=dtype), GATE["hard_concrete"], True)


def test_seeds_come_from_torchs_generator_anew_for_every_call():
    state = torch.cuda.get_rng_state if DEVICE == "cuda" else torch.get_rng_state
    inputs, gate = inputs_of(T=12), GATE["bernoulli"]
    torch.manual_seed(5)
    a, b = (fused.gated_attention(*inputs, gate, True)[0] for _ in range(2))
    torch.manual_seed(5)
    again = fused.gated_attention(*inputs, gate, True)[0]
    assert torch.equal(a, again) and not torch.equal(a, b)
    before = state()
    fused.gated_attention(*inputs, gate, False)
    assert torch.equal(before, state()), "evaluation draws noise"


# What it must work under


def test_activation_checkpointing_draws_the_same_noise_again():
    inputs = inputs_of(T=20)

    def attend(*inputs):
        y, stats = fused.gated_attention(*inputs, GATE["bernoulli"], True)
        return y.square().sum() + stats.penalty.sum()

    torch.manual_seed(1)
    plain = torch.autograd.grad(attend(*inputs), inputs)
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(attend, *inputs, use_reentrant=False), inputs)
    assert all(map(torch.equal, plain, again))


@pytest.mark.slow
def test_pytorchs_checks_of_custom_operators():
    numbers = fused.numbers_of(GATE["hard_concrete"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused.forward, (*inputs_of(T=11), new_seed(3), numbers, True), test_utils=tests)


def test_autocast_computes_in_its_dtype():
    inputs = inputs_of(T=9)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, stats = fused.gated_attention(*inputs, GATE["hard_concrete"], True)
    assert y.dtype == torch.bfloat16 and stats.penalty.dtype == torch.float32
    gradients = torch.autograd.grad(y.float().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_nothing_quadratic_is_kept_for_the_backward_pass():
    def kept(T):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda _: None):
            fused.gated_attention(*inputs_of(T=T), GATE["hard_concrete"], True)
        return sum(sizes)

    assert kept(64) < 2.1 * kept(32)


# In a model


def small_model(**overrides):
    shape = dict(block_size=16, vocab_size=11, n_layer=1, n_head=2, n_embd=32)
    return GPT(GPTConfig(**shape | dict(gate="hard_concrete", gate_bias=0.5) | overrides)).to(DEVICE)


def with_attention(model, attend=fused.gated_attention):
    """The model with fused attention, also where choose_attention would refuse the interpreter."""
    for block in model.h:
        block.attn.attend = attend
    return model


@torch._inductor.config.patch(fallback_random=True)  # else on CUDA a generator of its own, with checkpointing
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_model_without_a_graph_break(checkpointing):
    model, idx = with_attention(small_model().train()), torch.randint(11, (1, 16), device=DEVICE)
    model.activation_checkpointing = checkpointing
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        _, loss, stats = forward(idx, idx, return_stats=True)
        results.append([loss, *torch.autograd.grad(loss + stats.penalty.mean(), model.parameters())])
    assert all(map(torch.allclose, *results))


@pytest.mark.slow
def test_fifty_training_steps_follow_the_reference_with_the_same_noise():
    def reference(q, k, v, bias, gate, training):
        u = fused.uniforms(fused.new_seed(q.device), *q.shape[:3])
        return gates.gated_attention(q, k, v, bias, gate, training, u)

    untrained, data = small_model(n_head=1, gate_bias=1.0), torch.randint(11, (50, 1, 17), device=DEVICE)
    data[..., 1::2] = data[..., :-1:2]  # every other token repeats the one before
    losses, edges = [], []
    for attend in (fused.gated_attention, reference):
        torch.manual_seed(0)
        model = with_attention(copy.deepcopy(untrained).train(), attend)
        optimizer, bound = torch.optim.AdamW(model.parameters(), lr=3e-3), LossBound(1.0)
        results = [training_step(model, optimizer, [(x[:, :-1], x[:, 1:])], bound, 1.0) for x in data]
        losses.append([loss for loss, *_ in results])
        edges.append(results[-1][1].expected_edges)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert torch.allclose(*edges, atol=1e-3)


def test_a_model_evaluates_and_generates_the_same_either_way():
    model = small_model(block_size=8, n_layer=2, gate_bias=0.0).eval()
    idx = torch.randint(11, (2, 8), device=DEVICE)
    logits, edges = model(idx)[0], model.attention(idx).edges
    text = model.generate(idx[:, :3], 9, temperature=0)
    with_attention(model)
    assert torch.allclose(model(idx)[0], logits, atol=1e-5)
    assert torch.equal(model.attention(idx).edges, edges)
    assert torch.equal(model.generate(idx[:, :3], 9, temperature=0), text)


class Other(HardConcrete):
    pass


@pytest.mark.parametrize(
    "problem, gate, shape",
    [("not Other", Other(), {}), ("float64", WIDE, {"dtype": torch.float64}), ("256", WIDE, {"D": 256})],
)
def test_what_the_kernels_do_not_know_is_one_sentence(problem, gate, shape):
    with pytest.raises(UserError, match=f"^.*{problem}.*choose --attention=reference$"):
        fused.gated_attention(*inputs_of(**shape), gate, True)


@BOTH
def test_an_edited_gate_or_penalty_is_noticed(gate, monkeypatch):
    assert fused.disagreement(gate, DEVICE) == ""
    monkeypatch.setattr(gates, "edge_penalty", lambda gate, log_alpha: gate.open_probability(log_alpha))
    assert "edited" in fused.disagreement(gate, DEVICE)


def test_the_project_runs_without_triton():
    """Only fused_attention.py imports it at the top, and nothing imports that at the top."""
    for path in {*ROOT.glob("*.py"), *ROOT.glob("support/*.py")} - {ROOT / "fused_attention.py"}:
        assert not re.search(r"^(import|from) (triton|fused_attention)", path.read_text(), re.M), path
