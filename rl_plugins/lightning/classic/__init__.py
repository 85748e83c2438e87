"""Agents for Gymnasium environments, as LightningModules."""

from rl_plugins.extras import require

require("lightning", "gymnasium")

from rl_plugins.lightning.classic.a2c import A2CModule
from rl_plugins.lightning.classic.agent import ClassicModule
from rl_plugins.lightning.classic.dqn import DQNModule
from rl_plugins.lightning.classic.off_policy_ac import OffPolicyACModule
from rl_plugins.lightning.classic.ppo import PPOModule
from rl_plugins.lightning.classic.qac import QACModule
from rl_plugins.lightning.classic.reinforce import ReinforceModule
from rl_plugins.lightning.classic.schedules import Linear
from rl_plugins.lightning.classic.trpo import TRPOModule

__all__ = [
    "A2CModule",
    "ClassicModule",
    "DQNModule",
    "Linear",
    "OffPolicyACModule",
    "PPOModule",
    "QACModule",
    "ReinforceModule",
    "TRPOModule",
]
