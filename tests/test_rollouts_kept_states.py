"""States that are kept for later: the right ones of the right tokens, and never more than the limit."""

import pytest
import torch
from torch import Tensor

from rl_plugins.rollouts import ValueRecord
from rl_plugins.rollouts.kept_states import KeptStates


def state_of(row: int, step: int) -> list[float]:
    return [10.0 * row + step, -1.0]


def column(rows: list[int], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """One state of each row, at one step."""
    states = torch.tensor([[state_of(row, step)] for row in rows])
    return states, torch.full((len(rows), 1), step), torch.tensor(rows)


def test_all_states_of_real_tokens_in_the_order_of_the_rows() -> None:
    kept = KeptStates(100)
    for step in range(3):
        kept.add(*column([0, 1, 2], step))
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()
    states, rows = kept.of(mask)
    assert rows == 3
    assert states[:, 0].tolist() == [0, 1, 10, 12]
    assert states[:, 1].tolist() == [-1] * 4


def test_rows_that_do_not_fit_are_given_up_as_in_the_docstring() -> None:
    kept = KeptStates(6)
    for step, count in enumerate([3, 6, 6, 4]):
        kept.add(*column([0, 1, 2], step))
        assert kept._count == count
    states, rows = kept.of(torch.ones(3, 4).bool())
    assert rows == 1
    assert states[:, 0].tolist() == [0, 1, 2, 3]


def test_rows_in_chunks_fill_the_room() -> None:
    """A pass over whole rows brings all states of some rows at a time."""
    kept = KeptStates(7)
    for rows in ([0, 1], [2, 3], [4]):
        states = torch.tensor([[state_of(row, step) for step in range(2)] for row in rows])
        kept.add(states, torch.arange(2).expand(len(rows), 2), torch.tensor(rows))
    states, count = kept.of(torch.ones(5, 2).bool())
    assert count == 3
    assert states[:, 0].tolist() == [0, 1, 10, 11, 20, 21]


def test_one_row_is_kept_however_long() -> None:
    kept = KeptStates(1)
    for step in range(5):
        kept.add(*column([0, 1], step))
    states, rows = kept.of(torch.ones(2, 5).bool())
    assert (rows, states[:, 0].tolist()) == (1, [0, 1, 2, 3, 4])


def test_rows_at_steps_of_their_own_and_places_without_a_token() -> None:
    """Speculative decoding settles another number of tokens in each row; -1 marks what is none."""
    kept = KeptStates(100)
    kept.add(torch.tensor([[[1.0], [2.0]], [[3.0], [9.0]]]), torch.tensor([[0, 1], [0, -1]]), torch.tensor([0, 1]))
    kept.add(torch.tensor([[[4.0], [5.0]]]), torch.tensor([[1, 2]]), torch.tensor([1]))
    states, _ = kept.of(torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    assert states.squeeze(1).tolist() == [1, 2, 3, 4, 5]


def test_a_missing_state_is_an_error() -> None:
    kept = KeptStates(100)
    kept.add(*column([0, 1], 0))
    with pytest.raises(RuntimeError, match="not seen"):
        kept.of(torch.ones(2, 2).bool())


@pytest.mark.parametrize("limit", [3, 10, 31, 1000])
def test_random_streams_against_a_slow_reference(limit: int) -> None:
    g = torch.Generator().manual_seed(limit)
    rows, width = 6, 9
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    made = torch.randn(rows, width, 4, generator=g)
    kept, done = KeptStates(limit), torch.zeros(rows, dtype=torch.long)
    while bool((done < lengths).any()):
        active = (done < lengths).nonzero().squeeze(1)
        steps = done[active][:, None] + torch.arange(2)
        real = steps < lengths[active][:, None]
        states = made[active[:, None], steps.clamp(max=width - 1)]
        kept.add(states, torch.where(real, steps, -1), active)
        done[active] += real.sum(1)
        assert kept._count <= max(limit, int(lengths[0]))
    mask = torch.arange(width) < lengths[:, None]
    states, count = kept.of(mask)
    assert torch.equal(states, made[:count][mask[:count]])
    fitting = int((lengths.cumsum(0) <= limit).sum())
    assert 1 <= count <= max(1, fitting)  # rows that end late may have left room behind


def test_a_record_keeps_the_states_that_it_judges() -> None:
    kept = KeptStates(100)
    record = ValueRecord(lambda states: states.sum(-1, keepdim=True), flush_every=2, kept=kept)
    rows, hidden = torch.arange(2), torch.randn(2, 5, 3)
    for step in range(5):
        record.add(hidden[:, step : step + 1], torch.full((2, 1), step), rows)
    values = record.finish(5)
    assert values is not None
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    states, _ = kept.of(mask)
    assert torch.equal(states, hidden[mask])
    assert torch.equal(states.sum(-1), values[0][mask].squeeze(-1))
    record.reset()
    with pytest.raises(RuntimeError, match="not seen"):
        kept.of(mask)
