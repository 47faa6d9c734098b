"""sample.py: generation, pictures, scores, and what it says of bad input."""

import pytest
import torch

import sample
from data.prepare import prepare_text
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig
from support.checkpoints import save_model

CHARACTERS = "\n abcdefghij"


@pytest.fixture
def models(tmp_path, data_dir):
    """A task checkpoint, dense and gated, and a text checkpoint; untrained."""
    from data.dataset import read_meta

    torch.manual_seed(0)
    shape = dict(block_size=8, vocab_size=12, n_layer=2, n_head=2, n_embd=16)
    for name, gate in (("dense", "none"), ("sparse", "hard_concrete")):
        model = GPT(GPTConfig(**shape, gate=gate, gate_bias=0.0))
        save_model(model, tmp_path / f"{name}.pt", read_meta(data_dir / "sums"), {})
    for name, other in (("deep", {"n_layer": 3}), ("long", {"block_size": 9})):
        save_model(GPT(GPTConfig(**shape | other)), tmp_path / f"{name}.pt", read_meta(data_dir / "sums"), {})
    model = GPT(GPTConfig(**{**shape, "vocab_size": len(CHARACTERS)}))
    save_model(model, tmp_path / "text.pt", CharTokenizer(CHARACTERS).meta(), {})
    return tmp_path


def test_answers_a_problem_of_a_task(program, models):
    code, out, _ = program(sample.main, models / "sparse.pt", "--prompt=4+5=")
    assert code == 0 and out.startswith("4+5=") and len(out.strip()) == 6


def test_text_is_reproducible_from_its_seed(program, models):
    argv = [models / "text.pt", "--prompt=abc", "--max_new_tokens=30", "--num_samples=2"]
    one, two = program(sample.main, *argv, "--seed=1")[1], program(sample.main, *argv, "--seed=1")[1]
    assert one == two != program(sample.main, *argv, "--seed=2")[1]
    assert one.count("abc") >= 2


def test_a_prompt_may_be_longer_than_the_context(program, models):
    code, out, err = program(sample.main, models / "text.pt", "--prompt=abcabcabc", "--max_new_tokens=2")
    assert code == 0 and out.startswith("abcabcabc") and len(out) == 12, err


@pytest.mark.parametrize("ending", ["png", pytest.param("svg", marks=pytest.mark.slow)])
def test_pictures(program, models, ending):
    code, out, _ = program(
        sample.main, models / "sparse.pt", f"--compare={models / 'dense.pt'}", "--prompt=4+5=",
        f"--plot={models / 'a'}.{ending}", f"--edges={models / 'b'}.{ending}",
    )  # fmt: skip
    assert code == 0 and out.count("wrote") == 2
    assert all((models / f"{name}.{ending}").stat().st_size > 5000 for name in "ab")


def test_a_picture_shows_the_tokens_that_are_read(program, models, monkeypatch):
    """Of a task's example of 6 all but the last, though the model could read 8."""
    seen, draw = [], sample.pictures.records_of
    monkeypatch.setattr(sample.pictures, "records_of", lambda m, t, i: seen.append(i.shape) or draw(m, t, i))
    program(sample.main, models / "sparse.pt", "--prompt=4+5=1+2=", f"--edges={models}/b.png")
    assert seen == [(2, 5)]


def test_a_model_is_scored_on_sequences_as_long_as_those_of_its_training(program, models, data_dir):
    """A model that init_from gave may read longer ones."""
    (models / "t").write_text("\nabcdefghij " * 8)
    prepare_text([models / "t"], models / "short", "char", 0.1)
    model = GPT(GPTConfig(block_size=64, vocab_size=12, n_layer=1, n_head=2, n_embd=16))
    trained_on = {"dataset": "short", "block_size": 4}
    save_model(model, models / "m.pt", CharTokenizer(CHARACTERS).meta(), trained_on)
    code, out, err = program(sample.main, models / "m.pt", "--eval_only", f"--data_dir={models}")
    assert code == 0 and "loss, nats" in out, err


def test_a_model_is_compared_with_itself_when_an_edge_is_forced(program, models, monkeypatch):
    seen, records_of = [], sample.pictures.records_of
    monkeypatch.setattr(sample.pictures, "records_of", lambda m, *_: seen.append([*m]) or records_of(m, *_))
    path = models / "sparse.pt"
    argv = [path, f"--compare={path}", "--force=0.1=closed", "--prompt=4+5=", f"--edges={models}/b.png"]
    code, _, err = program(sample.main, *argv)
    assert code == 0 and seen == [[str(path), f"{path}, forced"]], err


def test_eval_only_prints_the_figures(program, models, data_dir):
    argv = [models / "sparse.pt", "--eval_only", "--dataset=sums", f"--data_dir={data_dir}"]
    code, out, _ = program(sample.main, *argv)
    assert code == 0 and all(word in out for word in ("loss, nats", "accuracy", "hard edges", "layer 1"))


BAD = [
    (["{}/sparse.pt", "--prompt=4+x="], "the model does not know 'x': use only the characters '+01"),
    (["{}/sparse.pt", "--prompt=4+5=0"], "--prompt '4+5=0' has 5 characters, this task's prompts have 4"),
    (["{}/sparse.pt"], "--prompt '' has 0 characters, this task's prompts have 4: give one or more whole"),
    (["{}/sparse.pt", "--prompt=4+5=", "--plot={}/sparse.pt/a.png"], "in another folder"),
    (["{}/sparse.pt", "--prompt=4+5=", "--plot={}/a"], "that ends in .png, .svg or .pdf"),
    (["{}/sparse.pt", "--prompt=4+5=", "--plot={}/a.doc"], "that ends in .png, .svg or .pdf"),
    (["{}/missing.pt"], "there is no checkpoint"),
    (["{}/sparse.pt", "--eval_only"], "does not say what it was trained on: add --dataset=NAME"),
    (["{}/sparse.pt", "--heads", "--eval_only"], "are two commands: leave one out"),
    (["{}/sparse.pt", "--heads", "--edges=a.png"], "--edges draws a --prompt: leave --eval_only and --heads"),
    (["{}/sparse.pt", "--eval_only", "--plot=a.png"], "--plot draws a --prompt or --heads: leave"),
    (["{}/sparse.pt", "--heads", "--compare={}/sparse.pt", "--plot=a.png"], "draws one model: leave"),
    (["{}/dense.pt", "--heads", "--dataset=sums"], "run `python data/prepare.py"),
    (["{}/sparse.pt", "--eval_only", "--dataset=none"], "run `python data/prepare.py text PATH --name=none`"),
    (["{}/sparse.pt", "--temperature=-1"], "--temperature is -1.0: give at least 0"),
    (["{}/sparse.pt", "--prompt=4+5=", "--compare={}/text.pt"], "know different tokens: compare"),
    (["{}/sparse.pt", "--prompt=4+5=", "--compare={}/deep.pt"], "deep.pt has n_layer 3"),
    (["{}/sparse.pt", "--prompt=4+5=", "--compare={}/long.pt"], "long.pt has block_size 9"),
    ([], "give one checkpoint, such as out/addition/sparse.pt: 0 were given"),
]


@pytest.mark.parametrize("argv, sentence", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(program, models, argv, sentence):
    code, _, err = program(sample.main, *(word.format(models) for word in argv))
    assert code == 2 and sentence in err and len(err.splitlines()) == 1


def test_a_checkpoint_that_does_not_fit_the_dataset(program, models):
    (models / "t").write_text("xyz" * 50)
    prepare_text([models / "t"], models / "xyz", "char", 0.1)
    argv = [models / "sparse.pt", "--eval_only", "--dataset=xyz", f"--data_dir={models}"]
    code, _, err = program(sample.main, *argv)
    assert code == 2 and "knows other tokens (char, vocabulary 12) than xyz has (char, vocabulary 3)" in err
