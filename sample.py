"""
Generate text from a checkpoint, show and read its attention, force edges, or score it.

    python sample.py out/addition/sparse.pt --prompt=57+68=
    python sample.py out/addition/sparse.pt --compare=out/addition/dense.pt --prompt=43+59= --edges=a.png
    python sample.py out/addition/sparse.pt --heads --plot=heads.png
    python sample.py out/addition/sparse.pt --prompt=57+68= --force="1.2:6<-4=closed"
    python sample.py out/shakespeare_char/sparse.pt --prompt=ROMEO: --max_new_tokens=300 --temperature=0.8
    python sample.py out/addition/sparse.pt --eval_only
    python sample.py gpt2 --prompt="The Eiffel Tower is in" --max_new_tokens=20 --temperature=0
    python sample.py --help
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import Dataset
from data.tokenizer import tokenizer_of
from model import GPT
from readings import forced, parse_forces, read_heads, roles_of, words_of
from support import command_line, pictures
from support.checkpoints import check_comparable, open_pretrained
from support.command_line import UserError, arguments, option
from support.ranks import find_device
from support.report import evaluate, table


@dataclass
class SampleConfig:
    checkpoint: tuple = arguments("one checkpoint, such as out/addition/sparse.pt", 1, 1)
    prompt: str = option("", "what the text begins with, empty: a line end; of a toy task, whole prompts")
    num_samples: int = option(1, "texts to generate", at_least=1)
    max_new_tokens: int = option(0, "tokens to generate; 0: the answer on a toy task, else 200", at_least=0)
    temperature: float = option(1.0, "0: always the likeliest token, as on toy tasks", at_least=0)
    top_k: int = option(0, "sample among so many likeliest tokens only; 0: all", at_least=0)
    seed: int = option(1337, "of the sampling", at_least=0, below=2**62)
    compare: str = option("", "another checkpoint, taken first and drawn above this one")
    plot: str = option("", "draw the open heads, of the last prompt or of --heads, to this .png, .svg, .pdf")
    edges: str = option("", "draw the open edges from layer to layer, on all prompts, to this file")
    force: str = option("", 'hold edges open or closed: "1.2:6<-4=closed,0.1=open", see readings.py')
    heads: bool = option(False, "print what every open head reads, what opens it and what it is for")
    eval_only: bool = option(False, "print loss, accuracy on tasks, and edges; generate nothing")
    dataset: str = option("", "for --heads, --eval_only: a folder under data_dir; empty: as trained on")
    data_dir: str = option("data", "where the datasets are")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")

    def check(self):
        if self.eval_only and self.heads:
            raise UserError("--eval_only and --heads are two commands: leave one out")
        if self.edges and (self.eval_only or self.heads):
            raise UserError("--edges draws a --prompt: leave --eval_only and --heads out")
        if self.plot and self.eval_only:
            raise UserError("--plot draws a --prompt or --heads: leave --eval_only out")
        if self.heads and self.compare and self.plot:
            raise UserError("--plot of --heads draws one model: leave --compare out")


def validation_data(config, source, model):
    """The Dataset of config.dataset, or of the one that the model was trained on."""
    name = config.dataset or source.trained_on.get("dataset")
    if not name:
        raise UserError(f"{source.name} does not say what it was trained on: add --dataset=NAME")
    block_size = source.trained_on.get("block_size", model.config.block_size)
    data = Dataset(name, block_size, config.data_dir, config.device)
    data.check_tokenizer(source.tokenizer, source.name)
    return data


def score(config, source, model):
    """--eval_only: the figures of the model on the validation split."""
    name = "dense" if model.config.gate == "none" else "sparse"
    print(table({name: evaluate(model, validation_data(config, source, model), batch_size=32)}))


def read(config, source, model):
    """--heads: the cards of all open heads."""
    data = validation_data(config, source, model)
    cards = read_heads(model, data)
    print("\n".join(words_of(cards, data)))
    if config.plot:
        labels = roles_of(data) if data.is_task else None
        print(f"wrote {pictures.save(pictures.heads_figure(cards, labels), config.plot)}")


def generate(config, source, model):
    """Print the continuations of config.prompt. Returns the tokens to draw, (N, T): the prompt, on a toy task
    the prompts with their answers."""
    meta, tokenizer = source.tokenizer, tokenizer_of(source.tokenizer)
    answer_start = meta.get("answer_start")
    prompt = tokenizer.encode(config.prompt or ("" if answer_start else "\n"))
    if answer_start and (len(prompt) == 0 or len(prompt) % answer_start):
        length = f"has {len(prompt)} characters, this task's prompts have {answer_start}"
        raise UserError(f"--prompt {config.prompt!r} {length}: give one or more whole prompts")
    n_new = config.max_new_tokens or (meta["example_length"] - answer_start if answer_start else 200)
    idx = torch.from_numpy(prompt.astype("int64")).view(-1, answer_start or len(prompt)).to(config.device)
    torch.manual_seed(config.seed)
    for _ in range(config.num_samples):
        texts = model.generate(idx, n_new, 0.0 if answer_start else config.temperature, config.top_k)
        print("\n".join(map(tokenizer.decode, texts.tolist())))
    return texts[:, : meta["example_length"] - 1] if answer_start else idx  # nothing reads the last token


def main(argv):
    config = command_line.parse(SampleConfig(), argv, __doc__)
    config.device = find_device(config.device)
    forces = parse_forces(config.force)
    sources = [open_pretrained(path) for path in (config.compare, *config.checkpoint) if path]
    check_comparable(sources[0], sources[-1], ("n_layer", "n_head", "block_size"))
    models, short = {}, [Path(source.name).stem for source in sources]
    names = short if len(set(short)) == len(short) else [source.name for source in sources]
    names[-1] += ", forced" if forces else ""
    with ExitStack() as while_forced:
        for source, name in zip(sources, names):
            model = models[name] = GPT.from_pretrained(source).to(config.device)
            if len(sources) > 1:
                print(f"{source.name}:")
            if forces and source is sources[-1]:
                while_forced.enter_context(forced(model, forces))
            if config.eval_only:
                score(config, source, model)
            elif config.heads:
                read(config, source, model)
            else:
                idx = generate(config, source, model)
        tokenizer = tokenizer_of(source.tokenizer)
        if config.plot and not config.heads:
            figure = pictures.attention_figure(*pictures.records_of(models, tokenizer, idx[-1:]))
            print(f"wrote {pictures.save(figure, config.plot)}")
        if config.edges:
            figure = pictures.edges_figure(*pictures.records_of(models, tokenizer, idx))
            print(f"wrote {pictures.save(figure, config.edges)}")


if __name__ == "__main__":
    command_line.run(main)
