"""
Minimise a cost while a loss stays under a bound.

Sparsity is not traded for loss at some fixed exchange rate; it is bought with whatever slack the loss has:

    minimise  cost   subject to   loss <= bound            (GECO; Rezende and Viola 2018, arXiv 1810.00597)

The Lagrangian  L = cost + multiplier * (loss - bound)  turns this into a game. The model descends on L; the
multiplier, the price of loss in units of cost, ascends on it: dL/d(multiplier) = loss - bound, so it grows
while the loss is too high and shrinks while there is slack. At rest the loss sits on the bound, and the
price is the exact one that holds it there. (The model may descend on a noisy or differentiable stand-in, as
here with sampled gates; `update` is given the loss that the bound is meant for.)

What to expect: if the model can meet the bound at a price that the multiplier may reach, and has the steps to
do it, the loss ends near the bound or below it. No price helps where the gradient of the loss is zero: a gate
that is shut for good feels none. So the price starts high and comes down step by step.

Nothing here knows of attention: cost and loss are any two scalars.
"""

import math


class LossBound:
    """The multiplier of one bounded loss, moved by dual ascent.

        bound    the loss not to exceed, in nats (or any unit that the loss has)
        scale    a violation that counts as large, in the same unit; violations are clipped to it
        rate     how far log(multiplier) moves in one step under a violation of `scale`
        decay    of the running average of the loss: it forgets over about 1 / (1 - decay) steps
        smallest, largest    clamp on the multiplier; it starts at `largest`, where the loss counts most, and
                             comes down as soon as there is slack

    The attribute `allowance` is what the loss may have on top for now: set it while training, end it at 0.

    How `update` follows: a price must be positive, so ascend on its logarithm, log m. A single batch is
    noisy, so use the running average of the loss. The step is rate * (average - bound - allowance) / scale,
    clipped to [-rate, rate], because early violations are a hundred times the later ones and would wind the
    price up; the clamp keeps a long phase on one side of the bound from doing the same.
    """

    def __init__(self, bound, scale=0.01, rate=0.01, decay=0.98, smallest=1e-3, largest=20.0):
        self.bound, self.allowance, self.scale, self.rate, self.decay = bound, 0.0, scale, rate, decay
        self.log_min, self.log_max = math.log(smallest), math.log(largest)
        self.log_multiplier = self.log_max
        self.average = None  # of the loss; None before the first update

    @property
    def multiplier(self):
        return math.exp(self.log_multiplier)

    def lagrangian(self, cost, loss):
        """cost + multiplier * (loss - bound), divided by 1 + multiplier so that the gradient has the same
        size whatever the price. Scalars in, a scalar to minimise out; tensors keep their gradient."""
        return (cost + self.multiplier * (loss - self.bound)) / (1 + self.multiplier)

    def update(self, loss):
        """Move the multiplier after a step that had this loss (a number)."""
        self.average = loss if self.average is None else self.decay * self.average + (1 - self.decay) * loss
        violation = (self.average - self.bound - self.allowance) / self.scale
        step = self.rate * min(max(violation, -1.0), 1.0)
        self.log_multiplier = min(max(self.log_multiplier + step, self.log_min), self.log_max)

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        if set(state) != set(vars(self)):
            raise ValueError(f"a LossBound holds {sorted(vars(self))}, the saved state holds {sorted(state)}")
        vars(self).update(state)
