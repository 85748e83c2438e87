"""Training signals: tensors in, losses and metrics out; shared by all hosts."""

from rl_plugins.objectives.critic import (
    ESTIMATORS,
    SCALINGS,
    CriticTargets,
    critic_targets,
    initial_values,
    rollout_metrics,
    scale_advantages,
    sequence_means,
    value_loss,
    value_losses,
)
from rl_plugins.objectives.group_advantages import (
    ADVANTAGES,
    advantage_options,
    check_advantage,
    group_advantages,
    penalised_returns,
)
from rl_plugins.objectives.policy import POLICY_LOSSES, PolicyLoss, clip_shares, policy_loss

__all__ = [
    "ADVANTAGES",
    "ESTIMATORS",
    "POLICY_LOSSES",
    "SCALINGS",
    "CriticTargets",
    "PolicyLoss",
    "advantage_options",
    "check_advantage",
    "clip_shares",
    "critic_targets",
    "group_advantages",
    "initial_values",
    "penalised_returns",
    "policy_loss",
    "rollout_metrics",
    "scale_advantages",
    "sequence_means",
    "value_loss",
    "value_losses",
]
