"""Replay of values: a copy of the heads learns values many times from the hidden states of the last rollouts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rl_plugins.functional.alignment import completion_states, head_targets
from rl_plugins.functional.masking import zero_masked
from rl_plugins.nn.target_heads import RowCopy, ValueCopy
from rl_plugins.rollouts.kept_rows import Rows
from rl_plugins.signals.critic_targets import ValueLoss
from rl_plugins.signals.host import Ranks
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.options import ValueReplayOptions

MINIBATCHES = 4
"""Optimizer steps of the copy in a pass over a rollout, which is cut into minibatches as in PPO."""
SMALLEST_MINIBATCH = 64
"""Smallest number of states, over all ranks, in an optimizer step; small rollouts make fewer steps."""


class ValueTargets(NamedTuple):
    """Value targets of a replay.

    Attributes:
        make: `(rewards (R, T), values (R, T, K), mask (R, T), after (R,) or None) -> targets of head 1 (R, T)`.
        bootstraps: Whether the targets depend on the values, so that they change while the values learn.
    """

    make: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    bootstraps: bool


class KeptRollout(ABC):
    """A rollout of R completions that values learn from.

    Args:
        rewards: (R, T), 0 at masked positions.
        mask: Real tokens (R, T), bool.
        after: Values of the states after the last tokens (R,), 0 where an episode has ended there; `None` if all
            episodes have.
    """

    kinds: ClassVar[dict[str, type["KeptRollout"]]] = {}
    kind: ClassVar[str]
    num_steps = 1
    """Optimizer steps in a pass over the rollout, equal on all ranks."""
    goals: tuple[Tensor, Tensor] | None = None
    """Targets and where they exist, kept once they are made, if they do not depend on the values."""

    def __init_subclass__(cls) -> None:
        KeptRollout.kinds[cls.kind] = cls

    def __init__(self, rewards: Tensor, mask: Tensor, after: Tensor | None = None) -> None:
        self.rewards, self.mask, self.after = rewards, mask, after

    @property
    @abstractmethod
    def num_units(self) -> int:
        """Number of units, which are drawn at random: states or rows."""

    @abstractmethod
    def judge(self, copy: nn.Module, units: Tensor | slice) -> Tensor:
        """Compute the values of some units (n, ..., K)."""

    @abstractmethod
    def by_unit(self, x: Tensor) -> Tensor:
        """Arrange entries of the tokens (R, T, K) by unit (units, ..., K)."""

    @abstractmethod
    def by_token(self, values: Tensor) -> Tensor:
        """Arrange the values of all units by token (R, T, K)."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers for a checkpoint."""
        kept = {name: x for name, x in vars(self).items() if name != "goals"}
        return {"kind": self.kind, **{name: tuple(x) if isinstance(x, tuple) else x for name, x in kept.items()}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "KeptRollout":
        """Make a rollout from the result of [`state_dict`]."""
        kept = object.__new__(cls.kinds[state["kind"]])
        vars(kept).update({name: x for name, x in state.items() if name != "kind"})
        return kept


class RolloutOfStates(KeptRollout):
    """A rollout whose values are computed from single states.

    Args:
        states: Inputs of the heads at the real tokens (N, ...), row by row.
        rewards, mask, after: See [`KeptRollout`].
    """

    kind = "states"

    def __init__(self, states: Tensor, rewards: Tensor, mask: Tensor, after: Tensor | None = None) -> None:
        super().__init__(rewards, mask, after)
        self.states = states

    @property
    def num_units(self) -> int:
        """Number of states."""
        return len(self.states)

    def judge(self, copy: nn.Module, units: Tensor | slice) -> Tensor:
        """Compute the values (n, K) of some states."""
        return copy(self.states[units])

    def by_unit(self, x: Tensor) -> Tensor:
        """Pick the entries of the real tokens (N, K)."""
        return x[self.mask]

    def by_token(self, values: Tensor) -> Tensor:
        """Put the values at their tokens (R, T, K), with 0 at masked positions."""
        found = values.new_zeros(*self.mask.shape, values.shape[-1])
        found[self.mask] = values
        return found


class RolloutOfRows(KeptRollout):
    """A rollout whose values are computed from whole rows, since a state's value depends on the tokens before it.

    Args:
        rows: Prompts and completions.
        rewards, mask, after: See [`KeptRollout`].
    """

    kind = "rows"

    def __init__(self, rows: Rows, rewards: Tensor, mask: Tensor, after: Tensor | None = None) -> None:
        super().__init__(rewards, mask, after)
        self.rows: tuple[Tensor, ...] = rows

    @property
    def num_units(self) -> int:
        """Number of rows."""
        return len(self.mask)

    def judge(self, copy: nn.Module, units: Tensor | slice) -> Tensor:
        """Compute the values (n, T, K) of the completions of some rows."""
        return completion_states(copy(*Rows(*self.rows).choose(units)), self.mask.shape[1])

    def by_unit(self, x: Tensor) -> Tensor:
        """Return the entries unchanged: the units are whole rows."""
        return x

    def by_token(self, values: Tensor) -> Tensor:
        """Return the values unchanged: the units are whole rows."""
        return values


class ValueReplay:
    """Trains a float32 copy of the heads' values on cached hidden states, between two rollouts.

    Heads are small compared with the trunk. So they can learn many times from the states of the last rollouts, without
    a forward pass of the trunk: the critic learns faster than the policy. The advantages use the copy's values as
    baseline and for the bootstrap. The heads inside the policy also keep learning in its training forward, where their
    gradient shapes the trunk and their token loss keeps them good drafters.

    A copy of parallel heads learns from single states. A copy of sequential heads learns from whole rows, so that its
    decoder layers learn as well ([`~rl_plugins.nn.target_heads.RowCopy`]).

    The values of a rollout are computed before the copy learns from it, so that baselines do not depend on the
    rollout's own rewards. Every rank keeps its own rollouts; gradients are summed over ranks, so that all copies stay
    equal.

    Args:
        values: The copy.
        options: Passes, bounds and learning rate.
        num_heads: K, number of values that the copy gives for a state.
        loss: Elementwise value loss.
        ahead: Tokens that each head looks further ahead than the head before it.
        seed: Seed of the order of the states.
    """

    def __init__(
        self,
        values: ValueCopy | RowCopy,
        options: ValueReplayOptions,
        *,
        num_heads: int,
        loss: ValueLoss,
        ahead: int = 1,
        seed: int = 0,
    ) -> None:
        self.values, self.options, self.loss, self.seed = values, options, loss, seed
        self.num_heads, self.ahead = num_heads, ahead
        values.heads.requires_grad_(True)  # except for weights that never learn
        self._parameters = [p for p in values.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self._parameters, lr=options.value_replay_learning_rate)
        self.rollouts: list[KeptRollout] = []
        self.num_learned = 0

    @property
    def room(self) -> int:
        """Largest number of states that are kept of one rollout."""
        return max(1, self.options.value_replay_size // self.options.value_replay_rollouts)

    def learn(self, newest: KeptRollout, targets: ValueTargets, ranks: Ranks) -> Metrics:
        """Add a rollout, and make the passes over all rollouts that are kept.

        Args:
            newest: The rollout.
            targets: Makes value targets; if they bootstrap, they use the copy's values before each pass.
            ranks: Sums over ranks; all ranks call this method at the same time.

        Returns:
            `critic/replay_loss`, the mean loss per state and head in the last pass, and `critic/replay_states`, the
            states of all ranks.
        """
        self.rollouts = [*self.rollouts, newest][-self.options.value_replay_rollouts :]
        states = int(self._sum(float(newest.mask.sum()), ranks))
        newest.num_steps = min(MINIBATCHES, max(1, states // SMALLEST_MINIBATCH))
        # Two generators: `shared` gives the order of rollouts, which is equal on all ranks. `own` shuffles a rank's
        # units, whose number differs between ranks, so that ranks draw more or fewer random numbers from it.
        shared, own = (torch.Generator().manual_seed(2 * (self.seed + self.num_learned) + i) for i in range(2))
        self.num_learned += 1
        sums = torch.zeros(2, device=newest.rewards.device)
        with self.values.outside():
            for _ in range(self.options.value_replay):
                sums = self._pass(targets, shared, own, ranks)
        kept_states = self._sum(float(sum(int(kept.mask.sum()) for kept in self.rollouts)), ranks)
        return Metrics(
            {"critic/replay_loss": sums[0] / sums[1].clamp(min=1.0), "critic/replay_states": torch.tensor(kept_states)}
        )

    def _pass(self, targets: ValueTargets, shared: torch.Generator, own: torch.Generator, ranks: Ranks) -> Tensor:
        """Learn from every kept unit once, and return the sum of the losses and their number (2,)."""
        goals = [self._goals(kept, targets) for kept in self.rollouts]
        turns = [i for i, kept in enumerate(self.rollouts) for _ in range(kept.num_steps)]
        order = [turns[i] for i in torch.randperm(len(turns), generator=shared)]
        chunks = []
        for kept in self.rollouts:
            units = torch.randperm(kept.num_units, generator=own).to(kept.mask.device)
            chunks.append(list(units.tensor_split(kept.num_steps)))
        total = torch.zeros(2, device=ranks.device)
        for i in order:
            units = chunks[i].pop()
            total += self._step(self.rollouts[i], units, goals[i][0][units], goals[i][1][units], ranks)
        return total

    @torch.no_grad()
    def _goals(self, kept: KeptRollout, targets: ValueTargets) -> tuple[Tensor, Tensor]:
        """Make the targets of all heads and where they exist, unit by unit (units, ..., K)."""
        if kept.goals is not None and not targets.bootstraps:
            return kept.goals
        values = kept.rewards.new_zeros(*kept.mask.shape, self.num_heads)
        if targets.bootstraps and kept.num_units:
            # In pieces as large as those of the steps: a whole rollout may not fit into memory.
            pieces = torch.arange(kept.num_units, device=kept.mask.device).tensor_split(kept.num_steps)
            values = kept.by_token(torch.cat([kept.judge(self.values, piece) for piece in pieces if len(piece)]))
        returns = targets.make(kept.rewards, values, kept.mask, kept.after)
        of_heads, exists = head_targets(returns, kept.mask, self.num_heads, ahead=self.ahead)
        goals = kept.by_unit(of_heads), kept.by_unit(exists)
        if not targets.bootstraps:
            kept.goals = goals
        return goals

    @torch.enable_grad()
    def _step(self, kept: KeptRollout, units: Tensor, goals: Tensor, valid: Tensor, ranks: Ranks) -> Tensor:
        """Make one step of the optimizer, and return the sum of the losses and their number (2,)."""
        self.optimizer.zero_grad()
        error = torch.zeros((), device=ranks.device)
        if len(units):
            values = kept.judge(self.values, units)
            error = zero_masked(self.loss(values, goals, values.detach()), valid).sum()
            error.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        sums = torch.stack([error.detach().float(), valid.sum().float()])
        flat = ranks.sum_over_ranks(torch.cat([*(g.flatten() for g in gradients), sums]))
        flat, sums = flat[:-2] / flat[-1].clamp(min=1.0), flat[-2:]
        sizes = [p.numel() for p in self._parameters]
        for parameter, gradient in zip(self._parameters, flat.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    @staticmethod
    def _sum(number: float, ranks: Ranks) -> float:
        return float(ranks.sum_over_ranks(torch.tensor([number], device=ranks.device))[0])

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is equal on all ranks: the copy, its optimizer, and how often it has learned."""
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
        """Return the rollouts of this rank."""
        return {"rollouts": [kept.state_dict() for kept in self.rollouts]}

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Restore [`rank_state`]."""
        self.rollouts = [KeptRollout.of(kept) for kept in state["rollouts"]]
