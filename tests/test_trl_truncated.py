"""Episodes that end, and episodes that are cut, as the critic is told of them in TRL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_plugins.trl import EpisodeRollouts, MTPCriticTrainer

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")


class TwoTurns:
    """Pays every turn 1. The episode is over, or cut, after the second."""

    def __init__(self, terminated: bool, truncated: bool) -> None:
        self.flags = terminated, truncated

    def reset(self, **row: Any) -> str:
        self.turn = 0
        return ""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        over = self.turn == 2
        return "+", 1.0, over and self.flags[0], over and self.flags[1], {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terminated", "truncated", "bootstraps", "cut"),
    [(True, False, True, False), (False, True, None, True), (False, False, True, True), (False, True, False, False)],
    ids=["over", "cut", "out of turns", "never"],
)
def test_an_episode_that_is_over_is_worth_nothing_more(
    terminated: bool,
    truncated: bool,
    bootstraps: bool | None,
    cut: bool,
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    dataset: Any,
    critic_args: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Turns are cut at two tokens, so that no end-of-text token says which episodes are over."""
    episodes = EpisodeRollouts(lambda: TwoTurns(terminated, truncated), max_turns=2, max_turn_length=2)
    args = critic_args(tmp_path, max_completion_length=12, max_steps=1, bootstrap_truncated=bootstraps)
    trainer = MTPCriticTrainer(
        tiny_model(), episodes.earned, args, dataset, processing_class=tokenizer, rollout_func=episodes
    )
    trainer.train()
    rollout = trainer.last_rollout
    assert ("truncated" in rollout and bool(rollout["truncated"].all())) == cut
    assert rollout["rewards"].sum(1).tolist() == [2.0] * len(rollout["rewards"])
