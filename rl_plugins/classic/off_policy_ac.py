"""Actor-critic from the experience of other policies."""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_plugins.classic.actor_critic import ActorCriticModule
from rl_plugins.classic.environments import EnvSpec
from rl_plugins.classic.networks import evaluation_mode
from rl_plugins.classic.rollouts import Rollout, next_values
from rl_plugins.classic.schedules import Schedule
from rl_plugins.functional.masking import masked_whiten
from rl_plugins.functional.policy_losses.clip import cispo
from rl_plugins.functional.ratios import log_ratios
from rl_plugins.functional.returns import vtrace
from rl_plugins.functional.value_losses import squared_error


class Experience(NamedTuple):
    """A rollout and how likely its actions were when they were taken."""

    rollout: Rollout
    behaviour_logps: Tensor
    """`ln beta(a | s) (N, T)`."""


class OffPolicyACModule(ActorCriticModule):
    """Off-policy actor-critic: importance weights correct for the behaviour policy `beta`.

    `L = mean(-sg[min(rho, clip_rho) A] ln pi(a | s) + value_coef (V(s) - v)^2 - entropy_coef H)`, `rho = pi / beta`,
    with the targets `v` and advantages `A` of `functional.vtrace` (Degris et al., arXiv 1205.4839; Espeholt et al.,
    arXiv 1802.01561, section 4.2). `gae_lambda = 0` is the one-step rule for the policy, `rho delta grad ln pi`.

    The behaviour is that of past policies: each iteration collects one rollout, then learns from `updates` of those
    kept. For another behaviour override `act` and `behaviour_logps` together.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        num_envs: Environments that are stepped side by side.
        rollout_steps: Steps of each environment in an iteration.
        replay_rollouts: Number of the latest rollouts that are kept.
        updates: Gradient steps of an iteration, each on one of the rollouts kept.
        gae_lambda: Trace decay in [0, 1].
        clip_rho: Largest importance weight; infinite for none.
        entropy_coef: Weight of the entropy bonus; with none, policies that had become deterministic stayed so.
        value_coef: Weight of the critic's loss.
        learning_rate: Of Adam, a number or a function of the share of training that remains.
        settings: Those of `ActorCriticModule`, `PolicyGradientModule` and `ClassicModule`.

    Raises:
        ValueError: If the spaces of the environment are not supported, or a setting is out of range.
    """

    def __init__(
        self,
        env: EnvSpec,
        *,
        num_envs: int = 8,
        rollout_steps: int = 16,
        replay_rollouts: int = 8,
        updates: int = 2,
        gae_lambda: float = 0.95,
        clip_rho: float = 1.0,
        entropy_coef: float = 0.01,
        value_coef: float = 0.5,
        learning_rate: Schedule = 7e-4,
        **settings: Any,
    ) -> None:
        super().__init__(
            env,
            num_envs=num_envs,
            rollout_steps=rollout_steps,
            gae_lambda=gae_lambda,
            entropy_coef=entropy_coef,
            learning_rate=learning_rate,
            **settings,
        )
        if replay_rollouts < 1 or updates < 1 or clip_rho <= 0:
            raise ValueError(
                f"replay_rollouts={replay_rollouts}, updates={updates}, clip_rho={clip_rho}: give at least 1 rollout "
                "and 1 update, and a positive clip_rho."
            )
        self.updates, self.clip_rho, self.value_coef = updates, clip_rho, value_coef
        self.replay: deque[Experience] = deque(maxlen=replay_rollouts)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), eps=1e-5, fused=True)

    def behaviour_logps(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`ln beta(a | s) (N, T)` of what `act` has just done in observations `(N, T, D)`, not normalised."""
        return self.policy(self.normalizer(observations)).log_prob(actions)

    @torch.no_grad()
    def remember(self, rollout: Rollout) -> None:
        """Keep a rollout that has just been collected."""
        with evaluation_mode(self):  # as when the policy sampled
            logps = self.behaviour_logps(rollout.observations[:, :-1], rollout.actions)
        self.replay.append(Experience(rollout, logps))

    def loss(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a rollout, and what is logged of it."""
        rollout, behaviour_logps = experience
        observations = self.normalizer(rollout.observations)
        values = self.values(observations)  # (N, T + 1)
        distribution = self.policy(observations[:, :-1])
        logps = distribution.log_prob(rollout.actions)
        ratios = log_ratios(logps.detach(), behaviour_logps).exp()
        targets, advantages = self.targets(rollout, values.detach(), ratios)
        if self.normalize_advantages:
            advantages = masked_whiten(advantages, rollout.mask)
        policy_loss = cispo(logps, behaviour_logps, advantages, epsilon_high=self.clip_rho).mean()
        value_loss = squared_error(values[:, :-1], targets).mean()
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "ratio_max": ratios.max()}
        return self.with_entropy_bonus(policy_loss + self.value_coef * value_loss, distribution, metrics)

    @torch.no_grad()
    def targets(self, rollout: Rollout, values: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """V-trace over the episodes of each row.

        Args:
            rollout: `N` rows of `T` steps.
            values: `V(s_t) (N, T + 1)` of its observations.
            ratios: `pi / beta (N, T)`.

        Returns:
            Targets of the critic and advantages, both `(N, T)`.
        """
        final_values = self.final_values(rollout)
        return vtrace(
            rollout.rewards,
            values[:, :-1],
            ratios,
            rollout.mask,
            gamma=self.gamma,
            lam=torch.where(rollout.ends, 0.0, self.gae_lambda),
            clip_rho=self.clip_rho,
            next_values=next_values(rollout, values, final_values),
        )

    def iterate(self) -> dict[str, Tensor | float]:
        """Collect and keep a rollout, then learn from those kept; the metrics are those of the last gradient step."""
        rollout = self.collect()
        self.remember(rollout)
        parameters = list(self.parameters())
        chosen = torch.randint(len(self.replay), (self.updates,), generator=self.generator)
        for index in chosen.tolist():
            loss, metrics = self.loss(self.replay[index])
            self.optimize(loss, self.optimizer, parameters)
        self.update_normalizer(rollout)
        return {name: value.detach() for name, value in metrics.items()}

    def on_fit_start(self) -> None:
        """Forget the rollouts of an earlier fit."""
        self.replay.clear()
        super().on_fit_start()

    def training_state(self) -> dict[str, Any]:
        """The rollouts that are kept, as well."""
        replay = [{"behaviour_logps": logps, **rollout._asdict()} for rollout, logps in self.replay]
        return super().training_state() | {"replay": replay}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from a `training_state`."""
        super().load_training_state(state)
        for kept in state["replay"]:
            kept = {name: tensor.to(self.device) for name, tensor in kept.items()}
            self.replay.append(Experience(behaviour_logps=kept.pop("behaviour_logps"), rollout=Rollout(**kept)))
