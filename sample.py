"""
Generate text from a checkpoint, show its attention, or score it.

    python sample.py out/addition/sparse.pt --prompt=57+68=
    python sample.py out/addition/sparse.pt --compare=out/addition/dense.pt --prompt=57+68= --plot=a.png
    python sample.py out/shakespeare_char/sparse.pt --prompt=ROMEO: --max_new_tokens=300 --temperature=0.8
    python sample.py out/addition/sparse.pt --eval_only --dataset=addition
    python sample.py gpt2 --prompt="The Eiffel Tower is in" --max_new_tokens=20 --temperature=0
    python sample.py --help
"""

from dataclasses import dataclass

import torch

from data.dataset import Dataset
from data.tokenizer import tokenizer_of
from model import GPT
from support import command_line, pictures
from support.checkpoints import open_pretrained
from support.command_line import UserError, arguments, option
from support.ranks import find_device
from support.report import evaluate, table


@dataclass
class SampleConfig:
    checkpoint: tuple = arguments("one checkpoint, such as out/addition/sparse.pt", 1, 1)
    prompt: str = option("", "what the text begins with; empty: a line end, where the model knows it")
    num_samples: int = option(1, "texts to generate", at_least=1)
    max_new_tokens: int = option(0, "tokens to generate; 0: the answer on a toy task, else 200", at_least=0)
    temperature: float = option(1.0, "0: always the likeliest token, as on toy tasks", at_least=0)
    top_k: int = option(0, "sample among so many likeliest tokens only; 0: all", at_least=0)
    seed: int = option(1337, "of the sampling", at_least=0, below=2**62)
    compare: str = option("", "another checkpoint, generated from and drawn above this one")
    plot: str = option("", "write the attention of every head on the prompt to this .png, .svg or .pdf")
    arcs: str = option("", "write the open edges as arcs over the prompt to this file")
    eval_only: bool = option(False, "print loss, accuracy on tasks, and edges on --dataset; generate nothing")
    dataset: str = option("", "with --eval_only: the folder under data_dir to score on")
    data_dir: str = option("data", "where the datasets are")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")

    def check(self):
        if self.eval_only and not self.dataset:
            raise UserError("--eval_only needs to know on what: add --dataset=NAME")
        if self.eval_only and (self.plot or self.arcs):
            raise UserError("--plot and --arcs draw a --prompt: leave --eval_only out")


def score(config, source, model):
    """--eval_only: the figures of the model on the validation split of config.dataset."""
    data = Dataset(config.dataset, model.config.block_size, config.data_dir, config.device)
    data.check_tokenizer(source.tokenizer, source.name)
    name = "dense" if model.config.gate == "none" else "sparse"
    print(table({name: evaluate(model, data, batch_size=32)}))


def generate(config, source, model):
    """Print the continuations of config.prompt. Returns the tokens to draw, (1, T): the prompt, on a toy
    task with its answer."""
    meta, block_size = source.tokenizer, model.config.block_size
    tokenizer, answer_start = tokenizer_of(meta), meta.get("answer_start")
    prompt = tokenizer.encode(config.prompt or ("" if answer_start else "\n"))
    if answer_start and len(prompt) != answer_start:
        length = f"has {len(prompt)} characters, this task's prompts have {answer_start}"
        raise UserError(f"--prompt {config.prompt!r} {length}: give a whole prompt")
    if len(prompt) > block_size:
        raise UserError(f"--prompt has {len(prompt)} tokens, the model sees {block_size} at once: shorten it")
    n_new = config.max_new_tokens or (meta["example_length"] - answer_start if answer_start else 200)
    idx = torch.from_numpy(prompt.astype("int64"))[None].to(config.device)
    torch.manual_seed(config.seed)
    for _ in range(config.num_samples):
        text = model.generate(idx, n_new, 0.0 if answer_start else config.temperature, config.top_k or None)
        print(tokenizer.decode(text[0].tolist()))
    return text[:, :block_size] if answer_start else idx


def check_comparable(a, b):
    """Raise UserError if the tokens or the heads of two Pretrained models do not match."""
    if any(a.tokenizer.get(key) != b.tokenizer.get(key) for key in ("tokenizer", "vocab_size", "characters")):
        raise UserError(f"{a.name} and {b.name} know different tokens: compare models of one dataset")
    for key in ("n_layer", "n_head", "block_size"):
        if a.model_config[key] != b.model_config[key]:
            sizes = f"{a.name} has {key} {a.model_config[key]}, {b.name} has {b.model_config[key]}"
            raise UserError(f"{sizes}: compare models of one shape")


def main(argv):
    config = command_line.parse(SampleConfig(), argv, __doc__)
    config.device = find_device(config.device)
    sources = [open_pretrained(path) for path in (config.compare, *config.checkpoint) if path]
    check_comparable(sources[0], sources[-1])
    records = {}
    for source in sources:
        model = GPT.from_pretrained(source).to(config.device)
        if len(sources) > 1:
            print(f"{source.name}:")
        if config.eval_only:
            score(config, source, model)
        else:
            idx = generate(config, source, model)
            records[source.name] = model.attention(idx).numpy()
    tokenizer = tokenizer_of(sources[-1].tokenizer)
    if config.plot or config.arcs:
        labels = [tokenizer.decode([token]) for token in idx[0].tolist()]
    if config.plot:
        print(f"wrote {pictures.save(pictures.attention_figure(labels, records), config.plot)}")
    if config.arcs:
        print(f"wrote {pictures.save(pictures.arcs_figure(labels, *records[sources[-1].name]), config.arcs)}")


if __name__ == "__main__":
    command_line.run(main)
