"""TransformerLens's weights in and out: against its equations, and against itself where it is installed."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

import circuits
import data.tokenizer
import sample
import train
from data.prepare import prepare_text
from gates import GATES
from model import GPT, GPTConfig
from support import checkpoints
from support.checkpoints import save_model
from support.command_line import UserError
from tests.conftest import ROOT
from tests.letters import Letters
from tests.test_gpt2_weights import TINY, random_model, same_weights

L, H, D, V, T = 3, 2, 8, 31, 16
C = H * D
CONFIG = dict(d_model=C, d_head=D, d_vocab=V, d_mlp=4 * C, n_layers=L, n_ctx=T, act_fn="gelu_new")
KINDS = [(r, n, s) for r in ("tied", "own", "biased") for n in ("LN", "LNPre") for s in (False, True)]


def random_state(read_out="biased", normalization="LN", V=V):
    """A HookedTransformer's state dict."""
    shapes = {"embed.W_E": (V, C), "pos_embed.W_pos": (T, C)}
    norms = ["ln_final"]
    for b in [f"blocks.{layer}." for layer in range(L)]:
        norms += [b + "ln1", b + "ln2"]
        shapes |= {f"{b}attn.W_{x}": (H, C, D) for x in "QKV"}
        shapes |= {f"{b}attn.b_{x}": (H, D) for x in "QKV"}
        shapes |= {b + "attn.W_O": (H, D, C), b + "attn.b_O": (C,), b + "mlp.W_in": (C, 4 * C)}
        shapes |= {b + "mlp.b_in": (4 * C,), b + "mlp.W_out": (4 * C, C), b + "mlp.b_out": (C,)}
    shapes |= {"unembed.W_U": (C, V), "unembed.b_U": (V,)}
    state = {name: 0.4 * torch.randn(shape) for name, shape in shapes.items()}
    if normalization == "LN":
        state |= {f"{n}.w": 1 + 0.3 * torch.randn(C) for n in norms}
        state |= {f"{n}.b": torch.randn(C) for n in norms}
    if read_out == "tied":
        state["unembed.W_U"] = state["embed.W_E"].t().contiguous()
    if read_out != "biased":
        state["unembed.b_U"].zero_()
    return state


def write(folder, state=None, **fields):
    """A folder as the authors publish theirs."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    if state is not None:
        torch.save(state, folder / "final.pth")
    return folder


def equations(state, idx, is_sparse):
    """Logits (B, T, V) and attention (L, B, H, T, T) of a state dict, as TransformerLens computes them."""
    w, T = state, idx.size(1)
    norm = lambda x, n: layer_norm(x, (C,), w.get(f"{n}.w"), w.get(f"{n}.b"), 1e-5)
    x, attention = w["embed.W_E"][idx] + w["pos_embed.W_pos"][:T], []
    for b in [f"blocks.{layer}." for layer in range(L)]:
        h = norm(x, b + "ln1")
        q, k, v = (torch.einsum("btc,hcd->bhtd", h, w[f"{b}attn.W_{n}"]) for n in "QKV")
        q, k, v = (x + w[f"{b}attn.b_{n}"][:, None] for x, n in zip((q, k, v), "QKV"))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(D)
        scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
        attention.append(scores.softmax(dim=-1) * (scores > 0 if is_sparse else 1))
        x = x + torch.einsum("bhij,bhjd,hdc->bic", attention[-1], v, w[b + "attn.W_O"]) + w[b + "attn.b_O"]
        hidden = gelu(norm(x, b + "ln2") @ w[b + "mlp.W_in"] + w[b + "mlp.b_in"], approximate="tanh")
        x = x + hidden @ w[b + "mlp.W_out"] + w[b + "mlp.b_out"]
    return norm(x, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"], torch.stack(attention)


def check_same(ours, logits, attention, idx):
    record = ours.attention(idx)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(record.pattern * record.gate, attention, rtol=0, atol=1e-5)
    assert logits.std() > 0.5 and torch.equal(record.edges, attention > 0)


# ------------------------------------------------------------------------------------------------------------
# In


@pytest.mark.parametrize("read_out, normalization, is_sparse", KINDS)
def test_logits_and_attention_are_those_of_the_equations(tmp_path, read_out, normalization, is_sparse):
    state, idx = random_state(read_out, normalization), torch.randint(V, (3, T))
    fields = dict(normalization_type=normalization, use_sparse_attn=is_sparse)
    ours = GPT.from_pretrained(write(tmp_path, state, **fields))
    assert ours.config.gate == ("bernoulli" if is_sparse else "none") and ours.config.read_out == read_out
    check_same(ours, *equations(state, idx, is_sparse), idx)


def test_gates_of_ones_own_choice(tmp_path):
    write(tmp_path, random_state(), use_sparse_attn=True)
    assert GPT.from_pretrained(tmp_path, gate="none").config.gate == "none"
    gated = GPT.from_pretrained(tmp_path, gate="hard_concrete", gate_bias=3.0)
    assert all((block.attn.gate_bias == 0).all() for block in gated.h)
    write(tmp_path)
    gated = GPT.from_pretrained(tmp_path, gate="hard_concrete", gate_bias=3.0)
    assert all((block.attn.gate_bias == 3).all() for block in gated.h)


def test_old_files_and_buffers(tmp_path):
    state = random_state()
    state |= {"blocks.0.attn.mask": torch.ones(T, T).tril(), "blocks.0.attn.IGNORE": torch.tensor(-1e5)}
    torch.save(state, write(tmp_path) / "final.pth", _use_new_zipfile_serialization=False)
    logits = equations(state, idx := torch.randint(V, (1, T)), False)[0]
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(idx, idx)[0], logits, rtol=0, atol=1e-5)
    assert GPT.from_pretrained(tmp_path).config.read_out == "biased"


@pytest.mark.parametrize(
    "name, padding", [("gpt2", 47), ("x/gpt-neo-125M", 47), ("x/TinyStories-1M", 47), ("neox", 0), (None, 0)]
)
def test_padding_is_what_lies_past_the_tokenizer(tmp_path, name, padding):
    write(tmp_path, random_state(V=50304), d_vocab=50304, tokenizer_name=name)
    source = checkpoints.open_pretrained(tmp_path)
    known = {"tokenizer": "gpt2" if padding else "unknown", "vocab_size": 50304 - padding}
    assert (source.model_config["padding"], source.tokenizer) == (padding, known)


def test_padding_is_never_generated(tmp_path):
    state = random_state()
    state["unembed.b_U"][20:] = 50.0
    (write(tmp_path, state) / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 20}))
    model, idx = GPT.from_pretrained(tmp_path), torch.zeros(4, 1, dtype=torch.long)
    for temperature in (0, 1.0):
        assert model.generate(idx, 20, temperature).max() < 20
    assert model(idx)[0].shape[-1] == V and replace(model.config, padding=0).vocab_size == V
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 256}))
    with pytest.raises(UserError, match="padding is -225: give at least 0, below vocab_size 31"):
        GPT.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Out and in again


@pytest.mark.parametrize("read_out", ["tied", "own", "biased"])
@pytest.mark.parametrize("gate", ["none", *GATES])
@pytest.mark.parametrize("layout", ["transformer_lens", "huggingface"])
def test_a_model_comes_back_bit_for_bit(tmp_path, capsys, gate, read_out, layout):
    gates = {"gate": gate, "gate_bias": 1.5} if gate != "none" else {}
    model = random_model(replace(TINY, read_out=read_out, padding=4, **gates))
    model.save_pretrained(tmp_path, layout=layout)
    assert ("without the gates" in capsys.readouterr().out) == (gate != "none")
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config and same_weights(again, model) and not again.training


def test_what_we_write_has_the_equations_logits(tmp_path):
    model, idx = random_model(GPTConfig(T, V, L, H, C, bias=False)), torch.randint(V, (2, T))
    model.save_pretrained(tmp_path, layout="transformer_lens")
    state = torch.load(tmp_path / "final.pth", weights_only=True)
    check_same(model, *equations(state, idx, False), idx)
    with pytest.raises(UserError, match="layout is 'gguf': choose one of huggingface, transformer_lens"):
        model.save_pretrained(tmp_path, layout="gguf")


# ------------------------------------------------------------------------------------------------------------
# TransformerLens itself


@pytest.fixture
def hooked():
    """A function: config.json's fields and a state dict -> transformer-lens 2's HookedTransformer."""
    reason = "transformer-lens 2, the oracle, is not installed"
    lens = pytest.importorskip("transformer_lens.HookedTransformer", reason=reason)

    def load(fields, state):
        model = lens.HookedTransformer(lens.HookedTransformerConfig(**fields))
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert all(name.endswith((".mask", ".IGNORE")) for name in missing)
        return model.eval()

    return load


def check_hooked(ours, theirs, n_sequences=3, length=T):
    idx = torch.randint(ours.config.vocab_size, (n_sequences, length))
    with torch.no_grad():
        logits, cache = theirs.run_with_cache(idx)
        difference = (ours(idx, idx)[0] - logits).abs().max().item()
    attention = torch.stack([cache["pattern", layer] for layer in range(ours.config.n_layer)])
    check_same(ours, logits, attention, idx)
    print(f"largest difference of a logit {difference:.1e}, of {logits.abs().max():.1f}")


@pytest.mark.parametrize("read_out, normalization, is_sparse", KINDS)
def test_a_hooked_transformer_and_ours_agree(tmp_path, hooked, read_out, normalization, is_sparse):
    """The authors' models compute softmax(scores) * (scores > 0)."""
    fields = dict(d_vocab=40, normalization_type=normalization)
    state, scores = random_state(read_out, normalization, V=40), {}
    theirs = hooked(CONFIG | fields, state)
    if is_sparse:
        for block in theirs.blocks:
            block.attn.hook_attn_scores.add_hook(lambda x, hook: scores.update({hook.layer(): x}))
            block.attn.hook_pattern.add_hook(lambda x, hook: x * (scores[hook.layer()] > 0))
    write(tmp_path, state, use_sparse_attn=is_sparse, **fields)
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 31}))
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.padding == 9
    check_hooked(ours, theirs)


def test_what_their_own_folding_makes(tmp_path, hooked):
    theirs = hooked(CONFIG, random_state("tied"))
    theirs.process_weights_()
    fields = json.loads(json.dumps(theirs.cfg.to_dict(), default=str))
    assert fields["normalization_type"] == "LNPre"
    torch.save(theirs.state_dict(), write(tmp_path, **fields) / "final.pth")
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.read_out == "biased"
    check_hooked(ours, theirs)


@pytest.fixture
def from_docs(tmp_path, monkeypatch):
    """A function: a model -> what the code of docs/lens.md defines, run as written with that model."""

    def run(model, number):
        monkeypatch.chdir(tmp_path)
        save_model(model, "out/shakespeare_char/sparse.pt", {}, {})
        text = (ROOT / "docs/lens.md").read_text(encoding="utf-8")
        code = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
        names = {"ours": GPT.from_pretrained("out/shakespeare_char/sparse.pt")}
        exec(code[number], names)
        return names

    return run


@pytest.mark.parametrize("gate", ["none", *GATES])
@pytest.mark.parametrize("read_out", ["tied", "own", "biased"])
def test_the_docs_code_opens_our_model_in_transformer_lens_2(hooked, from_docs, gate, read_out):
    model = random_model(GPTConfig(T, V, L, H, C, gate=gate, read_out=read_out, padding=5))
    names = from_docs(model, 0)
    check_hooked(names["ours"], names["theirs"])


@pytest.mark.huge
def test_gpt2_smalls_shape_agrees_in_transformer_lens_2(hooked, from_docs):
    model = random_model(GPTConfig(vocab_size=50304, read_out="biased", padding=47))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.1 if p.dim() == 2 else 1)  # as large as a trained model's
    names = from_docs(model, 0)
    check_hooked(names["ours"], names["theirs"], n_sequences=1, length=128)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("read_out", ["tied", "own"])
def test_the_docs_code_opens_our_model_in_transformer_lens_4(monkeypatch, from_docs, gate, read_out):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reason = "transformer-lens 4, the oracle, is not installed"
    pytest.importorskip("transformer_lens.model_bridge", reason=reason)
    names = from_docs(random_model(GPTConfig(T, V, L, H, C, gate=gate, read_out=read_out, padding=5)), 1)
    check_hooked(names["ours"], names["theirs"])


# ------------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(act_fn="gelu"), "act_fn 'gelu', GPT-2 has 'gelu_new'"),
        (dict(normalization_type="RMS"), "normalization_type 'RMS', GPT-2 has 'LN'"),
        (dict(normalization_type=None), "normalization_type None, GPT-2 has 'LN'"),
        (dict(positional_embedding_type="rotary"), "positional_embedding_type 'rotary', GPT-2 has 'st"),
        (dict(attention_dir="bidirectional"), "attention_dir 'bidirectional'"),
        (dict(attn_scale=1.0), "attn_scale 1.0"),
        (dict(eps=1e-6), "eps 1e-06"),
        (dict(parallel_attn_mlp=True), "parallel_attn_mlp True"),
        (dict(d_mlp=99), "d_mlp 99, GPT-2 has 64"),
        (dict(n_heads=3), "n_heads 3, GPT-2 has 2"),
        (dict(d_head=3), "d_head 3, which does not divide d_model 16"),
        (dict(d_head=0), "d_head 0, which does not divide d_model 16"),
        (dict(d_model="wide"), "config.json is damaged"),
        (dict(n_ctx=17), r"pos_embed.W_pos of shape \(16, 16\), the model needs \(17, 16\)"),
        (dict(nanosparse={"gate": "bernoulli", "gate_biases": [[1.0]]}), "config.json is damaged"),
        (dict(nanosparse={"gate": "sigmoid"}), "gate is 'sigmoid'"),
    ],
)
def test_another_model_is_one_sentence(tmp_path, fields, words):
    with pytest.raises(UserError, match=words) as error:
        GPT.from_pretrained(write(tmp_path, random_state(), **fields))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("blocks.1.mlp.b_in", None, "its tensor blocks.1.mlp.b_in is missing"),
        ("unembed.W_U", None, "its tensor unembed.W_U is missing"),
        ("embed.W_E", None, "its tensor embed.W_E is missing"),
        ("blocks.0.ln1.w", None, "its tensor blocks.0.ln1.w is missing"),
        ("blocks.0.mlp.W_gate", (16, 64), "there is no place for its tensor blocks.0.mlp.W_gate"),
        ("transformer.wte.weight", (31, 16), "there is no place for its tensor transformer.wte.weight"),
        ("blocks.0.attn.W_K", (1, 16, 8), r"W_K of shape \(1, 16, 8\), the model needs \(2, 16, 8\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, name, shape, words):
    state = random_state()
    state.pop(name, None)
    state |= {} if shape is None else {name: torch.ones(shape)}
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(write(tmp_path, state))


class Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_code_damage_and_missing_files_are_one_sentence(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "lens", {"embed.W_E": Code()})
    with pytest.raises(UserError, match="final.pth is damaged or incomplete .UnpicklingError"):
        GPT.from_pretrained(folder)
    assert not Path("ran").exists()
    code, _, err = program(sample.main, folder)
    assert code == 2 and len(err.splitlines()) == 1
    write(folder, random_state())
    content = (folder / "final.pth").read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"[1]"):
        (folder / "final.pth").write_bytes(damaged)
        with pytest.raises(UserError, match="final.pth is damaged"):
            GPT.from_pretrained(folder)
    for other in ([torch.ones(1)], {"model": {"embed.W_E": torch.ones(1)}}):
        write(folder, other)
        with pytest.raises(UserError, match="final.pth is damaged"):
            GPT.from_pretrained(folder)
    (folder / "final.pth").unlink()
    with pytest.raises(UserError, match="final.pth is missing: give a folder"):
        GPT.from_pretrained(folder)


DOWNLOADS = [
    ("gpt2", "openai-community/gpt2", "model.safetensors", lambda to: random_model().save_pretrained(to)),
    (*["ansonisl/SparseGPT2"] * 2, "final.pth", lambda to: write(to, random_state(), use_sparse_attn=True)),
]


@pytest.mark.parametrize("name, repository, file, make", DOWNLOADS, ids=["gpt2", "authors"])
def test_a_model_is_downloaded_once_and_whole(tmp_path, monkeypatch, name, repository, file, make):
    hub, cache = tmp_path / "hub" / repository / "resolve" / "main", tmp_path / "cache" / "nanosparse" / name
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "HUB", f"file://{tmp_path}/hub")
    monkeypatch.chdir(tmp_path)
    hub.mkdir(parents=True)
    make(hub)
    wanted = GPT.from_pretrained(hub)
    assert wanted.config.gate == ("none" if name == "gpt2" else "bernoulli")
    (hub / file).rename(tmp_path / file)
    with pytest.raises(UserError, match=f"cannot download .*{file}"):
        GPT.from_pretrained(name)
    assert [path.name for path in cache.iterdir()] == ["config.json"]
    (tmp_path / file).rename(hub / file)
    assert same_weights(GPT.from_pretrained(name), wanted)
    shutil.rmtree(hub)
    assert same_weights(GPT.from_pretrained(name), wanted)
    with pytest.raises(UserError, match="there is no checkpoint ansonisl/Sparse: .*ansonisl/SparseGPT2"):
        GPT.from_pretrained("ansonisl/Sparse")


# ------------------------------------------------------------------------------------------------------------
# The programs


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Padded dense and sparse models with read-outs of their own, and a text of GPT-2's tokens, which are
    played by bytes."""
    monkeypatch.setattr(Letters, "vocab_size", 50257)
    monkeypatch.setattr(data.tokenizer, "GPT2Tokenizer", Letters)
    for name in ("dense", "sparse"):
        state = random_state(V=50304)
        state["unembed.b_U"][256:50257] = -100.0  # no bytes
        state["unembed.b_U"][50257:] = 100.0  # padding
        fields = dict(d_vocab=50304, tokenizer_name="gpt2", use_sparse_attn=name == "sparse")
        write(tmp_path / name, state, **fields)
    (tmp_path / "text").write_text("to be or not to be, " * 200)
    prepare_text([tmp_path / "text"], tmp_path / "data" / "letters", "byte", 0.1)
    meta = tmp_path / "data" / "letters" / "meta.json"
    meta.write_text(meta.read_text().replace('"byte"', '"gpt2"').replace("256", "50257"))
    return tmp_path


def test_sample_writes_draws_and_reads(program, folders):
    argv = [folders / "sparse", "--prompt=to be", "--max_new_tokens=30", f"--plot={folders / 'a.png'}"]
    code, out, err = program(sample.main, *argv, f"--compare={folders / 'dense'}")
    assert code == 0 and out.count("to be") == 2 and (folders / "a.png").stat().st_size > 5000, err
    argv = ["--heads", "--dataset=letters", f"--data_dir={folders / 'data'}"]
    code, out, err = program(sample.main, folders / "sparse", *argv)
    assert code == 0 and "layer 0 head 0" in out, err


def test_circuits_compare_them(program, folders):
    argv = [f"--{name}={folders / name}" for name in ("dense", "sparse")]
    argv += [f"--data_dir={folders / 'data'}", f"--out_dir={folders / 'out'}", "--no-sweep"]
    code, out, err = program(circuits.main, "letters", *argv, "--steps=2", "--examples=8", "--batch_size=4")
    assert code == 0 and "edges dense / sparse" in out, err


def test_train_makes_the_dense_one_sparse(program, folders):
    argv = ["shakespeare_char", "--dataset=letters", f"--data_dir={folders / 'data'}", "--batch_size=4"]
    argv += ["--block_size=16", "--sparsify_steps=2", "--eval_iters=1", f"--out_dir={folders / 'out'}"]
    code, out, err = program(train.main, *argv, f"--init_from={folders / 'dense'}")
    assert code == 0, err
    dense, sparse = (GPT.from_pretrained(folders / "out" / f"{name}.pt") for name in ("dense", "sparse"))
    assert same_weights(dense, GPT.from_pretrained(folders / "dense"))
    assert sparse.config == replace(dense.config, gate="hard_concrete") and sparse.config.padding == 47
    assert not torch.equal(sparse.lm_head.bias, dense.lm_head.bias)
    code, _, err = program(train.main, *argv, f"--init_from={folders / 'sparse'}")
    assert code == 2 and "has gates already: give a dense model" in err
