"""
Generate text from a checkpoint, show its attention, or score it.

    python sample.py out/addition/sparse.pt --prompt=57+68=
    python sample.py out/addition/sparse.pt --prompt=57+68= --compare=out/addition/dense.pt --plot=attention.png
    python sample.py out/shakespeare_char/sparse.pt --prompt=ROMEO: --max_new_tokens=300 --temperature=0.8
    python sample.py out/addition/sparse.pt --eval_only --dataset=addition
    python sample.py gpt2 --prompt="The Eiffel Tower is in" --max_new_tokens=20 --temperature=0
    python sample.py --help
"""

from dataclasses import dataclass

import torch

import config as command_line
import plots
from config import UserError, arguments, option
from data.dataset import Dataset
from data.tokenizer import tokenizer_of
from model import GPT, device_problems, find_device, open_source
from report import evaluate, table


@dataclass
class SampleConfig:
    checkpoint: tuple = arguments("one checkpoint, such as out/addition/sparse.pt", 1, 1)
    prompt: str = option("", "what the text begins with; empty: a line end, where the model knows it")
    num_samples: int = option(1, "texts to generate", at_least=1)
    max_new_tokens: int = option(0, "tokens to generate; 0: the answer on a toy task, else 200", at_least=0)
    temperature: float = option(
        1.0, "1: the model's own distribution; 0: the likeliest token (always so on toy tasks)", at_least=0
    )
    top_k: int = option(0, "sample among so many likeliest tokens only; 0: all", at_least=0)
    seed: int = option(1337, "of the sampling", at_least=0, below=2**62)
    compare: str = option("", "another checkpoint, generated from and drawn above this one")
    plot: str = option("", "write the attention of every head on the prompt to this .png, .svg or .pdf")
    arcs: str = option("", "write the open edges as arcs over the prompt to this file")
    eval_only: bool = option(False, "print loss, accuracy on tasks, and edges on --dataset; generate nothing")
    dataset: str = option("", "with --eval_only: the folder under data_dir to score on")
    data_dir: str = option("data", "where the datasets are")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")

    def problems(self):
        problems = device_problems(self.device)
        if self.eval_only and not self.dataset:
            problems.append("--eval_only needs to know on what: add --dataset=NAME")
        if self.eval_only and (self.plot or self.arcs):
            problems.append("--plot and --arcs draw a --prompt: leave --eval_only out")
        return problems


def score(config, source, model):
    """--eval_only: the figures of the model on the validation split of config.dataset."""
    data = Dataset(config.dataset, model.config.block_size, config.data_dir, config.device)
    data.check_tokenizer(source.tokenizer, source.name)
    print(table({"dense" if model.config.gate == "none" else "sparse": evaluate(model, data, batch_size=32)}))


def generate(config, source, model):
    """Print the continuations of config.prompt. Returns the tokens to draw, (1, T): the prompt, on a toy task with its
    answer."""
    meta, block_size = source.tokenizer, model.config.block_size
    tokenizer = tokenizer_of(meta)
    is_task = "answer_start" in meta
    if is_task and not config.prompt:
        raise UserError(f"--prompt is missing: this task's prompts have {meta['answer_start']} characters")
    prompt = tokenizer.encode(config.prompt or "\n")
    if is_task and len(prompt) != meta["answer_start"]:
        raise UserError(
            f"the prompt {config.prompt!r} has {len(prompt)} characters: this task's prompts have {meta['answer_start']}"
        )
    if len(prompt) > block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, and the model sees {block_size} at once: shorten it")
    n_new = config.max_new_tokens or (meta["example_length"] - meta["answer_start"] if is_task else 200)
    idx = torch.from_numpy(prompt.astype("int64"))[None].to(config.device)
    torch.manual_seed(config.seed)
    for _ in range(config.num_samples):
        text = model.generate(idx, n_new, 0.0 if is_task else config.temperature, config.top_k or None)
        print(tokenizer.decode(text[0].tolist()))
    return text[:, :block_size] if is_task else idx


def check_comparable(models):
    """Raise UserError if --compare names a model whose tokens or heads do not match."""
    (source, model), *others = models
    for other_source, other in others:
        names = source.name, other_source.name
        for what in ("tokenizer", "vocab_size", "characters"):
            if source.tokenizer.get(what) != other_source.tokenizer.get(what):
                raise UserError(f"{names[0]} and {names[1]} were trained on different tokens: compare models of one dataset")
        for what in ("n_layer", "n_head", "block_size"):
            a, b = getattr(model.config, what), getattr(other.config, what)
            if a != b:
                raise UserError(f"{names[0]} has {what} {a}, {names[1]} has {b}: compare models of one shape")


def draw(config, models, idx):
    """Write --plot and --arcs: every model's attention on the tokens idx (1, T)."""
    tokenizer = tokenizer_of(models[-1][0].tokenizer)
    labels = [tokenizer.decode([t]) for t in idx[0].tolist()]
    records = {source.name: model.attention(idx).first_sequence() for source, model in models}
    if config.plot:
        print(f"wrote {plots.save(plots.attention_figure(labels, records), config.plot)}")
    if config.arcs:
        print(f"wrote {plots.save(plots.arcs_figure(labels, *records[models[-1][0].name]), config.arcs)}")


def main(argv):
    config = command_line.parse_or_help(SampleConfig(), argv, __doc__)
    config.device = find_device(config.device)
    models = []  # (Source, model)
    for path in filter(None, (config.compare, *config.checkpoint)):
        source = open_source(path)
        models.append((source, GPT.from_source(source).to(config.device)))
    check_comparable(models)
    for source, model in models:
        if len(models) > 1:
            print(f"{source.name}:")
        if config.eval_only:
            score(config, source, model)
        else:
            idx = generate(config, source, model)
    if config.plot or config.arcs:
        draw(config, models, idx)


if __name__ == "__main__":
    command_line.run(main)
