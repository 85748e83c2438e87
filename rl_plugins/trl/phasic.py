"""Schedule of Phasic Policy Gradient: policy phases, then value phases on what they sampled."""

from typing import Any

Batch = dict[str, Any]


class PhasicSchedule:
    """After every `every` generation batches, hand out their slices again for `epochs` passes (PPG, 2009.04416,
    algorithm 1).

    Args:
        every: Generation batches in one policy phase.
        epochs: Passes in one auxiliary phase.
        cycle: Micro-steps that the policy spends on one generation batch.
    """

    def __init__(self, every: int, epochs: int, cycle: int) -> None:
        self.every, self.epochs, self.cycle = every, epochs, cycle
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
        """Count one policy micro-step; `new_slices` are those of a batch just generated, if one was."""
        if new_slices is not None:
            self.stored.extend(new_slices)
        self.policy_steps += 1

    def next_slice(self) -> Batch:
        """The next stored slice; ends the phase after the last one."""
        batch = self.stored[self.auxiliary_steps % len(self.stored)]
        self.auxiliary_steps += 1
        if self.auxiliary_steps == self.epochs * len(self.stored):
            self.stored, self.policy_steps, self.auxiliary_steps = [], 0, 0
        return batch

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "stored": self.stored,
            "policy_steps": self.policy_steps,
            "auxiliary_steps": self.auxiliary_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore [`state_dict`]."""
        self.stored = state["stored"]
        self.policy_steps, self.auxiliary_steps = state["policy_steps"], state["auxiliary_steps"]
