"""Modules that attach to a Hugging Face model: MTP value heads and their slow copies, a value model, or a module of
your own."""

from rl_plugins.hooks import require_hooks

require_hooks("rl_plugins.nn")

from rl_plugins.nn.attaching import attach_mtp_heads, load_mtp_heads
from rl_plugins.nn.attachment import Attachment, TrunkInputs, base_model_of
from rl_plugins.nn.gradient import GradientStats, clamp_gradient
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads, MTPHeadsConfig
from rl_plugins.nn.parallel_heads import MTPHead, ParallelHeads
from rl_plugins.nn.released_layers import expect_mtp_keys
from rl_plugins.nn.sequential_heads import DepthModule, SequentialHeads
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.nn.token_loss import head_token_loss, logit_cap, logit_divisor
from rl_plugins.nn.value_head import ValueHead
from rl_plugins.nn.value_model import ValueModel

__all__ = [
    "Attachment",
    "DepthModule",
    "GradientStats",
    "HeadRun",
    "MTPHead",
    "MTPHeads",
    "MTPHeadsConfig",
    "ParallelHeads",
    "PolyakTarget",
    "SequentialHeads",
    "TrunkInputs",
    "ValueHead",
    "ValueModel",
    "attach_mtp_heads",
    "base_model_of",
    "clamp_gradient",
    "expect_mtp_keys",
    "head_token_loss",
    "load_mtp_heads",
    "logit_cap",
    "logit_divisor",
]
