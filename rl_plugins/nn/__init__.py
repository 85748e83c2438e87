"""Modules that attach to a Hugging Face model: MTP value heads and their slow copies, native MTP layers, a value
model."""

from rl_plugins.hooks import require_hooks

require_hooks("rl_plugins.nn")

from rl_plugins.nn.attach import attach_mtp_heads, base_model_of, detach_mtp_heads, get_mtp_heads
from rl_plugins.nn.gradient import GradientStats, clamp_gradient
from rl_plugins.nn.head_pass import HeadPass, head_token_loss, logit_divisor
from rl_plugins.nn.mtp_heads import MTPHead, MTPHeads, MTPHeadsConfig, ValueHead
from rl_plugins.nn.native_mtp import NativeMTP, attach_native_mtp, detach_native_mtp, get_native_mtp
from rl_plugins.nn.native_mtp_files import (
    expect_native_keys,
    load_native_mtp,
    native_layers_in,
    save_native_mtp,
)
from rl_plugins.nn.native_pass import NativePass, native_token_loss
from rl_plugins.nn.native_training import prepare_native_mtp
from rl_plugins.nn.serialization import (
    has_mtp_heads_file,
    load_mtp_heads,
    read_mtp_heads,
    save_mtp_heads,
)
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.nn.value_model import ValueModel, attach_value_model, detach_value_model, get_value_model

__all__ = [
    "GradientStats",
    "HeadPass",
    "MTPHead",
    "MTPHeads",
    "MTPHeadsConfig",
    "NativeMTP",
    "NativePass",
    "PolyakTarget",
    "ValueHead",
    "ValueModel",
    "attach_mtp_heads",
    "attach_native_mtp",
    "attach_value_model",
    "base_model_of",
    "clamp_gradient",
    "detach_mtp_heads",
    "detach_native_mtp",
    "detach_value_model",
    "expect_native_keys",
    "get_mtp_heads",
    "get_native_mtp",
    "get_value_model",
    "has_mtp_heads_file",
    "head_token_loss",
    "load_mtp_heads",
    "load_native_mtp",
    "logit_divisor",
    "native_layers_in",
    "native_token_loss",
    "prepare_native_mtp",
    "read_mtp_heads",
    "save_mtp_heads",
    "save_native_mtp",
]
