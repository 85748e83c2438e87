"""Schedule of Phasic Policy Gradient: policy phases, each followed by a value phase on the sampled completions."""

from typing import Any

from torch import Tensor

from rl_plugins.functional.log_probs import kl_to_sampler
from rl_plugins.functional.masking import masked_moments, zero_masked
from rl_plugins.functional.policy_losses.aggregation import aggregate
from rl_plugins.rollouts.batch import Batch, loss_mask
from rl_plugins.signals.host import Host
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.options import PhasicOptions


class PhasicSchedule:
    """Schedule that, after every `every` generation batches, hands out their slices again for `epochs` passes (PPG,
    2009.04416, algorithm 1).

    Args:
        options: Length of the phases.
        cycle: Micro-steps that the policy spends on one generation batch.
    """

    def __init__(self, options: PhasicOptions, cycle: int) -> None:
        self.options, self.cycle = options, cycle
        self.every, self.epochs = options.phasic_every, options.phasic_epochs
        self.reset()

    def reset(self) -> None:
        """Begin a policy phase, with nothing stored."""
        self.stored: list[Batch] = []
        self.policy_steps = 0
        self.auxiliary_steps = 0

    @property
    def auxiliary(self) -> bool:
        """Whether the next micro-step belongs to an auxiliary phase."""
        return self.policy_steps == self.every * self.cycle

    @property
    def starting(self) -> bool:
        """Whether the next micro-step is the first of an auxiliary phase."""
        return self.auxiliary and self.auxiliary_steps == 0

    def policy_step(self, new_slices: list[Batch] | None) -> None:
        """Count one policy micro-step; `new_slices` are the slices of a batch, if one was just generated."""
        if new_slices is not None:
            self.stored.extend(new_slices)
        self.policy_steps += 1

    def next_slice(self, host: Host) -> Batch:
        """Return the next stored slice with the log-probabilities to hold, and end the phase after the last slice."""
        if self.starting:
            for stored in self.stored:
                stored["held_logps"] = host.log_probs(stored)
        batch = self.stored[self.auxiliary_steps % len(self.stored)]
        self.auxiliary_steps += 1
        if self.auxiliary_steps == self.epochs * len(self.stored):
            self.reset()
        return batch

    def hold_loss(self, logps: Tensor, batch: Batch, num_items: Tensor, host: Host) -> tuple[Tensor, Metrics]:
        """Hold the policy while the values learn: `beta_clone KL(pi_held || pi)` per token (PPG, 2009.04416, equation
        4).

        Args:
            logps: `ln pi(y_t|s_t)` (B, T), with gradient.
            batch: Completions with `held_logps`.
            num_items: Real tokens that the KL is averaged over.
            host: Sums over ranks.

        Returns:
            The weighted mean KL (0-d), and metrics.
        """
        mask = loss_mask(batch)
        divergence = kl_to_sampler(zero_masked(logps, mask), zero_masked(batch["held_logps"], mask))
        kl = masked_moments(divergence.detach(), mask, reduce=host.sum_over_ranks)[0]
        held = aggregate(divergence, mask, "token", num_items=num_items)
        return self.options.phasic_kl_coef * held, Metrics({"phasic/kl": kl})

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "stored": self.stored,
            "policy_steps": self.policy_steps,
            "auxiliary_steps": self.auxiliary_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore [`state_dict`]."""
        self.stored = state["stored"]
        self.policy_steps, self.auxiliary_steps = state["policy_steps"], state["auxiliary_steps"]
