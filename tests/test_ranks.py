"""Two ranks, started by torchrun as a user would, over gloo: they train what one process trains."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import gates
import train as train_module
from support import ranks, runs
from support.checkpoints import RUN, load_checkpoint
from support.command_line import UserError
from tests.conftest import ROOT
from tests.test_train import SMALL

PROGRAM = """
import os, signal, sys

import train
from support import command_line
from tests.test_ranks import train_small

scenario, data_dir, out_dir, *words = sys.argv[1:]
rank, step, calls = int(os.environ["RANK"]), train.training_step, []


def training_step(model, *others):
    calls.append(1)
    if scenario == "nan" and rank == 1 and len(calls) == 4:
        next(model.parameters()).data.fill_(float("nan"))
    if scenario == "stop" and rank == 1 and len(calls) == 16:
        signal.raise_signal(signal.SIGTERM)
    if scenario == "die" and rank == 1 and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, *others)


train.training_step = training_step
command_line.run(lambda argv: train_small(scenario, data_dir, out_dir, resume="resume" in words))
"""


def train_small(scenario, data_dir, out_dir, resume=False, replaced=setattr):
    """A run of four micro-steps per step. fixed: in float64, all gates with the same uniforms, so that it
    does not matter which rank samples them; fused: in Triton's interpreter, with one seed."""
    config = replace(SMALL, data_dir=str(data_dir), out_dir=str(out_dir), resume=resume)
    config = replace(config, gradient_accumulation_steps=4, bias=False, dropout=0.0)
    config = replace(config, multiplier_scale=10.0)  # no violation is clipped: every digit of it counts
    replaced(runs.Run, "draw", lambda *_: [])
    if scenario == "fixed":
        sample = gates.HardConcrete.sample
        half = lambda self, log_alpha, u=None: sample(self, log_alpha, torch.full_like(log_alpha, 0.5))
        replaced(gates.HardConcrete, "sample", half)
        config = replace(config, gate_bias="auto", activation_checkpointing=True)
        torch.set_default_dtype(torch.float64)
    if scenario == "fused":
        take_the_kernels(replaced)
        config = replace(config, n_layer=1, n_head=1, batch_size=2, sparsify_steps=3)  # it is slow
    try:
        train_module.train(config)
    finally:
        torch.set_default_dtype(torch.float32)


def take_the_kernels(replaced):
    """Train with fused attention, evaluate with the reference."""
    import fused_attention

    def attend(q, k, v, bias, gate, training):
        return (fused_attention if training else gates).gated_attention(q, k, v, bias, gate, training)

    def choose_attention(model, name):
        for block in model.h:
            block.attn.attend = attend
        return "fused, in the interpreter"

    replaced(train_module, "choose_attention", choose_attention)
    replaced(fused_attention, "new_seed", lambda device: torch.tensor([7], device=device))


@pytest.fixture
def torchrun(tmp_path, data_dir):
    """Run PROGRAM on two ranks -> (exit code, stdout, stderr)."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(scenario, folder, *words):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [tmp_path / "program.py", scenario, data_dir, tmp_path / folder, *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    return run


def multipliers(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["multiplier"] for line in lines if "multiplier" in line]


def assert_alike(one, two, tolerance):
    """Two runs' folders hold the same models and multipliers."""
    for name in ("dense.pt", "sparse.pt"):
        a, b = (load_checkpoint(folder / name)["model"] for folder in (one, two))
        assert all((a[key] - b[key]).abs().max() <= tolerance for key in a)
    assert multipliers(one) == pytest.approx(multipliers(two), abs=tolerance, rel=0)


def test_two_ranks_train_what_one_process_trains(torchrun, tmp_path, data_dir, monkeypatch):
    code, out, err = torchrun("fixed", "two")
    assert code == 0, err
    assert out.count("writing to") == 1 and "hard edges" in out
    train_small("fixed", data_dir, tmp_path / "one", replaced=monkeypatch.setattr)
    assert_alike(tmp_path / "one", tmp_path / "two", 1e-6)


@pytest.mark.slow
def test_with_fused_attention_they_do_so_too(torchrun, tmp_path, data_dir, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: `make test` installs it")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and Triton's interpreter is off")
    code, out, err = torchrun("fused", "two")
    assert code == 0 and "gated attention: fused, in the interpreter" in out, err
    train_small("fused", data_dir, tmp_path / "one", replaced=monkeypatch.setattr)
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
    assert_alike(tmp_path / "whole", tmp_path / "parts", 0)


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
    assert code == 2 and "steps 4 cannot be shared out over 3 processes: give a multiple of 3" in err


def test_every_rank_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [ranks.find_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")]
    assert found == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.find_device("auto") == ranks.find_device("cuda") == "cuda:1"
    with pytest.raises(UserError, match="each of 2 ranks takes its own GPU: give cuda"):
        ranks.find_device("cuda:0")
