"""The index shifts: hand-worked rows with holes, and slow loops over the real tokens."""

import math

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import (
    completion_states,
    head_targets,
    last_real,
    lookahead_values,
    mtp_labels,
    next_state_values,
    predicted_mask,
    shift_real,
)
from rl_plugins.functional.alignment import value_after

NAN = math.nan
X = torch.tensor([[1.0, NAN, 3.0, 4.0, NAN], [NAN, 6.0, 7.0, NAN, 9.0]])
MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]])


def slow_shift(x: Tensor, mask: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    shifted, valid = torch.zeros_like(x), torch.zeros(mask.shape, dtype=torch.bool)
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if mask[b, t]]
        for i, t in enumerate(real):
            if 0 <= i + offset < len(real):
                shifted[b, t], valid[b, t] = x[b, real[i + offset]], True
    return shifted, valid


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (0, [[1.0, 0.0, 3.0, 4.0, 0.0], [0.0, 6.0, 7.0, 0.0, 9.0]]),
        (1, [[3.0, 0.0, 4.0, 0.0, 0.0], [0.0, 7.0, 9.0, 0.0, 0.0]]),
        (2, [[4.0, 0.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0, 0.0]]),
        (-1, [[0.0, 0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 6.0, 0.0, 7.0]]),
        (9, [[0.0] * 5] * 2),
        (-9, [[0.0] * 5] * 2),
    ],
)
def test_shift_by_hand(offset: int, expected: list[list[float]]) -> None:
    shifted, valid = shift_real(X, MASK, offset)
    assert shifted.tolist() == expected
    assert valid.tolist() == (torch.tensor(expected) > 0).tolist()


@pytest.mark.parametrize("offset", [-13, -3, -1, 0, 1, 2, 5, 12, 13])
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_shift_against_loop(offset: int, trailing: tuple[int, ...], density: float) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(4, 13, *trailing), torch.rand(4, 13) < density
    x[~mask] = NAN
    for got, expected in zip(shift_real(x, mask, offset), slow_shift(x, mask, offset), strict=True):
        assert torch.equal(got, expected)


def test_shift_keeps_integers_and_empty_shapes() -> None:
    tokens = torch.arange(1, 11).reshape(2, 5)
    assert shift_real(tokens, MASK, 1)[0].tolist() == [[3, 0, 4, 0, 0], [0, 8, 10, 0, 0]]
    assert shift_real(torch.zeros(2, 0), torch.zeros(2, 0), 1)[0].shape == (2, 0)
    with pytest.raises(ValueError, match="must be"):
        shift_real(X[:1], MASK, 1)


def test_gradient_follows_the_shift() -> None:
    x = X.clone().requires_grad_()
    weights = torch.arange(1.0, 11.0).reshape(2, 5)
    (shift_real(x, MASK, 1)[0] * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 7.0, 0.0, 8.0]]


def test_last_real_and_next_state() -> None:
    assert last_real(MASK).int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert not last_real(torch.zeros(2, 3)).any()
    assert next_state_values(X, MASK).tolist() == [[3.0, 0.0, 4.0, 0.0, 0.0], [0.0, 7.0, 9.0, 0.0, 0.0]]


def test_value_after_the_last_token_by_hand() -> None:
    """Behind the last column, in the middle of a row, behind a hole, and in a row without a token."""
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(4, -1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 0]])
    assert value_after(values, mask).tolist() == [4.0, 2.0, 4.0, 1.0]
    assert torch.equal(value_after(values, mask.bool()), value_after(values, mask))
    with pytest.raises(ValueError, match="one more column"):
        value_after(values[:, 1:], mask)


def test_head_targets_by_hand() -> None:
    targets, target_mask = head_targets(X, MASK, 3)
    assert targets[0].tolist() == [[1.0, 3.0, 4.0], [0.0] * 3, [3.0, 4.0, 0.0], [4.0, 0.0, 0.0], [0.0] * 3]
    assert target_mask[0].int().tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_lookahead_averages_the_forecasts_of_one_state() -> None:
    # v_k[t] = 10 k + t: at the third real token (t = 3) stand v_1[3], v_2[2] and v_3[0].
    values = 10.0 * torch.arange(1, 4) + torch.arange(5.0)[:, None]
    values[[1, 4]] = NAN
    out = lookahead_values(values[None], MASK[:1])[0].tolist()
    assert out == pytest.approx([10.0, 0.0, (12 + 20) / 2, (13 + 22 + 30) / 3, 0.0])
    out = lookahead_values(values[None], MASK[:1], num_heads=2)[0].tolist()
    assert out == pytest.approx([10.0, 0.0, (12 + 20) / 2, (13 + 22) / 2, 0.0])


def test_perfect_heads_agree_with_the_value() -> None:
    """Heads that hit their targets forecast every state without error: the two alignments are inverse."""
    torch.manual_seed(0)
    value, mask = torch.randn(3, 9), torch.rand(3, 9) < 0.7
    heads, _ = head_targets(value, mask, 4)
    torch.testing.assert_close(lookahead_values(heads, mask), torch.where(mask, value, 0.0))


@pytest.mark.parametrize("num_heads", [0, 4])
def test_head_count_is_checked(num_heads: int) -> None:
    with pytest.raises(ValueError, match="num_heads"):
        lookahead_values(torch.zeros(2, 5, 3), MASK, num_heads)


def test_labels_by_hand() -> None:
    labels = torch.tensor([[10, 11, 12, 13, 14]])
    # At p = 0 the main head predicts token 1, head 1 token 2, head 2 token 3.
    assert mtp_labels(labels, 2)[0].tolist() == [[12, 13], [13, 14], [14, -100], [-100, -100], [-100, -100]]
    assert mtp_labels(labels, 9, ignore_index=-1)[0, 0].tolist() == [12, 13, 14, -1, -1, -1, -1, -1, -1]


def test_labels_of_packed_rows_stay_in_their_document() -> None:
    labels = torch.tensor([[10, 11, 12, 20, 21, 22, 23]])
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    out = mtp_labels(labels, 2, position_ids)[0].tolist()
    assert out == [[12, -100], [-100, -100], [-100, -100], [22, 23], [23, -100], [-100, -100], [-100, -100]]
    alone = torch.cat([mtp_labels(labels[:, :3], 2), mtp_labels(labels[:, 3:], 2)], 1)[0].tolist()
    assert out == alone
    with pytest.raises(ValueError, match="position_ids"):
        mtp_labels(labels, 2, position_ids[:, 1:])


def test_labels_are_the_heads_tokens_from_the_completion_states() -> None:
    """At `s_t`, head k's label is `y_{t+k}`, as the design has it."""
    prompt, completion = torch.tensor([[1, 2, 3]]), torch.tensor([[50, 51, 52, 53]])
    labels = mtp_labels(torch.cat([prompt, completion], 1), 2, ignore_index=-1)
    assert completion_states(labels, 4)[0].tolist() == [[51, 52], [52, 53], [53, -1], [-1, -1]]


@pytest.mark.parametrize("prompt", [1, 4])
def test_completion_states_precede_their_tokens(prompt: int) -> None:
    positions = torch.arange(prompt + 3)[None, :, None].expand(2, -1, 6)
    assert completion_states(positions, 3)[1, :, 0].tolist() == [prompt - 1, prompt, prompt + 1]


def test_completion_states_need_one_prompt_token() -> None:
    with pytest.raises(ValueError, match="4 positions"):
        completion_states(torch.zeros(2, 3, 6), 3)


def test_predicted_mask_goes_with_the_states_of_the_whole_row() -> None:
    labels = torch.tensor([[-100, 7, -100, 9], [5, 6, 7, -100]])
    assert predicted_mask(labels).tolist() == [[True, False, True], [True, True, False]]
    positions = torch.arange(4).expand(2, 4)
    assert completion_states(positions, 3)[0].tolist() == [0, 1, 2]
