"""Fused gated attention against the reference in float64 with the same noise; on a CPU in Triton's
interpreter."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gates
from constrained import LossBound
from gates import GATES, Bernoulli, HardConcrete
from model import GPT, GPTConfig, causal_mask
from support.command_line import UserError
from support.gated import choose_attention
from tests.conftest import ROOT
from train import training_step

pytest.importorskip("triton", reason="triton is not installed: `make test` installs it")
import fused_attention as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not fused.INTERPRET, reason="no GPU, and triton was imported for one"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # NumPy's: infinity is right there, and 1 / infinity 0
]
GATE = {"hard_concrete": GATES["hard_concrete"](), "bernoulli": Bernoulli(), "wide": HardConcrete(0.5, -0.4, 1.3, cutoff=0.2)}
BOTH = pytest.mark.parametrize("gate", [GATE["hard_concrete"], GATE["bernoulli"]], ids=["hard_concrete", "bernoulli"])


@pytest.fixture(autouse=True)
def fixed_blocks(monkeypatch):
    """On a GPU, every new shape would otherwise be tuned first."""
    monkeypatch.setattr(fused, "BLOCKS", (32, 32))


def inputs_of(B=1, H=1, T=37, D=16, dtype=torch.float32, scale=1.0):
    """q, k, v and bias, as leaves."""
    tensors = [scale * torch.randn(shape, device=DEVICE) for shape in [(B, H, T, D)] * 3 + [(H,)]]
    return [(t if t.dim() == 1 else t.to(dtype)).requires_grad_() for t in tensors]


def run(attend, inputs, gate, training, dy, d_penalty, **noise):
    """{name: tensor} of everything that attention returns and of all gradients."""
    y, stats = attend(*inputs, gate, training, **noise)
    gradients = torch.autograd.grad((y * dy).sum() + (stats.penalty * d_penalty).sum(), inputs)
    return {"y": y, **stats._asdict(), **dict(zip(("dq", "dk", "dv", "dbias"), gradients))}


def distance_to_threshold(inputs, gate, u):
    """How close, in log_alpha, any gate comes to where it opens, closes or stops moving: there rounding
    decides."""
    q, k, _, bias = (t.detach().double() for t in inputs)
    causal = causal_mask(q.size(2), q.size(2), q.device)
    log_alpha = (gates.causal_scores(q, k) + bias[:, None, None])[..., causal]
    bends = (0, 1, gate.cutoff) if isinstance(gate, HardConcrete) else ()
    bends = [(x - gate.gamma) / (gate.zeta - gate.gamma) for x in bends]
    edges = [math.log(s / (1 - s)) if s else 0.0 for s in bends] or [0.0]
    x = log_alpha
    if u is not None:
        x = (log_alpha + torch.logit(u.double())[..., causal]) / getattr(gate, "beta", 1)
    return min((t - edge).abs().min().item() for t in (x, log_alpha) for edge in edges)


def compare(inputs, gate, training):
    """{name: error relative to the tensor's largest value} of fused attention against the float64
    reference."""
    B, H, T, _ = inputs[0].shape
    dy, d_penalty = torch.randn_like(inputs[2]), torch.randn(H, device=DEVICE)
    for attempt in range(50):
        seed = torch.tensor([attempt], device=DEVICE)
        u = fused.uniforms(seed, B, H, T) if training else None
        if distance_to_threshold(inputs, gate, u) > 1e-5:
            break
        with torch.no_grad():
            inputs[3].add_(1e-3)
    else:
        raise AssertionError("there is always a gate on its threshold, where rounding decides")
    ours = run(fused.gated_attention, inputs, gate, training, dy, d_penalty, seed=seed)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    u = None if u is None else u.double()
    theirs = run(gates.gated_attention, exact, gate, training, dy.double(), d_penalty.double(), u=u)
    assert ours.keys() == theirs.keys() and all(t.isfinite().all() for t in ours.values())
    for name in ("y", "dq", "dv"):
        assert ours[name].dtype == inputs[0].dtype
    figures = ("expected_edges", "hard_edges", "empty_rows", "mass_removed")  # fractions: their scale is 1
    scale = {name: 1.0 if name in figures else theirs[name].abs().max().item() for name in theirs}
    return {name: (ours[name] - theirs[name]).abs().max().item() / (scale[name] or 1.0) for name in ours}


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check(inputs, gate, training):
    for name, error in compare(inputs, gate, training).items():
        assert error <= TOLERANCE[inputs[0].dtype], f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("gate", GATE.values(), ids=GATE.keys())
def test_everything_is_that_of_the_float64_reference(gate, training, dtype):
    check(inputs_of(dtype=dtype), gate, training)


@pytest.mark.parametrize(
    "B, H, T, D", [(2, 3, 1, 16), (1, 1, 33, 128), (2, 2, 19, 20), pytest.param(1, 1, 70, 32, marks=pytest.mark.slow)]
)
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
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_huge_logits(gate, training, scale):
    """No infinity, no NaN, and as good as float32 can be: its scores of 1e3 (1e8) are only known to 1e-4
    (10)."""
    inputs = inputs_of(H=1, T=20, scale=scale)
    dy, d_penalty = torch.randn_like(inputs[0]), torch.ones(1, device=DEVICE)
    seed = torch.tensor([1], device=DEVICE)
    ours = run(fused.gated_attention, inputs, gate, training, dy, d_penalty, seed=seed)
    assert all(t.isfinite().all() for t in ours.values())
    u = fused.uniforms(seed, 1, 1, 20)
    theirs = run(gates.gated_attention, inputs, gate, training, dy, d_penalty, u=u)
    for name in ("y", "dv", "penalty") if scale < 100 else ("penalty",):
        assert (ours[name] - theirs[name]).abs().max() <= 1e-3 * theirs[name].abs().max()


@pytest.mark.slow
def test_inputs_that_are_not_contiguous():
    """As a model cuts them from one matrix, with other strides each, and with a strided last dimension."""
    B, H, T, D = 2, 2, 18, 16
    whole = torch.randn(B, T, 3 * H * D, device=DEVICE)
    model_like = [t.view(B, T, H, D).transpose(1, 2) for t in whole.split(H * D, dim=2)]
    mixed = [torch.randn(T, H, B, D, device=DEVICE).permute(2, 1, 0, 3), *model_like[1:]]
    strided = [torch.randn(B, H, T, 2 * D, device=DEVICE)[..., ::2] for _ in range(3)]
    bias = torch.randn(2 * H, device=DEVICE)[::2]
    for tensors in (model_like, mixed, strided):
        inputs = [t.detach().requires_grad_() for t in (*tensors, bias)]
        assert not all(t.is_contiguous() for t in inputs)
        check(inputs, GATE["hard_concrete"], True)


def test_gradients_of_the_output_alone_and_of_the_penalty_alone():
    inputs, gate, seed = inputs_of(T=9), GATE["hard_concrete"], torch.tensor([3], device=DEVICE)
    u = fused.uniforms(seed, 1, 1, 9)
    for pick in (lambda y, stats: y.square().sum(), lambda y, stats: stats.penalty.sum()):
        ours = torch.autograd.grad(pick(*fused.gated_attention(*inputs, gate, True, seed=seed)), inputs, allow_unused=True)
        theirs = torch.autograd.grad(pick(*gates.gated_attention(*inputs, gate, True, u=u)), inputs, allow_unused=True)
        for a, b in zip(ours, theirs):
            b = torch.zeros_like(a) if b is None else b
            assert (a - b).abs().max() <= 1e-5 * max(b.abs().max().item(), 1e-3)


# The noise


def noise(seed=7, B=2, H=2, T=128):
    return fused.uniforms(torch.tensor([seed], device=DEVICE), B, H, T).double().cpu()


def test_noise_is_uniform():
    """Kolmogorov-Smirnov: the largest distance to the uniform distribution, times sqrt(n), exceeds 1.95 once
    in 1,000."""
    for seed in (0, 1, 2**40 + 1, 2**63 - 2):
        u = noise(seed).flatten().sort().values
        n = len(u)
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        assert max((steps[1:] - u).max(), (u - steps[:-1]).max()) * math.sqrt(n) < 1.95
        assert 0 < u[0] and u[-1] < 1 and abs((u - 0.5).mean()) < 4 * math.sqrt(1 / 12 / n)


@pytest.mark.slow
def test_noise_is_independent_between_positions_and_seeds():
    """Correlations of n pairs have a standard deviation of 1 / sqrt(n); so have those of the distances from
    the middle."""
    u = noise()
    others = {f"seed {seed}": noise(seed) for seed in (6, 8, 7 + 2**32, 7 + 2**62)}
    others["bits as one number"] = noise(7, 1, 4).view(2, 2, 128, 128).flip(2)
    pairs = [(name, u, other) for name, other in others.items()]
    for name, dim in (("batch", 0), ("head", 1), ("query", 2), ("key", 3)):
        for lag in (1, 2, 16, 64) if dim > 1 else (1,):
            n = u.size(dim) - lag
            pairs.append((f"{name} {lag} apart", u.narrow(dim, 0, n), u.narrow(dim, lag, n)))
    pairs.append(("transposed", u.tril(-1)[u.tril(-1) > 0], u.mT.tril(-1)[u.mT.tril(-1) > 0]))
    for name, a, b in pairs:
        for measure in (lambda x: x - 0.5, lambda x: (x - 0.5).abs() - 0.25):
            a0, b0 = measure(a).flatten(), measure(b).flatten()
            r = (a0 * b0).mean() / (a0.square().mean() * b0.square().mean()).sqrt()
            assert abs(r) * math.sqrt(len(a0)) < 4.5, f"noise is correlated: {name}"


@pytest.mark.parametrize("blocks", [pytest.param((16, 32), marks=pytest.mark.slow), (32, 16), (64, 64)])
def test_blocks_change_nothing_not_the_noise_either(blocks, monkeypatch):
    """Bernoulli gates: one other draw would change a whole edge."""
    monkeypatch.setattr(fused, "BLOCKS", blocks)
    check(inputs_of(T=50), GATE["bernoulli"], True)


@pytest.mark.skipif(DEVICE == "cpu", reason="block sizes are tuned on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuned_blocks_change_nothing_either(dtype, monkeypatch):
    monkeypatch.setattr(fused, "BLOCKS", None)
    check(inputs_of(2, 3, 257, 64, dtype=dtype), GATE["hard_concrete"], True)


def test_seeds_come_from_torchs_generator_anew_for_every_call():
    state = torch.cuda.get_rng_state if DEVICE == "cuda" else torch.get_rng_state
    inputs, gate = inputs_of(T=12), GATE["bernoulli"]
    a, b = (fused.gated_attention(*inputs, gate, True)[0] for _ in range(2))
    torch.manual_seed(5)
    c = fused.gated_attention(*inputs, gate, True)[0]
    torch.manual_seed(5)
    d = fused.gated_attention(*inputs, gate, True)[0]
    assert not torch.equal(a, b) and torch.equal(c, d)
    before = state()
    fused.gated_attention(*inputs, gate, False)
    assert torch.equal(before, state()), "evaluation draws noise"


# What it must work under


def test_activation_checkpointing_draws_the_same_noise_again():
    inputs, gate = inputs_of(T=20), GATE["bernoulli"]

    def attend(*inputs):
        y, stats = fused.gated_attention(*inputs, gate, True)
        return y.square().sum() + stats.penalty.sum()

    torch.manual_seed(1)
    plain = torch.autograd.grad(attend(*inputs), inputs)
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(attend, *inputs, use_reentrant=False), inputs)
    assert all(map(torch.equal, plain, again))


@pytest.mark.slow
def test_pytorchs_checks_of_custom_operators():
    inputs, seed = inputs_of(T=11), torch.tensor([3], device=DEVICE)
    numbers = fused.numbers_of(GATE["hard_concrete"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused.forward, (*inputs, seed, numbers, True), test_utils=tests)


def test_autocast_computes_in_its_dtype():
    inputs = inputs_of(T=9)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, stats = fused.gated_attention(*inputs, GATE["hard_concrete"], True)
    assert y.dtype == torch.bfloat16 and stats.penalty.dtype == torch.float32
    gradients = torch.autograd.grad(y.float().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_nothing_quadratic_is_kept_for_the_backward_pass():
    kept = {}
    for T in (32, 64):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            fused.gated_attention(*inputs_of(T=T), GATE["hard_concrete"], True)
        kept[T] = sum(sizes)
    assert kept[64] < 2.1 * kept[32]


# In a model


def small_model(**overrides):
    shape = dict(block_size=16, vocab_size=11, n_layer=1, n_head=2, n_embd=32, gate="hard_concrete", gate_bias=0.5)
    return GPT(GPTConfig(**{**shape, **overrides})).to(DEVICE)


def with_fused(model):
    """The model with fused attention, also where choose_attention would refuse the interpreter."""
    for block in model.h:
        block.attn.attend = fused.gated_attention
    return model


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_model_without_a_graph_break(checkpointing):
    model, idx = with_fused(small_model().train()), torch.randint(11, (1, 16), device=DEVICE)
    model.activation_checkpointing = checkpointing
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        _, loss, stats = forward(idx, idx, return_stats=True)
        results.append([loss, *torch.autograd.grad(loss + stats.penalty.mean(), model.parameters())])
    assert all(map(torch.allclose, *results))


@pytest.mark.slow
def test_fifty_training_steps_follow_the_reference_with_the_same_noise():
    models = [small_model(n_head=1, gate_bias=1.0) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with_fused(models[1])

    def with_kernel_noise(q, k, v, bias, gate, training):
        u = fused.uniforms(fused.new_seed(q.device), *q.shape[:3])
        return gates.gated_attention(q, k, v, bias, gate, training, u)

    for block in models[0].h:
        block.attn.attend = with_kernel_noise
    data = torch.randint(11, (50, 1, 17), device=DEVICE)
    data[..., 1::2] = data[..., :-1:2]  # every other token repeats the one before
    losses, stats = [], []
    for model in models:
        torch.manual_seed(0)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        bound = LossBound(1.0)
        results = [training_step(model, optimizer, [(x[:, :-1], x[:, 1:])], bound, 1.0) for x in data]
        losses.append([loss for loss, *_ in results])
        stats.append(results[-1][1])
    assert losses[0][-1] < losses[0][0]
    assert max(abs(a - b) for a, b in zip(*losses)) < 1e-3
    assert (stats[0].expected_edges - stats[1].expected_edges).abs().max() < 1e-3
    differences = [(a - b).abs().max().item() for a, b in zip(models[0].parameters(), models[1].parameters())]
    assert max(differences) < 1e-2


def test_a_model_evaluates_and_generates_the_same_either_way():
    model, idx = small_model(block_size=8, n_layer=2, gate_bias=0.0).eval(), torch.randint(11, (2, 8), device=DEVICE)
    logits, record, text = model(idx)[0], model.attention(idx), model.generate(idx[:, :3], 9, temperature=0)
    with_fused(model)
    assert torch.allclose(model(idx)[0], logits, atol=1e-5)
    assert torch.equal(model.attention(idx).edges, record.edges)
    assert torch.equal(model.generate(idx[:, :3], 9, temperature=0), text)


def test_what_the_kernels_do_not_know_is_one_sentence():
    class Other(HardConcrete):
        pass

    q = torch.zeros(1, 1, 4, 16, device=DEVICE)
    for problem, q, gate in [
        ("not Other", q, Other()),
        ("float64", q.double(), Bernoulli()),
        ("256", q.repeat(1, 1, 1, 16), Bernoulli()),
    ]:
        with pytest.raises(UserError, match=f"{problem}.*choose --attention=reference") as error:
            fused.gated_attention(q, q, q, torch.zeros(1, device=DEVICE), gate, True)
        assert len(str(error.value).splitlines()) == 1


@BOTH
def test_an_edited_gate_or_penalty_is_noticed(gate, monkeypatch):
    assert fused.disagreement(gate, DEVICE) == ""
    monkeypatch.setattr(gates, "edge_penalty", lambda gate, log_alpha: gate.open_probability(log_alpha))
    assert "edited" in fused.disagreement(gate, DEVICE)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_fused_without_a_gpu_is_one_sentence(program, data_dir, tmp_path):
    import train

    argv = ["--attention=fused", "--dataset=sums", f"--data_dir={data_dir}", f"--out_dir={tmp_path}"]
    code, _, err = program(train.main, "addition", *argv, "--pretrain_steps=1")
    assert code == 2 and "--attention is fused, which needs a CUDA device, and this is cpu: choose auto or" in err
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=16, gate="bernoulli"))
    assert choose_attention(model, "auto").startswith("reference (fused needs")


def test_the_project_runs_without_triton():
    """Only fused_attention.py imports it at the top, and nothing imports that at the top."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        lines = [] if path.name == "fused_attention.py" else path.read_text().splitlines()
        assert not any(line.startswith(("import triton", "import fused_attention")) for line in lines), path
