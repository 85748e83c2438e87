"""Replay of values: a copy of the value path that learns many times from the hidden states of the last rollouts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.alignment import head_targets
from rl_plugins.functional.masking import zero_masked
from rl_plugins.nn.target_heads import ValueCopy
from rl_plugins.signals.critic_targets import ValueLoss
from rl_plugins.signals.host import Ranks
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.options import ValueReplayOptions

STATES_PER_STEP = 1024
"""States of all ranks in one step of the copy's optimizer."""


@dataclass
class KeptRollout:
    """What the values learn from a rollout of R completions with N real tokens in all.

    Attributes:
        states: What the heads judge (N, ...), row by row.
        rewards: (R, T), 0 at masked positions.
        mask: Real tokens (R, T), bool.
        after: Values of the states after the last tokens (R,), 0 where an episode has ended there; `None` where all
            have.
    """

    states: Tensor
    rewards: Tensor
    mask: Tensor
    after: Tensor | None = None


Targets = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""`(rewards (R, T), values (R, T, K), mask (R, T), after (R,) or None) -> targets of head 1 (R, T)`."""


class ValueReplay:
    """Trains a float32 copy of the heads' value path on cached hidden states, between two rollouts.

    Heads are small and read hidden states only. So the states of the last rollouts teach them many times without a
    forward pass of the trunk: a fast critic beside a slow actor. The copy's values are the baseline of the
    advantages, and what they bootstrap from. The heads inside the policy go on to learn in its training forward, where
    their gradient shapes the trunk and their token loss keeps them good drafters.

    A rollout is judged before the copy learns from it, so that its baselines have not seen its rewards. Every rank
    keeps its own rollouts; gradients are summed over ranks, so that all copies stay alike.

    Args:
        values: The copy.
        options: Passes, bounds and learning rate.
        loss: Elementwise value loss.
        ahead: How many tokens further each head looks than the one before it.
        seed: Of the order of the states.
    """

    def __init__(
        self, values: ValueCopy, options: ValueReplayOptions, *, loss: ValueLoss, ahead: int = 1, seed: int = 0
    ) -> None:
        self.values, self.options, self.loss, self.ahead, self.seed = values, options, loss, ahead, seed
        values.requires_grad_(True)
        self._parameters = list(values.parameters())
        self.optimizer = torch.optim.Adam(self._parameters, lr=options.value_replay_learning_rate)
        self.rollouts: list[KeptRollout] = []
        self.num_learned = 0

    def learn(self, newest: KeptRollout, targets: Targets, ranks: Ranks) -> Metrics:
        """Take a rollout in, and pass over all that are kept.

        Args:
            newest: The rollout.
            targets: Makes value targets; they bootstrap from the copy as it is before each pass.
            ranks: All other ranks call this at the same time.

        Returns:
            `critic/replay_loss`, the mean loss per state and head in the last pass, and `critic/replay_states`, the
            states of all ranks.
        """
        self.rollouts.append(newest)
        self._forget()
        states = torch.cat([kept.states for kept in self.rollouts])
        total = self._sum(float(len(states)), ranks)
        num_steps = max(1, round(total / STATES_PER_STEP))
        generator = torch.Generator().manual_seed(self.seed + self.num_learned)
        self.num_learned += 1
        mean = states.new_zeros((), dtype=torch.float32)
        for _ in range(self.options.value_replay):
            goals, valid = self._goals(targets)
            order = torch.randperm(len(states), generator=generator).to(states.device)
            losses = [self._step(states[i], goals[i], valid[i], ranks) for i in order.tensor_split(num_steps)]
            sums = torch.stack(losses).sum(0)
            mean = sums[0] / sums[1].clamp(min=1.0)
        return Metrics({"critic/replay_loss": mean, "critic/replay_states": torch.tensor(total)})

    def _forget(self) -> None:
        """Drop the oldest rollouts that exceed a bound."""
        options = self.options
        del self.rollouts[: -options.value_replay_rollouts]
        while len(self.rollouts) > 1 and sum(len(kept.states) for kept in self.rollouts) > options.value_replay_size:
            del self.rollouts[0]

    @torch.no_grad()
    def _goals(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Targets of all heads at every state (N, K), and where they exist (N, K)."""
        goals, valid = [], []
        for kept in self.rollouts:
            judged = self.values(kept.states)
            values = judged.new_zeros(*kept.mask.shape, judged.shape[-1])
            values[kept.mask] = judged
            returns = targets(kept.rewards, values, kept.mask, kept.after)
            of_heads, exists = head_targets(returns, kept.mask, values.shape[-1], ahead=self.ahead)
            goals.append(of_heads[kept.mask])
            valid.append(exists[kept.mask])
        return torch.cat(goals), torch.cat(valid)

    @torch.enable_grad()
    def _step(self, states: Tensor, goals: Tensor, valid: Tensor, ranks: Ranks) -> Tensor:
        """Make one step of the optimizer, and give the sum of the losses and their number (2,)."""
        values = self.values(states)
        error = zero_masked(self.loss(values, goals, values.detach()), valid).sum()
        self.optimizer.zero_grad()
        error.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        sums = torch.stack([error.detach().float(), valid.sum().float()])
        flat = ranks.sum_over_ranks(torch.cat([*(g.flatten() for g in gradients), sums]))
        flat, sums = flat[:-2] / flat[-1].clamp(min=1.0), flat[-2:]
        for parameter, gradient in zip(
            self._parameters, flat.split([p.numel() for p in self._parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    @staticmethod
    def _sum(number: float, ranks: Ranks) -> float:
        return float(ranks.sum_over_ranks(torch.tensor([number], device=ranks.device))[0])

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What is the same on every rank: the copy, its optimizer, and how often it has learned."""
        return {
            "values": {name: x.detach().cpu().clone() for name, x in self.values.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "num_learned": self.num_learned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore [`state_dict`]."""
        self.values.load_state_dict(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_learned = state["num_learned"]

    def rank_state(self) -> dict[str, Any]:
        """The rollouts of this rank."""
        return {"rollouts": [vars(kept).copy() for kept in self.rollouts]}

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Restore [`rank_state`]."""
        self.rollouts = [KeptRollout(**kept) for kept in state["rollouts"]]
