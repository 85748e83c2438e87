"""Trainers and configs for TRL: `from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer`."""

from rl_plugins.extras import require
from rl_plugins.hooks import require_hooks

require("trl", "trl")
require_hooks("rl_plugins.trl")

from rl_plugins.trl.balancing import MoEBalancingCallback
from rl_plugins.trl.callbacks import PolyakCallback
from rl_plugins.trl.critic_config import MTPCriticConfig
from rl_plugins.trl.critic_trainer import MTPCriticTrainer
from rl_plugins.trl.ppo_config import PPOConfig
from rl_plugins.trl.ppo_trainer import PPOTrainer
from rl_plugins.trl.sft_config import MTPSFTConfig
from rl_plugins.trl.sft_trainer import MTPSFTTrainer
from rl_plugins.trl.variant_config import GRPOVariantConfig
from rl_plugins.trl.variant_trainer import GRPOVariantTrainer

__all__ = [
    "GRPOVariantConfig",
    "GRPOVariantTrainer",
    "MTPCriticConfig",
    "MTPCriticTrainer",
    "MTPSFTConfig",
    "MTPSFTTrainer",
    "MoEBalancingCallback",
    "PPOConfig",
    "PPOTrainer",
    "PolyakCallback",
]
