"""`nn.Module`s and state: MTP value heads, their slow copies, native MTP layers, a separate value model, and how they
attach to a Hugging Face model; the balance of its experts."""

from rl_plugins.hooks import require_hooks

require_hooks("rl_plugins.modules")

from rl_plugins.modules.attach import attach_mtp_heads, base_model_of, detach_mtp_heads, get_mtp_heads
from rl_plugins.modules.balancing_config import BalancingConfig
from rl_plugins.modules.bias_files import load_selection_bias, save_selection_bias
from rl_plugins.modules.gradient import GradientStats, clamp_gradient
from rl_plugins.modules.head_pass import HeadPass, head_token_loss, logit_divisor
from rl_plugins.modules.heads import MTPHead, MTPHeads, MTPHeadsConfig, ValueHead
from rl_plugins.modules.native_mtp import NativeMTP, attach_native_mtp, detach_native_mtp, get_native_mtp
from rl_plugins.modules.native_mtp_files import (
    expect_native_keys,
    load_native_mtp,
    native_layers_in,
    save_native_mtp,
)
from rl_plugins.modules.native_pass import NativePass, native_token_loss
from rl_plugins.modules.native_training import prepare_native_mtp
from rl_plugins.modules.polyak import PolyakTarget
from rl_plugins.modules.router_balancer import RouterBalancer, get_router_balancer
from rl_plugins.modules.routers import Router, find_routers
from rl_plugins.modules.selection_bias import remove_selection_bias
from rl_plugins.modules.serialization import (
    has_mtp_heads_file,
    load_mtp_heads,
    read_mtp_heads,
    save_mtp_heads,
)
from rl_plugins.modules.value_model import ValueModel, attach_value_model, detach_value_model, get_value_model
from rl_plugins.modules.value_tracker import ValueTracker, prompt_key

__all__ = [
    "BalancingConfig",
    "GradientStats",
    "HeadPass",
    "MTPHead",
    "MTPHeads",
    "MTPHeadsConfig",
    "NativeMTP",
    "NativePass",
    "PolyakTarget",
    "Router",
    "RouterBalancer",
    "ValueHead",
    "ValueModel",
    "ValueTracker",
    "attach_mtp_heads",
    "attach_native_mtp",
    "attach_value_model",
    "base_model_of",
    "clamp_gradient",
    "detach_mtp_heads",
    "detach_native_mtp",
    "detach_value_model",
    "expect_native_keys",
    "find_routers",
    "get_mtp_heads",
    "get_native_mtp",
    "get_router_balancer",
    "get_value_model",
    "has_mtp_heads_file",
    "head_token_loss",
    "load_mtp_heads",
    "load_native_mtp",
    "load_selection_bias",
    "logit_divisor",
    "native_layers_in",
    "native_token_loss",
    "prepare_native_mtp",
    "prompt_key",
    "read_mtp_heads",
    "remove_selection_bias",
    "save_mtp_heads",
    "save_native_mtp",
    "save_selection_bias",
]
