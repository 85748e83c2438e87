"""Training signals: advantages, critics, losses and metrics that are made from a scored batch of completions."""

from rl_plugins.signals.advantages import (
    ADVANTAGES,
    Advantage,
    advantage_options,
    advantages_of,
    advantages_of_rewards,
    check_advantage,
)
from rl_plugins.signals.critic_targets import (
    ESTIMATORS,
    SCALINGS,
    CriticTargets,
    critic_signal,
    critic_targets,
    initial_values,
    rollout_metrics,
    scale_advantages,
    sequence_means,
    value_loss,
    value_losses,
)
from rl_plugins.signals.critics import Critic, CriticSignal, TrunkCritic
from rl_plugins.signals.head_critic import HeadCritic
from rl_plugins.signals.host import Host
from rl_plugins.signals.metrics import (
    Metrics,
    completion_metrics,
    draft_metrics,
    gradient_metrics,
    head_metrics,
    per_head_means,
    reward_metrics,
)
from rl_plugins.signals.online import online_loss
from rl_plugins.signals.options import (
    DraftOptions,
    HeadOptions,
    LengthOptions,
    OnlineValueOptions,
    PhasicOptions,
    PolicyOptions,
    PPOValueOptions,
    SamplingOptions,
    SFTHeadOptions,
    ValueHeadOptions,
    ValueModelOptions,
    ValueOptions,
    ValueReplayOptions,
    VariantOptions,
)
from rl_plugins.signals.policy import POLICY_LOSSES, LossEntry, PolicyLoss, clip_shares, policy_loss
from rl_plugins.signals.presets import GRPO_PRESETS, PPO_PRESETS
from rl_plugins.signals.signals import GroupSignal, Signal
from rl_plugins.signals.value_model_critic import ValueModelCritic
from rl_plugins.signals.value_replay import ValueReplay
from rl_plugins.signals.value_tracker import ValueTracker, prompt_key

__all__ = [
    "ADVANTAGES",
    "Advantage",
    "Critic",
    "CriticSignal",
    "CriticTargets",
    "DraftOptions",
    "ESTIMATORS",
    "GRPO_PRESETS",
    "GroupSignal",
    "HeadCritic",
    "HeadOptions",
    "Host",
    "LengthOptions",
    "LossEntry",
    "Metrics",
    "OnlineValueOptions",
    "POLICY_LOSSES",
    "PPO_PRESETS",
    "PPOValueOptions",
    "PhasicOptions",
    "PolicyLoss",
    "PolicyOptions",
    "SCALINGS",
    "SFTHeadOptions",
    "SamplingOptions",
    "Signal",
    "TrunkCritic",
    "ValueHeadOptions",
    "ValueModelCritic",
    "ValueModelOptions",
    "ValueReplay",
    "ValueReplayOptions",
    "ValueOptions",
    "ValueTracker",
    "VariantOptions",
    "advantage_options",
    "advantages_of",
    "advantages_of_rewards",
    "check_advantage",
    "clip_shares",
    "completion_metrics",
    "critic_signal",
    "critic_targets",
    "draft_metrics",
    "gradient_metrics",
    "head_metrics",
    "initial_values",
    "online_loss",
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
