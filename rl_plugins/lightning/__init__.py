"""Modules, callbacks and a strategy for Lightning: `from rl_plugins.lightning import MTPCriticModule`.

Agents for Gymnasium are in `rl_plugins.classic`, DeepSpeed on a CPU in `rl_plugins.lightning.deepspeed`.
"""

from rl_plugins.extras import require
from rl_plugins.hooks import require_hooks

require("lightning", "lightning.pytorch")
require_hooks("rl_plugins.lightning")

from rl_plugins.lightning.balancing import MoEBalancingCallback
from rl_plugins.lightning.module import RLModule
from rl_plugins.lightning.modules import GRPOModule, MTPCriticModule, PPOModule
from rl_plugins.lightning.polyak_callback import PolyakCallback
from rl_plugins.lightning.progress import RolloutProgressBar
from rl_plugins.lightning.prompts import PromptDataModule
from rl_plugins.lightning.sft import MTPSFTModule
from rl_plugins.lightning.token_value_report import TokenValueReport

__all__ = [
    "GRPOModule",
    "MTPCriticModule",
    "MTPSFTModule",
    "MoEBalancingCallback",
    "PPOModule",
    "PolyakCallback",
    "PromptDataModule",
    "RLModule",
    "RolloutProgressBar",
    "TokenValueReport",
]
