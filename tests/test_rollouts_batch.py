"""Joining and cutting batches: every real token stays with its row, and padding goes where TRL has it."""

from typing import Any

import torch
from torch import Tensor

from rl_plugins.rollouts.batch import join_rows, num_rows, reordered, select_rows

PAD = 9


def batch_of(prompts: list[list[int]], completions: list[list[int]], **rest: Any) -> dict[str, Any]:
    """A batch as TRL pads it; the log-probability of a token is minus the token."""

    def padded(rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), PAD)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        return ids, mask

    prompt_ids, prompt_mask = padded(prompts, left=True)
    completion_ids, completion_mask = padded(completions, left=False)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "old_per_token_logps": -completion_ids.float() * completion_mask,
        "scores": torch.tensor([float(sum(row)) for row in completions]),
        "num_items_in_batch": completion_mask.sum(),
        **rest,
    }


def texts(batch: dict[str, Any]) -> list[tuple[list[int], list[int], list[float], float]]:
    """What each row says, without its padding."""
    rows = []
    for i in range(num_rows(batch)):
        prompt, real = batch["prompt_mask"][i].bool(), batch["completion_mask"][i].bool()
        rows.append(
            (
                batch["prompt_ids"][i][prompt].tolist(),
                batch["completion_ids"][i][real].tolist(),
                batch["old_per_token_logps"][i][real].tolist(),
                batch["scores"][i].item(),
            )
        )
    return rows


SHORT = ([[1], [2, 3]], [[4, 5, 6], [7]])
LONG = ([[1, 2, 3, 4]], [[5]])
LONGEST = ([[8]], [[1, 2, 3, 4, 5]])


def test_joining_keeps_every_row() -> None:
    batches = [batch_of(*SHORT), batch_of(*LONG), batch_of(*LONGEST)]
    joined = join_rows(batches, PAD)
    assert texts(joined) == [row for batch in batches for row in texts(batch)]
    assert joined["prompt_ids"].tolist() == [[9, 9, 9, 1], [9, 9, 2, 3], [1, 2, 3, 4], [9, 9, 9, 8]]
    assert joined["prompt_mask"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert joined["completion_ids"].tolist() == [[4, 5, 6, 9, 9], [7, 9, 9, 9, 9], [5, 9, 9, 9, 9], [1, 2, 3, 4, 5]]
    assert joined["completion_mask"].sum(1).tolist() == [3, 1, 1, 5]
    assert joined["num_items_in_batch"] == batches[0]["num_items_in_batch"]  # for the caller to count again
    assert {k: v.dtype for k, v in joined.items()} == {k: v.dtype for k, v in batches[0].items()}


def test_joining_one_batch_changes_nothing() -> None:
    batch = batch_of(*SHORT)
    joined = join_rows([batch], PAD)
    assert all(torch.equal(joined[key], value) for key, value in batch.items())


def test_what_trl_pads_with_ones_stays_one() -> None:
    def more(rows: int, width: int) -> dict[str, Any]:
        return {
            "tool_mask": torch.zeros(rows, width, dtype=torch.long),
            "importance_sampling_ratio": torch.full((rows, width), 0.5),
            "sampling_per_token_logps": torch.full((rows, width), -0.5),
        }

    joined = join_rows([batch_of(*SHORT, **more(2, 3)), batch_of(*LONGEST, **more(1, 5))], PAD)
    assert joined["importance_sampling_ratio"].tolist() == [[0.5] * 3 + [1.0] * 2] * 2 + [[0.5] * 5]
    assert joined["tool_mask"].tolist() == [[0, 0, 0, 1, 1]] * 2 + [[0] * 5]
    assert joined["sampling_per_token_logps"][0].tolist() == [-0.5] * 3 + [0.0] * 2


def test_one_ratio_per_sequence_is_not_padded() -> None:
    joined = join_rows(
        [
            batch_of(*SHORT, importance_sampling_ratio=torch.tensor([[0.5], [2.0]])),
            batch_of(*LONGEST, importance_sampling_ratio=torch.tensor([[3.0]])),
        ],
        PAD,
    )
    assert joined["importance_sampling_ratio"].tolist() == [[0.5], [2.0], [3.0]]


def test_selecting_rows() -> None:
    batch = batch_of(*SHORT, kept="word")
    picked = select_rows(batch, torch.tensor([1, 0, 1]))
    assert texts(picked) == [texts(batch)[i] for i in (1, 0, 1)]
    assert picked["num_items_in_batch"] == 4 and picked["kept"] == "word"


def test_reordering_slices() -> None:
    batch = batch_of([[i] for i in range(6)], [[i, i] for i in range(6)])
    slices = [select_rows(batch, torch.arange(i, i + 2)) for i in (0, 2, 4)]
    order = torch.tensor([5, 0, 3, 2, 1, 4])
    cut = reordered(slices, order)
    assert [num_rows(part) for part in cut] == [2, 2, 2]
    assert [row for part in cut for row in texts(part)] == [texts(batch)[i] for i in order.tolist()]
    assert all(part["num_items_in_batch"] == 12 for part in cut)
