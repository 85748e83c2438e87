"""Trainers and configs for TRL: `from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer`."""

from rl_plugins.extras import require
from rl_plugins.hooks import require_hooks

require("trl", "accelerate", "datasets", "trl")
require_hooks("rl_plugins.trl")

from rl_plugins.trl.balancing import MoEBalancingCallback
from rl_plugins.trl.configs import GRPOVariantConfig, MTPCriticConfig, MTPSFTConfig, PPOConfig, RLConfig
from rl_plugins.trl.rollouts import EpisodeRollouts
from rl_plugins.trl.sft import MTPSFTTrainer
from rl_plugins.trl.trainer import RLTrainer
from rl_plugins.trl.trainers import GRPOVariantTrainer, MTPCriticTrainer, PPOTrainer

__all__ = [
    "EpisodeRollouts",
    "GRPOVariantConfig",
    "GRPOVariantTrainer",
    "MTPCriticConfig",
    "MTPCriticTrainer",
    "MTPSFTConfig",
    "MTPSFTTrainer",
    "MoEBalancingCallback",
    "PPOConfig",
    "PPOTrainer",
    "RLConfig",
    "RLTrainer",
]
