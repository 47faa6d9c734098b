"""The multiplier against a problem whose answer is known, and its parts one by one."""

import math

import pytest
import torch

from constrained import LossBound


@pytest.mark.parametrize("late", [0, 2000])
def test_finds_the_known_multiplier_of_a_convex_problem(late):
    """minimise x^2 subject to (x - 3)^2 <= 1. At the optimum x = 2 the gradients balance: 2x = multiplier *
    2 (3 - x), so the multiplier is 2. So it is if for `late` steps the loss has 2 nats on top that no x
    removes: the multiplier waits at its clamp."""
    x = torch.tensor(0.0, requires_grad=True)
    bound = LossBound(1.0, scale=0.5, rate=0.02, decay=0.5)
    optimizer = torch.optim.SGD([x], lr=0.05)
    for step in range(4000):
        loss = (x - 3) ** 2 + 2 * (step < late)
        optimizer.zero_grad()
        bound.lagrangian(x**2, loss).backward()
        optimizer.step()
        bound.update(loss.item())
        if step == late - 1:
            assert loss.item() > 1 and bound.log_multiplier == bound.log_max
    assert x.item() == pytest.approx(2.0, abs=1e-2) and loss.item() == pytest.approx(1.0, abs=2e-2)
    assert bound.multiplier == pytest.approx(2.0, rel=2e-2)


def test_an_allowance_is_granted_on_top_of_the_bound():
    bound = LossBound(1.0, decay=0.0)
    bound.allowance = 0.5
    bound.update(1.4)
    assert bound.log_multiplier < bound.log_max
    bound.allowance = 0.0
    bound.update(1.4)
    assert bound.log_multiplier == bound.log_max


def test_rises_under_violation_and_falls_under_slack():
    bound = LossBound(1.0, scale=0.1, rate=0.01, decay=0.0)
    start = bound.multiplier
    bound.update(0.0)
    assert bound.multiplier == pytest.approx(start * math.exp(-0.01)), "large slack is clipped"
    bound.update(0.95)
    assert bound.multiplier == pytest.approx(start * math.exp(-0.015))
    bound.update(1.05)
    assert bound.multiplier == pytest.approx(start * math.exp(-0.01))


def test_follows_the_running_average_not_the_last_batch():
    bound = LossBound(1.0, scale=1.0, rate=1.0, decay=0.9)
    bound.update(0.9)
    before = bound.log_multiplier
    bound.update(1.5)  # average 0.9 * 0.9 + 0.1 * 1.5 = 0.96: still slack
    assert bound.average == pytest.approx(0.96)
    assert bound.log_multiplier == pytest.approx(before - 0.04)


def test_stays_within_its_clamp():
    bound = LossBound(1.0, rate=0.5, smallest=0.5, largest=4.0)
    for _ in range(20):
        bound.update(50.0)
    assert bound.multiplier == pytest.approx(4.0)
    for _ in range(500):
        bound.update(0.0)
    assert bound.multiplier == pytest.approx(0.5)


def test_lagrangian_has_unit_scale_and_gradients_of_both():
    cost, loss = torch.tensor(5.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    bound = LossBound(1.0, largest=3.0)
    value = bound.lagrangian(cost, loss)
    value.backward()
    assert value.item() == pytest.approx((5 + 3 * (2 - 1)) / 4)
    assert (cost.grad.item(), loss.grad.item()) == pytest.approx((0.25, 0.75))


def test_refuses_a_foreign_state():
    with pytest.raises(ValueError, match="log_multiplier"):
        LossBound(1.0).load_state_dict({"bound": 1.0})
