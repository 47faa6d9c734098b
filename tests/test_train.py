"""The training loop: edges fall, runs resume bit for bit, and nothing is lost when something goes wrong."""

import dataclasses
import json
import math
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train as train_module
from config import UserError
from constrained import LossBound
from data.prepare import prepare_text
from gates import GATES
from model import GATE_INPUTS, GPT, GPTConfig, checkpoint_of, load_checkpoint, save_checkpoint
from report import evaluate
from tests.conftest import ROOT
from train import RECIPES, TrainConfig, learning_rate_at, make_optimizer, train, training_step

SMALL = TrainConfig(
    dataset="sums", n_layer=2, n_head=2, n_embd=16, block_size=5, batch_size=16, pretrain_steps=12, sparsify_steps=12,
    control=False, learning_rate=1e-2, gate_learning_rate=1e-1, min_lr=1e-3, warmup_iters=2, eval_interval=5, log_interval=3,
    dropout=0.1, device="cpu", seed=3,
)  # fmt: skip


@pytest.fixture
def small(data_dir, tmp_path, monkeypatch, request):
    if "promises" not in request.node.name:  # pictures take longer than all the rest
        monkeypatch.setattr(train_module, "draw", lambda *args: [])
    return replace(SMALL, data_dir=str(data_dir), out_dir=str(tmp_path / "run"))


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(monkeypatch, n):
    """Let the nth training step be interrupted as Ctrl-C would."""
    calls = []

    def step(*args):
        calls.append(1)
        if len(calls) == n:
            signal.raise_signal(signal.SIGINT)
        return training_step(*args)

    monkeypatch.setattr(train_module, "training_step", step)


def test_a_run_writes_what_it_promises(small, tmp_path, capsys):
    summary = train(replace(small, control=True))
    folder = tmp_path / "run"
    files = {"dense.pt", "sparse.pt", "control.pt", "last.pt", "log.jsonl", "summary.json"}
    assert {p.name for p in folder.iterdir()} == files | {"training.png", "attention.png", "arcs.png"}
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["bound"] == pytest.approx(summary["dense_loss"] + 0.01)
    for name, key in (("dense", "dense_loss"), ("sparse", "sparse_loss"), ("control", "control_loss")):
        model = GPT.from_pretrained(folder / f"{name}.pt")
        data = train_module.Dataset("sums", 5, small.data_dir)
        assert evaluate(model, data, 32)["loss"] == pytest.approx(summary[key])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["phase"] == "sparse" and "multiplier" in line]
    assert steps == [3, 6, 9, 12]
    wanted = {
        "phase",
        "step",
        "loss",
        "bound",
        "multiplier",
        "expected_edges",
        "hard_edges",
        "learning_rate",
        "tokens_per_second",
    }
    assert all(wanted <= line.keys() for line in lines if line["phase"] == "sparse" and "multiplier" in line)
    out = capsys.readouterr().out
    for words in ("hard edges", "expected edges", "empty rows", "accuracy", "layer 1", "attention.png", "tokens/s", "left"):
        assert words in out


def test_evaluation_agrees_with_a_plain_loop_over_greedy_answers(data_dir):
    data = train_module.Dataset("sums", 5, data_dir)
    torch.manual_seed(4)
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=1, n_head=2, n_embd=8, gate="hard_concrete", gate_bias=-0.1))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)
    examples = torch.from_numpy(data.tokens["val"].astype("int64")).view(-1, 6)
    answers = model.generate(examples[:, :4], 2, temperature=0)[:, 4:]
    result = evaluate(model, data, batch_size=7)
    assert result["accuracy"] == pytest.approx((answers == examples[:, 4:]).all(1).double().mean().item())
    model.eval()
    log_p = model(examples[:, :-1], examples[:, 1:])[0].log_softmax(-1)
    loss = -log_p[:, 3:].gather(-1, examples[:, 4:, None]).mean().item()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    edges = model.attention(examples[:, :-1]).edges.sum().item() / (100 * 2 * 15)
    assert result["edges_hard"] == pytest.approx(edges) and 0 < edges < 1


@pytest.mark.parametrize("seen", GATE_INPUTS)
@pytest.mark.parametrize("gate", sorted(GATES))
def test_thirty_steps_close_edges(small, gate, seen):
    gated = dict(gate=gate, gate_input=seen, gate_bias=1.0)
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=2, n_head=2, n_embd=16, **gated))
    data = train_module.Dataset("sums", 5, small.data_dir)
    before = evaluate(model, data, 32)  # the scores of a new model are near zero: only the bias counts
    after = train(replace(small, **gated, pretrain_steps=1, sparsify_steps=30, loss_tolerance=10.0))
    assert before["edges_hard"] > 0.9 and after["edges_hard"] < 0.8
    assert after["edges_expected"] < before["edges_expected"] - 0.1


def test_the_sparse_phase_is_the_same_from_the_dense_checkpoint(small, tmp_path):
    """Low-rank gates start at random, from the seed alone."""
    small = replace(small, gate_input="low_rank")
    train(small)
    train(replace(small, init_from=f"{small.out_dir}/dense.pt", out_dir=str(tmp_path / "again")))
    first, again = weights(f"{small.out_dir}/sparse.pt"), weights(tmp_path / "again/sparse.pt")
    assert same(first, again)


@pytest.fixture(scope="module")
def never_stopped(data_dir, tmp_path_factory):
    """The folder of a run of all three phases, 12 steps each."""
    folder = tmp_path_factory.mktemp("never_stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "draw", lambda *args: [])
        train(replace(SMALL, control=True, data_dir=str(data_dir), out_dir=str(folder)))
    return folder


# in the dense phase before and after its first evaluation, at an evaluation, at phases' ends, in the sparse phase, the control
@pytest.mark.parametrize("n", [1, 4, 5, 7, 12, 13, 20, 24, 30])
def test_resuming_equals_never_stopping_bit_for_bit(small, never_stopped, tmp_path, monkeypatch, n):
    broken = replace(small, control=True, out_dir=str(tmp_path / "broken"))
    stop_at(monkeypatch, n)
    with pytest.raises(KeyboardInterrupt, match=r"after step \d+ of 12, and saved"):
        train(broken)
    monkeypatch.setattr(train_module, "training_step", training_step)
    train(replace(broken, resume=True))
    for name in ("dense", "sparse", "control"):
        assert same(weights(never_stopped / f"{name}.pt"), weights(tmp_path / "broken" / f"{name}.pt")), name

    def log(folder):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]

    assert log(never_stopped) == log(tmp_path / "broken")


def test_evaluating_more_often_changes_nothing(small, tmp_path):
    train(small)
    train(replace(small, eval_interval=1, log_interval=1, out_dir=str(tmp_path / "often")))
    assert same(weights(tmp_path / "run" / "sparse.pt"), weights(tmp_path / "often" / "sparse.pt"))


def test_a_finished_run_is_reused_and_other_settings_are_not(small, tmp_path, monkeypatch, capsys):
    first = train(small)
    capsys.readouterr()

    def no_training(*args):
        raise AssertionError("a finished phase was trained again")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "training_step", no_training)
        assert train(small)["sparse_loss"] == first["sparse_loss"]
        assert train(replace(small, resume=True))["sparse_loss"] == first["sparse_loss"]
    assert capsys.readouterr().out.count("has the same settings: reused") == 4
    dense = weights(tmp_path / "run" / "dense.pt")
    train(replace(small, loss_tolerance=0.5))  # a new sparse phase from the same dense model
    assert "dense: " in (out := capsys.readouterr().out) and "sparse: " not in out.split("validation")[0]
    assert same(dense, weights(tmp_path / "run" / "dense.pt"))
    capsys.readouterr()
    train(replace(small, seed=4))
    assert not same(dense, weights(tmp_path / "run" / "dense.pt"))
    assert same(dense, weights(tmp_path / "run" / "dense.old.pt")), "the older model must not be lost"
    assert "dense.pt has other settings (seed was 3, now 4): it will be kept as dense.old.pt" in capsys.readouterr().out


def test_post_training_an_existing_dense_model(small, tmp_path):
    train(small)
    dense = tmp_path / "run" / "dense.pt"
    one = train(replace(small, init_from=str(dense), seed=11, out_dir=str(tmp_path / "one"), n_embd=999))
    two = train(replace(small, init_from=str(dense), seed=12, out_dir=str(tmp_path / "two")))
    assert one["dense_loss"] == two["dense_loss"] and one["sparse_loss"] != two["sparse_loss"]
    assert one["config"]["n_embd"] == 16, "the checkpoint decides the shape"
    with pytest.raises(UserError, match="sparse.pt has gates already"):
        train(replace(small, init_from=str(tmp_path / "run" / "sparse.pt")))


def test_gated_model_starts_from_the_dense_weights_and_dense_stays(small, tmp_path):
    train(replace(small, sparsify_steps=1, learning_rate=1e-9, gate_learning_rate=1e-9, min_lr=0.0))
    dense, sparse = (weights(tmp_path / "run" / f"{name}.pt") for name in ("dense", "sparse"))
    assert all(torch.allclose(dense[name], sparse[name], atol=1e-6) for name in dense)
    assert torch.allclose(sparse["h.0.attn.gate_bias"], torch.full((2,), 5.0))


def test_accumulated_micro_steps_are_one_large_batch(data_dir):
    data = train_module.Dataset("sums", 5, data_dir)
    x, y = data.batch("train", 32, torch.Generator().manual_seed(0))
    states = []
    for batches in ([(x, y)], [(x[:16], y[:16]), (x[16:], y[16:])]):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=1, n_head=2, n_embd=8))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss, _ = training_step(model, optimizer, batches, None, 1e9, nullcontext)
        states.append((loss, model.state_dict()))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-6)
    assert all(torch.allclose(states[0][1][name], p, atol=1e-6) for name, p in states[1][1].items())


def test_the_multiplier_follows_the_mean_of_the_micro_steps(data_dir):
    data = train_module.Dataset("sums", 5, data_dir)
    generator = torch.Generator().manual_seed(0)
    batches = [data.batch("train", 8, generator) for _ in range(3)]
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=1, n_head=2, n_embd=8, gate="bernoulli", gate_bias=50.0))
    losses = [model(*batch)[1].item() for batch in batches]
    bound = LossBound(1.0)
    loss, _ = training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, bound, 1.0, nullcontext)
    assert bound.average == pytest.approx(sum(losses) / 3) == pytest.approx(loss)


def test_a_gradient_that_is_not_finite_changes_nothing(data_dir):
    data = train_module.Dataset("sums", 5, data_dir)
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=1, n_head=2, n_embd=8))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.ln_f.weight.register_hook(lambda grad: grad * float("nan"))  # the loss stays finite
    batch = data.batch("train", 8, torch.Generator().manual_seed(0))
    with pytest.raises(FloatingPointError, match="norm of the gradient nan"):
        training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch], None, 1.0, nullcontext)
    assert same(before, model.state_dict())


def test_learning_rates():
    config = replace(SMALL, warmup_iters=10, learning_rate=1.0, min_lr=0.1)
    assert learning_rate_at(0, 100, config) == pytest.approx(1 / 11)
    assert learning_rate_at(50, 100, config) == pytest.approx(0.55)
    assert learning_rate_at(100, 100, config) == pytest.approx(0.1)
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=1, n_head=2, n_embd=8, gate="bernoulli", gate_input="low_rank"))
    groups = make_optimizer(model, replace(SMALL, learning_rate=1.0, gate_learning_rate=10.0), 0.1).param_groups
    assert [(len(g["params"]), g["weight_decay"], g["lr_ratio"]) for g in groups] == [(7, 0.1, 1), (10, 0, 1), (1, 0, 10)]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(small, tmp_path, monkeypatch):
    calls = []

    def step(model, *args):
        calls.append(1)
        if len(calls) == 12 + 8:
            with torch.no_grad():
                model.wte.weight.fill_(float("nan"))
        return training_step(model, *args)

    monkeypatch.setattr(train_module, "training_step", step)
    with pytest.raises(UserError, match="sparse: the loss is nan, .* in step 8: .*last.pt holds the last good state"):
        train(small)
    saved = load_checkpoint(tmp_path / "run" / "last.pt", format="nanosparse run")
    assert saved["step"] == 5 and all(p.isfinite().all() for p in saved["state"]["model"].values())
    monkeypatch.setattr(train_module, "training_step", training_step)
    assert train(replace(small, resume=True))["sparse_loss"] > 0


def test_text_runs_too(tmp_path):
    prepare_text([ROOT / "LICENSE", ROOT / "README.md"], tmp_path / "data" / "text", "char", 0.1)
    config = replace(
        RECIPES["shakespeare_char"], dataset="text", data_dir=str(tmp_path / "data"), out_dir=str(tmp_path / "run")
    )
    config = replace(
        config,
        learning_rate=1e-2,
        warmup_iters=10,
        pretrain_steps=100,
        sparsify_steps=5,
        eval_interval=100,
        block_size=16,
        batch_size=64,
        n_layer=2,
        n_embd=32,
        device="cpu",
    )
    summary = train(config)
    assert summary["dense_loss"] < 3.6 and "dense_accuracy" not in summary and summary["control_loss"] > 0


BAD = [
    (["adition"], "there is no recipe 'adition': choose one of addition, shakespeare_char"),
    (["addition", "--batchsize=4"], "there is no option --batchsize: did you mean --batch_size?"),
    (["addition", "--batch_size=four"], "--batch_size is 'four': give a whole number"),
    (["addition", "--n_embd=10", "--n_head=4"], "n_embd 10 is not divisible by n_head 4"),
    (["addition", "--n_layer=0"], "--n_layer is 0: give at least 1"),
    (["addition", "--learning_rate=-1"], "--learning_rate is -1.0: give more than 0"),
    (["addition", "--pretrain_steps=0"], "--pretrain_steps is 0: give at least 1"),
    (["addition", "--gate=gumbel"], "--gate is 'gumbel': choose one of hard_concrete, bernoulli"),
    (["addition", "--device=gpu"], "--device is 'gpu': choose auto, cpu, cuda, cuda:N"),
    (["addition", "--device=cuda:99"], "--device is cuda:99, but PyTorch sees"),
    (["addition", "--data_dir=/nowhere"], "/nowhere/addition/meta.json is missing: run `python data/prepare.py addition`"),
    (["addition", "--init_from=nothing.pt"], "there is no checkpoint nothing.pt"),
    (["addition", "--min_lr=1"], "--min_lr 1.0 is above --learning_rate"),
    (["addition", "--seed=99999999999999999999"], "--seed is 99999999999999999999: give less than"),
    (["addition", "extra"], "what is 'extra'? Options are written --name=value"),
]


@pytest.mark.parametrize("argv, sentence", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(program, data_dir, tmp_path, argv, sentence):
    if not any(word.startswith("--data_dir") for word in argv):
        argv = [*argv, f"--data_dir={data_dir}", "--dataset=sums"]
    code, out, err = program(train_module.main, *argv, f"--out_dir={tmp_path / 'new'}")
    assert code == 2 and err.startswith("error: ") and sentence in err and len(err.splitlines()) == 1
    assert "Traceback" not in err and not (tmp_path / "new").exists()


def test_all_problems_of_a_command_line_are_reported_together(program):
    code, _, err = program(train_module.main, "adition", "--gate=x", "--n_layer=-1", "--seed=a", "--bogus", "--device=gpu")
    assert code == 2 and len(err.splitlines()) == 6
    code, _, err = program(
        train_module.main, "addition", "--data_dir=nowhere", "--init_from=nothing.pt", "--resume", "--out_dir=none"
    )
    assert code == 2 and [line.split(" ")[1:4] for line in err.splitlines()] == [
        ["there", "is", "no"], ["nowhere/addition/meta.json", "is", "missing:"], ["there", "is", "nothing"]
    ]  # fmt: skip


def test_nothing_to_resume(program, small, tmp_path):
    argv = ["addition", "--resume", f"--out_dir={tmp_path / 'none'}", f"--data_dir={small.data_dir}", "--dataset=sums"]
    code, _, err = program(train_module.main, *argv)
    assert code == 2 and "there is nothing to resume" in err and "last.pt does not exist" in err


def test_resuming_with_other_settings_is_refused_and_loses_nothing(small, tmp_path):
    train(small)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="pretrain_steps was 12, now 20; batch_size was 16, now 8: give the same values"):
        train(replace(small, resume=True, pretrain_steps=20, batch_size=8))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_resuming_from_another_start_is_refused_and_loses_nothing(small, tmp_path):
    train(small)
    other = replace(small, seed=9, out_dir=str(tmp_path / "other"))
    train(other)
    begun = replace(small, init_from=str(tmp_path / "other" / "dense.pt"), out_dir=str(tmp_path / "begun"))
    train(begun)
    for config in (replace(small, init_from=begun.init_from), replace(begun, init_from="scratch")):
        before = {p.name: p.read_bytes() for p in Path(config.out_dir).iterdir()}
        with pytest.raises(UserError, match="cannot resume .*last.pt: init_from was "):
            train(replace(config, resume=True))
        assert {p.name: p.read_bytes() for p in Path(config.out_dir).iterdir()} == before


def test_the_bound_does_not_depend_on_whether_the_dense_model_was_reused(small):
    first = train(small)  # small has dropout: the dense model's training loss is noisy
    Path(small.out_dir, "sparse.pt").unlink()
    assert train(small)["training_bound"] == first["training_bound"]


def test_a_log_cut_short_does_not_stop_the_next_run(small, tmp_path):
    train(small)
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"phase": "sparse", "st')
    train(replace(small, loss_tolerance=0.5))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    seen = [(line["phase"], line["step"], "val_loss" in line) for line in lines]
    assert len(seen) == len(set(seen)), "lines of the older run are still there"


def test_ctrl_c_on_the_command_line(small, tmp_path, monkeypatch, program):
    flags = [
        f"--{k}={getattr(small, k)}" for k in "dataset data_dir out_dir n_layer n_head n_embd block_size batch_size".split()
    ]
    flags += ["--pretrain_steps=5", "--sparsify_steps=5", "--device=cpu", "--plot_text="]
    stop_at(monkeypatch, 7)
    code, _, err = program(train_module.main, "addition", *flags)
    assert code == 130 and err == "stopped: sparse after step 2 of 5, and saved: the same command with --resume goes on\n"
    monkeypatch.setattr(train_module, "training_step", training_step)
    code, out, _ = program(train_module.main, "addition", *flags, "--resume")
    assert code == 0 and "sparse: resumed after step 2 of 5" in out
    assert "hard edges" in out


def test_an_aborted_run_with_other_settings_leaves_the_finished_one_usable(small, tmp_path, monkeypatch, capsys):
    first = train(small)
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(replace(small, seed=4))
    capsys.readouterr()
    assert train(small)["sparse_loss"] == first["sparse_loss"]
    out = capsys.readouterr().out
    assert out.count("reused") == 2 and "the interrupted run's last.pt is kept as last.old.pt" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "multiplier" in line] == [3, 6, 9, 12], "training.png needs them"


def test_an_edited_algorithm_is_not_taken_for_a_finished_run(small, monkeypatch):
    train(small)
    calls = []
    monkeypatch.setattr(train_module, "code_of", lambda *files: "edited")
    monkeypatch.setattr(train_module, "training_step", lambda *args: calls.append(1) or training_step(*args))
    train(small)
    assert len(calls) == 12, "the sparse phase, and only that, must be trained again"


def test_where_a_recipe_writes(small, tmp_path, monkeypatch, program):
    seen = []
    monkeypatch.setattr(train_module, "train", seen.append)
    for argv in (["addition"], ["addition", "--dataset=sums"], ["shakespeare_char_gpu"], ["addition", "--out_dir=x"]):
        program(train_module.main, *argv)
    assert [(c.out_dir, c.plot_text) for c in seen] == [
        ("out/addition", "57+68=125"),
        ("", ""),
        ("out/shakespeare_char_gpu", ""),
        ("x", "57+68=125"),
    ]


def test_bfloat16_runs(small):
    assert math.isfinite(train(replace(small, dtype="bfloat16"))["sparse_loss"])


def test_a_text_to_draw_that_the_dataset_does_not_know_is_no_error(small, capsys):
    train(replace(small, plot_text="hello"))
    assert "note: --plot_text 'hello' is not drawn" in capsys.readouterr().out


def test_field_names_left_out_of_the_settings_exist():
    assert train_module.NO_RESULT | train_module.NOT_DENSE <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_damaged_last_pt_is_named(small, tmp_path):
    train(small)
    (tmp_path / "run" / "last.pt").write_bytes(b"PK broken")
    with pytest.raises(UserError, match="last.pt is damaged"):
        train(replace(small, resume=True))
    save_checkpoint({"format": "something else"}, tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match="last.pt is no nanosparse run"):
        train(replace(small, resume=True))


def test_a_checkpoint_that_does_not_fit_the_dataset(small, tmp_path):
    train(small)
    (tmp_path / "text.txt").write_text("other characters " * 50)
    prepare_text([tmp_path / "text.txt"], tmp_path / "data" / "text", "char", 0.1)
    other = replace(small, dataset="text", data_dir=str(tmp_path / "data"), init_from=str(tmp_path / "run" / "dense.pt"))
    with pytest.raises(UserError, match=r"dense.pt was trained on other tokens \(char, 12 of them\) than text has"):
        train(replace(other, out_dir=str(tmp_path / "other")))


def test_recipes_are_possible():
    for name, recipe in RECIPES.items():
        assert train_module.command_line.check(recipe) == [], name


def low_scores(data_dir, path):
    """A dense checkpoint whose attention is far from uniform and whose scores are far below zero: a constant in the residual
    stream gives every query and key of a head opposite parts."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        model.wte.weight.mul_(20)
        for block in model.h:
            for p in (block.attn.c_attn.weight, block.attn.c_proj.weight):
                p.mul_(50)
            block.attn.c_attn.bias[:16], block.attn.c_attn.bias[16:32] = 9.0, -9.0
    meta = json.loads((Path(data_dir) / "sums" / "meta.json").read_text())
    save_checkpoint(checkpoint_of(model, meta, {}), path)


def test_automatic_gate_biases_let_a_model_with_low_scores_start_at_its_own_loss(small, tmp_path):
    path = str(tmp_path / "low.pt")
    low_scores(small.data_dir, path)
    data = train_module.Dataset("sums", 5, small.data_dir)
    x, _ = data.batch("train", 16, torch.Generator().manual_seed(0))
    dense, gated = GPT.from_pretrained(path), GPT.from_pretrained(path, gate="hard_concrete")
    losses = {"dense": evaluate(dense, data, 32)["loss"], "bias 5": evaluate(gated, data, 32)["loss"]}
    assert evaluate(gated, data, 32)["edges_hard"] < 0.1
    gated.open_gates(x)
    after = evaluate(gated, data, 32)
    assert after["mass_removed"] < 0.01 and abs(after["loss"] - losses["dense"]) < 0.02 < abs(
        losses["bias 5"] - losses["dense"]
    )
    low_rank = GPT.from_pretrained(path, gate="hard_concrete", gate_input="low_rank", gate_bias=-5.0)
    low_rank.open_gates(x)
    assert evaluate(low_rank, data, 32)["loss"] == pytest.approx(losses["dense"])
    train(replace(small, init_from=path, gate_bias="auto", sparsify_steps=1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    start = next(line for line in lines if line["phase"] == "sparse" and "val_loss" in line)
    assert abs(start["val_loss"] - losses["dense"]) < 0.02


def test_distillation_pulls_towards_the_teacher(small):
    """With a bound that is never met and a large weight, the divergence from the teacher is smaller than without."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=5, vocab_size=12, n_layer=1, n_head=2, n_embd=16)
    teacher, data = GPT(config).eval(), train_module.Dataset("sums", 5, small.data_dir)
    x, y = data.batch("train", 32, torch.Generator().manual_seed(0))

    def divergence_after(distill):
        torch.manual_seed(1)
        model = GPT(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(20):
            training_step(model, optimizer, [(x, y)], LossBound(0.0), 1e9, nullcontext, teacher, distill)
        return train_module.divergence(teacher, model(x, y)[0], x, y, nullcontext).item()

    other = GPT(config)
    p, q = (model(x, y)[0][y >= 0].log_softmax(-1) for model in (teacher, other))
    by_hand = (p.exp() * (p - q)).sum(-1).mean().item()
    assert train_module.divergence(teacher, other(x, y)[0], x, y, nullcontext).item() == pytest.approx(by_hand, rel=1e-4)
    assert divergence_after(10.0) < 0.5 * divergence_after(0.0)


def test_activation_checkpointing_changes_nothing(small, tmp_path):
    for folder, on in (("off", False), ("on", True)):
        train(replace(small, out_dir=str(tmp_path / folder), activation_checkpointing=on))
    assert same(*(weights(tmp_path / folder / "sparse.pt") for folder in ("off", "on")))


def test_a_dense_model_may_be_trained_on_shorter_sequences(small, tmp_path, capsys):
    train(replace(small, sparsify_steps=1, out_dir=str(tmp_path / "first"), block_size=7))
    path = str(tmp_path / "first" / "dense.pt")
    train(replace(small, init_from=path, sparsify_steps=1))
    assert "sequences of 5 tokens" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "sparse.pt")["model_config"]["block_size"] == 7
