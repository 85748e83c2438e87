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

__all__ = [
    "ESTIMATORS",
    "SCALINGS",
    "CriticTargets",
    "critic_targets",
    "initial_values",
    "rollout_metrics",
    "scale_advantages",
    "sequence_means",
    "value_loss",
    "value_losses",
]
