"""
Transformers whose circuit is known because their weights were written down.

The width is cut into slots of eight dimensions: the token, the position, two slots for what heads and MLPs
pass on, one that balances every vector's mean to zero, so that LayerNorm changes nothing but the length, and
an unused one. A head is told which slots its query, key and value read and where it writes; what is not
mentioned is zero.
"""

import torch

from model import GPT, GPTConfig

V = 8  # tokens, and positions
TOKEN, POSITION, A, B, BALANCE = (slice(start, start + V) for start in range(0, 5 * V, V))
C, T = 6 * V, 6
GAIN = 4.0  # of what is passed on, so that an answer outweighs the embedding's own token


def empty(n_layer):
    """Embeddings of one-hot tokens and positions, and blocks that do nothing."""
    model = GPT(GPTConfig(block_size=V, vocab_size=V, n_layer=n_layer, n_head=2, n_embd=C))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(8.0 if name == "ln_f.weight" else 1.0 if ".ln_" in name and "weight" in name else 0.0)
        model.wte.weight[:, TOKEN] = model.wpe.weight[:, POSITION] = torch.eye(V)
        model.wte.weight[:, BALANCE] = model.wpe.weight[:, BALANCE] = -1 / V
    return model.eval()


@torch.no_grad()
def add_head(model, layer, head, query, key, value, to, gain=GAIN):
    """query, key: (slot, matrix (V, V)): the head attends where the two products are the same one-hot;
    value, to: slots."""
    attn, D = model.h[layer].attn, C // 2
    rows = slice(head * D, head * D + V)  # the first V of the head's D dimensions
    for part, (slot, matrix) in enumerate([query, key, (value, torch.eye(V))]):
        weight = attn.c_attn.weight[part * C : (part + 1) * C]
        weight[rows, slot] = matrix * (16.0 if part < 2 else 1.0)  # all attention is on one key
    attn.c_proj.weight[to, rows] = gain * torch.eye(V)
    attn.c_proj.weight[BALANCE, rows] = -gain / V


@torch.no_grad()
def add_mlp(model, layer, read, matrix, to):
    """A hidden unit per dimension of the slot `read`; matrix times that slot is written to the slot `to`."""
    mlp = model.h[layer].mlp
    mlp.c_fc.weight[:V, read] = torch.eye(V)
    mlp.c_proj.weight[to, :V] = GAIN * matrix
    mlp.c_proj.weight[BALANCE, :V] = -GAIN / V


SAME = torch.eye(V)
PREVIOUS = torch.eye(V).roll(-1, dims=0)  # position p asks for p - 1
PREVIOUS[-1] = 0  # but the first one for nothing
SUCCESSOR = torch.eye(V).roll(1, dims=0)


def at(position):
    """(query, key) of a head that reads one position from everywhere."""
    ask, answer = torch.zeros(V, V), torch.zeros(V, V)
    ask[0], answer[0, position] = 1, 1
    return (POSITION, ask), (POSITION, answer)


def random_prompts(n, generator):
    """(n, T) tokens, all different within a prompt."""
    return torch.stack([torch.randperm(V, generator=generator)[:T] for _ in range(n)])


def previous_token():
    """Head 0 copies the token before. Queries and keys read positions, which the corrupted prompt leaves as
    they were, so their edges do not count."""
    model = empty(1)
    add_head(model, 0, 0, (POSITION, PREVIOUS), (POSITION, SAME), TOKEN, TOKEN)
    return model, random_prompts, {("embed", "a0.h0.v"), ("a0.h0", "logits")}


def induction():
    """Head 0 of layer 0 tells every token what came before it; head 1 of layer 1 looks for the token that
    came after the present one's first time, and copies it."""
    model = empty(2)
    add_head(model, 0, 0, (POSITION, PREVIOUS), (POSITION, SAME), TOKEN, A, gain=1.0)
    add_head(model, 1, 1, (TOKEN, SAME), (A, SAME), TOKEN, TOKEN)

    def repeating_prompts(n, generator):
        prompts = random_prompts(n, generator)
        first = torch.randint(1, T - 2, (n,), generator=generator)
        prompts[:, -1] = prompts[torch.arange(n), first]  # the last token was seen before
        return prompts

    edges = {("embed", "a0.h0.v"), ("a0.h0", "a1.h1.k"), ("embed", "a1.h1.q"), ("embed", "a1.h1.v")}
    return model, repeating_prompts, edges | {("a1.h1", "logits")}


def distractor():
    """Head 0 copies the first token to the answer; head 1 the second as strongly to where nobody reads."""
    model = empty(1)
    add_head(model, 0, 0, *at(0), TOKEN, TOKEN)
    add_head(model, 0, 1, *at(1), TOKEN, B)
    return model, random_prompts, {("embed", "a0.h0.v"), ("a0.h0", "logits")}


def two_paths():
    """The first token goes through head 0 to the MLP of layer 0, which answers with its successor. The
    second goes through head 1 and the MLP of layer 1 to the positions' slot, which is no answer."""
    model = empty(2)
    add_head(model, 0, 0, *at(0), TOKEN, A)
    add_head(model, 0, 1, *at(1), TOKEN, B)
    add_mlp(model, 0, A, SUCCESSOR, TOKEN)
    add_mlp(model, 1, B, SUCCESSOR, POSITION)
    return model, random_prompts, {("embed", "a0.h0.v"), ("a0.h0", "m0"), ("m0", "logits")}


PLANTED = [previous_token, induction, distractor, two_paths]
