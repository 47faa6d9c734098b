"""The lesson's code, block after block, on a model that is hardly trained; and its pictures."""

import re

import pytest

import readings
import train
from data import prepare
from support import pictures
from tests.conftest import ROOT

LESSON = (ROOT / "docs" / "lesson.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", LESSON, flags=re.M | re.S)
SHORT = {
    "100_000": "1000",
    "steps=2000": "steps=20",
    "range(600)": "range(20)",
    "1000, seed=0": "20, seed=0",
    "steps=200": "steps=3, sweep=False",
}


@pytest.fixture
def trained(program, tmp_path, monkeypatch):
    """An empty folder with out/addition and data/addition, as after the lesson's first two commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readings, "MOST_PAIRS", 2**14)  # 16 examples
    size = "--n_layer=2 --n_head=2 --n_embd=16 --gate_bias=-2"  # few edges are open from the start
    options = f"{size} --pretrain_steps=3 --sparsify_steps=3 --eval_iters=1 --log_interval=1 --device=cpu"
    assert program(prepare.main, "addition")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save", lambda figure, path: path)
        assert program(train.main, "addition", *options.split())[0] == 0


def test_blocks_run_in_order_and_every_chapter_draws_its_picture(trained, tmp_path):
    scope = {}
    for block in BLOCKS:
        for long, short in SHORT.items():
            block = block.replace(long, short)
        exec(block, scope)
    drawn = sorted(path.name for path in (tmp_path / "out").glob("lesson_*.png"))
    assert drawn == [f"lesson_{chapter}.png" for chapter in range(1, 6)]
    assert all((ROOT / "docs" / name).is_file() and f"]({name})" in LESSON for name in drawn)
    assert all(long in "".join(BLOCKS) for long in SHORT), "the test shortens what the lesson no longer says"
