"""`nn.Module`s and state: MTP value heads, their slow copies, a separate value model, and how they attach to a Hugging
Face model."""

from rl_plugins.modules.attach import attach_mtp_heads, base_model_of, detach_mtp_heads, get_mtp_heads
from rl_plugins.modules.gradient import GradientStats, clamp_gradient
from rl_plugins.modules.head_pass import HeadPass, head_token_loss, logit_divisor
from rl_plugins.modules.heads import MTPHead, MTPHeads, MTPHeadsConfig, ValueHead
from rl_plugins.modules.polyak import PolyakTarget
from rl_plugins.modules.serialization import (
    has_mtp_heads_file,
    load_mtp_heads,
    read_mtp_heads,
    save_mtp_heads,
)
from rl_plugins.modules.value_model import ValueModel, attach_value_model, detach_value_model, get_value_model
from rl_plugins.modules.value_tracker import ValueTracker, prompt_key

__all__ = [
    "GradientStats",
    "HeadPass",
    "MTPHead",
    "MTPHeads",
    "MTPHeadsConfig",
    "PolyakTarget",
    "ValueHead",
    "ValueModel",
    "ValueTracker",
    "attach_mtp_heads",
    "attach_value_model",
    "base_model_of",
    "clamp_gradient",
    "detach_mtp_heads",
    "detach_value_model",
    "get_mtp_heads",
    "get_value_model",
    "has_mtp_heads_file",
    "head_token_loss",
    "load_mtp_heads",
    "logit_divisor",
    "prompt_key",
    "read_mtp_heads",
    "save_mtp_heads",
]
