"""Rollouts: completions by the model's own `generate`, their rewards, and the values saved on the way."""

from typing import TYPE_CHECKING, Any

from rl_plugins.rollouts.batch import Batch
from rl_plugins.rollouts.completions import Completions, generate_completions
from rl_plugins.rollouts.episodes import TextEnvironment, Turns, play_episodes
from rl_plugins.rollouts.reward_models import ProcessRewardModel, RewardModel
from rl_plugins.rollouts.rewards import call_rewards
from rl_plugins.rollouts.speculative.draft_statistics import DraftStatistics, SpeculativeOutput
from rl_plugins.rollouts.step_rewards import TokenRewards, rewards_per, text_steps
from rl_plugins.rollouts.values import EachStep, ValueRecord, WholeRows, completion_values

if TYPE_CHECKING:
    from rl_plugins.rollouts.speculative.decoder import SpeculativeDecoder, speculating

__all__ = [
    "Batch",
    "Completions",
    "DraftStatistics",
    "EachStep",
    "ProcessRewardModel",
    "RewardModel",
    "SpeculativeDecoder",
    "SpeculativeOutput",
    "TextEnvironment",
    "TokenRewards",
    "Turns",
    "ValueRecord",
    "WholeRows",
    "call_rewards",
    "completion_values",
    "generate_completions",
    "play_episodes",
    "rewards_per",
    "speculating",
    "text_steps",
]


def __getattr__(name: str) -> Any:
    """Import speculative decoding when it is used: only it needs certain undocumented parts of transformers."""
    if name not in ("SpeculativeDecoder", "speculating"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rl_plugins.rollouts.speculative import decoder

    return getattr(decoder, name)
