"""Deep Q-learning."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl_plugins.classic.agent import Agent
from rl_plugins.classic.agent_settings import AgentSettings, Linear, Schedule
from rl_plugins.classic.environments import EnvSpec, to_tensor
from rl_plugins.classic.networks import evaluation_mode, mlp
from rl_plugins.classic.replay import ReplayBuffer, Transitions
from rl_plugins.functional.action_values import double_q_targets, q_learning_targets
from rl_plugins.functional.target_networks import periodic_update, polyak_update
from rl_plugins.functional.value_losses import huber


@dataclass(frozen=True, kw_only=True)
class DQNSettings(AgentSettings):
    """Settings of `DQNAgent`; the defaults are those of Stable-Baselines3's zoo for CartPole-v1."""

    num_envs: int = 1
    rollout_steps: int = 256
    gradient_steps: int = 128
    """Updates in each iteration."""
    batch_size: int = 64
    """Transitions in each update."""
    buffer_size: int = 100_000
    """Transitions to remember."""
    learning_starts: int = 1000
    """Steps of all environments together before the first update; until then actions are random."""
    double_q: bool = False
    """Whether the online network chooses the action that the target network judges."""
    target_period: int = 128
    """Number of updates between two copies of the network into the target."""
    tau: float | None = None
    """If given, the target moves this share of the way after every update instead."""
    epsilon_start: float = 1.0
    """Share of random actions in the beginning."""
    epsilon_end: float = 0.04
    """Share of random actions after `exploration_fraction`."""
    exploration_fraction: float = 0.16
    """Share of the training in which the share of random actions falls, in a straight line."""
    hidden_sizes: Sequence[int] = (256, 256)
    total_steps: int = 50_000
    learning_rate: Schedule = 2.3e-3
    max_grad_norm: float | None = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("gradient_steps", "batch_size", "target_period")
        self.check_shares("epsilon_start", "epsilon_end", "exploration_fraction")
        if self.tau is not None and not 0 < self.tau <= 1:
            raise ValueError(f"tau={self.tau}: give a share in (0, 1], such as 0.005.")
        if self.learning_starts >= self.total_steps:
            raise ValueError(
                f"learning_starts={self.learning_starts} with total_steps={self.total_steps}: nothing would be "
                "learned, start earlier or train for longer."
            )
        if self.buffer_size < self.rollout_steps * self.num_envs:
            raise ValueError(
                f"buffer_size={self.buffer_size} holds less than one iteration, rollout_steps * num_envs = "
                f"{self.rollout_steps * self.num_envs}: make it larger."
            )


class DQNAgent(Agent):
    """DQN learns `q(s, a)` from a replay buffer, with targets from a slow copy `q'`, and acts epsilon-greedily.

    `Y = r + gamma max_a q'(s', a)`, `L = huber(q(s, a), Y)` (Mnih et al., Nature 518, 2015, algorithm 1), or with
    `double_q` `Y = r + gamma q'(s', argmax_a q(s', a))` (van Hasselt et al., arXiv 1509.06461, eq. 4).

    An iteration is `rollout_steps` steps in each environment, then `gradient_steps` updates. For another network
    override `build_network`, for another exploration `epsilon` or `act`, for another objective `targets` or `loss`.

    Args:
        env: The id of a registered environment, or a callable that makes one; its actions must be Discrete.
        settings: The fields of `DQNSettings`.

    Raises:
        TypeError: If a setting is unknown, or text where a number is needed.
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    continuous = False
    settings: DQNSettings
    replay: ReplayBuffer
    """The buffer of past transitions; it exists from the start of fit on."""

    def __init__(self, env: EnvSpec, **settings: Any) -> None:
        super().__init__(env, DQNSettings(**settings))
        with self.seeded():
            self.network = self.build_network(self.observation_size, self.action_size, gain=1.0)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.updates = 0

    def build_network(self, inputs: int, outputs: int, *, gain: float) -> nn.Module:
        """Make `q(s, .)`, from observations `(..., D)` to values `(..., A)`; `gain` is not used."""
        return mlp([inputs, *self.settings.hidden_sizes, outputs], nn.ReLU)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make Adam; an iteration sets its learning rate."""
        return torch.optim.Adam(self.network.parameters(), fused=True)

    # Acting.

    @property
    def epsilon(self) -> float:
        """Share of random actions now: 1 until `learning_starts`, then on a line that starts with training."""
        settings = self.settings
        if self.runner.steps < settings.learning_starts:
            return 1.0
        fraction = settings.exploration_fraction
        left = max(0.0, 1.0 - (1.0 - self.remaining) / fraction) if fraction else 0.0
        return Linear(settings.epsilon_start, settings.epsilon_end)(left)

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Take the best actions `(N,)` for observations `(N, D)`; unless `deterministic`, some of them at random."""
        if deterministic:
            return self.network(observations).argmax(-1)
        # Both are drawn at every step, so that the draws do not depend on the network.
        explores = torch.rand(len(observations), generator=self.generator) < self.epsilon
        actions = torch.randint(self.action_size, (len(observations),), generator=self.generator)
        if explores.all():
            return actions
        return torch.where(explores, actions, self.network(observations).argmax(-1).cpu())

    # Learning.

    def iterate(self) -> Mapping[str, Tensor | float]:
        """Collect transitions into the buffer, then update the network."""
        self.collect()
        metrics: dict[str, Tensor | float] = {"epsilon": self.epsilon}
        if self.runner.steps > self.settings.learning_starts:
            metrics |= self.update()
        return metrics

    @torch.inference_mode()
    def collect(self) -> None:
        """Step the environments, and store the transitions."""
        rows = []
        with evaluation_mode(self):
            for _ in range(self.settings.rollout_steps):
                observations = self.runner.observations
                actions = self.act(to_tensor(observations, self.device))
                reached, rewards, terminated, _ = self.step_environments(actions)
                rows.append((observations, actions.numpy(force=True), rewards, reached, terminated))
        columns = (torch.from_numpy(np.concatenate(column)) for column in zip(*rows, strict=True))
        self.replay.add(Transitions(*columns))

    def update(self) -> dict[str, Tensor | float]:
        """Make `gradient_steps` updates; return the loss and the values of the last one."""
        optimizer, parameters = self.optimizer, list(self.network.parameters())
        for _ in range(self.settings.gradient_steps):
            batch = self.replay.sample(self.settings.batch_size).to(self.device)
            values = self.network(batch.observations).gather(1, batch.actions[:, None]).squeeze(1)  # (N,)
            loss = self.loss(values, self.targets(batch))
            self.optimize(loss, optimizer, parameters)
            self.updates += 1
            self.update_target()
        return {"loss": loss.detach(), "q_mean": values.detach().mean()}

    @torch.no_grad()
    def targets(self, batch: Transitions) -> Tensor:
        """Return the targets `Y (N,)`."""
        gamma = self.settings.gamma
        with evaluation_mode(self.target):
            next_q = self.target(batch.next_observations)  # (N, A)
        if not self.settings.double_q:
            return q_learning_targets(batch.rewards, next_q, batch.terminated, gamma=gamma)
        with evaluation_mode(self.network):
            chosen = self.network(batch.next_observations)
        return double_q_targets(batch.rewards, chosen, next_q, batch.terminated, gamma=gamma)

    def loss(self, values: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, 0-d, of values `q(s, a) (N,)` with targets `(N,)`."""
        return huber(values, targets).mean()

    def update_target(self) -> None:
        """Move the target network after an update; running statistics, such as batch normalisation's, are copied."""
        if self.settings.tau is not None:
            polyak_update(self.target.parameters(), self.network.parameters(), tau=self.settings.tau)
            polyak_update(self.target.buffers(), self.network.buffers(), tau=1.0)
        else:
            ours, theirs = (chain(net.parameters(), net.buffers()) for net in (self.target, self.network))
            periodic_update(ours, theirs, step=self.updates, period=self.settings.target_period)

    # Memory and checkpoints.

    def forget(self) -> None:
        """Begin with an empty buffer, and count updates from 0."""
        self.replay = ReplayBuffer(self.settings.buffer_size, self.observation_size, seed=self.seed)
        self.updates = 0

    def training_state(self) -> dict[str, Any]:
        """Return the state of the base class, the buffer and the number of updates."""
        return {**super().training_state(), "replay": self.replay.state_dict(), "updates": self.updates}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from a `training_state`."""
        super().load_training_state(state)
        self.replay.load_state_dict(state["replay"])
        self.updates = state["updates"]
