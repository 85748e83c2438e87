"""SPO's memory of the success of prompts: its names, its counts by hand, its file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_plugins.signals.value_tracker import ValueTracker, prompt_key

NAN = math.nan
CHAT: list[dict[str, Any]] = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]


def test_keys_tell_prompts_apart() -> None:
    prompts: list[Any] = ["1+1=", "1+2=", "", CHAT, CHAT[1:], [CHAT[1], CHAT[0]], json.dumps(CHAT)]
    keys = [prompt_key(prompt) for prompt in prompts]
    assert len(set(keys)) == len(prompts) and {len(key) for key in keys} == {24}


def test_keys_do_not_depend_on_the_order_of_fields() -> None:
    turned = [{"content": m["content"], "role": m["role"]} for m in CHAT]
    assert prompt_key(turned) == prompt_key(CHAT)


def test_keys_are_the_same_in_every_process() -> None:
    # Python's own hash of a string is not.
    assert prompt_key("1+1=") == "4369fbd1b4bdde8cd08ef9e7"
    assert prompt_key(CHAT) == "dbbd9ab7f6329502e0da7501"


def test_new_prompts_start_at_jeffreys_prior() -> None:
    tracker = ValueTracker()
    values = tracker.values(["a", "b"])
    assert values.tolist() == [0.5, 0.5] and values.dtype == torch.float64
    assert len(tracker) == 0 and tracker.values([]).shape == (0,)


def test_two_updates_by_hand() -> None:
    tracker = ValueTracker()
    tracker.update(["a", "b"], torch.tensor([1.0, 0.25]), torch.tensor([0.5, 1.0]))
    assert tracker.counts == {"a": (1.25, 0.25), "b": (0.75, 1.25)}
    assert tracker.values(["b", "a", "c"]).tolist() == [0.375, 1.25 / 1.5, 0.5]
    tracker.update(["a"], torch.tensor([0.0]), torch.tensor([0.8]))
    assert tracker.counts["a"] == pytest.approx((1.0, 1.2)) and tracker.counts["b"] == (0.75, 1.25)


def test_of_several_completions_only_the_first_forgets() -> None:
    tracker = ValueTracker()
    tracker.update(["a", "b", "a", "a"], torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.full((4,), 0.5))
    assert tracker.counts == {"a": (2.25, 1.25), "b": (1.25, 0.25)}


def test_unscorable_completions_are_passed_over() -> None:
    tracker = ValueTracker()
    tracker.update(["a", "a", "b"], torch.tensor([NAN, 1.0, NAN]), torch.full((3,), 0.5))
    assert tracker.counts == {"a": (1.25, 0.25)}  # the second is the first that counts, and forgets


@pytest.mark.parametrize(
    ("reward", "forget", "message"),
    [(1.5, 0.9, "rewards outside"), (-0.1, 0.9, "rewards outside"), (1.0, 1.1, "forget")],
)
def test_what_is_out_of_range_is_refused(reward: float, forget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValueTracker().update(["a"], torch.tensor([reward]), torch.tensor([forget]))


@pytest.mark.slow
def test_the_value_tends_to_the_success_rate() -> None:
    tracker = ValueTracker()
    wins = torch.rand(3000, generator=torch.Generator().manual_seed(0)) < 0.3
    values = []
    for win in wins.tolist():
        tracker.update(["a"], torch.tensor([float(win)]), torch.tensor([0.98]))
        values.append(tracker.values(["a"]).item())
    assert sum(values[500:]) / 2500 == pytest.approx(0.3, abs=0.02)
    assert sum(tracker.counts["a"]) == pytest.approx(50.0)  # 1 / (1 - forget)


def test_the_file_is_exact(tmp_path: Path) -> None:
    tracker = ValueTracker()
    for i in range(20):
        tracker.update([f"{i % 3}"], torch.tensor([i / 19]), torch.tensor([0.9]))
    tracker.save(tmp_path / "tracker.json")
    again = ValueTracker()
    again.update(["gone"], torch.ones(1), torch.ones(1))
    again.load(tmp_path / "tracker.json")
    assert again.counts == tracker.counts and set(again.counts) == {"0", "1", "2"}
