"""The base of the policy gradient agents: a policy, and rollouts of it."""

from collections.abc import Sequence
from typing import Any

from gymnasium.spaces import Discrete
from torch import Tensor, nn
from torch.distributions import Distribution

from rl_plugins.classic.agent import ClassicModule
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import CategoricalPolicy, GaussianPolicy, ObservationNorm, Policy, mlp
from rl_plugins.classic.rollouts import Rollout, collect


class PolicyGradientModule(ClassicModule):
    """A policy `pi(a | s)` that learns from rollouts.

    For another network, override `build_network`, which serves policy and critic, or `build_policy`; settings of a
    subclass are in `self.hparams` by then. Another exploration is another `act`. An algorithm defines `iterate`.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        rollout_steps: Steps of each environment in an iteration.
        entropy_coef: Weight of the entropy bonus.
        normalize_advantages: Whether the advantages of a rollout are scaled to zero mean and unit variance.
        normalize_observations: Whether the networks see observations scaled by their running moments.
        hidden_sizes: Widths of the hidden layers.
        settings: Those of `ClassicModule`.

    Raises:
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    policy: Policy

    def __init__(
        self,
        env: EnvSpec,
        *,
        rollout_steps: int = 128,
        entropy_coef: float = 0.0,
        normalize_advantages: bool = False,
        normalize_observations: bool = False,
        hidden_sizes: Sequence[int] = (64, 64),
        **settings: Any,
    ) -> None:
        super().__init__(env, **settings)
        if rollout_steps < 1:
            raise ValueError(f"rollout_steps={rollout_steps}: give at least 1 step.")
        self.rollout_steps, self.entropy_coef, self.hidden_sizes = rollout_steps, entropy_coef, tuple(hidden_sizes)
        self.normalize_advantages = normalize_advantages
        self.normalizer = ObservationNorm(self.observation_size) if normalize_observations else nn.Identity()
        with self.seeded():
            self.policy = self.build_policy()

    def build_policy(self) -> Policy:
        """The policy; its first actions are close to uniform, or to a mean of 0."""
        network = self.build_network(self.observation_size, self.action_size, gain=0.01)
        if isinstance(self.action_space, Discrete):
            return CategoricalPolicy(network)
        return GaussianPolicy(network, self.action_size)

    def build_network(self, inputs: int, outputs: int, *, gain: float) -> nn.Module:
        """From `(..., inputs)` to `(..., outputs)`, the last layer initialised with `gain`."""
        return mlp([inputs, *self.hidden_sizes, outputs], output_gain=gain)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps of one training step."""
        return self.num_envs * self.rollout_steps

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Sample from the policy, or take its most likely actions."""
        return self.policy.act(self.normalizer(observations), None if deterministic else self.generator)

    def with_entropy_bonus(
        self, loss: Tensor, distribution: Distribution, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss less `entropy_coef H`, and its metrics; the entropy is computed only where it counts."""
        if not self.entropy_coef:
            return loss, metrics
        entropy = distribution.entropy().mean()
        return loss - self.entropy_coef * entropy, {**metrics, "entropy": entropy}

    def collect(self) -> Rollout:
        """Rows of `rollout_steps` steps."""
        return collect(self, self.rollout_steps)

    def update_normalizer(self, rollout: Rollout) -> None:
        """Take in the observations of a rollout; do it after the update, which is to see what the policy saw."""
        if isinstance(self.normalizer, ObservationNorm):
            self.normalizer.update(rollout.observations[:, :-1][rollout.mask])
