"""Trainers and configs for TRL: `from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer`."""

from rl_plugins.trl.callbacks import PolyakCallback
from rl_plugins.trl.critic_config import MTPCriticConfig
from rl_plugins.trl.critic_trainer import MTPCriticTrainer
from rl_plugins.trl.sft_config import MTPSFTConfig
from rl_plugins.trl.sft_trainer import MTPSFTTrainer

__all__ = ["MTPCriticConfig", "MTPCriticTrainer", "MTPSFTConfig", "MTPSFTTrainer", "PolyakCallback"]
