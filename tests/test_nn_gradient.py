"""Identity forwards, a clamped gradient backwards: numbers worked by hand."""

import pytest
import torch

from rl_plugins.nn import GradientStats, clamp_gradient

# One token's gradient has norm 5, one 0.5, one 0.
GRADIENT = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]])


def backward(gradient: torch.Tensor, **options: object) -> torch.Tensor:
    """The gradient that arrives before `clamp_gradient` when `gradient` is what comes back to it."""
    x = torch.zeros_like(gradient, requires_grad=True)
    clamp_gradient(x, **options).backward(gradient)  # type: ignore[arg-type]
    assert x.grad is not None
    return x.grad


def test_forward_is_the_identity() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(clamp_gradient(x, max_norm=0.1, scale=0.5), x)


def test_without_options_the_gradient_passes() -> None:
    assert torch.equal(backward(GRADIENT), GRADIENT)


def test_clamp_shortens_only_what_is_too_long() -> None:
    expected = torch.tensor([[[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]])
    torch.testing.assert_close(backward(GRADIENT, max_norm=1.0), expected)
    torch.testing.assert_close(backward(GRADIENT, max_norm=torch.tensor(1.0)), expected)
    torch.testing.assert_close(backward(GRADIENT, max_norm=0.25).norm(dim=-1), torch.tensor([[0.25, 0.25, 0.0]]))


def test_scale_comes_after_the_clamp() -> None:
    torch.testing.assert_close(backward(GRADIENT, scale=0.5), GRADIENT / 2)
    torch.testing.assert_close(
        backward(GRADIENT, max_norm=1.0, scale=0.5), torch.tensor([[[0.3, 0.4], [0.15, 0.2], [0.0, 0.0]]])
    )


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"max_norm": 0.0}, {"max_norm": 1.0, "scale": 0.0}])
def test_zero_detaches(options: dict[str, float]) -> None:
    assert torch.equal(backward(GRADIENT, **options), torch.zeros_like(GRADIENT))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_token_that_overflows_contributes_nothing(bad: float, max_norm: float | None) -> None:
    gradient = GRADIENT.clone()
    gradient[0, 0] = bad  # 3e38 is finite, its norm is not
    clean = GRADIENT.clone()
    clean[0, 0] = 0.0
    torch.testing.assert_close(backward(gradient, max_norm=max_norm), backward(clean, max_norm=max_norm))


def test_bf16_gradients_keep_their_dtype() -> None:
    grad = backward(GRADIENT.bfloat16(), max_norm=1.0)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad[0, 0].float(), torch.tensor([0.6, 0.8]), atol=0.01, rtol=0)


def test_stats_add_up_over_backward_passes() -> None:
    stats = GradientStats()
    assert stats.totals(torch.device("cpu")).tolist() == [0.0, 0.0, 0.0]
    backward(GRADIENT, max_norm=2.0, stats=stats)
    # Norms in units of the limit: 5 / 2 and 0.5 / 2; one clamped; two tokens with a gradient.
    torch.testing.assert_close(stats.totals(torch.device("cpu")), torch.tensor([2.75, 1.0, 2.0]))
    backward(GRADIENT * 10, max_norm=2.0, stats=stats)
    torch.testing.assert_close(stats.totals(torch.device("cpu")), torch.tensor([30.25, 3.0, 4.0]))


def test_stats_without_a_limit_are_plain_norms() -> None:
    stats = GradientStats()
    backward(GRADIENT, stats=stats)
    torch.testing.assert_close(stats.totals(torch.device("cpu")), torch.tensor([5.5, 0.0, 2.0]))


def test_stats_of_a_zero_limit_are_finite() -> None:
    # A value loss with coefficient 0 has a limit of 0 and no gradient.
    stats = GradientStats()
    backward(torch.zeros(1, 3, 2), max_norm=0.0, stats=stats)
    assert stats.totals(torch.device("cpu")).tolist() == [0.0, 0.0, 0.0]


def test_negative_options_are_refused() -> None:
    with pytest.raises(ValueError, match="max_norm must be at least 0, got -1.0; use None for no clamp"):
        clamp_gradient(GRADIENT, max_norm=-1.0)
    with pytest.raises(ValueError, match="scale must be at least 0, got -0.5"):
        clamp_gradient(GRADIENT, scale=-0.5)
