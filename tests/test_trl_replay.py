"""The buffer of groups: what it keeps, what it forgets, what it hands out, and that it survives a checkpoint."""

import io
from typing import Any

import pytest
import torch

from rl_plugins.signals.replay import ReplayBuffer, trimmed


def group(name: int, rows: int = 2) -> dict[str, Any]:
    """Rows with padding that all share: 2 columns before the prompts, 3 after the completions."""
    ids = torch.full((rows, 3), name)
    return {
        "prompt_ids": torch.cat([torch.zeros(rows, 2, dtype=torch.long), ids], dim=1),
        "prompt_mask": torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])[:rows],
        "completion_ids": torch.cat([ids, torch.zeros(rows, 3, dtype=torch.long)], dim=1),
        "completion_mask": torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])[:rows],
        "old_per_token_logps": torch.arange(rows * 6.0).view(rows, 6),
        "importance_sampling_ratio": torch.ones(rows, 1),
        "scores": torch.arange(rows) / 1.0,
        "num_items_in_batch": torch.tensor(4),
    }


def names(rows: list[dict[str, Any]]) -> list[int]:
    return [int(r["completion_ids"][0, 0]) for r in rows]


def kept(buffer: ReplayBuffer) -> list[int]:
    return [int(g.rows["completion_ids"][0, 0]) for g in buffer.groups]


def test_shared_padding_is_cut() -> None:
    whole = group(7)
    cut = trimmed(whole)
    assert cut["prompt_ids"].tolist() == [[7, 7, 7]] * 2
    assert cut["prompt_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert cut["completion_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert cut["old_per_token_logps"].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert cut["importance_sampling_ratio"].shape == (2, 1) and cut["scores"].tolist() == [0, 1]
    cut["scores"] += 1  # a copy
    cut["prompt_mask"] += 1
    assert whole["scores"].tolist() == [0, 1] and whole["prompt_mask"].max() == 1


def test_completions_without_tokens_keep_one_column() -> None:
    whole = group(7)
    whole["completion_mask"] = torch.zeros_like(whole["completion_mask"])
    assert trimmed(whole)["completion_ids"].shape == (2, 1)


def test_the_least_spread_goes_first_then_the_oldest() -> None:
    buffer = ReplayBuffer(3, max_age=100)
    for name, priority in ((1, 0.5), (2, 0.2), (3, 0.9), (4, 0.6)):
        buffer.add(group(name), priority, step=name)
    assert kept(buffer) == [1, 3, 4]
    buffer.add(group(5), 0.5, step=5)  # as wide as group 1, which is older
    assert kept(buffer) == [3, 4, 5]
    buffer.add(group(6), 0.1, step=6)  # less than all that are there
    assert kept(buffer) == [3, 4, 5] and len(buffer) == 3


def test_old_groups_are_forgotten() -> None:
    buffer = ReplayBuffer(5, max_age=2)
    for name in (1, 2, 3):
        buffer.add(group(name), 1.0, step=name)
    assert sorted(names(buffer.draw(5, step=4))) == [2, 3]
    assert kept(buffer) == [2, 3]
    assert buffer.draw(5, step=6) == [] and len(buffer) == 0
    buffer.add(group(4), 1.0, step=6)
    assert names(buffer.draw(1, step=6)) == [4]


def test_draws_are_different_groups() -> None:
    buffer = ReplayBuffer(4, max_age=10)
    for name in (1, 2, 3, 4):
        buffer.add(group(name), 1.0, step=0)
    for _ in range(20):
        assert len(set(names(buffer.draw(3, step=0)))) == 3
    assert buffer.draw(0, step=0) == []
    assert len(buffer) == 4  # drawing takes nothing out


def test_draws_are_in_proportion_to_the_spread() -> None:
    buffer = ReplayBuffer(2, max_age=10, seed=3)
    buffer.add(group(1), 0.1, step=0)
    buffer.add(group(2), 0.3, step=0)
    drawn = [names(buffer.draw(1, step=0))[0] for _ in range(2000)]
    assert drawn.count(2) / len(drawn) == pytest.approx(0.75, abs=0.03)  # three standard deviations


def test_groups_without_spread_can_be_drawn() -> None:
    """A penalty on length may level the scores of a group whose rewards differ."""
    buffer = ReplayBuffer(2, max_age=10)
    buffer.add(group(1), 0.0, step=0)
    assert names(buffer.draw(1, step=0)) == [1]
    buffer.add(group(2), 1.0, step=0)
    assert sorted(names(buffer.draw(2, step=0))) == [1, 2]


def filled(seed: int) -> ReplayBuffer:
    buffer = ReplayBuffer(8, max_age=100, seed=seed)
    for name in range(8):
        buffer.add(group(name), 0.1 + name / 8, step=name)
    return buffer


def sequence(buffer: ReplayBuffer, count: int = 10) -> list[list[int]]:
    return [names(buffer.draw(2, step=8)) for _ in range(count)]


def test_the_seed_decides() -> None:
    torch.manual_seed(0)
    first = sequence(filled(1))
    torch.manual_seed(1)
    assert sequence(filled(1)) == first
    assert sequence(filled(2)) != first


def test_a_checkpoint_goes_on_where_it_was() -> None:
    buffer = filled(1)
    sequence(buffer, 3)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    again = ReplayBuffer(8, max_age=100, seed=77)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert [(g.priority, g.step) for g in again.groups] == [(g.priority, g.step) for g in buffer.groups]
    for mine, other in zip(buffer.groups, again.groups, strict=True):
        assert mine.rows.keys() == other.rows.keys()
        assert all(torch.equal(mine.rows[key], other.rows[key]) for key in mine.rows)
    assert sequence(buffer) == sequence(again)
