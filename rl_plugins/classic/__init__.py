"""Agents for Gymnasium environments, as LightningModules."""

from rl_plugins.extras import require

require("lightning", "gymnasium")

from rl_plugins.classic.a2c import A2CModule
from rl_plugins.classic.agent import ClassicModule
from rl_plugins.classic.dqn import DQNModule
from rl_plugins.classic.off_policy_ac import OffPolicyACModule
from rl_plugins.classic.ppo import PPOModule
from rl_plugins.classic.qac import QACModule
from rl_plugins.classic.reinforce import ReinforceModule
from rl_plugins.classic.schedules import Linear
from rl_plugins.classic.trpo import TRPOModule

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
