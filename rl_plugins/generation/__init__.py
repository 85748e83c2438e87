"""Rollouts: completions by the model's own `generate`, their rewards, and the values saved on the way."""

from rl_plugins.generation.completions import Completions, generate_completions
from rl_plugins.generation.scoring import RewardModel, call_rewards
from rl_plugins.generation.value_capture import ValuePass, ValueRecorder, completion_values

__all__ = [
    "Completions",
    "RewardModel",
    "ValuePass",
    "ValueRecorder",
    "call_rewards",
    "completion_values",
    "generate_completions",
]
