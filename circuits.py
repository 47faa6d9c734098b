"""
Circuits: the smallest subgraph of a model that keeps a behaviour, in a dense model and in the sparse one.

    python circuits.py addition                 out/addition/dense.pt against out/addition/sparse.pt
    python circuits.py addition --positions     which token talks to which, through which head
    python circuits.py sort                     any toy task that `data/prepare.py examples` made and train.py trained
    python circuits.py shakespeare_char         or running text: what predicts the next token
    python circuits.py ioi --dense=gpt2 --sparse=out/gpt2/sparse.pt
    python circuits.py mine --data=FILE.jsonl --dense=... --sparse=...
    python circuits.py --help

The model is a graph. Writers (the embedding, every head, every MLP) add to the residual stream; readers (every head's query,
key and value, every MLP, the logits) read the sum of all writers before them; an edge is one (writer, reader). Closing an
edge replaces, in that reader's input, the writer's activation by an *ablated* one, usually its activation on another prompt:

    input of r = sum_w  z_rw * circuit_w + (1 - z_rw) * ablated_w          (edge pruning; Bhaskar et al., arXiv 2406.16778)

circuit_w being what w writes in this very run. Every edge gets a hard-concrete gate z (gates.py), the model itself is frozen,
and the gates are trained as post-training trains the attention's: as few open edges as possible, subject to a bound
(constrained.py), here on KL(full model || circuit) at the positions of the answer. The same optimiser, used twice.

Shapes: N examples, B of them in a batch, K answer positions, T tokens, C width, H heads, L layers, W = 1 + L (H + 1) writers,
R = L (3 H + 1) + 1 readers. P is 1, or T where every position has edges of its own.
"""

import json
import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import config as command_line
import plots
from config import UserError, arguments, option
from constrained import LossBound
from data import tasks
from data.tokenizer import tokenizer_of
from gates import HardConcrete, attention_pattern, causal_mask, edge_penalty
from model import GPT, device_problems, find_device, open_source
from report import circuits_table, ratio_of

ABLATIONS = ("corrupted", "mean", "zero")
CHUNK = 64  # examples at once where no gradient is needed; `fits` stops between two chunks


# ---------------------------------------------------------------------------------------------------------------------
# The graph


class Graph:
    """Writers and readers in the order in which the model computes them.

    writers: W names, embed, then a{layer}.h{head} and m{layer} of every layer; readers: R names, a{layer}.h{head}.q, .k and .v,
    m{layer}, and logits last; edges: (R, W) bool, True where the writer comes before the reader."""

    def __init__(self, n_layer, n_head):
        self.n_layer, self.n_head = n_layer, n_head
        self.writers, self.readers, before = ["embed"], [], []
        for layer in range(n_layer):
            heads = [f"a{layer}.h{head}" for head in range(n_head)]
            self.readers += [f"{head}.{part}" for part in "qkv" for head in heads]
            before += [len(self.writers)] * 3 * n_head
            self.writers += heads
            self.readers.append(f"m{layer}")
            before.append(len(self.writers))
            self.writers.append(f"m{layer}")
        self.readers.append("logits")
        before.append(len(self.writers))
        self.edges = torch.arange(len(self.writers)) < torch.tensor(before)[:, None]

    def layers(self):
        """(first reader, first writer) of every layer."""
        return [(layer * (3 * self.n_head + 1), 1 + layer * (self.n_head + 1)) for layer in range(self.n_layer)]

    def effective(self, mask, links):
        """The edges of mask that lie on a path from the embedding to the logits. mask: (R, W, P) bool, the open edges; links:
        (L, H, P, P) bool, where a head lets its query position (row) read its key position (column) -> (R, W, P) bool."""
        H = self.n_head
        reached = mask.new_zeros(len(self.writers), mask.size(2))  # what each writer says depends on the embedding
        needed = mask.new_zeros(len(self.readers), mask.size(2))  # the logits depend on what each reader reads
        reached[0] = needed[-1] = True
        for layer, (r, w) in enumerate(self.layers()):
            query, key, value = (mask[r : r + 3 * H] & reached).any(dim=1).view(3, H, -1)  # (H, P): the input is reached
            reached[w : w + H] = (links[layer] & (query[:, :, None] | (key | value)[:, None])).any(dim=2)
            reached[w + H] = (mask[r + 3 * H] & reached).any(dim=0)
        for layer, (r, w) in reversed(list(enumerate(self.layers()))):
            needed[r + 3 * H] = (mask[:, w + H] & needed).any(dim=0)
            output = (mask[:, w : w + H] & needed[:, None]).any(dim=0)  # (H, P): something needed reads the head
            used = links[layer] & output[:, :, None]
            needed[r : r + H] = used.any(dim=2)
            needed[r + H : r + 3 * H] = used.any(dim=1).repeat(2, 1)
        return mask & reached & needed[:, None]


@contextmanager
def frozen(model):
    """Inside, the model evaluates, and no gradient is computed for its weights."""
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p in trained:
            p.requires_grad_(True)


@torch.no_grad()
def attention_links(model, clean, corrupted, by_position):
    """Which positions a head may join: (L, H, T, T) bool, causal, or (L, H, 1, 1); none where the head has no open attention
    edge on any of the examples. Single closed edges are no reason to leave out a position: that they stay closed is the work
    of the query and the key, and another prompt's key might open them."""
    chunks = torch.cat([clean, corrupted]).split(CHUNK)
    alive = torch.stack([model.attention(chunk).edges.any(dim=1) for chunk in chunks]).any(dim=0).flatten(2).any(dim=2)
    T = clean.size(1) if by_position else 1
    return alive[:, :, None, None] & causal_mask(T, T, alive.device)


# ---------------------------------------------------------------------------------------------------------------------
# The masked forward pass


def head_outputs(attn, q, k, v, gate_q, gate_k):
    """What every head adds to the residual stream, with deterministic attention gates; the output bias is shared out equally.
    q, k, v, gate_q, gate_k: as in model.Attention -> (B, H, T, C)."""
    if attn.gate is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
    else:
        pattern, log_alpha = attention_pattern(q, k, attn.gate_bias, gate_q, gate_k)
        y = (pattern * attn.gate.deterministic(log_alpha)).to(v.dtype) @ v
    out = torch.einsum("bhtd,chd->bhtc", y, attn.c_proj.weight.unflatten(1, (attn.n_head, -1)))
    return out + bias_share(attn)


def bias_share(attn):
    return 0.0 if attn.c_proj.bias is None else attn.c_proj.bias / attn.n_head


def all_writers(model, idx):
    """The full model: (B, W, T, C), what every writer adds to the residual stream. Their sum is what the logits read."""
    x = model.embed(idx)
    outputs = [x[:, None]]
    for block in model.h:
        h = block.ln_1(x)
        heads = head_outputs(block.attn, *block.attn.qkv(h), *block.attn.gate_inputs(h))
        x = x + heads.sum(dim=1)
        mlp = block.mlp(block.ln_2(x))
        x = x + mlp
        outputs += [heads, mlp[:, None]]
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def ablated_writers(model, corrupted, ablation):
    """What closed edges deliver, (B or 1, W, T, C). corrupted: every writer on the corrupted prompts (B, T); mean: the mean of
    that over the prompts, at each position; zero: nothing, but heads that read nothing still write their share of the bias.
    Raises UserError for another word."""
    if ablation not in ABLATIONS:
        raise UserError(f"the ablation is {ablation!r}: choose one of {', '.join(ABLATIONS)}")
    if ablation == "corrupted":
        return torch.cat([all_writers(model, chunk) for chunk in corrupted.split(CHUNK)])
    if ablation == "mean":
        sums = sum(all_writers(model, chunk).sum(dim=0) for chunk in corrupted.split(CHUNK))
        return sums[None] / len(corrupted)
    zeros = [torch.zeros_like(model.embed(corrupted[:1]))[:, None]]
    for block in model.h:
        zeros += [zeros[0].repeat(1, model.config.n_head, 1, 1) + bias_share(block.attn), zeros[0]]
    return torch.cat(zeros, dim=1)


def mix(z, delta):
    """sum_w z_rw * delta_w of the writers so far. z: (B, R', n, P), delta: (B, n, T, C) -> (B, R', T, C)."""
    if z.size(3) == 1:
        return torch.einsum("brw,bwtc->brtc", z[..., 0], delta)
    return torch.einsum("brwt,bwtc->brtc", z, delta)


def layer_output(block, z, base, delta, ablated):
    """What a layer's heads and its MLP add to the residual stream, less what they add when ablated: (B, H + 1, T, C).

    z: (B, 3 H + 1, n + H, P) gates of its readers; base: (B or 1, 1, T, C), sum_w ablated_w of the n writers before it; delta:
    (B, n, T, C), circuit_w - ablated_w of these; ablated: (B or 1, H + 1, T, C), its own writers'."""
    attn, n, H = block.attn, delta.size(1), block.attn.n_head
    h = block.ln_1(base + mix(z[:, : 3 * H, :n], delta))  # (B, 3H, T, C)
    qkv = torch.einsum("brtc,rdc->brtd", h, attn.c_attn.weight.unflatten(0, (3 * H, -1)))
    if attn.c_attn.bias is not None:
        qkv = qkv + attn.c_attn.bias.view(3 * H, 1, -1)
    gate_q = gate_k = None
    if attn.gate_qk is not None:
        seen = torch.einsum("brtc,rdc->brtd", h[:, : 2 * H], attn.gate_qk.weight.unflatten(0, (2 * H, -1)))
        gate_q, gate_k = seen.split(H, dim=1)
    heads = head_outputs(attn, *qkv.split(H, dim=1), gate_q, gate_k) - ablated[:, :H]
    base = base + ablated[:, :H].sum(dim=1, keepdim=True)
    mlp = block.mlp(block.ln_2(base + mix(z[:, 3 * H :, :n], delta) + mix(z[:, 3 * H :, n:], heads)))
    return torch.cat([heads, mlp - ablated[:, H:]], dim=1)


def circuit_output(model, idx, z, ablated, written=None):
    """The model with gates on its edges: the logits' input, (B, T, C). idx: (B, T) tokens; z: (B, R, W, P) gates; ablated:
    (B or 1, W, T, C); written: a list of what layer_output returns for the first layers, where that is known; the others' is
    appended.

    A reader gets sum_w ablated_w + sum_w z_rw (circuit_w - ablated_w): one batched product for all queries, keys and values of
    a layer, two for its MLP. LayerNorm comes after the mixing, for every reader on its own. Gates that see a query and a key
    of their own read what the head's query and key read.
    """
    H, row = model.config.n_head, 0
    written = [] if written is None else written
    base = ablated[:, :1]
    delta = model.embed(idx)[:, None] - base
    for layer, block in enumerate(model.h):
        n = delta.size(1)
        own = ablated[:, n : n + H + 1]
        if layer == len(written):
            written.append(layer_output(block, z[:, row : row + 3 * H + 1, : n + H], base, delta, own))
        base = base + own.sum(dim=1, keepdim=True)
        delta = torch.cat([delta, written[layer]], dim=1)
        row += 3 * H + 1
    return (base + mix(z[:, row:], delta))[:, 0]


def read_out(model, x, positions=None):
    """The residual stream x (B, T, C) -> logits (B, T, V), or (B, K, V) at positions (B, K)."""
    if positions is not None:
        x = x.gather(1, positions[:, :, None].expand(-1, -1, x.size(2)))
    return F.linear(model.ln_f(x), model.wte.weight).float()


@torch.no_grad()
def masked_logits(model, mask, clean, ablated, positions=None, written=None):
    """The circuit's logits in chunks of (B, K, V), or of (B, T, V) without positions. mask: (R, W, P) bool; ablated: (N or 1,
    W, T, C); written: one list per chunk, as circuit_output takes it."""
    z = mask.to(ablated.device, ablated.dtype)
    for number, idx in enumerate(clean.split(CHUNK)):
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        given = z.expand(len(idx), -1, -1, -1), ablated if len(ablated) == 1 else ablated[part]
        x = circuit_output(model, idx, *given, written and written[number])
        yield read_out(model, x, None if positions is None else positions[part])


@torch.no_grad()
def full_logits(model, idx, positions):
    """The model's own logits at the positions: (N, K, V)."""
    chunks = zip(idx.split(CHUNK), positions.split(CHUNK))
    return torch.cat([read_out(model, all_writers(model, i).sum(dim=1), p) for i, p in chunks])


def divergence(full, circuit):
    """KL(full || circuit) in nats, (N, K), from logits (N, K, V)."""
    full, circuit = full.log_softmax(dim=-1), circuit.log_softmax(dim=-1)
    return (full.exp() * (full - circuit)).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The search


@dataclass
class Circuit:
    """A set of edges of a model. edges: (writer, reader) names, or (writer, reader, position), effective ones only; found: how
    it was found, plain values."""

    model: torch.nn.Module
    edges: set
    ablation: str = "corrupted"
    by_position: bool = False
    found: dict = field(default_factory=dict)

    def mask(self, n_positions=1):
        """The edges as (R, W, P) bool."""
        graph = graph_of(self.model)
        mask = torch.zeros(*graph.edges.shape, n_positions if self.by_position else 1, dtype=torch.bool)
        for writer, reader, *position in self.edges:
            mask[graph.readers.index(reader), graph.writers.index(writer), position or 0] = True
        return mask

    def run(self, clean, corrupted):
        """The circuit's logits, (N, T, V). clean, corrupted: (N, T) tokens; with mean ablation the mean is over these
        corrupted ones."""
        with frozen(self.model):
            ablated = ablated_writers(self.model, corrupted, self.ablation)
            return torch.cat(list(masked_logits(self.model, self.mask(clean.size(1)), clean, ablated)))

    def save(self, path):
        """Write everything but the model as JSON."""
        content = {"ablation": self.ablation, "by_position": self.by_position, "found": self.found}
        content["edges"] = sorted(map(list, self.edges))
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path, model):
        """What save wrote, as a circuit of model. Raises UserError if there is no such file or the model has no such edge."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            edges = {tuple(edge) for edge in content["edges"]}
            circuit = cls(model, edges, content["ablation"], content["by_position"], content["found"])
            if (circuit.mask(model.config.block_size) & ~graph_of(model).edges[:, :, None]).any():
                raise ValueError("an edge runs backwards")
            if circuit.ablation not in ABLATIONS:
                raise ValueError(f"ablation {circuit.ablation!r}")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path} holds no circuit of this model ({error}): give a file that Circuit.save wrote")
        return circuit


def graph_of(model):
    return Graph(model.config.n_layer, model.config.n_head)


class Problem:
    """What the search and the baselines share: a model, examples, what closed edges deliver, and the full model's answer.
    model: evaluating (`frozen`); positions: (N,) or (N, K). Raises UserError if the model's logits are not finite."""

    def __init__(self, model, clean, corrupted, positions, ablation, by_position=False):
        self.model, self.clean, self.ablation, self.by_position = model, clean, ablation, by_position
        self.positions = positions.view(len(positions), -1)
        self.graph = graph_of(model)
        self.ablated = ablated_writers(model, corrupted, ablation)  # (N or 1, W, T, C)
        self.full = full_logits(model, clean, self.positions)  # (N, K, V)
        if not self.full.isfinite().all():
            raise UserError("the model's logits are not finite: give one that was trained without a NaN")
        self.links = attention_links(model, clean, corrupted, by_position).cpu()
        candidates = self.graph.edges[:, :, None].repeat(1, 1, clean.size(1) if by_position else 1)
        if by_position:
            asked = torch.zeros(clean.size(1), dtype=torch.bool)
            asked[self.positions.unique().cpu()] = True
            candidates[-1] &= asked
        self.candidates = self.graph.effective(candidates, self.links)  # (R, W, P): the others can make no difference

    def fits(self, mask, bound, known=None, changed=0):
        """If the circuit's mean KL over all examples is at most bound: what its layers write, a list per chunk of examples.
        Else None, as soon as the sum is too large. known: such lists of a circuit that differs only in what layers from
        `changed` on read; the layers before are not computed again."""
        written = [layers[:changed] for layers in known] if known else [[] for _ in self.clean.split(CHUNK)]
        left = bound * self.positions.numel()
        for kl in self.divergences(mask, written):
            left -= kl.sum().item()
            if left < 0:
                return None
        return written

    def divergences(self, mask, written=None):
        """The KL of a circuit, (B, K) for one chunk of examples after the other. written: as masked_logits takes it."""
        logits = masked_logits(self.model, mask, self.clean, self.ablated, self.positions, written)
        return (divergence(full, chunk) for full, chunk in zip(self.full.split(CHUNK), logits))

    def prefix(self, ranking, k):
        """The k candidates of largest ranking (R, W, P), less those that are not effective, as a mask."""
        mask = torch.zeros(ranking.numel(), dtype=torch.bool)
        mask[self.order(ranking)[:k]] = True
        return self.graph.effective(mask.view(ranking.shape), self.links)

    def order(self, ranking):
        """Flat numbers of all edges, the candidates first, by falling ranking."""
        return ranking.cpu().masked_fill(~self.candidates, -math.inf).flatten().argsort(descending=True, stable=True)

    def shortest_prefix(self, ranking, fits):
        """By bisection, a prefix of the ranking for which fits(mask) though one edge less would not; all candidates where none
        does."""
        low, high = -1, int(self.candidates.sum())
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.prefix(ranking, middle)) else (middle, high)
        return self.prefix(ranking, high)

    def hardest_first(self, mask):
        """Order the examples by the KL of this circuit, so that `fits` stops early on those like it."""
        order = torch.cat([kl.sum(dim=1) for kl in self.divergences(mask)]).argsort(descending=True)
        self.clean, self.positions, self.full = self.clean[order], self.positions[order], self.full[order]
        self.ablated = self.ablated if len(self.ablated) == 1 else self.ablated[order]

    def swept(self, mask, ranking, bound):
        """mask without the edges that it can do without: each is left out, the lowest of the ranking first, and put back where
        the bound would not hold. Orders the examples anew."""
        self.hardest_first(mask)
        known = self.fits(mask, math.inf)
        readers_per_layer, edges_per_reader = 3 * self.graph.n_head + 1, mask[0].numel()
        for edge in self.order(ranking).flip(0).tolist():
            if mask.view(-1)[edge]:
                smaller = mask.clone()
                smaller.view(-1)[edge] = False
                smaller = self.graph.effective(smaller, self.links)
                layer = edge // edges_per_reader // readers_per_layer  # of the reader; the logits' is the last one's + 1
                found = self.fits(smaller, bound, known, layer)
                if found:
                    mask, known = smaller, found
        return mask

    def circuit(self, mask, **found):
        """The Circuit of a mask."""
        names = [
            (self.graph.writers[w], self.graph.readers[r], *([p] if self.by_position else []))
            for r, w, p in mask.nonzero().tolist()
        ]
        return Circuit(self.model, set(names), self.ablation, self.by_position, found)


def find_circuit(model, clean, corrupted, positions, *, bound=0.001, ablation="corrupted", steps=400, seed=0, batch_size=32,
                 by_position=False, sweep=True):  # fmt: skip
    """The smallest circuit whose KL from the full model is at most `bound` nats. Returns a Circuit.

    clean, corrupted: (N, T) tokens; positions: (N,) or (N, K), the tokens whose next-token distribution must be kept, the mean
    over them being bounded; by_position: edges of their own for every position, for examples that are aligned.

    Gates are drawn anew for every example, not for every batch, which takes most of the noise out of the KL. Noisy gates cost
    KL that the circuit in the end does not have, so the multiplier follows the KL of the deterministic circuit (log_alpha > 0)
    on the same examples. Then edges are ranked by log_alpha, and bisection finds a prefix that keeps the bound on all examples.
    Last, every edge of it is tried, the lowest first, and left out where the bound holds without it (sweep=False: not done).
    """
    started = time.time()
    with frozen(model):
        problem = Problem(model, clean, corrupted, positions, ablation, by_position)
        ranking = search(problem, bound, steps, seed, batch_size)
        mask = problem.shortest_prefix(ranking, lambda mask: problem.fits(mask, bound))
        mask = problem.swept(mask, ranking, bound) if sweep else mask
    found = {"bound": bound, "steps": steps, "seed": seed, "examples": len(clean), "seconds": round(time.time() - started, 1)}
    return problem.circuit(mask, **found)


def search(problem, bound, steps, seed, batch_size, learning_rate=0.1):
    """Edge pruning: log_alpha of every edge after so many steps, (R, W, P). The model is `frozen`.

    All edges start open. The multiplier says how many edges a bound's worth of KL is worth. Adam forgets squared gradients
    within some twenty steps (beta2 0.95): the first, of a circuit that fails altogether, are thousands of times the last.
    """
    model, device = problem.model, problem.full.device
    generator = torch.Generator(device).manual_seed(seed)
    gate, candidates = HardConcrete(), problem.candidates.to(device)
    log_alpha = torch.full(candidates.shape, 3.0, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha], lr=learning_rate, betas=(0.9, 0.95))
    limit = LossBound(1.0, scale=1.0, rate=0.05, smallest=0.01, largest=10.0)  # KL in units of the bound, cost in edges
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        rows = torch.randint(len(problem.clean), (batch_size,), generator=generator, device=device)
        clean, positions, full = problem.clean[rows], problem.positions[rows], problem.full[rows]
        ablated = problem.ablated if len(problem.ablated) == 1 else problem.ablated[rows]

        def loss_of(z):
            logits = read_out(model, circuit_output(model, clean, z * candidates, ablated), positions)
            return divergence(full, logits).mean() / bound

        u = torch.rand(batch_size, *candidates.shape, generator=generator, device=device)
        cost = edge_penalty(gate, log_alpha)[candidates].sum()
        optimizer.zero_grad()
        limit.lagrangian(cost, loss_of(gate.sample(log_alpha.expand_as(u), u))).backward()
        optimizer.step()
        with torch.no_grad():
            limit.update(loss_of((log_alpha > 0).to(u.dtype).expand_as(u)).item())
    return log_alpha.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a circuit, and other ways to rank edges


def logit_difference(logits, answers, wrong):
    """The answers' logits less the wrong ones', (N, K). logits: (N, K, V); answers, wrong: (N, K) tokens."""
    return (logits.gather(2, answers[:, :, None]) - logits.gather(2, wrong[:, :, None]))[..., 0]


def scores(circuit, task):
    """Figures of a circuit on the examples of a task, a dict:

    edges, heads, mlps: how many the circuit has; attention_edges: open (layer, head, query, key) of its heads, for queries up
    to the last answer, mean per prompt; kl: KL(full || circuit), nats, mean over examples and positions; accuracy: fraction of
    examples whose every answer is the likeliest token; preference: fraction whose every answer is likelier than the wrong
    one; logit_difference: m, answer minus wrong, mean; faithfulness: (m(circuit) - m(empty)) / (m(full) - m(empty)), and 1
    where full and empty circuit do not differ, so that there is nothing to explain. With corrupted ablation the empty
    circuit is the model on the corrupted prompt. full_accuracy, full_preference: the full model's."""
    mask = circuit.mask(task.clean.size(1))
    with frozen(circuit.model):
        given = (task.clean, ablated_writers(circuit.model, task.corrupted, circuit.ablation), task.positions)
        full = full_logits(circuit.model, task.clean, task.positions)
        logits, empty = (torch.cat(list(masked_logits(circuit.model, m, *given))) for m in (mask, torch.zeros_like(mask)))

    def difference(logits):
        return logit_difference(logits, task.answers, task.wrong)

    def mean(values):
        return values.cpu().double().mean().item()

    def right(logits):
        return mean((logits.argmax(dim=-1) == task.answers).all(dim=1))

    def preferred(logits):
        return mean((difference(logits) > 0).all(dim=1))

    m, m_full, m_empty = (mean(difference(x)) for x in (logits, full, empty))
    explained = m_full - m_empty
    matters = torch.arange(task.clean.size(1), device=task.clean.device) <= task.positions.amax(dim=1, keepdim=True)  # (N, T)
    chunks = zip(task.clean.split(CHUNK), matters.split(CHUNK))
    read = sum((reading(circuit, idx)[1] & queries[:, None, :, None]).sum().item() for idx, queries in chunks)
    nodes = {tuple(node.split(".")[:2]) for edge in circuit.edges for node in edge[:2]}  # (a0, h1), (m0,), ...
    return {
        "edges": len(circuit.edges),
        "heads": sum(len(node) == 2 for node in nodes),
        "mlps": sum(node[0].startswith("m") for node in nodes),
        "attention_edges": read / len(task.clean),
        "kl": mean(divergence(full, logits)),
        "accuracy": right(logits),
        "preference": preferred(logits),
        "logit_difference": m,
        "faithfulness": (m - m_empty) / explained if abs(explained) > 1e-6 else 1.0,
        "full_accuracy": right(full),
        "full_preference": preferred(full),
    }


@torch.no_grad()
def reading(circuit, idx):
    """Which token reads which in the circuit, on prompts idx (B, T): the model's attention (pattern times gate), and whether
    its edges are open, both (L, B, H, T, T), zero and False where the head is not in it, or in a circuit by position its
    output at the query or its key and value at the key."""
    graph, mask, record = graph_of(circuit.model), circuit.mask(idx.size(1)).to(idx.device), circuit.model.attention(idx)
    weight, edges, H = record.pattern * record.gate, record.edges.clone(), graph.n_head
    for layer, (r, w) in enumerate(graph.layers()):
        written = mask[:, w : w + H].any(dim=0)  # (H, P): something reads the head there
        read = mask[r + H : r + 3 * H].any(dim=1).view(2, H, -1).any(dim=0)  # (H, P): the key or the value is not ablated
        if not circuit.by_position:
            read = written
        edges[layer] &= written[:, :, None] & read[:, None]
    return weight * edges, edges


def attribution(problem, answers, wrong):
    """Edge attribution patching (Syed et al., arXiv 2310.10348): how much closing each edge would change the logit difference
    to first order, |d m / dz| at z = 1, (R, W, P). One backward pass over the examples."""
    total = torch.zeros(problem.candidates.shape, dtype=problem.ablated.dtype, device=problem.ablated.device)
    ablated = problem.ablated.expand(len(problem.clean), -1, -1, -1)
    batches = (t.split(32) for t in (problem.clean, ablated, problem.positions, answers, wrong))
    for clean, ablated, positions, answer, other in zip(*batches):
        z = torch.ones_like(total, requires_grad=True)
        x = circuit_output(problem.model, clean, z.expand(len(clean), -1, -1, -1), ablated)
        difference = logit_difference(read_out(problem.model, x, positions), answer, other)
        total += torch.autograd.grad(difference.sum(), z)[0]
    return total.abs()


def overlap(circuits):
    """Mean over all pairs of circuits of the edges in both as a fraction of the edges in either (IoU)."""
    pairs = [(a.edges, b.edges) for i, a in enumerate(circuits) for b in circuits[:i]]
    return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / len(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# The command line: dense against sparse


@dataclass
class CircuitConfig:
    task: tuple = arguments("one task, such as addition", 1, 1)
    dense: str = option("", "the dense model; empty: out/<task>/dense.pt")
    sparse: str = option("", "the sparse model; empty: out/<task>/sparse.pt")
    data: str = option("", "your own examples, JSON lines with clean, corrupted, answer and, if you like, wrong_answer; every "
                       "other line is searched on, the rest scored on")  # fmt: skip
    data_dir: str = option("data", "where the datasets are")
    out_dir: str = option("", "where to write; empty: out/<task>")
    examples: int = option(0, "pairs of prompts to search on, and as many others to score on; 0: 2,000 of a toy task, 500 of "
                           "text, else 200", at_least=0)  # fmt: skip
    bound: float = option(0.001, "KL(full model || circuit) at the answer, nats, not to be exceeded", above=0)
    ablation: str = option("corrupted", "what closed edges deliver: what the writer says on the corrupted prompt, its mean "
                           "over these, or nothing", choices=ABLATIONS)  # fmt: skip
    positions: bool = option(False, "edges of their own for every position; the task's prompts must be aligned")
    steps: int = option(400, "steps of the search", at_least=1)
    batch_size: int = option(32, "examples per step", at_least=1)
    sweep: bool = option(True, "at the end, leave out every edge without which the bound holds, too")
    curve: bool = option(True, "also three other bounds, attribution patching and random edges")
    seeds: int = option(1, "searches per model at the bound, with seeds that follow --seed", at_least=1)
    seed: int = option(0, "of the examples and of the search", at_least=0, below=2**31)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")

    def problems(self):
        return device_problems(self.device)


def make_tasks(config, model, meta, path):
    """The examples to search on and others to score on, two Tasks."""
    if config.data:
        task = tasks.from_file(config.data, tokenizer_of(meta))
    else:
        task = tasks.make(config.task[0], model.config, meta, 2 * config.examples, config.seed, config.data_dir)
    length, block_size = task.clean.size(1), model.config.block_size
    if length > block_size:
        raise UserError(f"{config.task[0]} has {length} tokens, and {path} sees {block_size} at once: give another model")
    if config.positions and not task.aligned:
        raise UserError(f"--positions needs prompts of one length, and those of {config.task[0]} differ: leave it out")
    return [half.to(config.device) for half in task.halves()]


def examine(name, model, task, others, config):
    """Search, score and compare for one model, `frozen`. Returns the circuits at the bound (one per seed), and what
    circuits.json says of the model: a dict of plain values."""
    given = (task.clean, task.corrupted, task.positions)
    keywords = dict(ablation=config.ablation, steps=config.steps, batch_size=config.batch_size, by_position=config.positions,
                    sweep=config.sweep)  # fmt: skip
    circuits, points = [], []

    def found(bound, seed):
        circuit = find_circuit(model, *given, bound=bound, seed=seed, **keywords)
        figures = {**circuit.found, **scores(circuit, others), "kl_searched": scores(circuit, task)["kl"]}
        words = [f"{name:7} bound {bound:<7.4g} seed {seed}: {len(circuit.edges):>6,} edges  KL {figures['kl_searched']:.4f}"]
        words.append(f"on others {figures['kl']:.4f}, accuracy {figures['accuracy']:.2%}  {figures['seconds']:.0f} s")
        print("  ".join(words), flush=True)
        return circuit, figures

    for seed in range(config.seed, config.seed + config.seeds):
        circuit, figures = found(config.bound, seed)
        circuits.append(circuit)
        points.append(figures)
    problem = Problem(model, *given, config.ablation, config.positions)
    report = {"seeds": points, "candidates": int(problem.candidates.sum())}
    if config.seeds > 1:
        report["overlap"] = overlap(circuits)
    if config.curve:
        more = [found(factor * config.bound, config.seed)[1] for factor in (0.3, 3, 30)]
        report["bounds"] = sorted([points[0], *more], key=lambda figures: figures["bound"])
        rankings = {"attribution": attribution(problem, task.answers, task.wrong)}
        generator = torch.Generator().manual_seed(config.seed)
        rankings["random"] = torch.rand(problem.candidates.shape, generator=generator)
        for way, ranking in rankings.items():
            same_bound = problem.shortest_prefix(ranking, lambda mask: problem.fits(mask, config.bound))
            report[way] = {"edges_at_the_bound": int(same_bound.sum()), "bounds": []}
            for figures in report["bounds"]:  # as many edges as the circuit has
                mask = problem.shortest_prefix(ranking, lambda mask, n=figures["edges"]: int(mask.sum()) >= n)
                report[way]["bounds"].append(scores(problem.circuit(mask), others))
    return circuits, report


def draw(config, models, circuits, reports, task, meta, folder):
    """The pictures of a comparison. Returns their paths."""
    shape = models["dense"].config
    if config.positions:
        tokenizer = tokenizer_of(meta)
        some = task.clean[:CHUNK]
        most = reading(circuits["sparse"], some)[1].sum(dim=(0, 2, 3, 4)).argmax()  # the prompt on which there is most to see
        labels = [tokenizer.decode([token]) for token in some[most].tolist()]
        drawn = {name: (c.edges, reading(c, some)[0][:, most].cpu().numpy()) for name, c in circuits.items()}
        figures = {"circuits_positions.png": plots.positions_figure(labels, drawn, shape.n_layer)}
    else:
        edges = {name: circuit.edges for name, circuit in circuits.items()}
        figures = {"circuits.png": plots.circuits_figure(edges, shape.n_layer, shape.n_head)}
    if config.curve:
        curves = {}
        for name, report in reports.items():
            ways = {"edge pruning": report["bounds"], **{way: report[way]["bounds"] for way in ("attribution", "random")}}
            bounds = [figures["bound"] for figures in report["bounds"]]
            curves[name] = {
                way: [(p["edges"], p["faithfulness"], b) for p, b in zip(points, bounds)] for way, points in ways.items()
            }
        figures["circuits_positions_curve.png" if config.positions else "circuits_curve.png"] = plots.curve_figure(curves)
    return [plots.save(figure, folder / name) for name, figure in figures.items()]


def main(argv):
    config = command_line.parse_or_help(CircuitConfig(), argv, __doc__)
    config.device = find_device(config.device)
    paths = {name: getattr(config, name) or f"out/{config.task[0]}/{name}.pt" for name in ("dense", "sparse")}
    folder = Path(config.out_dir or f"out/{config.task[0]}")
    models, metas = {}, {}
    for name, path in paths.items():
        source = open_source(path)
        models[name], metas[name] = GPT.from_source(source).to(config.device), source.tokenizer
    shapes = [(m.config.n_layer, m.config.n_head, meta.get("characters"), meta["tokenizer"]) for m, meta in
              zip(models.values(), metas.values())]  # fmt: skip
    if shapes[0] != shapes[1]:
        raise UserError(f"{paths['dense']} and {paths['sparse']} differ in shape or tokens: compare two versions of one model")
    task, others = make_tasks(config, models["dense"], metas["dense"], paths["dense"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out_dir {folder} ({error.strerror}): choose another")
    circuits, reports = {}, {}
    for name, model in models.items():
        with frozen(model):
            found, reports[name] = examine(name, model, task, others, config)
        circuits[name] = found[0]
    ending = "_positions" if config.positions else ""
    for name, circuit in circuits.items():
        circuit.save(folder / f"circuit{ending}_{name}.json")
    content = {"settings": asdict(config), "models": paths, **reports, "ratio": ratio_of(reports)}
    (folder / f"circuits{ending}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    pictures = draw(config, models, circuits, reports, others, metas["dense"], folder)
    print(circuits_table(reports))
    print(f"\nwrote {folder / f'circuits{ending}.json'}  pictures: " + "  ".join(map(str, pictures)))


if __name__ == "__main__":
    command_line.run(main)
