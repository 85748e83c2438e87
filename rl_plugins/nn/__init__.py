"""Modules that attach to a Hugging Face model: MTP value heads and their slow copies, native MTP layers, a value
model, or one of your own."""

from rl_plugins.hooks import require_hooks

require_hooks("rl_plugins.nn")

from rl_plugins.nn.attachment import Attachment, base_model_of
from rl_plugins.nn.gradient import GradientStats, clamp_gradient
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHead, MTPHeads, MTPHeadsConfig, ValueHead, attach_mtp_heads, load_mtp_heads
from rl_plugins.nn.native_mtp import NativeMTP, attach_native_mtp
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.nn.token_loss import head_token_loss, logit_divisor, native_token_loss
from rl_plugins.nn.value_model import ValueModel

__all__ = [
    "Attachment",
    "GradientStats",
    "HeadRun",
    "MTPHead",
    "MTPHeads",
    "MTPHeadsConfig",
    "NativeMTP",
    "PolyakTarget",
    "ValueHead",
    "ValueModel",
    "attach_mtp_heads",
    "attach_native_mtp",
    "base_model_of",
    "clamp_gradient",
    "head_token_loss",
    "load_mtp_heads",
    "logit_divisor",
    "native_token_loss",
]
