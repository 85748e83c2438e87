"""Actor-critic from the experience of other policies."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl_plugins.classic.actor_critic import final_values
from rl_plugins.classic.agent import Agent
from rl_plugins.classic.agent_settings import PolicySettings, Schedule
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import Policy, evaluation_mode, make_normalizer, make_policy
from rl_plugins.classic.rollouts import Rollout, collect, next_values, update_normalizer
from rl_plugins.functional.masking import masked_whiten
from rl_plugins.functional.policy_losses.clip import cispo
from rl_plugins.functional.ratios import log_ratios
from rl_plugins.functional.returns import check_trace_decay, vtrace
from rl_plugins.functional.value_losses import squared_error


class Experience(NamedTuple):
    """A rollout and how likely its actions were when they were taken."""

    rollout: Rollout
    behaviour_logps: Tensor
    """`ln beta(a | s) (N, T)`."""


@dataclass(frozen=True, kw_only=True)
class OffPolicyACSettings(PolicySettings):
    """Settings of `OffPolicyACAgent`."""

    rollout_steps: int = 16
    replay_rollouts: int = 8
    """Number of the latest rollouts that are kept."""
    updates: int = 2
    """Gradient steps in each iteration, each on one of the rollouts kept."""
    gae_lambda: float = 0.95
    """Trace decay of targets and advantages in [0, 1]."""
    clip_rho: float = 1.0
    """Largest importance weight; infinite for no bound."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus in the loss; without a bonus, policies that had become deterministic stayed so."""
    value_coef: float = 0.5
    """Weight of the critic's loss."""
    learning_rate: Schedule = 7e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("replay_rollouts", "updates")
        check_trace_decay(self.gae_lambda, "gae_lambda")
        if self.clip_rho <= 0:
            raise ValueError(f"clip_rho={self.clip_rho}: give a positive bound, or inf for none.")


class OffPolicyACAgent(Agent):
    """Off-policy actor-critic learns from rollouts of a behaviour policy `beta`, which importance weights correct for.

    `L = mean(-sg[min(rho, clip_rho) A] ln pi(a | s) + value_coef (V(s) - v)^2 - entropy_coef H)`, `rho = pi / beta`,
    with the targets `v` and advantages `A` of `functional.vtrace` (Degris et al., arXiv 1205.4839; Espeholt et al.,
    arXiv 1802.01561, section 4.2). `gae_lambda = 0` is the one-step rule for the policy, `rho delta grad ln pi`.

    `beta` is a past policy: each iteration collects one rollout, then learns from `updates` of the rollouts kept. For
    another behaviour policy override `act` and `behaviour_logps` together.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        settings: The fields of `OffPolicyACSettings`.

    Raises:
        TypeError: If a setting is unknown, or text where a number is needed.
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    settings: OffPolicyACSettings

    def __init__(self, env: EnvSpec, **settings: Any) -> None:
        super().__init__(env, OffPolicyACSettings(**settings))
        self.normalizer = make_normalizer(self.observation_size, normalize=self.settings.normalize_observations)
        with self.seeded():
            self.policy = self.build_policy()
            self.critic = self.build_critic()
        self.replay: deque[Experience] = deque(maxlen=self.settings.replay_rollouts)

    def build_policy(self) -> Policy:
        """Make the policy; its first actions are close to uniform, or to a mean of 0."""
        return make_policy(self.build_network(self.observation_size, self.action_size, gain=0.01), self.action_space)

    def build_critic(self) -> nn.Module:
        """Make the critic, from observations `(..., D)` to values `(..., 1)`."""
        return self.build_network(self.observation_size, 1, gain=1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make Adam."""
        return torch.optim.Adam(self.parameters(), eps=1e-5, fused=True)

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Sample from the policy, or take its most likely actions."""
        return self.policy.act(self.normalizer(observations), None if deterministic else self.generator)

    def values(self, observations: Tensor) -> Tensor:
        """Return `V(s) (...)` of observations `(..., D)`, as `normalizer` returns them."""
        return self.critic(observations).squeeze(-1)

    def behaviour_logps(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return `ln beta(a | s) (N, T)` of actions that `act` has just taken in raw observations `(N, T, D)`."""
        return self.policy(self.normalizer(observations)).log_prob(actions)

    @torch.no_grad()
    def remember(self, rollout: Rollout) -> None:
        """Keep a rollout that has just been collected."""
        with evaluation_mode(self):  # as when the policy sampled
            logps = self.behaviour_logps(rollout.observations[:, :-1], rollout.actions)
        self.replay.append(Experience(rollout, logps))

    def loss(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a rollout, and the metrics for the log."""
        settings = self.settings
        rollout, behaviour_logps = experience
        observations = self.normalizer(rollout.observations)
        values = self.values(observations)  # (N, T + 1)
        distribution = self.policy(observations[:, :-1])
        logps = distribution.log_prob(rollout.actions)
        ratios = log_ratios(logps.detach(), behaviour_logps).exp()
        targets, advantages = self.targets(rollout, values.detach(), ratios)
        if settings.normalize_advantages:
            advantages = masked_whiten(advantages, rollout.mask)
        policy_loss = cispo(logps, behaviour_logps, advantages, epsilon_high=settings.clip_rho).mean()
        value_loss = squared_error(values[:, :-1], targets).mean()
        loss = policy_loss + settings.value_coef * value_loss
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "ratio_max": ratios.max()}
        if settings.entropy_coef:  # the entropy costs time, so it is computed only where it counts
            metrics["entropy"] = distribution.entropy().mean()
            loss = loss - settings.entropy_coef * metrics["entropy"]
        return loss, metrics

    @torch.no_grad()
    def targets(self, rollout: Rollout, values: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """Apply V-trace to the episodes of each row.

        Args:
            rollout: `N` rows of `T` steps.
            values: `V(s_t) (N, T + 1)` of its observations.
            ratios: `pi / beta (N, T)`.

        Returns:
            Targets of the critic and advantages, both `(N, T)`.
        """
        return vtrace(
            rollout.rewards,
            values[:, :-1],
            ratios,
            rollout.mask,
            gamma=self.settings.gamma,
            lam=torch.where(rollout.ends, 0.0, self.settings.gae_lambda),  # no trace crosses the end of an episode
            clip_rho=self.settings.clip_rho,
            next_values=next_values(rollout, values, final_values(self, rollout)),
        )

    def iterate(self) -> Mapping[str, Tensor | float]:
        """Collect and keep a rollout, then learn from those kept; the metrics are those of the last gradient step."""
        rollout = collect(self, self.settings.rollout_steps)
        self.remember(rollout)
        parameters = list(self.parameters())
        chosen = torch.randint(len(self.replay), (self.settings.updates,), generator=self.generator)
        for index in chosen.tolist():
            loss, metrics = self.loss(self.replay[index])
            self.optimize(loss, self.optimizer, parameters)
        update_normalizer(self.normalizer, rollout)
        return metrics

    # Checkpoints.

    def forget(self) -> None:
        """Forget the rollouts of an earlier fit."""
        self.replay.clear()

    def training_state(self) -> dict[str, Any]:
        """Return the state of the base class, and the rollouts that are kept."""
        replay = [{"behaviour_logps": logps, **rollout._asdict()} for rollout, logps in self.replay]
        return super().training_state() | {"replay": replay}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from a `training_state`."""
        super().load_training_state(state)
        for kept in state["replay"]:
            kept = {name: tensor.to(self.device) for name, tensor in kept.items()}
            self.replay.append(Experience(behaviour_logps=kept.pop("behaviour_logps"), rollout=Rollout(**kept)))
