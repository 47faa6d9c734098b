"""Several ranks on one machine, started by torchrun as a user would, over gloo: they train what one process
trains."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

import gates
import train as train_module
from support import ranks, runs
from support.checkpoints import RUN, load_checkpoint
from tests.conftest import ROOT
from tests.test_train import SMALL

OPTIONS = dict(gate_bias="auto", activation_checkpointing=True)
PROGRAM = """
import os, signal, sys
from dataclasses import replace

import torch

import gates, train
from support import command_line, runs
from tests.test_ranks import FEW_STEPS, OPTIONS, fix_the_noise, take_the_kernels
from tests.test_train import SMALL

scenario, data_dir, out_dir, *words = sys.argv[1:]
rank, step, calls = int(os.environ["RANK"]), train.training_step, []
sys.argv[1:] = []


def training_step(model, *others):
    calls.append(1)
    if scenario == "nan" and rank == 1 and len(calls) == 4:
        next(model.parameters()).data.fill_(float("nan"))
    if scenario == "stop" and rank == 1 and len(calls) == 16:
        signal.raise_signal(signal.SIGTERM)
    if scenario == "die" and rank == 1 and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, *others)


train.training_step, runs.Run.draw = training_step, lambda *_: []
if scenario == "fixed":
    fix_the_noise()
settings = dict(data_dir=data_dir, out_dir=out_dir, bias=False, dropout=0.0, resume="resume" in words)
if scenario == "fused":
    take_the_kernels()
    settings |= FEW_STEPS
if scenario == "fixed":
    settings |= OPTIONS
    torch.set_default_dtype(torch.float64)
command_line.run(lambda argv: train.train(replace(SMALL, gradient_accumulation_steps=4, **settings)))
"""


def fix_the_noise():
    """Gates are sampled with the same uniforms everywhere, so that it does not matter which rank samples
    them."""
    sample = gates.HardConcrete.sample
    gates.HardConcrete.sample = lambda self, log_alpha, u=None: sample(self, log_alpha, torch.full_like(log_alpha, 0.5))


FEW_STEPS = dict(n_layer=1, n_head=1, batch_size=2, sparsify_steps=3)  # Triton's interpreter is slow


def take_the_kernels(replace=setattr):
    """Train with fused attention in Triton's interpreter, with the same noise everywhere, and evaluate with
    the reference."""
    import fused_attention
    import train

    def attend(q, k, v, bias, gate, training):
        return (fused_attention if training else gates).gated_attention(q, k, v, bias, gate, training)

    def choose_attention(model, name):
        for block in model.h:
            block.attn.attend = attend
        return "fused, in the interpreter"

    replace(train, "choose_attention", choose_attention)
    replace(fused_attention, "BLOCKS", (32, 32))
    replace(fused_attention, "new_seed", lambda device: torch.tensor([7], device=device))


@pytest.fixture
def torchrun(tmp_path, data_dir):
    """Run PROGRAM on two ranks -> (exit code, stdout, stderr)."""
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))

    def run(scenario, folder, *words):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [tmp_path / "program.py", scenario, data_dir, tmp_path / folder, *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    return run


def differences(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def multipliers(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["multiplier"] for line in lines if "multiplier" in line]


def assert_alike(one, two, tolerance):
    """Two runs' folders hold the same models and multipliers."""
    for name in ("dense.pt", "sparse.pt"):
        assert differences(*(load_checkpoint(folder / name)["model"] for folder in (one, two))) < tolerance
    assert multipliers(one) == pytest.approx(multipliers(two), abs=tolerance)


def test_two_ranks_train_what_one_process_with_twice_the_micro_steps_trains(torchrun, tmp_path, data_dir, monkeypatch, request):
    code, out, err = torchrun("fixed", "two")
    assert code == 0, err
    assert out.count("writing to") == 1 and "hard edges" in out
    monkeypatch.setattr(gates.HardConcrete, "sample", gates.HardConcrete.sample)
    monkeypatch.setattr(runs.Run, "draw", lambda *_: [])
    fix_the_noise()
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    settings = dict(data_dir=str(data_dir), out_dir=str(tmp_path / "one"), bias=False, dropout=0.0)
    train_module.train(replace(SMALL, gradient_accumulation_steps=4, **OPTIONS, **settings))
    assert_alike(tmp_path / "one", tmp_path / "two", 1e-6)


@pytest.mark.slow
def test_fused_attention_on_two_ranks_trains_what_it_trains_in_one_process(torchrun, tmp_path, data_dir, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: `make test` installs it")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and Triton's interpreter is off")
    code, out, err = torchrun("fused", "two")
    assert code == 0 and "gated attention: fused, in the interpreter" in out, err
    monkeypatch.setattr(runs.Run, "draw", lambda *_: [])
    take_the_kernels(monkeypatch.setattr)
    settings = dict(data_dir=str(data_dir), out_dir=str(tmp_path / "one"), bias=False, dropout=0.0)
    train_module.train(replace(SMALL, gradient_accumulation_steps=4, **FEW_STEPS, **settings))
    assert_alike(tmp_path / "one", tmp_path / "two", 1e-4)


@pytest.mark.slow
def test_two_ranks_stop_together_and_resume(torchrun, tmp_path):
    """Their noise differs, or the saved states would not; the signal reaches one rank only."""
    code, _, err = torchrun("none", "whole")
    assert code == 0, err
    code, _, err = torchrun("stop", "parts")
    assert code != 0 and "stopped: sparse after step 4 of 12, and saved" in err
    saved = load_checkpoint(tmp_path / "parts" / "last.pt", RUN)
    assert len(saved["noise"]) == 2 and not torch.equal(*saved["noise"])
    code, out, err = torchrun("none", "parts", "resume")
    assert code == 0 and "sparse: resumed after step 4 of 12" in out, err
    whole, parts = (load_checkpoint(tmp_path / folder / "sparse.pt")["model"] for folder in ("whole", "parts"))
    assert differences(whole, parts) == 0
    assert multipliers(tmp_path / "whole") == multipliers(tmp_path / "parts")


@pytest.mark.slow
def test_not_a_number_on_one_rank_stops_all(torchrun, tmp_path):
    code, _, err = torchrun("nan", "run")
    assert code != 0 and "error: the loss is nan" in err and "rank 1: error: the loss is nan" in err
    assert (tmp_path / "run" / "last.pt").is_file() and not (tmp_path / "run" / "dense.pt").exists()


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_down(torchrun):
    code, _, err = torchrun("die", "run")
    assert code != 0 and "another rank has stopped" in err


def test_micro_steps_that_cannot_be_shared_out_are_refused(program, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = program(train_module.main, "addition", "--gradient_accumulation_steps=4")
    assert code == 2 and "--gradient_accumulation_steps 4 cannot be shared out over 3 processes: give a multiple of 3" in err
