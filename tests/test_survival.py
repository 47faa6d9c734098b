"""A training process that is killed again and again, at any moment, ends where one left alone does."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from support.checkpoints import load_checkpoint
from tests.conftest import ROOT

FIELDS = dict(
    dataset="sums", n_layer=2, n_head=2, n_embd=16, block_size=5, batch_size=16, pretrain_steps=1500,
    sparsify_steps=1500, dropout=0.1, eval_interval=30, log_interval=10, device="cpu", seed=3,
)  # fmt: skip


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.huge
def test_ten_kills_and_resumes_give_the_weights_of_an_undisturbed_run(data_dir, tmp_path):
    def start(folder, resume=False):
        fields = {} if resume else {**FIELDS, "data_dir": data_dir}
        options = ["--resume"] * resume + [f"--{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "train.py", "addition", f"--out_dir={tmp_path / folder}", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)

    assert start("whole").wait() == 0
    log, moments, kills, resumed = tmp_path / "parts" / "log.jsonl", random.Random(0), 0, 0
    while True:
        resume = (tmp_path / "parts" / "last.pt").exists()
        process = start("parts", resume)
        enough = lines(log) + moments.randrange(1, 30)
        while process.poll() is None:
            if kills < 10 and lines(log) >= enough:
                time.sleep(moments.uniform(0, 0.05))
                process.kill()
            time.sleep(0.005)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        kills, resumed = kills + 1, resumed + resume
    assert kills == 10 and resumed >= 5
    for name in ("dense.pt", "sparse.pt"):
        whole, parts = (load_checkpoint(tmp_path / folder / name)["model"] for folder in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
