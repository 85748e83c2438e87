"""Balancing of the experts of a Hugging Face model: its routers, their selection biases, auxiliary losses and logs."""

from rl_plugins.moe.balancer import RouterBalancer, get_router_balancer
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.files import load_selection_bias, save_selection_bias
from rl_plugins.moe.routers import Router, find_routers
from rl_plugins.moe.selection_bias import remove_selection_bias

__all__ = [
    "BalancingConfig",
    "Router",
    "RouterBalancer",
    "find_routers",
    "get_router_balancer",
    "load_selection_bias",
    "remove_selection_bias",
    "save_selection_bias",
]
