"""What a report says of the data that its figures come from."""

import pytest
import torch

from data import dataset
from data.dataset import Dataset
from model import GPT, GPTConfig
from support.report import evaluate, side_by_side, table


def test_figures_of_a_part_of_a_split_say_so(data_dir, monkeypatch):
    model = GPT(GPTConfig(block_size=5, vocab_size=12, n_layer=1, n_head=2, n_embd=8)).eval()
    data = Dataset("sums", 5, data_dir)
    whole = evaluate(model, data, batch_size=7)
    assert "part" not in whole and "tokens of" not in table({"dense": whole})
    monkeypatch.setattr(dataset, "EVALUATED", 60)
    result = evaluate(model, data, batch_size=3)
    assert "all on 60 of the 600 tokens of val.bin, evenly spread" in table({"dense": result}).splitlines()
    examples = torch.from_numpy(data.tokens["val"].astype("int64")).view(100, 6)[::10]
    log_p = model(examples[:, :-1], examples[:, 1:])[0].log_softmax(-1)
    loss = -log_p[:, 3:].gather(-1, examples[:, 4:, None]).mean().item()
    assert result["loss"] == pytest.approx(loss, rel=1e-5) and result["loss"] != whole["loss"]


def test_long_names_of_models_stay_apart():
    names = ["shakespeare_char_1_threads_seed_100", "shakespeare_char_1_threads_seed_101"]
    _, head, row = side_by_side({name: {"edges": 1} for name in names}, {"edges": ("edges", "d")}, 8)
    assert head.split() == names and len(head) == len(row)
