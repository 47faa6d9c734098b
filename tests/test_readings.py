"""Cards, rules and forced edges, on models whose heads are known because their weights were written down."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import readings
import sample
from data.dataset import Dataset
from data.prepare import prepare_examples, prepare_text
from model import GPT, GPTConfig
from readings import Edge, forced, parse_forces, read_heads, simplest_rule, token_groups, words_of
from support import pictures
from support.checkpoints import save_model
from support.command_line import UserError
from tests import planted

LETTERS = "abcdefgh"  # the planted models' eight tokens
ROLES = ["first", "second", "third", "fourth", "fifth", "last", "answer"]


def gated(model):
    """A planted model with gates. A score is about zero, or large, and opens, where query and key match."""
    sparse = GPT(replace(model.config, gate="hard_concrete", gate_bias=-50.0))
    sparse.load_state_dict(model.state_dict(), strict=False)
    return sparse.eval()


def reads_a_c():
    """The last position reads every c."""
    model = planted.empty(1)
    ask, answer = torch.zeros(planted.V, planted.V), torch.zeros(planted.V, planted.V)
    ask[0, planted.T - 1], answer[0, LETTERS.index("c")] = 1, 1
    asks, answers = (planted.POSITION, ask), (planted.TOKEN, answer)
    planted.add_head(model, 0, 1, asks, answers, planted.TOKEN, planted.TOKEN)
    return model, planted.random_prompts, None


def read(folder, built, seed, n=500):
    """Cards of a planted model on n of its own prompts, by (layer, head)."""
    model, prompts, _ = built()
    idx = prompts(n, torch.Generator().manual_seed(seed))
    answers = model(idx)[0][:, -1].argmax(dim=-1)
    texts = ["".join(LETTERS[t] for t in row) for row in idx.tolist()]
    pairs = [(text, LETTERS[answer]) for text, answer in zip(texts, answers)]
    prepare_examples(pairs, folder / "planted", 0, ROLES)
    data = Dataset("planted", planted.V, folder)
    assert data.meta["characters"] == LETTERS
    return {(card.layer, card.head): card for card in read_heads(gated(model), data)}, data


@pytest.mark.parametrize("seed", range(5))
class TestPlanted:
    def test_previous_token(self, tmp_path, seed):
        cards, data = read(tmp_path, planted.previous_token, seed)
        assert set(cards) == {(0, 0)}, "a head without open edges has no card"
        edges = [(e.edge.query, e.edge.key, e.frequency, e.rule) for e in cards[0, 0].edges]
        assert edges == [(p, p - 1, 1.0, "") for p in range(1, planted.T)]
        assert cards[0, 0].name == "reads the previous token"
        last = cards[0, 0].edges[-1]
        assert last.opened is None and last.closed.accuracy < 0.5 and last.closed.loss > 1
        assert "    0.0:5<-4  last <- fifth: open in 100.0%" in words_of(list(cards.values()), data)

    def test_induction(self, tmp_path, seed):
        cards, _ = read(tmp_path, planted.induction, seed)
        assert cards[0, 0].name == "reads the previous token"
        assert cards[1, 1].name == "reads what followed the same token (induction)"
        for e in cards[1, 1].edges:
            assert e.edge.query == planted.T - 1
            assert e.rule in (f"{ROLES[e.edge.key - 1]} is last", f"last is {ROLES[e.edge.key - 1]}")
            assert e.agreement == 1 and e.closed.accuracy < 1

    def test_an_edge_that_the_content_opens(self, tmp_path, seed):
        cards, _ = read(tmp_path, reads_a_c, seed)
        assert {e.edge for e in cards[0, 1].edges} == {Edge(0, 1, planted.T - 1, p) for p in range(planted.T)}
        assert [e.rule for e in cards[0, 1].edges] == [f"{role} is c" for role in ROLES[:-1]]
        assert all(e.agreement == 1 for e in cards[0, 1].edges)

    def test_two_heads(self, tmp_path, seed):
        cards, _ = read(tmp_path, planted.two_paths, seed)
        assert {head: card.name for head, card in cards.items()} == {
            (0, 0): "reads the first token", (0, 1): "reads second"
        }  # fmt: skip


def digits(n=2000):
    """Symbols (n, 3): two random digits and a letter."""
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(list(kind), n) for kind in ("0123456789", "0123456789", "xy")], axis=1)


RULES = {  # the rule that an edge follows, and the words for it
    "b is 7": lambda a, b, c: b == 7,
    "a >= 6": lambda a, b, c: a >= 6,
    "a + b >= 10": lambda a, b, c: a + b >= 10,
    "a + b = 9": lambda a, b, c: a + b == 9,
    "a is b": lambda a, b, c: a == b,
    "a is one of 0 1 5 6": lambda a, b, c: np.isin(a, [0, 1, 5, 6]),
    "a < 5 and c is x": lambda a, b, c: (a < 5) & (c == "x"),
}


@pytest.mark.parametrize("words", RULES)
def test_the_simplest_rule_is_found(words):
    symbols = digits()
    is_open = RULES[words](symbols[:, 0].astype(int), symbols[:, 1].astype(int), symbols[:, 2])
    found, agreement = simplest_rule(symbols, "abc", 2, is_open)
    assert agreement == 1 and set(found.split(" and ")) == set(words.split(" and "))


def test_raised_digits_are_no_numbers():
    symbols = np.array([["1"], ["²"]] * 20)
    words, agreement = simplest_rule(symbols, ["power"], 0, symbols[:, 0] == "²")
    assert agreement == 1 and words in ("power is ²", "power is not 1")


def test_a_rare_edge_keeps_its_exact_rule():
    """It is closed in so many examples that "never" is right in nearly all."""
    symbols = digits(20_000)
    is_open = (symbols[:, 0] == "9") & (symbols[:, 1] == "9") & (symbols[:, 2] == "x")
    words, agreement = simplest_rule(symbols, "abc", 2, is_open)
    assert is_open.mean() < 0.006 and agreement == 1 and "18" in words


def test_a_rule_sees_no_later_symbol_and_agreement_is_of_other_examples():
    symbols = digits()
    _, agreement = simplest_rule(symbols, "abc", 0, symbols[:, 1].astype(int) >= 5)
    assert agreement < 0.6, "what the query cannot see does not open its edge"


def test_a_text(tmp_path):
    """A head that reads the previous token, and one that reads line breaks."""
    model = planted.empty(1)
    everywhere = torch.zeros(planted.V, planted.V)
    everywhere[0] = 1
    newline = torch.zeros(planted.V, planted.V)
    newline[0, 0] = 1
    position, token = planted.POSITION, planted.TOKEN
    planted.add_head(model, 0, 0, (position, planted.PREVIOUS), (position, planted.SAME), token, token)
    planted.add_head(model, 0, 1, (position, everywhere), (token, newline), token, token)
    text = "".join(np.random.default_rng(0).choice(list("\nABbcdef"), 4000, p=[0.1] + [0.9 / 7] * 7))
    (tmp_path / "t").write_text(text)
    prepare_text([tmp_path / "t"], tmp_path / "text", "char", 0.5)
    data = Dataset("text", planted.V, tmp_path)
    previous, breaks = read_heads(gated(model), data)
    assert previous.name == "reads the previous token"
    assert "distances: the previous token 100%" in previous.lines
    assert breaks.name == "reads line breaks"
    assert any(line.startswith("keys: line breaks 100% (10") for line in breaks.lines)
    assert any("[↵]" in line for line in breaks.lines) and "the loss rises by" in breaks.lines[0]
    assert pictures.heads_figure([previous, breaks], None).axes[0].patches[1].get_height() == 1


def test_bytes_that_are_no_whole_character_are_counted_each(tmp_path):
    (tmp_path / "t").write_text("é" * 100, encoding="utf-8")
    prepare_text([tmp_path / "t"], tmp_path / "text", "byte", 0.1)
    data = Dataset("text", 8, tmp_path)
    groups = token_groups(data, data.tokens["train"][:100].reshape(1, -1))
    single = [(tokens, usual) for words, tokens, usual in groups if words == repr("\ufffd")]
    assert single == [([0xA9], 0.5), ([0xC3], 0.5)]


def test_an_effect_names_the_commonest_mistake(data_dir, monkeypatch):
    """Of the 100 sums 45 reach ten; without the carry they come out ten too small."""
    data = Dataset("sums", 5, data_dir)
    x, y = data.cut("val", data.starts("val"))
    answers = y[:, 3:].clone()
    answers[:, 0] = data.meta["characters"].index("0")
    fake = SimpleNamespace(generate=lambda idx, n, temperature: torch.cat([idx, answers], dim=1))
    monkeypatch.setattr(readings, "forced", lambda *_: nullcontext())
    monkeypatch.setattr(readings, "mean_loss", lambda *_: 0.5)
    effect = readings.effect_of(fake, data, x, y, {})
    assert str(effect) == "45.0% come out 10 too small (accuracy 55.0%, loss 0.50)"


# ------------------------------------------------------------------------------------------------------------
# Forcing


@pytest.fixture
def model():
    shape = dict(block_size=6, vocab_size=8, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**shape, gate="hard_concrete", gate_bias=0.0)).eval()


def test_forced_edges_are_open_or_closed_and_come_back(model):
    idx = torch.randint(8, (3, 6))
    before = model.attention(idx).gate
    heads = {Edge(0, 0): False, Edge(1, 1): True}
    with forced(model, {Edge(1, 0, 4, 2): True, Edge(0, 1, 3, 3): False, **heads}):
        within = model.attention(idx).gate
    assert (within[1, :, 0, 4, 2] == 1).all() and (within[0, :, 1, 3, 3] == 0).all()
    assert (within[0, :, 0] == 0).all()
    assert (within[1, :, 1] == torch.ones(6, 6).tril()).all(), "an open head still reads no later key"
    within[1, :, 0, 4, 2], within[0, :, 1, 3, 3] = before[1, :, 0, 4, 2], before[0, :, 1, 3, 3]
    assert torch.equal(within[0, :, 1], before[0, :, 1]), "in the layer of forced edges, the others stay"
    with forced(model, {Edge(1, 1, 4, 2): False, Edge(1, 1): True}):
        assert (model.attention(idx).gate[1, :, 1, 4] == torch.tensor([1, 1, 0, 1, 1, 0])).all(), "any order"
    assert torch.equal(model.attention(idx).gate, before)


def test_a_forced_edge_is_forced_in_generation_too(model):
    """The key/value cache holds positions, not the edges of the first step."""
    idx = torch.randint(8, (5, 3))
    with forced(model, {Edge(0, head, 4, key): False for head in (0, 1) for key in range(5)}):
        text = model.generate(idx, 3, temperature=0)
        for end in (3, 4, 5):
            assert torch.equal(model(text[:, :end])[0][:, -1].argmax(-1), text[:, end])


BAD = [
    ("1.2:6<-4", "--force has '1.2:6<-4': write layer.head:query<-key=closed (or =open)"),
    ("0.0:1<-0=shut", "--force has '0.0:1<-0=shut': write"),
    ("0.2=open", "there is no head 0.2: the model has 2 layers of 2, both counted from 0"),
    ("0.0:2<-3=open", "there is no edge 0.0:2<-3: give a key up to the query, and a query"),
    ("0.0:6<-3=open", "block_size 6"),
]


@pytest.mark.parametrize("text, sentence", BAD)
def test_a_bad_force_is_one_sentence(program, model, tmp_path, text, sentence):
    save_model(model, tmp_path / "a.pt", {"tokenizer": "char", "vocab_size": 8, "characters": LETTERS}, {})
    argv = [tmp_path / "a.pt", "--prompt=abc", "--max_new_tokens=2", f"--force={text}"]
    code, _, err = program(sample.main, *argv)
    assert code == 2 and sentence in err and len(err.splitlines()) == 1


def test_forces_are_written_as_edges_are():
    assert parse_forces("1.2:6<-4=closed, 0.1=open") == {Edge(1, 2, 6, 4): False, Edge(0, 1): True}
    assert str(Edge(1, 2, 6, 4)) == "1.2:6<-4" and str(Edge(0, 1)) == "0.1"


def test_a_dense_model_has_nothing_to_force():
    dense = GPT(GPTConfig(block_size=6, vocab_size=8, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(UserError, match="a dense model has no gates"), forced(dense, {}):
        pass
