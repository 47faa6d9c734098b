"""What the bound of post-training is measured on."""

import torch
import torch.nn.functional as F

from model import evaluating
from support import ranks


class HeldOut:
    """The loss that the bound is on: with deterministic gates, on pieces of the training text that are not
    trained on; of a toy task, and of a very short text, on what is trained on.

    Sequences differ in difficulty, so the mean of one batch is noisy; the difference to the dense model on
    the same sequences is not. So the dense model is measured once on all of them, and the estimate is

        mean over all of dense  +  mean over a batch of (model - dense)
    """

    def __init__(self, run, dense):
        self.run, self.starts = run, run.data.starts("held_out")
        self.dense = self.losses(dense, self.starts)  # (N,)

    def losses(self, model, starts):
        """The model's loss on the sequences that start there, nats per predicted token: (N,), on the CPU."""
        found = []
        with evaluating(model), self.run.autocast():
            for chunk in starts.split(self.run.config.batch_size):
                x, y = self.run.data.cut("held_out", chunk)
                flat = model(x, y)[0].flatten(0, 1).float(), y.flatten()
                losses = F.cross_entropy(*flat, ignore_index=-1, reduction="none").view(y.shape)  # (B, T)
                found.append(losses.sum(dim=1) / (y >= 0).sum(dim=1))
        return torch.cat(found).cpu()

    def loss(self, model, step):
        """This rank's estimate of the held-out loss: measured in every step, on a quarter of a batch."""
        config = self.run.config
        n = max(1, config.batch_size // 4) * config.gradient_accumulation_steps
        generator = torch.Generator().manual_seed((config.seed + 2**20 * step) % 2**63)
        rows = torch.randint(len(self.starts), (n,), generator=generator)[ranks.rank() :: ranks.world_size()]
        return self.dense.mean() + (self.losses(model, self.starts[rows]) - self.dense[rows]).mean()
