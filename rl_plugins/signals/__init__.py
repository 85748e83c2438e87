"""Training signals: what a scored batch of completions teaches; tensors in, losses and metrics out."""

from rl_plugins.signals.advantages import (
    ADVANTAGES,
    advantage_options,
    check_advantage,
    group_advantages,
    penalised_returns,
)
from rl_plugins.signals.critic_targets import (
    ESTIMATORS,
    SCALINGS,
    CriticTargets,
    critic_signal,
    critic_targets,
    initial_values,
    per_head_means,
    rollout_metrics,
    scale_advantages,
    sequence_means,
    value_loss,
    value_losses,
)
from rl_plugins.signals.online import completion_metrics, draft_metrics, online_loss, reward_metrics
from rl_plugins.signals.policy import POLICY_LOSSES, PolicyLoss, clip_shares, policy_loss
from rl_plugins.signals.value_tracker import ValueTracker, prompt_key

__all__ = [
    "ADVANTAGES",
    "ESTIMATORS",
    "POLICY_LOSSES",
    "SCALINGS",
    "CriticTargets",
    "PolicyLoss",
    "ValueTracker",
    "advantage_options",
    "check_advantage",
    "clip_shares",
    "completion_metrics",
    "draft_metrics",
    "critic_signal",
    "critic_targets",
    "group_advantages",
    "initial_values",
    "online_loss",
    "penalised_returns",
    "per_head_means",
    "policy_loss",
    "prompt_key",
    "reward_metrics",
    "rollout_metrics",
    "scale_advantages",
    "sequence_means",
    "value_loss",
    "value_losses",
]
