"""The schedule of phases: when the policy learns, when the values do, on which slices, and what holds the policy."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rl_plugins.signals import PhasicOptions
from rl_plugins.signals.phasic import PhasicSchedule

HOST: Any = SimpleNamespace(log_probs=lambda batch: -batch["n"], sum_over_ranks=lambda x: x)


def test_slices_of_both_phases() -> None:
    schedule = PhasicSchedule(PhasicOptions(phasic_every=2, phasic_epochs=3), cycle=4)  # two slices, two iterations
    for first in (0, 2):
        for step in range(4):
            assert not schedule.auxiliary and not schedule.starting
            schedule.policy_step([{"n": first}, {"n": first + 1}] if step == 0 else None)  # type: ignore[typeddict-unknown-key]
    assert schedule.auxiliary and schedule.starting
    seen: list[Any] = []
    for step in range(12):
        assert schedule.auxiliary and schedule.starting == (step == 0)
        if step == 5:
            other = PhasicSchedule(PhasicOptions(phasic_every=2, phasic_epochs=3), 4)
            other.load_state_dict(schedule.state_dict())
            schedule = other
        seen.append(schedule.next_slice(HOST))
    assert [batch["n"] for batch in seen] == [0, 1, 2, 3] * 3
    # Every slice is held to the policy as it was when the phase began.
    assert all(batch["held_logps"] == -batch["n"] for batch in seen)
    assert not schedule.auxiliary and schedule.stored == []


def test_the_kl_that_holds_the_policy() -> None:
    """k3 of the held policy: `exp(x) - 1 - x` with `x = ln pi - ln pi_held`; garbage in padding counts for nothing."""
    schedule = PhasicSchedule(PhasicOptions(phasic_every=1, phasic_kl_coef=0.5), cycle=1)
    logps = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, 7.0, 7.0]], requires_grad=True)
    held: Any = {
        "completion_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "held_logps": torch.tensor([[-1.5, -2.0, 9.0], [-0.2, math.inf, 0.0]]),
    }
    loss, metrics = schedule.hold_loss(logps, held, torch.tensor(6.0), HOST)
    ratios = [0.5, 0.0, -0.3]
    expected = sum(math.exp(x) - 1 - x for x in ratios)
    assert metrics["phasic/kl"].item() == pytest.approx(expected / 3, rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * expected / 6, rel=1e-5)
    loss.backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad[0, 0], torch.tensor(0.5 / 6 * (math.exp(0.5) - 1)))
    assert not logps.grad[0, 2] and not logps.grad[1, 1:].any()
