"""Callbacks for Lightning: `from rl_plugins.lightning import MoEBalancingCallback`."""

from rl_plugins.lightning.moe_callback import MoEBalancingCallback

__all__ = ["MoEBalancingCallback"]
