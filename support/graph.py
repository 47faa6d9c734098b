"""The graph of a model: which part writes to the residual stream, and which reads what was written before."""

from functools import cache

import torch


class Graph:
    """Writers and readers in the order in which the model computes them.

    writers: W names, embed, then a{layer}.h{head} and m{layer} of every layer; readers: R names,
    a{layer}.h{head}.q, .k and .v, m{layer}, and logits last; edges: (R, W) bool, True where the writer comes
    before the reader; layers: (first reader, first writer) of every layer."""

    def __init__(self, n_layer, n_head):
        self.n_head, self.layers = n_head, []
        self.writers, self.readers, before = ["embed"], [], []
        for layer in range(n_layer):
            self.layers.append((len(self.readers), len(self.writers)))
            heads = [f"a{layer}.h{head}" for head in range(n_head)]
            self.readers += [f"{head}.{part}" for part in "qkv" for head in heads] + [f"m{layer}"]
            before += [len(self.writers)] * 3 * n_head + [len(self.writers) + n_head]
            self.writers += [*heads, f"m{layer}"]
        self.readers.append("logits")
        before.append(len(self.writers))
        self.edges = torch.arange(len(self.writers)) < torch.tensor(before)[:, None]

    def effective(self, mask, links):
        """The edges of mask that lie on a path from the embedding to the logits. mask: (R, W, P) bool, the
        open edges; links: (L, H, P, P) bool, where a head lets its query position read its key position."""
        H = self.n_head
        reached = mask.new_zeros(len(self.writers), mask.size(2))  # what the writer says depends on embed
        needed = mask.new_zeros(len(self.readers), mask.size(2))  # the logits depend on what the reader reads
        reached[0] = needed[-1] = True
        for layer, (r, w) in enumerate(self.layers):
            query, key, value = (mask[r : r + 3 * H] & reached).any(dim=1).view(3, H, -1)  # (H, P): read it
            reached[w : w + H] = (links[layer] & (query[:, :, None] | (key | value)[:, None])).any(dim=2)
            reached[w + H] = (mask[r + 3 * H] & reached).any(dim=0)
        for layer, (r, w) in reversed(list(enumerate(self.layers))):
            needed[r + 3 * H] = (mask[:, w + H] & needed).any(dim=0)
            output = (mask[:, w : w + H] & needed[:, None]).any(dim=0)  # (H, P): something reads the head
            used = links[layer] & output[:, :, None]
            needed[r : r + H] = used.any(dim=2)
            needed[r + H : r + 3 * H] = used.any(dim=1).repeat(2, 1)
        return mask & reached & needed[:, None]

    def named(self, mask):
        """{(writer, reader, position)} of a mask (R, W, P)."""
        return {(self.writers[w], self.readers[r], p) for r, w, p in mask.nonzero().tolist()}

    def mask(self, edges, n_positions=1):
        """The mask (R, W, P) of {(writer, reader)} or {(writer, reader, position)}. Raises ValueError or
        IndexError for an edge that the graph does not have."""
        mask = torch.zeros(*self.edges.shape, n_positions, dtype=torch.bool)
        for writer, reader, *position in edges:
            r, w, p = self.readers.index(reader), self.writers.index(writer), position[0] if position else 0
            mask[r, w, p] = True
        if (mask & ~self.edges[:, :, None]).any():
            raise ValueError("an edge runs backwards")
        return mask


def graph_of(model):
    """The Graph of a model: one for all of its size, since every pass of a search asks for it."""
    return graph_of_size(model.config.n_layer, model.config.n_head)


graph_of_size = cache(Graph)


def node_of(reader):
    """(A reader's node, which of its inputs): a1.h2.q -> a1.h2 and q, m3 -> m3 and "", logits likewise."""
    return (reader[:-2], reader[-1]) if "." in reader else (reader, "")


def reading(circuit, idx):
    """Which token reads which in a circuits.Circuit, on prompts idx (B, T): the attention (pattern times
    gate), and whether its edges are open, both (L, B, H, T, T); zero and False where the head is not in the
    circuit (by position: its output at the query, or its key and value at the key)."""
    graph, record = graph_of(circuit.model), circuit.model.attention(idx)
    mask, edges = circuit.mask(idx.size(1)).to(idx.device), record.edges.clone()
    for layer, (r, w) in enumerate(graph.layers):
        written = mask[:, w : w + graph.n_head].any(dim=0)  # (H, P): something reads the head there
        keys_values = mask[r + graph.n_head : r + 3 * graph.n_head].any(dim=1)  # (2 H, P)
        read = keys_values.view(2, graph.n_head, -1).any(dim=0)  # (H, P): it reads there
        read = read if circuit.by_position else written
        edges[layer] &= written[:, :, None] & read[:, None]
    return record.pattern * record.gate * edges, edges


def edges_read(circuit, idx, positions):
    """The open attention edges of the circuit's heads on prompts idx (B, T), up to the last query of
    positions (B, K): (L, B, H, T, T) bool."""
    queries = torch.arange(idx.size(1), device=idx.device) <= positions.amax(dim=1, keepdim=True)  # (B, T)
    return reading(circuit, idx)[1] & queries[:, None, :, None]
