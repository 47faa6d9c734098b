"""The training step and the loop: edges fall, runs resume bit for bit, and nothing is lost when something
goes wrong."""

import copy
import json
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train as train_module
from constrained import LossBound
from data import prepare
from data.dataset import Dataset
from data.prepare import prepare_text
from gates import GATES
from model import GPT, Block, GPTConfig
from support import command_line, runs
from support.checkpoints import RUN, load_checkpoint, save_checkpoint, save_model
from support.command_line import UserError
from support.gated import calibrate_gate_biases
from support.held_out import HeldOut
from support.report import evaluate, missed_bound
from tests.conftest import ROOT
from train import RECIPES, TrainConfig, learning_rate_at, make_optimizer, train, training_step

SMALL = TrainConfig(
    dataset="sums", n_layer=2, n_head=2, n_embd=16, block_size=5, batch_size=16, pretrain_steps=12,
    sparsify_steps=12, control=False, learning_rate=1e-2, gate_learning_rate=1e-1, min_lr=1e-3,
    warmup_iters=2, eval_interval=5, log_interval=3, dropout=0.1, device="cpu", seed=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    if "promises" not in request.node.name:  # they take longer than all the rest
        monkeypatch.setattr(runs.Run, "draw", lambda *_: [])


@pytest.fixture
def small(data_dir, tmp_path):
    return replace(SMALL, data_dir=str(data_dir), out_dir=str(tmp_path / "run"))


def tiny(gate="none", **fields):
    return GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=1, n_head=2, n_embd=8, gate=gate, **fields))


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(folder, leave_out=("tokens_per_second",)):
    lines = runs.read_log(folder / "log.jsonl")
    return [{key: value for key, value in line.items() if key not in leave_out} for line in lines]


# ------------------------------------------------------------------------------------------------------------
# The step


def test_accumulated_micro_steps_are_one_large_batch(data_dir):
    x, y = Dataset("sums", 5, data_dir).batch("train", 32, torch.Generator().manual_seed(0))
    states = []
    for batches in ([(x, y)], [(x[:16], y[:16]), (x[16:], y[16:])]):
        torch.manual_seed(0)
        model = tiny()
        loss, _ = training_step(model, torch.optim.SGD(model.parameters(), lr=1.0), batches, None, 1e9)
        states.append((loss, model.state_dict()))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-6)
    assert all(torch.allclose(states[0][1][name], p, atol=1e-6) for name, p in states[1][1].items())


def test_the_multiplier_follows_the_held_out_loss_and_the_step_reports_the_mean(data_dir):
    data, generator = Dataset("sums", 5, data_dir), torch.Generator().manual_seed(0)
    batches = [data.batch("train", 8, generator) for _ in range(3)]
    model, bound = tiny("bernoulli", gate_bias=50.0), LossBound(1.0)
    losses = [model(*batch)[1].item() for batch in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, _ = training_step(model, optimizer, batches, bound, 1.0, torch.tensor(0.7))
    assert bound.average == pytest.approx(0.7) and loss == pytest.approx(sum(losses) / 3)
    with pytest.raises(UserError, match="held out nan"):
        training_step(model, optimizer, batches, bound, 1.0, torch.tensor(float("nan")))
    assert bound.average == pytest.approx(0.7)


def test_a_teachers_predictions_take_the_place_of_the_tokens(data_dir):
    """A model that is its own teacher has nothing to learn; its loss is the entropy of its predictions."""
    batch = Dataset("sums", 5, data_dir).batch("train", 8, torch.Generator().manual_seed(0))
    model = tiny()
    teacher, before = copy.deepcopy(model).train(), copy.deepcopy(model.state_dict())
    entropy = torch.distributions.Categorical(logits=model(*batch)[0]).entropy().mean().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss, _ = training_step(model, optimizer, [batch], None, 1.0, teacher=teacher)
    assert loss == pytest.approx(entropy, abs=1e-5) and teacher.training
    assert all(torch.allclose(before[name], p, atol=1e-5) for name, p in model.state_dict().items())
    training_step(model, optimizer, [batch], None, 1.0)
    assert not torch.allclose(before["wte.weight"], model.wte.weight, atol=1e-5)


def test_a_price_per_head_closes_its_gates(data_dir):
    batch, biases = Dataset("sums", 5, data_dir).batch("train", 8, torch.Generator().manual_seed(0)), []
    for price in (0.0, 1.0):
        torch.manual_seed(0)
        model = tiny("hard_concrete", gate_bias=1.0)
        bound = LossBound(10.0, largest=0.01)  # the cost counts most
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training_step(model, optimizer, [batch], bound, 1e9, head_price=price)
        biases.append(model.h[0].attn.gate_bias.detach())
    assert (biases[1] < biases[0]).all() and (biases[0] < 1).all()


def test_a_gradient_that_is_not_finite_changes_nothing(data_dir):
    model = tiny()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.ln_f.weight.register_hook(lambda grad: grad * float("nan"))  # the loss stays finite
    batch = Dataset("sums", 5, data_dir).batch("train", 8, torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="norm of the gradient nan: give a smaller"):
        training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch], None, 1.0)
    assert same(before, model.state_dict())


def test_learning_rates():
    config = replace(SMALL, warmup_iters=10, learning_rate=1.0, min_lr=0.1, gate_learning_rate=10.0)
    assert learning_rate_at(0, 100, config) == pytest.approx(1 / 11)
    assert learning_rate_at(50, 100, config) == pytest.approx(0.55)
    assert learning_rate_at(100, 100, config) == pytest.approx(0.1)
    groups = make_optimizer(tiny("bernoulli"), config, 0.1).param_groups
    seen = [(len(group["params"]), group["weight_decay"], group["lr_ratio"]) for group in groups]
    assert seen == [(6, 0.1, 1), (10, 0, 1), (1, 0, 10)]


def test_the_allowance_falls_to_zero_before_the_end():
    config = replace(SMALL, loss_allowance=0.7)
    allowance = [train_module.allowance_at(step, 100, config) for step in (0, 35, 70, 99)]
    assert allowance == pytest.approx([0.7, 0.35, 0.0, 0.0])


def test_the_held_out_loss_is_that_of_the_whole_split_but_for_the_noise_of_the_difference(small, tmp_path):
    """Every batch gives the dense model's own mean for the dense model, and nearly the truth for a model that
    differs little; with deterministic gates, and the model's mode stays."""
    data = Dataset("sums", 5, small.data_dir)
    run = runs.Run(small, data, "cpu", None, [])
    dense = tiny()
    held_out = HeldOut(run, dense)
    mean = evaluate(dense, data, 16)["loss"]
    assert held_out.dense.mean().item() == pytest.approx(mean, rel=1e-5)
    assert all(held_out.loss(dense, step).item() == pytest.approx(mean, rel=1e-5) for step in range(3))
    gated = tiny("bernoulli", gate_bias=0.5).train()
    gated.load_state_dict(dense.state_dict(), strict=False)
    truth = evaluate(gated, data, 16)["loss"]
    seen = torch.stack([held_out.loss(gated, step) for step in range(200)])
    assert gated.training and seen.std() > 0
    assert seen.mean().item() == pytest.approx(truth, abs=4 * seen.std().item() / 200**0.5)


# ------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_writes_what_it_promises(small, tmp_path, capsys):
    summary, folder = train(replace(small, control=True)), tmp_path / "run"
    files = {"dense.pt", "sparse.pt", "control.pt", "last.pt", "log.jsonl", "summary.json"}
    assert {p.name for p in folder.iterdir()} == files | {"training.png", "attention.png", "edges.png"}
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["bound"] == pytest.approx(summary["dense_loss"] + 0.01)
    assert summary["within_bound"] == (summary["sparse_loss"] <= summary["bound"])
    data = Dataset("sums", 5, small.data_dir)
    for name, key in (("dense", "dense_loss"), ("sparse", "sparse_loss"), ("control", "control_loss")):
        result = evaluate(GPT.from_pretrained(folder / f"{name}.pt"), data, 32)
        assert result["loss"] == pytest.approx(summary[key])
    lines = [line for line in log_of(folder, ()) if line["phase"] == "sparse" and "multiplier" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    wanted = {"phase", "step", "loss", "held_out_loss", "bound", "multiplier", "expected_edges", "hard_edges"}
    assert all(line.keys() == wanted | {"learning_rate", "tokens_per_second"} for line in lines)
    assert summary["training_bound"] == pytest.approx(summary["bound"]), "a task is trained on in full"
    assert summary["training_loss"] == pytest.approx(summary["sparse_loss"])
    out = capsys.readouterr().out
    assert "gated attention: reference (fused needs a CUDA device, and this is cpu)" in out
    for words in ("hard edges", "empty rows", "accuracy", "layer 1", "attention.png", "tokens/s", "left"):
        assert words in out


def test_without_its_tokenizer_a_run_keeps_its_promises_but_draws_nothing(small, capsys, monkeypatch):
    def absent(meta):
        raise UserError("tiktoken cannot get the GPT-2 vocabulary")

    monkeypatch.setattr(runs, "tokenizer_of", absent)
    summary, out = train(small), capsys.readouterr().out
    assert summary["edges_hard"] > 0 and "hard edges" in out and "note: nothing is drawn: tiktoken" in out


def test_a_run_over_its_bound_says_so_and_names_the_remedy(small, capsys):
    summary = train(replace(small, loss_tolerance=0.0, multiplier_max=0.01, sparsify_steps=30))
    out = capsys.readouterr().out
    assert not summary["within_bound"] and summary["training_loss"] > summary["training_bound"]
    for words in ("OVER IT BY", "note: the sparse model is over its bound by", "--multiplier_max"):
        assert words in out
    (note,) = missed_bound(summary | {"training_loss": 0.0})
    assert "though not on the held-out data: give a larger --loss_tolerance, or for a text --distill" in note


@pytest.mark.parametrize("gate", sorted(GATES))
def test_thirty_steps_close_edges(small, gate):
    gated = dict(gate=gate, gate_bias=1.0)
    config = replace(small, **gated, pretrain_steps=1, sparsify_steps=30, loss_tolerance=10.0)
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=2, n_head=2, n_embd=16, **gated))
    before = evaluate(model, Dataset("sums", 5, small.data_dir), 32)  # a new model's
    after = train(config)
    assert before["edges_hard"] > 0.85 and after["edges_hard"] < 0.8
    assert after["edges_expected"] < before["edges_expected"] - 0.1


@pytest.mark.slow
def test_nearly_all_edges_close_and_the_loss_stays_within_its_bound(program, tmp_path, monkeypatch):
    """The README's promise, by a quarter of the sparse phase's steps."""
    monkeypatch.chdir(tmp_path)
    assert program(prepare.main, "addition")[0] == 0
    summary = train(replace(RECIPES["addition"], sparsify_steps=900, device="cpu"))
    assert summary["within_bound"] and summary["sparse_accuracy"] > 0.99 and summary["edges_hard"] < 0.06


def test_gated_model_starts_from_the_dense_weights_and_dense_stays(small, tmp_path):
    train(replace(small, sparsify_steps=1, sparsify_learning_rate=1e-9, gate_learning_rate=1e-9, min_lr=0.0))
    dense, sparse = (weights(tmp_path / "run" / f"{name}.pt") for name in ("dense", "sparse"))
    assert all(torch.allclose(dense[name], sparse[name], atol=1e-6) for name in dense)
    assert torch.allclose(sparse["h.0.attn.gate_bias"], torch.full((2,), 5.0))


def test_post_training_an_existing_dense_model(small, tmp_path, capsys):
    train(replace(small, block_size=7))
    path = str(tmp_path / "run" / "dense.pt")
    one = train(replace(small, init_from=path, out_dir=str(tmp_path / "one"), n_embd=999))
    assert "dense.pt reads up to 7 tokens, sequences have 5" in capsys.readouterr().out
    two = train(replace(small, init_from=path, seed=12, out_dir=str(tmp_path / "two")))
    assert one["dense_loss"] == two["dense_loss"] and one["sparse_loss"] != two["sparse_loss"]
    assert one["config"]["n_embd"] == 16, "the checkpoint decides the shape"
    assert load_checkpoint(tmp_path / "one" / "sparse.pt")["model_config"]["block_size"] == 7
    with pytest.raises(UserError, match="sparse.pt has gates already"):
        train(replace(small, init_from=str(tmp_path / "run" / "sparse.pt")))


def test_a_run_that_is_not_told_where_to_write_does_not_write_here(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(replace(small, out_dir="", pretrain_steps=1, sparsify_steps=1))
    assert (tmp_path / "out" / "sums" / "summary.json").is_file()


def test_text_runs_too_and_every_setting_reaches_its_step(tmp_path, monkeypatch):
    seen = []

    def step(model, optimizer, batches, bound, clip, held_out_loss, autocast, head_price, teacher):
        seen.append(bound and (bound.allowance, float(held_out_loss), head_price, teacher is not None))
        rest = clip, held_out_loss, autocast, head_price, teacher
        return training_step(model, optimizer, batches, bound, *rest)

    monkeypatch.setattr(train_module, "training_step", step)
    prepare_text([ROOT / "LICENSE", ROOT / "README.md"], tmp_path / "data" / "text", "char", 0.1)
    summary = train(replace(
        RECIPES["shakespeare_char"], dataset="text", data_dir=str(tmp_path / "data"),
        out_dir=str(tmp_path / "run"), learning_rate=1e-2, warmup_iters=10, pretrain_steps=100, control=True,
        sparsify_steps=5, eval_interval=100, block_size=16, batch_size=64, n_layer=2, n_embd=32, device="cpu",
        head_price=0.2,
    ))  # fmt: skip
    assert summary["dense_loss"] < 3.9 and "dense_accuracy" not in summary and summary["control_loss"] > 0
    dense = GPT.from_pretrained(tmp_path / "run" / "dense.pt")
    data = Dataset("text", 16, tmp_path / "data")
    with torch.no_grad():
        losses = [dense(x, y)[1].item() for x, y in data.sequential("held_out", 1)]
    bound = sum(losses) / len(losses) + summary["config"]["loss_tolerance"]
    assert summary["training_bound"] == pytest.approx(bound) != summary["bound"], "of text not trained on"
    last = [line for line in log_of(tmp_path / "run") if "multiplier" in line][-1]
    assert last["bound"] == pytest.approx(bound - 0.75 * summary["config"]["loss_tolerance"], abs=1e-4)
    allowances, held_out, prices, taught = zip(*filter(None, seen))
    assert len(seen) == 110 and len(allowances) == 5, "the bound is on the sparse phase alone"
    assert allowances[0] == pytest.approx(0.15) and allowances[-1] == 0
    assert set(prices) == {0.2} and all(taught) and held_out[0] == pytest.approx(bound, abs=0.5)


def test_evaluating_more_often_bfloat16_and_checkpointing(small, tmp_path, monkeypatch):
    """The first and the last change nothing; checkpointing computes blocks more often; bfloat16 runs."""
    settings = {"a": {}, "b": dict(eval_interval=1, log_interval=1), "c": dict(activation_checkpointing=True)}
    calls, forward = Counter(), Block.forward
    for name, fields in (settings | {"d": dict(dtype="bfloat16")}).items():
        counted = lambda *args, name=name: calls.update([name]) or forward(*args)
        monkeypatch.setattr(Block, "forward", counted)
        train(replace(small, out_dir=str(tmp_path / name), **fields))
    a, b, c, d = (weights(tmp_path / name / "sparse.pt") for name in "abcd")
    assert same(a, b) and same(a, c) and not same(a, d) and calls["c"] > calls["a"] == calls["d"]
    assert all(p.isfinite().all() for p in d.values())


def test_automatic_gate_biases_let_a_model_with_low_scores_start_at_its_own_loss(small, tmp_path):
    """A constant in the residual stream gives every query and key of a head opposite parts: scores far below
    zero."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        model.wte.weight.mul_(1.6)
        for block in model.h:
            for p in (block.attn.c_attn.weight, block.attn.c_proj.weight):
                p.mul_(4)
            block.attn.c_attn.bias[:16], block.attn.c_attn.bias[16:32] = 9.0, -9.0
    data, path = Dataset("sums", 5, small.data_dir), str(tmp_path / "low.pt")
    save_model(model, path, data.meta, {})
    gated = GPT.from_pretrained(path, gate="hard_concrete")
    dense_loss, gated_loss = (evaluate(m, data, 32)["loss"] for m in (model, gated))
    calibrate_gate_biases(gated, data.batch("train", 16, torch.Generator().manual_seed(0))[0])
    after = evaluate(gated, data, 32)
    assert abs(after["loss"] - dense_loss) < 0.02 < abs(gated_loss - dense_loss)
    train(replace(small, init_from=path, gate_bias="auto", sparsify_steps=1))
    start = next(line for line in log_of(tmp_path / "run") if "val_loss" in line)
    assert abs(start["val_loss"] - dense_loss) < 0.02


def test_evaluation_agrees_with_a_plain_loop_over_greedy_answers(data_dir):
    data = Dataset("sums", 5, data_dir)
    torch.manual_seed(4)
    model = tiny("hard_concrete", gate_bias=-0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)
    examples = torch.from_numpy(data.tokens["val"].astype("int64")).view(-1, 6)
    answers = model.generate(examples[:, :4], 2, temperature=0)[:, 4:]
    result = evaluate(model, data, batch_size=7)
    assert result["accuracy"] == pytest.approx((answers == examples[:, 4:]).all(1).double().mean().item())
    log_p = model.eval()(examples[:, :-1], examples[:, 1:])[0].log_softmax(-1)
    loss = -log_p[:, 3:].gather(-1, examples[:, 4:, None]).mean().item()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    edges = model.attention(examples[:, :-1]).edges.sum().item() / (100 * 2 * 15)
    assert result["edges_hard"] == pytest.approx(edges) and 0 < edges < 1


# ------------------------------------------------------------------------------------------------------------
# Stop and resume


def stop_at(monkeypatch, n):
    """Let the nth training step be interrupted as Ctrl-C would."""
    calls = []

    def step(*args):
        calls.append(1)
        if len(calls) == n:
            signal.raise_signal(signal.SIGINT)
        return training_step(*args)

    monkeypatch.setattr(train_module, "training_step", step)


@pytest.fixture(scope="module")
def never_stopped(data_dir, tmp_path_factory):
    """The folder of a run of all three phases, 12 steps each."""
    folder = tmp_path_factory.mktemp("never_stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "draw", lambda *_: [])
        train(replace(SMALL, control=True, data_dir=str(data_dir), out_dir=str(folder)))
    return folder


# in the dense phase before and after an evaluation, at one, at its end; in the sparse phase and its end; the
# control
@pytest.mark.parametrize("n", [1, 4, 5, 12, 13, 20, 24, 30])
def test_resuming_equals_never_stopping_bit_for_bit(small, never_stopped, tmp_path, monkeypatch, n):
    broken = replace(small, control=True)
    stop_at(monkeypatch, n)
    with pytest.raises(KeyboardInterrupt, match=r"after step \d+ of 12, and saved"):
        train(broken)
    monkeypatch.setattr(train_module, "training_step", training_step)
    train(TrainConfig(resume=True, out_dir=broken.out_dir))  # all settings come from last.pt
    for name in ("dense", "sparse", "control"):
        assert same(weights(never_stopped / f"{name}.pt"), weights(tmp_path / "run" / f"{name}.pt")), name
    assert log_of(never_stopped) == log_of(tmp_path / "run")


def test_resuming_after_init_from_does_not_need_it_again(small, never_stopped, tmp_path, monkeypatch):
    start = tmp_path / "start.pt"
    start.write_bytes((never_stopped / "dense.pt").read_bytes())
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(replace(small, init_from=str(start)))
    start.unlink()
    train(replace(small, resume=True))
    assert same(weights(never_stopped / "sparse.pt"), weights(tmp_path / "run" / "sparse.pt"))


def test_ctrl_c_on_the_command_line(small, monkeypatch, program):
    names = "dataset data_dir out_dir n_layer n_head n_embd block_size batch_size".split()
    flags = [f"--{name}={getattr(small, name)}" for name in names]
    flags += ["--pretrain_steps=5", "--sparsify_steps=5", "--device=cpu"]
    stop_at(monkeypatch, 7)
    code, _, err = program(train_module.main, "addition", *flags)
    resume = f"--resume --out_dir={small.out_dir}"
    assert code == 130 and err == f"stopped: sparse after step 2 of 5, and saved: {resume} goes on\n"
    monkeypatch.setattr(train_module, "training_step", training_step)
    code, _, err = program(train_module.main, "addition", *flags)
    assert code == 2 and "holds an interrupted run: --resume it, or give another --out_dir" in err
    resume = ("addition", *resume.split())
    code, _, err = program(train_module.main, *resume, "--seed=5")
    assert code == 2 and "--resume goes on with the settings of the run: give no other option" in err
    code, out, _ = program(train_module.main, *resume)
    assert code == 0 and "sparse: resumed after step 2 of 5" in out and "hard edges" in out
    code, _, err = program(train_module.main, *resume)
    assert code == 2 and "there is nothing to resume: the run in" in err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(small, tmp_path, monkeypatch):
    calls = []

    def step(model, *args):
        calls.append(1)
        if len(calls) == 12 + 8:
            with torch.no_grad():
                model.wte.weight.fill_(float("nan"))
        return training_step(model, *args)

    monkeypatch.setattr(train_module, "training_step", step)
    with pytest.raises(UserError, match="the loss is nan, .*: give a smaller --learning_rate"):
        train(small)
    saved = load_checkpoint(tmp_path / "run" / "last.pt", RUN)
    assert saved["step"] == 5 and all(p.isfinite().all() for p in saved["parts"]["model"].values())
    monkeypatch.setattr(train_module, "training_step", training_step)
    assert train(replace(small, resume=True))["sparse_loss"] > 0
    steps = [line["step"] for line in log_of(tmp_path / "run") if "multiplier" in line]
    assert steps == [3, 6, 9, 12], "what was logged after the last save is logged once"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, as on Linux")
def test_a_full_disk_is_one_sentence():
    run = object.__new__(runs.Run)
    run.log_path = Path("/dev/full")
    with pytest.raises(UserError, match=r"cannot write /dev/full \(No space left on device\): make room"):
        run.log({"step": 1})


def test_a_second_run_reuses_the_dense_model_alone(small, tmp_path, monkeypatch, capsys):
    first, calls = train(small), []
    monkeypatch.setattr(train_module, "training_step", lambda *args: calls.append(1) or training_step(*args))
    assert train(small)["training_bound"] == first["training_bound"] and len(calls) == 12
    assert "dense.pt is there: reused" in capsys.readouterr().out
    steps = [(line["phase"], line["step"]) for line in log_of(tmp_path / "run") if "multiplier" in line]
    assert steps == [("sparse", n) for n in (3, 6, 9, 12)], "lines of the older run are still there"


@pytest.mark.parametrize("what", ["settings", "dense.pt alone", "model.py", "data"])
def test_a_folder_of_another_run_is_refused_and_loses_nothing(small, tmp_path, monkeypatch, what):
    train(small)
    if what == "dense.pt alone":
        for name in ("summary.json", "last.pt"):
            (tmp_path / "run" / name).unlink()
        small = replace(small, seed=4)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    sentence = "dense.pt is of other data, another model, steps or seed, or another model.py: delete it"
    if what == "settings":
        small = replace(small, seed=4, batch_size=8)
        sentence = r"other settings \(batch_size was 16, now 8; seed was 3, now 4\): give another --out_dir"
    elif what == "model.py":
        monkeypatch.setattr(train_module, "CODE", "edited")
    elif what == "data":
        monkeypatch.setattr(train_module, "Dataset", lambda *args: with_other_meta(Dataset(*args)))
    with pytest.raises(UserError, match=sentence):
        train(small)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_resuming_on_other_data_is_refused(small, monkeypatch):
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(small)
    monkeypatch.setattr(train_module, "Dataset", lambda *args: with_other_meta(Dataset(*args)))
    with pytest.raises(UserError, match="sums is not the data that the run in .* began with: make it again"):
        train(replace(small, resume=True))


def test_a_folder_that_cannot_be_written_is_one_sentence(small, tmp_path):
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write to .*run .*: give another --out_dir"):
        train(small)


def with_other_meta(data):
    data.meta = {**data.meta, "sha256": "other"}
    return data


# ------------------------------------------------------------------------------------------------------------
# Sentences

BAD = [
    (["adition"], "there is no recipe 'adition': choose one of addition, recall, shakespeare"),
    (["addition", "--n_embd=10", "--n_head=4"], "n_embd 10 is not divisible by n_head 4: change"),
    (["addition", "--pretrain_steps=0"], "--pretrain_steps is 0: give at least 1"),
    (["addition", "--gate=gumbel"], "--gate is 'gumbel': choose one of hard_concrete, bernoulli"),
    (["addition", "--device=gpu"], "--device is 'gpu': choose auto, cpu, cuda, cuda:N"),
    (["addition", "--device=cuda:99"], "--device is cuda:99, but PyTorch sees"),
    (["addition", "--data_dir=/nowhere"], "/nowhere/sums/meta.json is missing: run `python data/prepare.py"),
    (["addition", "--init_from=nothing.pt"], "there is no checkpoint nothing.pt"),
    (["addition", "--init_from=nothing.pt", "--n_layer=2"], "--n_layer is 2, but --init_from decides it: le"),
    (["addition", "--distill"], "--distill is for running text, and sums is a task: give --no-distill"),
    (["addition", "--min_lr=1"], "--min_lr 1.0 is above --learning_rate 0.003: lower it"),
    (["addition", "--seed=99999999999999999999"], "--seed is 99999999999999999999: give less than"),
    (["addition", "--block_size=3"], "block_size is 3, sums has examples of 6: give at least 5"),
    (["addition", "--attention=fused"], "--attention is fused, which needs a CUDA device, and this is cpu"),
]


@pytest.mark.parametrize("argv, sentence", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(program, data_dir, tmp_path, argv, sentence):
    defaults = ["--dataset=sums", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/new"]
    defaults += ["--pretrain_steps=1", "--device=cpu"]
    code, out, err = program(train_module.main, argv[0], *defaults, *argv[1:])
    assert code == 2 and err.startswith("error: ") and sentence in err and len(err.splitlines()) == 1
    assert out == "" and not (tmp_path / "new").exists(), "before anything is trained"


def test_nothing_to_resume_and_a_last_pt_of_another_version(small, tmp_path):
    with pytest.raises(UserError, match="there is nothing to resume: .*last.pt does not exist"):
        train(replace(small, resume=True))
    Path(small.out_dir).mkdir()
    save_checkpoint({"format": RUN, "noise": [0], "config": {"no_more": 1}}, tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match="last.pt is of another version .*no_more.*: start over in another"):
        train(replace(small, resume=True))


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_summary_is_one_sentence(small, tmp_path, content):
    Path(small.out_dir).mkdir()
    (tmp_path / "run" / "summary.json").write_text(content)
    sentence = "summary.json is damaged or incomplete .*: delete it, or give another folder"
    with pytest.raises(UserError, match=sentence):
        train(small)


def test_a_checkpoint_that_does_not_fit_the_dataset(small, never_stopped, tmp_path):
    (tmp_path / "text.txt").write_text("other characters " * 50)
    prepare_text([tmp_path / "text.txt"], tmp_path / "data" / "text", "char", 0.1)
    fields = dict(dataset="text", data_dir=str(tmp_path / "data"), init_from=str(never_stopped / "dense.pt"))
    with pytest.raises(UserError, match=r"dense.pt knows other tokens \(char, vocabulary 12\) than text has"):
        train(replace(small, **fields))


def test_where_a_recipe_writes(monkeypatch, program):
    seen = []
    monkeypatch.setattr(train_module, "train", seen.append)
    for words in ("addition", "addition --dataset=sums", "shakespeare_char_gpu", "addition --out_dir=x"):
        program(train_module.main, *words.split())
    assert [c.out_dir for c in seen] == ["out/addition", "out/sums", "out/shakespeare_char_gpu", "x"]


def test_recipes_are_possible():
    for recipe in RECIPES.values():
        command_line.check(recipe)
