"""Balancing of the experts of a Hugging Face model: its routers, their selection biases, auxiliary losses and logs."""

from rl_plugins.moe.balancer import RouterBalancer, get_router_balancer
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.files import load_selection_bias, save_selection_bias
from rl_plugins.moe.load_log import LOAD_FILE_NAME, ExpertLoadHistory, append_expert_load, read_expert_load
from rl_plugins.moe.routers import Router, find_routers
from rl_plugins.moe.run import BalancingRun
from rl_plugins.moe.selection_bias import remove_selection_bias

__all__ = [
    "LOAD_FILE_NAME",
    "BalancingConfig",
    "BalancingRun",
    "ExpertLoadHistory",
    "Router",
    "RouterBalancer",
    "append_expert_load",
    "find_routers",
    "get_router_balancer",
    "load_selection_bias",
    "read_expert_load",
    "remove_selection_bias",
    "save_selection_bias",
]
