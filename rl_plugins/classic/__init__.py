"""Agents for Gymnasium environments, as LightningModules.

Each algorithm is one file that can be read alone, top to bottom: settings, networks, acting, loss, iteration. For that
reason some lines are repeated in several of these files. `Agent` is their only base class; everything else that they
share is a function.
"""

from rl_plugins.extras import require

require("lightning", "lightning.pytorch", "gymnasium")

from rl_plugins.classic.a2c import A2CAgent
from rl_plugins.classic.agent import Agent
from rl_plugins.classic.agent_settings import Linear
from rl_plugins.classic.dqn import DQNAgent
from rl_plugins.classic.off_policy_ac import OffPolicyACAgent
from rl_plugins.classic.ppo import PPOAgent
from rl_plugins.classic.qac import QACAgent
from rl_plugins.classic.reinforce import ReinforceAgent
from rl_plugins.classic.trpo import TRPOAgent

__all__ = [
    "A2CAgent",
    "Agent",
    "DQNAgent",
    "Linear",
    "OffPolicyACAgent",
    "PPOAgent",
    "QACAgent",
    "ReinforceAgent",
    "TRPOAgent",
]
