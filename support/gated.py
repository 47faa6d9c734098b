"""Putting gates on a model: where their biases start, and what computes the attention."""

from importlib.util import find_spec

import gates
from model import evaluating
from support.command_line import UserError

ATTENTIONS = ("auto", "reference", "fused")


def calibrate_gate_biases(model, idx, mass=0.999, log_alpha=5.0):
    """Set the gates' biases so that on tokens idx (B, T) the edges that hold `mass` of each head's attention
    have a logit of at least log_alpha: a model whose scores are far below zero then starts open, too."""
    with evaluating(model):
        x = model.embed(idx)
        for block in model.h:
            q, k, _ = block.attn.qkv(block.ln_1(x))
            scores = gates.causal_scores(q, k)
            pattern = scores.softmax(dim=-1).transpose(0, 1).flatten(1)  # (H, B T T)
            scores, order = scores.transpose(0, 1).flatten(1).sort(dim=1)  # later keys first
            below = pattern.gather(1, order).cumsum(dim=1)  # weight of the edges up to this score
            first = (below < (1 - mass) * below[:, -1:]).sum(dim=1, keepdim=True)
            block.attn.gate_bias.copy_(log_alpha - scores.gather(1, first)[:, 0])
            x, _ = block(x)


def choose_attention(model, name):
    """Compute gated attention by "reference" (gates.py), "fused" (fused_attention.py), or "auto": fused
    where that works. Returns the choice, in words. Raises UserError where fused is asked for and does not
    work."""
    attend, words = gates.gated_attention, "reference"
    if name != "reference":
        problem = problem_with_fused(model)
        if name == "fused" and problem:
            raise UserError(f"--attention is fused, which {problem}: choose auto or reference")
        if problem:
            words = f"reference (fused {problem})"
        else:
            import fused_attention

            attend, words = fused_attention.gated_attention, "fused"
    for block in model.h:
        block.attn.attend = attend
    return words


def problem_with_fused(model):
    """Why fused attention does not work for this model where it is; empty if it does."""
    weight, config = model.wte.weight, model.config
    if weight.device.type != "cuda":
        return f"needs a CUDA device, and this is {weight.device}"
    if find_spec("triton") is None:
        return "needs the package triton, and it is not installed"
    import fused_attention  # here, since it imports Triton, which a CPU does without

    gate, q = model.h[0].attn.gate, weight.new_empty(1, 1, 1, config.n_embd // config.n_head)
    return fused_attention.unsupported(q, gate) or fused_attention.disagreement(gate, weight.device)
