"""Eligibility traces against the sums they stand for and against the gradient of the objective in the paper."""

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import discounted_returns
from rl_plugins.functional.advantages.traces import TraceStyle, lambda_trace, trace_weights

STYLES: list[TraceStyle] = ["recent", "both"]
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])


def trace(style: str, decay: float, t: int, lag: int) -> float:
    return decay**lag if style == "recent" else max(decay**lag, decay ** (t - lag))


def test_recent_by_hand() -> None:
    # d = 1/2: 1 + 1/2 + 1/4, 1 + 1/2, 1; the hole does not count.
    weights = trace_weights(torch.tensor([[1, 0, 1, 1, 0]]), gamma=0.5, lam=1.0)
    assert weights.tolist() == [[1.75, 0.0, 1.5, 1.0, 0.0]]


def test_both_by_hand() -> None:
    # d = 1/2, 4 tokens. j = 0: max(., d^0) = 1 each, 4. j = 1: 1 + 1/2 + max(1/4, 1/2) = 2. j = 2: 1 + 1/2. j = 3: 1.
    weights = trace_weights(torch.ones(1, 4), gamma=1.0, lam=0.5, style="both")
    assert weights.tolist() == [[4.0, 2.0, 1.5, 1.0]]


def test_lambda_trace_by_hand() -> None:
    advantages, mask = torch.tensor([2.0, -1.0]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    traced = lambda_trace(advantages, mask, gamma=1.0, lam=0.5)
    assert traced.tolist() == [[3.5, 3.0, 2.0], [-1.5, -1.0, 0.0]]
    floored = lambda_trace(advantages, mask, gamma=1.0, lam=0.5, min_advantage=-0.25)
    assert floored.tolist() == [[3.5, 3.0, 2.0], [-0.375, -0.25, 0.0]]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_weights_are_the_sum_of_the_traces(style: TraceStyle, decay: float) -> None:
    expected = torch.zeros(MASK.shape)
    for row, real in enumerate(MASK.bool()):
        places = real.nonzero().flatten().tolist()
        for j, place in enumerate(places):
            expected[row, place] = sum(trace(style, decay, t, t - j) for t in range(j, len(places)))
    torch.testing.assert_close(trace_weights(MASK, gamma=1.0, lam=decay, style=style), expected)


@pytest.mark.parametrize("style", STYLES)
def test_equals_the_gradient_of_the_traced_ratio_on_policy(style: TraceStyle) -> None:
    """The gradient of `sum_t A exp(sum_l tr(t, l) (logp - old)_{t-l})` at `logp = old`."""
    torch.manual_seed(0)
    decay, advantages = 0.8, torch.randn(4, dtype=torch.float64)
    logps = torch.randn(MASK.shape, dtype=torch.float64, requires_grad=True)
    objective = logps.new_zeros(())
    for row, real in enumerate(MASK.bool()):
        change = (logps - logps.detach())[row][real]
        for t in range(len(change)):
            log_ratio: Tensor | float = sum(trace(style, decay, t, lag) * change[t - lag] for lag in range(t + 1))
            objective = objective + advantages[row] * torch.as_tensor(log_ratio).exp()
    objective.backward()
    traced = lambda_trace(advantages, MASK, gamma=0.8, lam=1.0, style=style)
    torch.testing.assert_close(traced, logps.grad, rtol=1e-6, atol=1e-6)


def test_recent_weights_are_discounted_counts() -> None:
    torch.manual_seed(1)
    mask = (torch.rand(5, 300) < 0.8).float()
    weights = trace_weights(mask, gamma=0.999, lam=0.99)
    returns = discounted_returns(torch.ones(5, 300), mask, gamma=0.999 * 0.99)
    torch.testing.assert_close(weights, returns, rtol=1e-5, atol=1e-5)


def test_limits() -> None:
    advantages = torch.tensor([0.5, -1.0, 2.0, 1.0])
    broadcast = advantages[:, None] * MASK
    torch.testing.assert_close(lambda_trace(advantages, MASK, gamma=0.0, lam=0.9), broadcast)
    torch.testing.assert_close(lambda_trace(advantages, MASK, gamma=1.0, lam=0.0), broadcast)
    left = MASK.flip(1).cumsum(1).flip(1) * MASK
    for style in STYLES:
        torch.testing.assert_close(lambda_trace(advantages, MASK, gamma=1.0, lam=1.0, style=style), broadcast * left)
    # Without decay after the first token, "both" keeps only the first: it lies on the trace of all.
    first = trace_weights(torch.ones(1, 4), gamma=1.0, lam=0.0, style="both")
    assert first.tolist() == [[4.0, 1.0, 1.0, 1.0]]


def test_only_gamma_times_lambda_counts_and_recent_is_bounded() -> None:
    mask = torch.ones(1, 5000)
    for style in STYLES:
        torch.testing.assert_close(
            trace_weights(mask, gamma=0.9, lam=0.8, style=style), trace_weights(mask, gamma=0.72, lam=1.0, style=style)
        )
    weights = trace_weights(mask, lam=0.99)[0]
    assert weights[-1] == 1 and (weights.diff() <= 0).all() and weights[0] <= 100
    assert (trace_weights(mask, lam=0.99, style="both")[0] >= weights - 1e-4).all()


def test_masked_positions_and_dtypes() -> None:
    traced = lambda_trace(torch.tensor([1, 0]), torch.tensor([[True, False], [False, False]]))
    assert traced.tolist() == [[1.0, 0.0], [0.0, 0.0]] and traced.dtype == torch.float32
    assert lambda_trace(torch.ones(2, dtype=torch.float64), torch.ones(2, 3)).dtype == torch.float64
    assert lambda_trace(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, 3)).dtype == torch.float32
    assert lambda_trace(torch.ones(2), torch.ones(2, 0)).shape == (2, 0)


def test_arguments_are_checked() -> None:
    mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match="one per completion"):
        lambda_trace(torch.zeros(2, 1), mask)
    with pytest.raises(ValueError, match="completion mask"):
        trace_weights(torch.ones(3))
    for gamma, lam in ((1.1, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.5, -0.1)):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            lambda_trace(torch.zeros(2), mask, gamma=gamma, lam=lam)
    with pytest.raises(ValueError, match="choose 'recent' or 'both'"):
        lambda_trace(torch.zeros(2), mask, style="old")  # type: ignore[arg-type]
