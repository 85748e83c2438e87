"""Rollouts: completions by the model's own `generate`, their rewards, and the values saved on the way."""

from rl_plugins.generation.completions import Completions, generate_completions
from rl_plugins.generation.draft_statistics import DraftStatistics, SpeculativeOutput
from rl_plugins.generation.scoring import RewardModel, call_rewards
from rl_plugins.generation.speculative import SpeculativeDecoder, speculating
from rl_plugins.generation.value_capture import ValuePass, ValueRecorder, completion_values

__all__ = [
    "Completions",
    "DraftStatistics",
    "RewardModel",
    "SpeculativeDecoder",
    "SpeculativeOutput",
    "ValuePass",
    "ValueRecorder",
    "call_rewards",
    "completion_values",
    "generate_completions",
    "speculating",
]
