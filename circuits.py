"""
Circuits: a small subgraph of a model that keeps a behaviour, in a dense model and in the sparse one.

    python circuits.py addition                 out/addition/dense.pt against out/addition/sparse.pt
    python circuits.py addition --positions     which token talks to which, through which head
    python circuits.py carry                    a narrow task: one token decides, see data/tasks.py
    python circuits.py shakespeare_char         or running text: what predicts the next token
    python circuits.py ioi --dense=gpt2 --sparse=out/gpt2/sparse.pt
    python circuits.py mine --data=FILE.jsonl --dense=... --sparse=...
    python circuits.py --help

The model is a graph. Writers (the embedding, every head, every MLP) add to the residual stream; readers
(every head's query, key and value, every MLP, the logits) read the sum of all writers before them; an edge
is one (writer, reader). Closing an edge replaces, in that reader's input, the writer's activation by an
*ablated* one, usually its activation on another prompt (edge pruning, Bhaskar et al., arXiv 2406.16778):

    input of r = sum_w  z_rw * circuit_w + (1 - z_rw) * ablated_w,    circuit_w: what w writes in this run

Every edge gets a hard-concrete gate z (gates.py), the model is frozen, and the gates are trained as
post-training trains the attention's: as few open edges as possible, subject to a bound (constrained.py),
here on KL(full model || circuit) at the positions of the answer. The same gate and the same constraint, used
twice.

Shapes: N examples, B in a batch, K answer positions, T tokens, C width, H heads, L layers, V vocabulary,
W = 1 + L (H + 1) writers, R = L (3 H + 1) + 1 readers. P is 1, or T where every position has its own edges.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from constrained import LossBound
from data import tasks
from gates import GATES, edge_penalty
from model import GPT, evaluating
from support import circuit_report, command_line
from support.checkpoints import check_comparable, open_pretrained
from support.command_line import UserError, arguments, option
from support.files import make_folder, read_json, write_json
from support.graph import edges_read, graph_of, node_of
from support.ranks import find_device

ABLATIONS = ("corrupted", "mean", "zero")
CHUNK = 64  # examples at once where no gradient is needed


# ------------------------------------------------------------------------------------------------------------
# The masked forward pass


def head_outputs(attn, q, k, v):
    """What every head adds to the residual stream, with deterministic attention gates; the output bias is
    shared out over the heads. q, k, v: (B, H, T, D) -> (B, H, T, C)."""
    if attn.gate is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
    else:
        pattern, z = attn.pattern_and_gate(q, k)
        y = (pattern * z).to(v.dtype) @ v
    return projected(attn, y)


def projected(attn, y):
    """What heads read, (B, H, T, D) -> what each adds to the residual stream, (B, H, T, C)."""
    out = torch.einsum("bhtd,chd->bhtc", y, attn.c_proj.weight.unflatten(1, (attn.n_head, -1)))
    return out + bias_share(attn)


def bias_share(attn):
    return 0.0 if attn.c_proj.bias is None else attn.c_proj.bias / attn.n_head


def all_writers(model, idx):
    """What every writer of the full model adds to the residual stream, (B, W, T, C)."""
    x = model.embed(idx)
    outputs = [x[:, None]]
    for block in model.h:
        heads = head_outputs(block.attn, *block.attn.qkv(block.ln_1(x)))
        x = x + heads.sum(dim=1)
        mlp = block.mlp(block.ln_2(x))
        x = x + mlp
        outputs += [heads, mlp[:, None]]
    return torch.cat(outputs, dim=1)


def ablated_writers(model, corrupted, ablation):
    """What closed edges deliver, (N or 1, W, T, C). corrupted: every writer on the corrupted prompts (N, T);
    mean: its mean over the prompts, at each position; zero: nothing but a head's share of the bias."""
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


def mixed(z, delta):
    """sum_w z_rw * delta_w of the n writers so far, for R' readers. z: (B, R', n, P), delta: (B, n, T, C) ->
    (B, R', T, C). P may be 1: einsum repeats it over the positions."""
    return torch.einsum("brwt,bwtc->brtc", z, delta)


def circuit_output(model, idx, z, ablated, attend=head_outputs):
    """The model with gates on its edges: what the logits read, (B, T, C).

    idx: (B, T) tokens; z: (B, R, W, P) gates; ablated: (B or 1, W, T, C); attend: in place of head_outputs.
    A reader gets sum_w z_rw circuit_w + (1 - z_rw) ablated_w, which is what closed edges deliver, sum_w
    ablated_w, plus sum_w z_rw (circuit_w - ablated_w): `base` and the mix of `delta`, both of the writers so
    far."""
    H = model.config.n_head
    base = ablated[:, :1]
    delta = model.embed(idx)[:, None] - base  # (B, n, T, C)
    for block, (r, w) in zip(model.h, graph_of(model).layers):  # this layer's first reader and writer
        attn, mlp_r, mlp_w = block.attn, r + 3 * H, w + H
        heads_ablated, mlp_ablated = ablated[:, w:mlp_w], ablated[:, mlp_w : mlp_w + 1]
        h = block.ln_1(base + mixed(z[:, r:mlp_r, :w], delta))  # (B, 3H, T, C), each reader its own
        qkv = torch.einsum("brtc,rdc->brtd", h, attn.c_attn.weight.unflatten(0, (3 * H, -1)))
        if attn.c_attn.bias is not None:
            qkv = qkv + attn.c_attn.bias.view(3 * H, 1, -1)
        delta = torch.cat([delta, attend(attn, *qkv.split(H, dim=1)) - heads_ablated], dim=1)
        base = base + heads_ablated.sum(dim=1, keepdim=True)
        mlp = block.mlp(block.ln_2(base + mixed(z[:, mlp_r : mlp_r + 1, :mlp_w], delta)))
        delta, base = torch.cat([delta, mlp - mlp_ablated], dim=1), base + mlp_ablated
    return (base + mixed(z[:, -1:], delta))[:, 0]


def logits_at(model, x, positions):
    """The residual stream x (B, T, C) -> logits (B, K, V) at positions (B, K)."""
    return model.read_out(x.gather(1, positions[:, :, None].expand(-1, -1, x.size(2)))).float()


def kl_divergence(full, circuit):
    """KL(full || circuit) in nats, (N, K), from logits (N, K, V)."""
    full, circuit = full.log_softmax(dim=-1), circuit.log_softmax(dim=-1)
    return (full.exp() * (full - circuit)).sum(dim=-1)


# ------------------------------------------------------------------------------------------------------------
# The search


@dataclass
class Circuit:
    """A set of edges of a model. edges: (writer, reader) names, or (writer, reader, position), all on a path
    from the embedding to the logits; found: how it was found, plain values."""

    model: torch.nn.Module
    edges: set
    ablation: str = "corrupted"
    by_position: bool = False
    found: dict = field(default_factory=dict)

    def mask(self, n_positions):
        """The edges as (R, W, P) bool."""
        return graph_of(self.model).mask(self.edges, n_positions if self.by_position else 1)

    def run(self, clean, corrupted):
        """The circuit's logits, (N, T, V), on clean (N, T) tokens, ablated as on corrupted ones."""
        everywhere = torch.arange(clean.size(1), device=clean.device).expand_as(clean)
        with evaluating(self.model):
            problem = Problem(self.model, clean, corrupted, everywhere, self.ablation, self.by_position)
            return problem.logits(self.mask(clean.size(1)))

    def save(self, path):
        """Write everything but the model as JSON."""
        content = {"ablation": self.ablation, "by_position": self.by_position, "found": self.found}
        write_json({**content, "edges": sorted(map(list, self.edges))}, path)

    @classmethod
    def load(cls, path, model):
        """What save wrote, as a circuit of model. Raises UserError for another file or another model."""
        try:
            content = read_json(path)
            edges = {tuple(edge) for edge in content.pop("edges")}
            circuit = cls(model, edges, **content)
            circuit.mask(model.config.block_size)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} holds no circuit of this model ({error}): give one that save wrote")
        return circuit


class Problem:
    """A model, `evaluating`; examples, clean (N, T) tokens and positions (N, K); what closed edges deliver;
    the full model's answers. Masks are (R, W, P) bool. Raises UserError for logits that are not finite."""

    def __init__(self, model, clean, corrupted, positions, ablation="corrupted", by_position=False):
        self.model, self.clean, self.ablation, self.by_position = model, clean, ablation, by_position
        self.positions = positions.view(len(positions), -1)
        self.graph = graph_of(model)
        self.ablated = ablated_writers(model, corrupted, ablation).expand(len(clean), -1, -1, -1)
        pairs = zip(clean.split(CHUNK), self.positions.split(CHUNK))
        full = [logits_at(model, all_writers(model, idx).sum(dim=1), p) for idx, p in pairs]
        self.full = torch.cat(full)  # (N, K, V)
        if not self.full.isfinite().all():
            raise UserError("the model's logits are not finite: give one that was trained without a NaN")
        # a head whose attention edges are never open moves nothing between positions; any other may
        both = torch.cat([clean, corrupted]).split(CHUNK)
        alive = sum(model.attention(idx).edges.sum(dim=(1, 3, 4)) for idx in both) > 0  # (L, H)
        P = clean.size(1) if by_position else 1
        self.links = alive.cpu()[:, :, None, None].expand(-1, -1, P, P).tril()  # (L, H, P, P)
        candidates = self.graph.edges[:, :, None].repeat(1, 1, P)
        if by_position:
            candidates[-1] &= torch.isin(torch.arange(P), self.positions.cpu())  # logits: only at answers
        # edges that are no candidates change nothing; with the ablations mean and zero they may, a little
        self.candidates = self.graph.effective(candidates, self.links)

    def logits(self, mask):
        """A circuit's logits, (N, K, V)."""
        return torch.cat(list(self.chunks(mask)))

    def chunks(self, mask):
        """A circuit's logits (B, K, V), for one chunk of examples after the other."""
        z = mask.to(self.ablated.device, self.ablated.dtype)
        examples = self.clean, self.ablated, self.positions
        for idx, ablated, positions in zip(*(t.split(CHUNK) for t in examples)):
            x = circuit_output(self.model, idx, z.expand(len(idx), -1, -1, -1), ablated)
            yield logits_at(self.model, x, positions)

    def fits(self, mask, bound):
        """Whether the circuit's mean KL over all examples is at most bound. Stops as soon as the sum is too
        large."""
        left = bound * self.positions.numel()
        for full, logits in zip(self.full.split(CHUNK), self.chunks(mask)):
            left -= kl_divergence(full, logits).sum().item()
            if not left >= 0:  # nor if it is not a number
                return False
        return True

    def order(self, ranking):
        """Flat numbers of all edges, the candidates first, by falling ranking (R, W, P)."""
        ranking = ranking.cpu().masked_fill(~self.candidates, -math.inf)
        return ranking.flatten().argsort(descending=True, stable=True)

    def short_prefix(self, ranking, is_enough):
        """By bisection: of the highest ranked candidates as few as is_enough(mask) takes, and of these the
        effective ones. All candidates where no prefix is."""
        order, shortest = self.order(ranking), self.candidates
        low, high = -1, int(self.candidates.sum())  # the first low are too few, the first high enough
        while high - low > 1:
            middle = (low + high) // 2
            mask = torch.zeros(ranking.numel(), dtype=torch.bool)
            mask[order[:middle]] = True
            mask = self.graph.effective(mask.view(ranking.shape), self.links)
            if is_enough(mask):
                high, shortest = middle, mask
            else:
                low = middle
        return shortest

    def swept(self, mask, ranking, bound):
        """mask without the edges that it can do without: each is left out, the lowest of the ranking first,
        and put back where the bound would not hold."""
        candidates = [edge for edge in self.order(ranking).flip(0).tolist() if mask.view(-1)[edge]]
        for edge in candidates:
            if mask.view(-1)[edge]:  # still there
                smaller = mask.clone()
                smaller.view(-1)[edge] = False
                smaller = self.graph.effective(smaller, self.links)
                mask = smaller if self.fits(smaller, bound) else mask
        return mask

    def circuit(self, mask, **found):
        """The Circuit of a mask."""
        edges = {edge if self.by_position else edge[:2] for edge in self.graph.named(mask)}
        return Circuit(self.model, edges, self.ablation, self.by_position, found)


def search(problem, bound, steps, seed, batch_size):
    """Edge pruning: log_alpha of every edge after so many steps, (R, W, P).

    All edges start at log_alpha 3, where a gate is below 1 in a fifth of the draws. Gates are drawn for every
    example, not once per batch: that takes most of the noise out of the KL. The rest of the noise makes the
    sampled KL too large, so the multiplier follows the KL of the deterministic circuit. The loss is KL /
    bound, the cost the sum of edge_penalty. The multiplier starts at the number of edges, so that edges that
    do not matter close first, and aims at KL / bound = 0.7, as other examples have a larger KL. Adam forgets
    squared gradients within some twenty steps (beta2 0.95), since the KL of a circuit that fails is hundreds
    of times the bound. The learning rate falls from 0.1 to 0.01."""
    model, device = problem.model, problem.full.device
    generator = torch.Generator(device).manual_seed(seed)
    gate, candidates = GATES["hard_concrete"](), problem.candidates.to(device)
    log_alpha = torch.full(candidates.shape, 3.0, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha], betas=(0.9, 0.95))
    n = max(1, int(candidates.sum()))
    constraint = LossBound(0.7, scale=1.0, rate=0.05, decay=0.9, smallest=0.01, largest=n)

    def loss_of(z, rows):
        """KL / bound of the circuits z (B, R, W, P) on examples rows (B,)."""
        x = circuit_output(model, problem.clean[rows], z * candidates, problem.ablated[rows])
        logits = logits_at(model, x, problem.positions[rows])
        return kl_divergence(problem.full[rows], logits).mean() / bound

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        rows = torch.randint(len(problem.clean), (batch_size,), generator=generator, device=device)
        u = torch.rand(batch_size, *candidates.shape, generator=generator, device=device)
        with torch.enable_grad():
            cost = edge_penalty(gate, log_alpha)[candidates].sum()
            objective = constraint.lagrangian(cost, loss_of(gate.sample(log_alpha.expand_as(u), u), rows))
            (log_alpha.grad,) = torch.autograd.grad(objective, log_alpha)
        optimizer.step()
        constraint.update(loss_of(gate.deterministic(log_alpha).sign().expand_as(u), rows).item())
    return log_alpha.detach()


def find_circuit(model, clean, corrupted, positions, *, bound=0.001, ablation="corrupted", steps=400, seed=0,
                 batch_size=32, by_position=False, sweep=True):  # fmt: skip
    """A small circuit whose KL from the full model is at most `bound` nats. Returns a Circuit.

    clean, corrupted: (N, T) tokens; positions: (N,) or (N, K), the tokens whose next-token distribution must
    be kept, on average; by_position: edges of their own for every position. Edges are ranked by `search`,
    bisection finds a prefix of the ranking that keeps the bound on all examples, and then every edge of it
    is tried, and left out where the bound holds without it (sweep=False: not done)."""
    started = time.time()
    with evaluating(model):
        problem = Problem(model, clean, corrupted, positions, ablation, by_position)
        ranking = search(problem, bound, steps, seed, batch_size)
        mask = problem.short_prefix(ranking, lambda mask: problem.fits(mask, bound))
        mask = problem.swept(mask, ranking, bound) if sweep else mask
        kl = kl_divergence(problem.full, problem.logits(mask)).mean().item()
    found = {"bound": bound, "steps": steps, "seed": seed, "examples": len(clean), "kl_searched": kl}
    found |= {"candidates": int(problem.candidates.sum()), "seconds": round(time.time() - started, 1)}
    return problem.circuit(mask, **found)


def logit_difference(logits, answers, wrong):
    """The answers' logits less the wrong ones', (N, K). logits: (N, K, V); answers, wrong: (N, K) tokens."""
    return (logits.gather(2, answers[:, :, None]) - logits.gather(2, wrong[:, :, None]))[..., 0]


def scores(circuit, task):
    """Figures of a circuit on the examples of a task, a dict:

    edges, heads, mlps: how many the circuit has; attention_edges: open (layer, head, query, key) of its
    heads, up to the last answer's query, mean per prompt; kl: KL(full || circuit), nats, mean over examples
    and positions; accuracy: fraction of examples whose every answer is the likeliest token; preference: is
    likelier than the wrong one; logit_difference: m, answer minus wrong, mean; faithfulness: (m - m(empty))
    / (m(full) - m(empty)), the empty circuit being all closed; left out if these are equal, and there is
    nothing to explain; full_accuracy: the full model's accuracy."""
    with evaluating(circuit.model):
        problem = Problem(circuit.model, task.clean, task.corrupted, task.positions, circuit.ablation)
        mask = circuit.mask(task.clean.size(1))
        logits, empty = (problem.logits(m) for m in (mask, torch.zeros_like(mask)))
    answers, wrong, full = task.answers, task.wrong, problem.full
    mean = lambda values: values.cpu().double().mean().item()
    accuracy = lambda logits: mean((logits.argmax(dim=-1) == answers).all(dim=1))
    m, m_full, m_empty = (mean(logit_difference(x, answers, wrong)) for x in (logits, full, empty))
    effect = {"faithfulness": (m - m_empty) / (m_full - m_empty)} if abs(m_full - m_empty) > 1e-6 else {}
    pairs = zip(task.clean.split(CHUNK), task.positions.split(CHUNK))
    n_read = sum(edges_read(circuit, *pair).sum().item() for pair in pairs)
    nodes = {writer for writer, *_ in circuit.edges} | {node_of(reader)[0] for _, reader, *_ in circuit.edges}
    return {
        "edges": len(circuit.edges),
        "heads": sum(node[0] == "a" for node in nodes),
        "mlps": sum(node[0] == "m" for node in nodes),
        "attention_edges": n_read / len(task.clean),
        "kl": mean(kl_divergence(full, logits)),
        "accuracy": accuracy(logits),
        "preference": mean((logit_difference(logits, answers, wrong) > 0).all(dim=1)),
        "logit_difference": m,
        **effect,
        "full_accuracy": accuracy(full),
    }


# ------------------------------------------------------------------------------------------------------------
# The command line: dense against sparse


@dataclass
class CircuitConfig:
    task: tuple = arguments("one task, such as addition", 1, 1)
    dense: str = option("", "the dense model; empty: out/<task>/dense.pt; of carry, out/addition/dense.pt")
    sparse: str = option("", "the sparse model, likewise")
    data: str = option("", "your own examples, JSON lines: clean, corrupted, answer, wrong_answer")
    data_dir: str = option("data", "where the datasets are")
    out_dir: str = option("", "where to write; empty: out/<task>, with --sparse a folder <task> beside it")
    examples: int = option(0, "pairs of prompts to search on, and others to score on; 0: by task", at_least=0)
    bound: float = option(0.001, "KL(full model || circuit) of the answer's tokens at most, nats", above=0)
    ablation: str = option("corrupted", "what closed edges deliver, see ablated_writers", choices=ABLATIONS)
    positions: bool = option(False, "edges of their own for every position; for prompts that are aligned")
    steps: int = option(400, "steps of the search", at_least=1)
    batch_size: int = option(32, "examples per step", at_least=1)
    sweep: bool = option(True, "at the end, leave out every edge without which the bound holds, too")
    seeds: int = option(1, "searches per model, with seeds that follow --seed", at_least=1)
    seed: int = option(0, "of the examples and of the search", at_least=0, below=2**31)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


def open_task(config):
    """({dense, sparse: model}, their tokenizer's meta, (examples to search on, others to score on))."""
    name, device = config.task[0], find_device(config.device)
    if not config.data:
        tasks.check_name(name, config.data_dir)
    files = [getattr(config, n) or f"out/{tasks.home(name)}/{n}.pt" for n in ("dense", "sparse")]
    dense, sparse = map(open_pretrained, files)
    check_comparable(dense, sparse)
    models = {"dense": GPT.from_pretrained(dense), "sparse": GPT.from_pretrained(sparse)}
    task = tasks.find(
        name, config.data, models["dense"].config, dense.tokenizer, n=2 * config.examples, seed=config.seed,
        data_dir=config.data_dir, aligned=config.positions or config.ablation == "mean",
        dataset=dense.trained_on.get("dataset"),
    )  # fmt: skip
    models = {name: model.to(device).requires_grad_(False) for name, model in models.items()}
    return models, dense.tokenizer, [half.to(device) for half in task.halves()]


def folder_of(config):
    """The folder to write to: out_dir, or the task's own."""
    beside = Path(config.sparse).parent if config.sparse and Path(config.sparse).exists() else Path("out")
    return make_folder(config.out_dir or beside / config.task[0])


def main(argv):
    config = command_line.parse(CircuitConfig(), argv, __doc__)
    models, meta, (searched, scored) = open_task(config)
    folder = folder_of(config)
    circuits, reports = {}, {}
    for which, model in models.items():
        circuits[which], reports[which] = [], []
        for seed in range(config.seed, config.seed + config.seeds):
            circuit = find_circuit(
                model, searched.clean, searched.corrupted, searched.positions, bound=config.bound, seed=seed,
                ablation=config.ablation, steps=config.steps, batch_size=config.batch_size,
                by_position=config.positions, sweep=config.sweep,
            )  # fmt: skip
            figures = {**circuit.found, **scores(circuit, scored)}
            print(circuit_report.line(which, figures), flush=True)
            circuits[which].append(circuit)
            reports[which].append(figures)
    written = circuit_report.write(folder, asdict(config), circuits, reports, scored, meta)
    print(circuit_report.table(circuits, reports))
    print("\nwrote " + "  ".join(map(str, written)))


if __name__ == "__main__":
    command_line.run(main)
