"""Modules, callbacks and a strategy for Lightning: `from rl_plugins.lightning import MTPCriticModule`.

Agents for Gymnasium are in `rl_plugins.classic`, DeepSpeed on a CPU in `rl_plugins.lightning.deepspeed`.
"""

from rl_plugins.extras import require
from rl_plugins.hooks import require_hooks

require("lightning", "lightning.pytorch")
require_hooks("rl_plugins.lightning")

from rl_plugins.lightning.balancing import MoEBalancingCallback
from rl_plugins.lightning.critic_module import MTPCriticModule
from rl_plugins.lightning.grpo_module import GRPOModule
from rl_plugins.lightning.language_module import LanguageModule
from rl_plugins.lightning.online_module import OnlineModule
from rl_plugins.lightning.polyak_callback import PolyakCallback
from rl_plugins.lightning.ppo_module import PPOModule
from rl_plugins.lightning.progress import RolloutProgressBar
from rl_plugins.lightning.prompts import PromptDataModule
from rl_plugins.lightning.sft_module import MTPSFTModule
from rl_plugins.lightning.token_value_report import TokenValueReport
from rl_plugins.lightning.value_module import ValueModule

__all__ = [
    "GRPOModule",
    "LanguageModule",
    "MTPCriticModule",
    "MTPSFTModule",
    "MoEBalancingCallback",
    "OnlineModule",
    "PPOModule",
    "PolyakCallback",
    "PromptDataModule",
    "RolloutProgressBar",
    "TokenValueReport",
    "ValueModule",
]
