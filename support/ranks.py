"""
Where a program computes: devices, and the ranks that torchrun starts.

Everything here also works without torchrun: then there is one rank, and nothing is sent.
"""

import os
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.command_line import UserError


def find_device(name):
    """auto -> the best device of this machine; cuda -> this rank's own, cuda:0 without torchrun; else the
    name itself. Raises UserError for a device that is not there."""
    if name.startswith("cuda:") and world_size() > 1:
        raise UserError(f"--device is {name}, but each of {world_size()} ranks takes its own GPU: give cuda")
    n_cuda = torch.cuda.device_count()
    mps = ["mps"] if torch.backends.mps.is_available() else []
    known = ["cpu", *mps, *(f"cuda:{n}" for n in range(n_cuda))]
    if name == "cuda" or (name == "auto" and n_cuda):
        found = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    else:
        found = known[-1] if name == "auto" else name
    if found in known:
        return found
    if found.startswith("cuda"):
        raise UserError(f"--device is {name}, but PyTorch sees {n_cuda} CUDA devices: choose auto or cpu")
    raise UserError(f"--device is {name!r}: choose auto, cpu, cuda, cuda:N or mps")


def device_name(device):
    """The device and PyTorch's version, in words."""
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else f"{device}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of ranks; before `joined`, what torchrun says it will be."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Whether this rank writes files and prints."""
    return rank() == 0


@contextmanager
def joined(device):
    """Within it the ranks can talk to each other, and only the first one's prints are seen. Raises UserError,
    instead of waiting, if another rank is gone."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    if world_size() == 1:
        yield
        return
    hour = timedelta(hours=1)  # that the others wait while the first rank evaluates
    dist.init_process_group("nccl" if cuda else "gloo", timeout=hour)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_first() else nowhere):
            yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error):
            raise UserError("another rank has stopped, see its message: --resume goes on from last.pt")
        raise
    wait()
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this one


def replicated(model, device):
    """The model to train with: its backward pass takes the mean of the gradients over the ranks."""
    if world_size() == 1:
        return model
    gpus = [torch.device(device)] if device.startswith("cuda") else None
    return DistributedDataParallel(model, device_ids=gpus, gradient_as_bucket_view=True)  # no second copy


@contextmanager
def first_alone():
    """Within it the first rank is alone; the others come when it has left."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def last_only(model, is_last):
    """Within it the backward pass exchanges gradients only if is_last: one exchange per step is enough."""
    return nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def mean(*numbers):
    """The means over the ranks, the same on each, as floats. The first number is a scalar tensor, the others
    are that or plain numbers. One transfer from the device, one exchange."""
    alike = dict(dtype=numbers[0].dtype, device=numbers[0].device)
    values = torch.stack([torch.as_tensor(n, **alike) for n in numbers]).cpu().double()
    return torch.stack(gathered(values)).mean(dim=0).tolist()


def gathered(tensor):
    """The tensors of all ranks, in their order, on the CPU."""
    if world_size() == 1:
        return [tensor.cpu()]
    mine = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    theirs = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(theirs, mine)
    return [t.cpu() for t in theirs]


def wait():
    """Until all ranks are here."""
    gathered(torch.zeros(1))


def check_same(what, number):
    """Raise UserError if a number that all ranks compute for themselves is not the same on all."""
    numbers = [t.item() for t in gathered(torch.tensor(number, dtype=torch.float64))]
    if len(set(numbers)) > 1:
        raise UserError(f"{what} differs between the ranks ({numbers}), which is a bug: please report it")
