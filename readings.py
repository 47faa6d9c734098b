"""
Read a sparse model: what every surviving head reads, what opens an edge, what happens when it is forced.

    python sample.py out/addition/sparse.pt --heads                    a card for every head with an open edge
    python sample.py out/addition/sparse.pt --prompt=57+68= --force="1.2:6<-4=closed"

A card is made in three steps. *Which edges are open?* Deterministic gates on the validation split. *What
opens them?* On a toy task, whose positions have names, an edge that is open in only some examples gets the
simplest rule over the symbols that its query can see; on text a head gets the distances and tokens that its
edges share. *What are they for?* The edge is forced, and the loss and the answers are looked at again.

Sizes: N sequences of T tokens, L layers, H heads. An edge is written layer.head:query<-key.
"""

import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.tokenizer import tokenizer_of
from model import evaluating
from support.command_line import UserError

COVERS = 0.9  # a head is named after a rule that this fraction of its edges keep
MOST_PAIRS = 2**28  # N L H T T at most: that many bytes
MOST_RULES = 2000  # that are tried in pairs


# ------------------------------------------------------------------------------------------------------------
# Forcing an edge


class Edge(NamedTuple):
    """One edge of one head; with query and key None, all of them."""

    layer: int
    head: int
    query: int | None = None
    key: int | None = None

    def __str__(self):
        return f"{self.layer}.{self.head}" + (f":{self.query}<-{self.key}" if self.query is not None else "")


class ForcedGate:
    """A layer's gate, of which some edges are held open (1) or closed (0) in evaluation."""

    def __init__(self, gate, forces):
        self.gate = gate
        # (Edge, whether it is open): whole heads first, so that single edges can differ from their head
        self.forces = sorted(forces.items(), key=lambda force: force[0].query is not None)
        self.sample, self.open_probability = gate.sample, gate.open_probability

    def deterministic(self, log_alpha):
        z = self.gate.deterministic(log_alpha).clone()  # (B, H, Tq, Tk); the queries are the last positions
        n_queries, n_keys = z.shape[-2:]
        first = n_keys - n_queries  # the position of the first query
        for edge, is_open in self.forces:
            if edge.query is None:
                z[:, edge.head] = torch.ones_like(z[0, 0]).tril(first) * is_open
            elif first <= edge.query < n_keys:
                z[:, edge.head, edge.query - first, edge.key] = is_open
        return z


def check_gated(model):
    if model.config.gate == "none":
        raise UserError("a dense model has no gates to read or force: give a sparse one, such as sparse.pt")


@contextmanager
def forced(model, forces):
    """Within it, edges are held open or closed in evaluation. forces: {Edge: True for open}. Raises
    UserError for a model without gates and for an edge that it does not have."""
    check_gated(model)
    config = model.config
    for edge in forces:
        if edge.layer >= config.n_layer or edge.head >= config.n_head:
            counts = f"the model has {config.n_layer} layers of {config.n_head}"
            raise UserError(f"there is no head {edge.layer}.{edge.head}: {counts}, both counted from 0")
        if edge.query is not None and not edge.key <= edge.query < config.block_size:
            limits = f"give a key up to the query, and a query below block_size {config.block_size}"
            raise UserError(f"there is no edge {edge}: {limits}")
    attentions = [block.attn for block in model.h]
    gates = [attn.gate for attn in attentions]
    try:
        for layer, attn in enumerate(attentions):
            attn.gate = ForcedGate(attn.gate, {e: state for e, state in forces.items() if e.layer == layer})
        yield
    finally:
        for attn, gate in zip(attentions, gates):
            attn.gate = gate


def parse_forces(text):
    """"1.2:6<-4=closed,0.1=open" -> {Edge: whether it is open}. Raises UserError."""
    forces = {}
    for word in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)\.(\d+)(?::(\d+)<-(\d+))?=(open|closed)", word.strip())
        if not match:
            wanted = "layer.head:query<-key=closed (or =open), or layer.head=closed for all edges of a head"
            raise UserError(f"--force has {word.strip()!r}: write {wanted}")
        *numbers, state = match.groups()
        forces[Edge(*(None if n is None else int(n) for n in numbers))] = state == "open"
    return forces


# ------------------------------------------------------------------------------------------------------------
# Cards


@dataclass
class Effect:
    """What a forced edge does, on the examples in which that changes it."""

    loss: float  # nats per predicted token
    accuracy: float
    change: str  # the commonest one of the answers, in words

    def __str__(self):
        figures = f" (accuracy {self.accuracy:.1%}, loss {self.loss:.2f})" if self.accuracy < 1 else ""
        return self.change + figures


@dataclass
class EdgeCard:
    """One edge of a toy task."""

    edge: Edge
    frequency: float  # of the examples in which it is open
    rule: str = ""  # what opens it, where that is neither always nor never, and simple enough
    agreement: float = 1.0  # of the rule, on examples that it was not chosen on
    closed: Effect | None = None
    opened: Effect | None = None


@dataclass
class Card:
    """One head with open edges."""

    layer: int
    head: int
    name: str  # what covers COVERS of its edges, in words; or ""
    per_sequence: float  # open edges
    fraction: float  # of its causal pairs
    frequency: np.ndarray  # (T, T): of the sequences in which an edge is open; rows are queries
    edges: list = field(default_factory=list)  # EdgeCards, on a toy task
    lines: list = field(default_factory=list)  # on text: what else is to be said


def read_heads(model, data):
    """Cards of all heads that have an open edge on the validation split of `data`, a Dataset, thinned out to
    MOST_PAIRS. Raises UserError for a model without gates."""
    check_gated(model)
    config = model.config
    n = max(1, MOST_PAIRS // (config.n_layer * config.n_head * data.sequence_tokens**2))
    idx, targets = data.cut("val", data.starts("val", n * data.stride))  # (N, T)
    tokens = idx.cpu().numpy()
    pieces = [model.attention(x).edges.cpu() for (x,) in batches(model, idx)]
    edges = torch.cat(pieces, dim=1).transpose(1, 2)  # (L, H, N, T, T) bool
    known = symbols_of(data, idx) if data.is_task else token_groups(data, tokens)  # the same for all heads
    cards = []
    heads = list(product(range(config.n_layer), range(config.n_head)))
    for layer, head in tqdm(heads, unit="head", leave=False, disable=None):  # None: only on a terminal
        found = edges[layer, head].nonzero().T.numpy()  # (3, n): sequence, query, key
        if not found.size:
            continue
        frequency = edges[layer, head].float().mean(dim=0).numpy()
        T = len(frequency)
        share = found.shape[1] / len(idx)
        card = Card(layer, head, "", share, share / (T * (T + 1) / 2), frequency)
        if data.is_task:
            read_task_head(card, model, data, idx, targets, known, edges[layer, head].numpy(), found)
        else:
            read_text_head(card, data, tokens, known, found)
        cards.append(card)
    if not data.is_task:
        add_losses(cards, model, idx, targets)
    return cards


def batches(model, *tensors):
    """Pieces of (N, T) tensors, so small that every layer's attention fits in some 100 MB."""
    config, T = model.config, tensors[0].size(1)
    return zip(*(t.split(max(1, 2**24 // (config.n_layer * config.n_head * T * T))) for t in tensors))


def mean_loss(model, idx, targets):
    """With deterministic gates, nats per predicted token."""
    with evaluating(model):
        losses = [(model(x, y)[1].item() * (y >= 0).sum().item()) for x, y in batches(model, idx, targets)]
    return sum(losses) / (targets >= 0).sum().item()


# ------------------------------------------------------------------------------------------------------------
# On a toy task: edges by the names of their positions, and rules


def read_task_head(card, model, data, idx, targets, symbols, is_open, found):
    """Fill in a card. symbols: symbols_of; is_open: (N, T, T) bool; found: (3, n) sequence, query, key of
    every open edge."""
    roles = roles_of(data)
    card.name = head_name(idx.cpu().numpy(), found, roles)
    rows = np.arange(len(idx))[:: -(-len(idx) // 2000)]  # forcing takes some 2,000 examples
    for query, key in np.argwhere(card.frequency > 0):
        now = is_open[:, query, key]
        edge = EdgeCard(Edge(card.layer, card.head, int(query), int(key)), float(now.mean()))
        if 0 < edge.frequency < 1:
            rule, agreement = simplest_rule(symbols, roles, query, now)
            if 1 - agreement < min(edge.frequency, 1 - edge.frequency) * 2 / 3:  # else it says little
                edge.rule, edge.agreement = rule, agreement
        effect = lambda state, some: effect_of(model, data, idx[some], targets[some], {edge.edge: state})
        edge.closed = effect(False, rows[now[rows]]) if now[rows].any() else None
        edge.opened = effect(True, rows[~now[rows]]) if not now[rows].all() else None
        card.edges.append(edge)


def roles_of(data):
    """A name for every position of an example: those of meta.json, or numbers."""
    return data.meta.get("roles") or [f"position {p}" for p in range(data.example_length)]


def symbols_of(data, idx):
    """(N, T) array of characters."""
    return np.array([list(row) for row in map(tokenizer_of(data.meta).decode, idx.tolist())])


def rules(symbols, roles, query, is_open):
    """Every simple rule over the symbols that a query sees: (complexity, words, (N,) bool). One symbol's
    value, of digits also a threshold; two that are equal; the sum of two digits against a number; the values
    of one symbol for which the edge is open more often than not. symbols: (N, T) characters; is_open: (n,)
    bool, of the first n examples."""
    seen = [p for p in range(query + 1) if (symbols[:, p] != symbols[0, p]).any()]
    digits = {p: symbols[:, p].astype(int) for p in seen if np.char.isdecimal(symbols[:, p]).all()}
    for p in seen:
        values, first = np.unique(symbols[:, p]), symbols[: len(is_open), p]
        for value in values:
            yield 0, f"{roles[p]} is {value}", symbols[:, p] == value
            yield 0, f"{roles[p]} is not {value}", symbols[:, p] != value
        for value in range(2, 9) if p in digits else ():  # 1 and 9: "is not 0" and "is 9"
            yield 0, f"{roles[p]} >= {value}", digits[p] >= value
            yield 0, f"{roles[p]} < {value}", digits[p] < value
        often = [value for value in values if is_open[first == value].sum() > (first == value).sum() / 2]
        yield 1, f"{roles[p]} is one of {' '.join(often)}", np.isin(symbols[:, p], often)
    for p, q in combinations(seen, 2):
        yield 1, f"{roles[p]} is {roles[q]}", symbols[:, p] == symbols[:, q]
        yield 1, f"{roles[p]} is not {roles[q]}", symbols[:, p] != symbols[:, q]
        for value in range(1, 19) if p in digits and q in digits else ():
            total, words = digits[p] + digits[q], f"{roles[p]} + {roles[q]}"
            yield 1, f"{words} = {value}", total == value
            yield 1, f"{words} >= {value}", total >= value
            yield 1, f"{words} < {value}", total < value


def simplest_rule(symbols, roles, query, is_open, tolerance=0.005):
    """(words, agreement) of the rule that agrees best with is_open, (N,) bool: one of `rules`, or two joined
    by "and". It is chosen on one half of the examples, the simplest that is worse than the best by no more
    than the tolerance; the agreement is measured on the other half."""
    order = np.random.default_rng(0).permutation(len(symbols))
    symbols, is_open, n = symbols[order], is_open[order], len(symbols) // 2  # the first n choose
    complexity, words, holds = map(np.array, zip(*rules(symbols, roles, query, is_open[:n])))
    sign = np.where(is_open[:n], 1, -1).astype(np.float32)
    best = np.sort((holds[:, :n] @ sign).argsort()[::-1][:MOST_RULES])  # joined are only these
    complexity, words, holds = complexity[best], words[best], holds[best]
    # "i and j" agrees where the edge is open and both hold, and where it is closed, unless both hold
    R = holds[:, :n].astype(np.float32)
    both = (R * sign) @ R.T  # (rules, rules); diagonal: single ones
    agreement = (both + (~is_open[:n]).sum()) / n
    # of two joined both complexities and 2, of a single one twice its own
    cost = np.add.outer(complexity, complexity) + 2.0 - 2 * np.eye(len(words))
    frequency = is_open[:n].mean()
    tolerance = min(tolerance, min(frequency, 1 - frequency) / 10)  # else a rare edge's rule is "never"
    near = np.argwhere(agreement >= agreement.max() - tolerance)
    i, j = min(near, key=lambda pair: (cost[tuple(pair)], -agreement[tuple(pair)]))
    found = words[i] if i == j else f"{words[i]} and {words[j]}"
    return found, float(((holds[i] & holds[j])[n:] == is_open[n:]).mean())


def effect_of(model, data, idx, targets, forces):
    """The Effect of forced edges on examples of a toy task, (N, T) each."""
    start, n_new = data.answer_start, data.example_length - data.answer_start
    with forced(model, forces):
        loss = mean_loss(model, idx, targets)
        answers = model.generate(idx[:, :start], n_new, temperature=0)[:, start:].cpu()
    right = targets[:, start - 1 :].cpu()
    accuracy = (answers == right).all(dim=1).float().mean().item()
    decode = tokenizer_of(data.meta).decode
    pairs = [(decode(a), decode(b)) for a, b in zip(answers.tolist(), right.tolist())]
    if n_new > 1 and all(a.isdecimal() and b.isdecimal() for a, b in pairs):
        differences = Counter(int(a) - int(b) for a, b in pairs if a != b)
        if differences:
            difference, n = differences.most_common(1)[0]
            size = f"{abs(difference)} too {'large' if difference > 0 else 'small'}"
            return Effect(loss, accuracy, f"{n / len(pairs):.1%} come out {size}")
    return Effect(loss, accuracy, f"{1 - accuracy:.1%} come out wrong" if accuracy < 1 else "all are right")


# ------------------------------------------------------------------------------------------------------------
# On text: distances, tokens, contexts


def head_name(idx, found, roles=()):
    """A name for a head by what its queries read: the first that covers COVERS of its edges, or "". roles: of
    the positions of a toy task."""
    n, query, key = found
    distances, keys = np.bincount(query - key) / len(n), np.bincount(key) / len(n)
    nearest = distances.argmax()
    after_same = (key > 0) & (idx[n, np.maximum(key - 1, 0)] == idx[n, query])
    names = [
        (distance_words(nearest), distances[nearest]),
        ("the first token", keys[0]),
        ("the same token", (idx[n, key] == idx[n, query]).mean()),
        ("what followed the same token (induction)", after_same.mean()),
    ]
    shares, word = (keys, lambda position: roles[position]) if roles else (distances, distance_words)
    for most in (1, 2, 3):
        best = sorted(shares.argsort()[::-1][:most])
        names.append((" and ".join(map(word, best)), shares[best].sum()))
    return next((f"reads {words}" for words, share in names if share >= COVERS), "")


def distance_words(distance):
    return {0: "itself", 1: "the previous token"}.get(distance, f"{distance} back")


CLASSES = {  # of tokens, by their text
    "line breaks": lambda text: "\n" in text,
    "blanks": lambda text: not text.strip() and "\n" not in text,
    "word beginnings": lambda text: text[:1] == " " and text.strip() != "",
    "capitals": lambda text: text.strip()[:1].isupper(),
    "digits": lambda text: text.strip()[:1].isdigit(),
    "punctuation": lambda text: bool(text.strip()) and not any(c.isalnum() for c in text),
    "vowels": lambda text: text.lower() in set("aeiou"),
}


def read_text_head(card, data, idx, groups, found):
    """Fill in a card. idx: (N, T); groups: token_groups; found: (3, n) sequence, query, key of open edges."""
    n, query, key = found
    card.name = head_name(idx, found)
    distances = np.bincount(query - key) / len(n)
    common = [d for d in distances.argsort()[::-1][:5] if distances[d] >= 0.02]
    words = [f"{distance_words(d)} {distances[d]:.0%}" for d in common]
    card.lines += [f"distances: {', '.join(words)}"] if words else []
    for side, verb, position in (("keys", "reads", key), ("queries", "read by", query)):
        over = overrepresented(groups, idx[n, position])
        words = [f"{group} {share:.0%} ({usual:.1%} of the text)" for group, share, usual in over]
        card.lines += [f"{side}: {', '.join(words)}"] if words else []
        if not card.name and over and over[0][1] >= COVERS:
            card.name = f"{verb} {over[0][0]}"
    for row in np.linspace(0, len(n) - 1, 3).astype(int):
        card.lines.append(context(data, idx[n[row]], query[row], key[row]))


def token_groups(data, idx):
    """[(words, tokens, their fraction of idx)] of all classes of tokens of idx, (N, T), and of single tokens
    that are no class by themselves."""
    everywhere = np.bincount(idx.ravel(), minlength=data.meta["vocab_size"]) / idx.size
    decode = tokenizer_of(data.meta).decode
    texts = {t: decode([t]) for t in np.flatnonzero(everywhere).tolist()}
    groups = {name: [t for t in texts if holds(texts[t])] for name, holds in CLASSES.items()}
    # a list: the text of two tokens may be the same, where bytes are no whole character
    single = [(repr(text), [t]) for t, text in texts.items() if [t] not in groups.values()]
    return [(words, group, everywhere[group].sum()) for words, group in [*groups.items(), *single] if group]


def overrepresented(groups, tokens):
    """Of token_groups, those that are at least a tenth of `tokens` and three times as frequent there as in
    the text: [(words, fraction of tokens, fraction of the text)], most frequent first, at most five."""
    here = np.bincount(tokens, minlength=1 + max(max(group) for _, group, _ in groups)) / len(tokens)
    sums = [(words, here[group].sum(), usual) for words, group, usual in groups]
    return sorted((s for s in sums if s[1] >= 0.1 and s[1] >= 3 * s[2]), key=lambda s: -s[1])[:5]


def context(data, row, query, key, length=16):
    """The text around an edge: [its key], <its query>."""
    decode = tokenizer_of(data.meta).decode
    pieces = [decode([t]) for t in row.tolist()]
    pieces[query] = f"<{pieces[query]}>"
    pieces[key] = f"[{pieces[key]}]"
    first = max(0, key - length // 2)
    shown = pieces[first : query + 1 + length // 2]
    if query - key > 2 * length:
        shown = pieces[first : key + length] + [" ... "] + pieces[query - length : query + 1 + length // 2]
    return "".join(shown).replace("\n", "↵")


def add_losses(cards, model, idx, targets, most_heads=64, most_tokens=2**14):
    """What each head is for: the loss without it."""
    if len(cards) > most_heads:
        print(f"note: {len(cards)} heads are open, more than {most_heads}: what each is for is left out")
        return
    every = -(-idx.numel() // most_tokens)
    idx, targets = idx[::every], targets[::every]
    before = mean_loss(model, idx, targets)
    for card in cards:
        with forced(model, {Edge(card.layer, card.head): False}):
            rise = mean_loss(model, idx, targets) - before
        card.lines.insert(0, f"closed: the loss rises by {rise:.4f} nats")


# ------------------------------------------------------------------------------------------------------------
# Cards in words


def words_of(cards, data):
    """Lines for the terminal."""
    lines = []
    for card in cards:
        name = f": {card.name}" if card.name else ""
        size = f"{card.per_sequence:.2f} open edges a sequence, {card.fraction:.2%} of its pairs"
        lines.append(f"layer {card.layer} head {card.head}{name}. {size}")
        lines += [f"    {line}" for line in card.lines]
        roles = roles_of(data) if card.edges else []
        for e in sorted(card.edges, key=lambda e: -e.frequency):
            where = f"{e.edge}  {roles[e.edge.query]} <- {roles[e.edge.key]}"
            lines.append(f"    {where}: open in {e.frequency:.1%}")
            if e.rule:
                lines[-1] += f", where {e.rule} ({e.agreement:.1%} agree)"
            elif e.frequency < 1:
                lines[-1] += ", by no simple rule"
            effects = (("closed", e.closed), ("forced open", e.opened))
            lines.append("        " + "; ".join(f"{state}: {effect}" for state, effect in effects if effect))
    return lines or ["no head has an open edge"]
