"""Settings that every agent has, and schedules for those that change while an agent trains.

Each agent derives a frozen dataclass from the ones below, next to its loss. A new default is one line there, and so is
a new setting. Agents take the fields as keyword arguments, so that a script writes `PPOAgent("CartPole-v1",
num_envs=4)` and LightningCLI `--model.num_envs 4`, without a level of nesting between agent and setting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import get_args

import torch

from rl_plugins.functional.returns import check_discount
from rl_plugins.settings import check_number

Schedule = float | Callable[[float], float]
"""A number, or a function of the share of training that remains, from 1 down to 0."""


@dataclass(frozen=True)
class Linear:
    """A schedule that goes from `start` to `end` in a straight line: `end + remaining (start - end)`.

    Args:
        start: The value when training starts.
        end: The value when training ends.
    """

    start: float
    end: float = 0.0

    def __call__(self, remaining: float) -> float:
        return self.end + remaining * (self.start - self.end)


def value_at(schedule: Schedule, remaining: float) -> float:
    """Return the value of a schedule where the share `remaining` of training is left."""
    return schedule(remaining) if callable(schedule) else schedule


# Checkpoints hold the settings of an agent, and torch.load's safe mode admits classes by name only.
torch.serialization.add_safe_globals([Linear])


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Settings of every agent.

    Raises:
        TypeError: If a setting is text where a number is needed.
        ValueError: If a setting is out of range.
    """

    total_steps: int = 100_000
    """Environment steps of an epoch, of all environments together."""
    num_envs: int = 8
    """Environments that are stepped side by side."""
    rollout_steps: int = 128
    """Steps of each environment in an iteration."""
    gamma: float = 0.99
    """Discount in [0, 1]."""
    learning_rate: Schedule = 1e-3
    """A number, or a function of the share of training that remains, such as `Linear(1e-3)`."""
    max_grad_norm: float | None = 0.5
    """Bound of the norm of a gradient; None for no bound. (Trainer's own clipping is for automatic optimization
    only.)"""
    hidden_sizes: Sequence[int] = (64, 64)
    """Widths of the hidden layers."""
    seed: int | None = None
    """Seed of environments, exploration and initial weights, which are then reproducible. By default it is drawn from
    torch's global generator."""
    eval_episodes: int = 10
    """Episodes of an evaluation."""
    max_episode_steps: int | None = None
    """Steps after which an episode is cut off, in training and evaluation, besides the environment's own time limit.
    By default, evaluations of an environment without a time limit cut episodes off after 10,000 steps, since a
    deterministic policy may never end one."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(getattr(self, field.name), str) and {int, float} & {field.type, *get_args(field.type)}:
                check_number(field.name, getattr(self, field.name))
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))  # YAML gives a list
        check_discount(self.gamma)
        self.check_counts("total_steps", "num_envs", "rollout_steps", "eval_episodes")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps={self.max_episode_steps}: give at least 1 step, or None.")

    def check_counts(self, *names: str) -> None:
        """Refuse a number below 1 in any of the settings named."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1.")

    def check_shares(self, *names: str) -> None:
        """Refuse a number outside [0, 1] in any of the settings named."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share in [0, 1].")


@dataclass(frozen=True, kw_only=True)
class PolicySettings(AgentSettings):
    """Settings of every agent with a policy `pi(a | s)`, that is of all but DQN."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss."""
    normalize_advantages: bool = False
    """Whether the weights of `grad ln pi` are scaled to zero mean and unit variance, over all steps of a rollout."""
    normalize_observations: bool = False
    """Whether the networks see observations scaled by their running moments."""
