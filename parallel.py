"""
Several processes, one run: what the ranks that torchrun started share, and what only the first of them does.

Everything here also works without torchrun: then there is one rank, and nothing is sent.
"""

import os
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import UserError


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of ranks; before `joined`, what torchrun says it will be."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Whether this rank writes files and prints."""
    return rank() == 0


def own_device(device):
    """cuda -> this rank's GPU of the machine, cuda:N; any other name as it is."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


@contextmanager
def joined(device):
    """Inside, the ranks can talk to each other, and only the first one's prints are seen. Raises UserError if another rank
    is gone, which ends the run instead of waiting for it."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    if world_size() == 1:
        yield
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))  # the first rank evaluates alone
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_first() else nowhere):
            yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error):
            raise UserError("another rank has stopped, see its message: the same command with --resume goes on from last.pt")
        raise
    wait()
    dist.destroy_process_group()  # not after an error: that would wait for ranks that wait for this one


def replicated(model, device):
    """The model to train with: its backward pass takes the mean of the gradients over the ranks."""
    if world_size() == 1:
        return model
    gpus = [torch.device(device)] if device.startswith("cuda") else None
    return DistributedDataParallel(model, device_ids=gpus, gradient_as_bucket_view=True)  # no second copy of the gradients


def gradients_stay(model, stay):
    """Inside, if `stay`, the backward pass keeps its gradients on this rank: one exchange per step is enough."""
    return model.no_sync() if stay and isinstance(model, DistributedDataParallel) else nullcontext()


def gathered(tensor):
    """The tensors of all ranks, in their order, on the CPU."""
    if world_size() == 1:
        return [tensor.cpu()]
    mine = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    theirs = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(theirs, mine)
    return [t.cpu() for t in theirs]


def mean(*numbers):
    """The means of these numbers over the ranks, the same on each, as a list."""
    if world_size() == 1:
        return list(numbers)
    return torch.stack(gathered(torch.tensor(numbers, dtype=torch.float64))).mean(dim=0).tolist()


def wait():
    """Until all ranks are here."""
    mean(0.0)


def check_same(what, number):
    """Raise UserError if a number that all ranks compute for themselves is not the same on all."""
    numbers = [t.item() for t in gathered(torch.tensor(number, dtype=torch.float64))]
    if any(other != numbers[0] for other in numbers):
        raise UserError(f"{what} differs between the ranks ({numbers}), which must not happen: please report it")
