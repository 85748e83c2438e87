"""Returns and advantages against slow loops over real tokens, and the identities between them."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import (
    discounted_returns,
    gae,
    lambda_returns,
    length_adaptive_lambda,
    n_step_returns,
    next_state_values,
    td_errors,
    td_targets,
    vtrace,
)

REWARDS = torch.tensor([[1.0, math.nan, 2.0, 4.0, math.inf]])
VALUES = torch.tensor([[10.0, math.nan, 20.0, 30.0, math.nan]])
MASK = torch.tensor([[1, 0, 1, 1, 0]])


def random_batch(
    length: int = 23, density: float = 0.7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, next values and a mask with holes; NaN wherever the mask is 0."""
    generator = torch.Generator().manual_seed(length)
    tensors = torch.randn(3, 5, length, generator=generator, dtype=dtype)
    mask = torch.rand(5, length, generator=generator) < density
    rewards, values, following = tensors.masked_fill(~mask, math.nan)
    return rewards, values, following, mask


def slow(name: str, rewards: Tensor, mask: Tensor, following: Tensor, gamma: float, lam: Tensor, n: int) -> Tensor:
    """Each definition written out over the list of real tokens, in Python floats."""
    out = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        real = [t for t in range(rewards.shape[1]) if mask[b, t]]
        r, v, decay = (
            [rewards[b, t].item() for t in real],
            [following[b, t].item() for t in real],
            lam[b].item(),
        )
        for i, t in enumerate(real):
            n_step = [
                sum(gamma**j * r[i + j] for j in range(m)) + gamma**m * v[i + m - 1] for m in range(1, len(r) - i + 1)
            ]
            if name == "n_step":
                out[b, t] = n_step[min(n, len(n_step)) - 1]
            else:  # the forward view: a mixture of n-step returns, the rest of the weight on the last one
                mixed = sum((1 - decay) * decay**m * g for m, g in enumerate(n_step[:-1]))
                out[b, t] = mixed + decay ** (len(n_step) - 1) * n_step[-1]
    return out


def test_by_hand() -> None:
    """gamma = lam = 1/2, real tokens at 0, 2 and 3: every number below is exact in binary."""
    assert discounted_returns(REWARDS, MASK, gamma=0.5).tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0]]
    assert td_targets(REWARDS, VALUES, MASK, gamma=0.5).tolist() == [[11.0, 0.0, 17.0, 4.0, 0.0]]
    assert td_errors(REWARDS, VALUES, MASK, gamma=0.5).tolist() == [[1.0, 0.0, -3.0, -26.0, 0.0]]
    assert n_step_returns(REWARDS, VALUES, MASK, n=2, gamma=0.5).tolist() == [[9.5, 0.0, 4.0, 4.0, 0.0]]
    # G_3 = 4; G_2 = 2 + (15 + 2) / 2 = 10.5; G_0 = 1 + (10 + 5.25) / 2 = 8.625
    assert lambda_returns(REWARDS, VALUES, MASK, gamma=0.5, lam=0.5).tolist() == [[8.625, 0.0, 10.5, 4.0, 0.0]]
    # A_2 = -3 - 26 / 4 = -9.5; A_0 = 1 - 9.5 / 4 = -1.375
    assert gae(REWARDS, VALUES, MASK, gamma=0.5, lam=0.5).tolist() == [[-1.375, 0.0, -9.5, -26.0, 0.0]]


def test_next_values_replace_the_bootstrap() -> None:
    following = torch.tensor([[2.0, math.nan, 6.0, 8.0, math.nan]])
    assert td_targets(REWARDS, VALUES, MASK, gamma=0.5, next_values=following).tolist() == [[2.0, 0.0, 5.0, 8.0, 0.0]]
    errors = td_errors(REWARDS, VALUES, MASK, gamma=0.5, next_values=following)
    assert errors.tolist() == [[-8.0, 0.0, -15.0, -22.0, 0.0]]
    # The 8 after the last token is the bootstrap of a truncated completion, at any lambda.
    monte_carlo = lambda_returns(REWARDS, VALUES, MASK, gamma=0.5, lam=1.0, next_values=following)
    assert monte_carlo.tolist() == [[4.0, 0.0, 6.0, 8.0, 0.0]]
    n_step = n_step_returns(REWARDS, VALUES, MASK, gamma=0.5, n=5, next_values=following)
    assert n_step.tolist() == monte_carlo.tolist()


@pytest.mark.parametrize("density", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 23])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("own", [True, False], ids=["next_values", "values"])
def test_against_slow_loop(density: float, length: int, gamma: float, own: bool) -> None:
    rewards, values, following, mask = random_batch(length, density)
    lam = torch.tensor([0.0, 0.3, 0.7, 0.95, 1.0])
    given = following if own else None
    used = following if own else next_state_values(values, mask)
    for n in (1, 2, 3, 6, length, 10**6):
        expected = slow("n_step", rewards, mask, used, gamma, lam, n)
        got = n_step_returns(rewards, values, mask, n=n, gamma=gamma, next_values=given)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    returns = lambda_returns(rewards, values, mask, gamma=gamma, lam=lam, next_values=given)
    torch.testing.assert_close(returns, slow("lambda", rewards, mask, used, gamma, lam, 0), atol=1e-5, rtol=0)


def slow_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: Tensor) -> Tensor:
    out = torch.zeros_like(values)
    for b in range(values.shape[0]):
        running = next_value = 0.0
        for t in reversed(range(values.shape[1])):
            if mask[b, t]:
                delta = rewards[b, t].item() + gamma * next_value - values[b, t].item()
                running = delta + gamma * lam[b].item() * running
                next_value, out[b, t] = values[b, t].item(), running
    return out


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 7, 64, 100])
@pytest.mark.parametrize("gamma", [0.0, 0.99, 1.0])
def test_gae_against_slow_loop(density: float, length: int, gamma: float) -> None:
    rewards, values, _, mask = random_batch(length, density)
    lam = torch.tensor([0.0, 0.5, 0.9, 0.95, 1.0])
    expected = slow_gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=gamma, lam=lam), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=gamma, lam=lam[:, None]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_identities(gamma: float) -> None:
    rewards, values, _, mask = random_batch(dtype=torch.float64)
    monte_carlo = discounted_returns(rewards, mask, gamma=gamma)
    one_step = td_targets(rewards, values, mask, gamma=gamma)
    close = torch.testing.assert_close
    close(lambda_returns(rewards, values, mask, gamma=gamma, lam=1.0), monte_carlo)
    close(n_step_returns(rewards, values, mask, gamma=gamma, n=rewards.shape[1]), monte_carlo)
    # lam = 0 and n = 1 are exact: nothing of a later token may touch them.
    assert torch.equal(lambda_returns(rewards, values, mask, gamma=gamma, lam=0.0), one_step)
    assert torch.equal(n_step_returns(rewards, values, mask, gamma=gamma, n=1), one_step)
    assert torch.equal(gae(rewards, values, mask, gamma=gamma, lam=0.0), td_errors(rewards, values, mask, gamma=gamma))
    real_values = torch.where(mask, values, 0.0)
    for lam in (0.0, 0.4, 1.0):
        close(
            gae(rewards, values, mask, gamma=gamma, lam=lam),
            lambda_returns(rewards, values, mask, gamma=gamma, lam=lam) - real_values,
        )


def test_several_episodes_in_a_row() -> None:
    """lam = 0 at the end of an episode, and an own next value there, cut a row into rows of one episode each."""
    rewards, values, following, mask = random_batch(23, 0.8, torch.float64)
    mask[:, 0] = True  # every row has a first episode
    ends = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    lam = torch.where(ends, 0.0, torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)).double())
    lam = lam.masked_fill(~mask, math.nan)  # a masked token has no lambda
    returns = lambda_returns(rewards, values, mask, gamma=0.9, lam=lam, next_values=following)
    advantages = gae(rewards, values, mask, gamma=0.9, lam=lam, next_values=following)
    assert (ends & mask).sum() > 10
    for b in range(mask.shape[0]):
        real = [t for t in range(mask.shape[1]) if mask[b, t]]
        # The loop runs over episodes, in which the last step bootstraps with its whole weight.
        g, advantage, last = 0.0, 0.0, True
        for t in reversed(real):
            last = last or bool(ends[b, t])
            r, v, following_v = rewards[b, t].item(), values[b, t].item(), following[b, t].item()
            trace = lam[b, t].item()
            g = r + 0.9 * (following_v if last else (1 - trace) * following_v + trace * g)
            advantage = r + 0.9 * following_v - v + (0.0 if last else 0.9 * trace * advantage)
            assert returns[b, t].item() == pytest.approx(g)
            assert advantages[b, t].item() == pytest.approx(advantage)
            last = False


def test_lam_per_token_by_hand() -> None:
    """gamma = 1/2, lam = 1, 0, 1 at the real tokens: G_3 = 4, G_2 = 2 + 15, G_0 = 1 + 17 / 2."""
    lam = torch.tensor([[1.0, math.nan, 0.0, 1.0, math.nan]])
    assert lambda_returns(REWARDS, VALUES, MASK, gamma=0.5, lam=lam).tolist() == [[9.5, 0.0, 17.0, 4.0, 0.0]]
    # A_3 = -26, A_2 = -3, A_0 = 1 - 3 / 2
    assert gae(REWARDS, VALUES, MASK, gamma=0.5, lam=lam).tolist() == [[-0.5, 0.0, -3.0, -26.0, 0.0]]


def test_vtrace_by_hand() -> None:
    """gamma = lam = 1/2, ratios 2, 1/2 and 4, clipped at 3 and 1; errors 1, -3 and -26 as in `test_by_hand`."""
    ratios = torch.tensor([[2.0, math.nan, 0.5, 4.0, math.inf]])
    targets, advantages = vtrace(REWARDS, VALUES, ratios, MASK, gamma=0.5, lam=0.5, clip_rho=3.0)
    # v - V: at 3, 3 * -26 = -78; at 2, -3 / 2 - 78 / 8 = -11.25; at 0, 2 - 11.25 / 4 = -0.8125.
    assert targets.tolist() == [[9.1875, 0.0, 8.75, -48.0, 0.0]]
    assert advantages.tolist() == [[1 - 11.25 / 4, 0.0, -3 - 78 / 4, -26.0, 0.0]]
    with pytest.raises(ValueError, match="clip_c=2"):
        vtrace(REWARDS, VALUES, ratios, MASK, clip_c=2.0)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_vtrace_on_policy_is_the_lambda_return(lam: float) -> None:
    rewards, values, _, mask = random_batch(dtype=torch.float64)
    shared = {"gamma": 0.9, "lam": lam}
    targets, advantages = vtrace(rewards, values, torch.ones_like(values), mask, **shared)
    torch.testing.assert_close(targets, lambda_returns(rewards, values, mask, **shared))
    torch.testing.assert_close(advantages, gae(rewards, values, mask, **shared))


def test_vtrace_against_the_sum_of_the_paper() -> None:
    """`v_s = V_s + sum_t gamma^(t-s) (prod_{i<t} c_i) rho_t delta_t`, Espeholt et al., eq. 1, in Python floats."""
    rewards, values, _, _ = random_batch(12, 1.1, torch.float64)
    ratios = torch.rand(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.5
    mask = torch.ones(5, 12, dtype=torch.bool)
    targets, _ = vtrace(rewards, values, ratios, mask, gamma=0.9, clip_rho=1.5, clip_c=0.8)
    errors = td_errors(rewards, values, mask, gamma=0.9)
    for b in range(5):
        for s in range(12):
            v, trace = values[b, s].item(), 1.0
            for t in range(s, 12):
                v += 0.9 ** (t - s) * trace * min(1.5, ratios[b, t].item()) * errors[b, t].item()
                trace *= min(0.8, ratios[b, t].item())
            assert targets[b, s].item() == pytest.approx(v)


def test_holes_are_as_if_cut_out() -> None:
    rewards, values, _, mask = random_batch()
    holed = gae(rewards, values, mask)
    for b in range(mask.shape[0]):
        real = mask[b]
        cut = gae(rewards[b, real][None], values[b, real][None], torch.ones(1, int(real.sum())))
        torch.testing.assert_close(holed[b, real], cut[0])


def test_a_long_trace_stays_accurate() -> None:
    rewards, values, _, mask = random_batch(1500)
    lam = torch.ones(5)
    expected = slow_gae(rewards.double(), values.double(), mask, 1.0, lam)
    torch.testing.assert_close(gae(rewards, values, mask, lam=lam).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("function", [gae, lambda_returns], ids=["gae", "lambda_returns"])
def test_gradcheck(function, lam: float) -> None:  # type: ignore[no-untyped-def]
    rewards, values, _, mask = random_batch(6, dtype=torch.float64)
    rewards, values = rewards.nan_to_num().requires_grad_(), values.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, v: function(r, v, mask, gamma=0.9, lam=lam), (rewards, values))


def test_garbage_reaches_no_gradient() -> None:
    rewards, values, _, mask = random_batch()
    values.requires_grad_()
    gae(rewards, values, mask).sum().backward()
    assert values.grad is not None and values.grad.isfinite().all()
    assert not values.grad[~mask].any()


def test_inputs_are_not_written_to_and_half_is_upcast() -> None:
    rewards, values, following, mask = random_batch()
    before = [x.clone() for x in (rewards, values, following, mask)]
    gae(rewards, values, mask, next_values=following)
    n_step_returns(rewards, values, mask, n=3, next_values=following)
    for x, y in zip((rewards, values, following, mask), before, strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    assert gae(rewards.bfloat16(), values.half(), mask.long()).dtype == torch.float32


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_gamma_is_checked(gamma: float) -> None:
    for call in (
        lambda: discounted_returns(REWARDS, MASK, gamma=gamma),
        lambda: td_targets(REWARDS, VALUES, MASK, gamma=gamma),
        lambda: n_step_returns(REWARDS, VALUES, MASK, n=1, gamma=gamma),
        lambda: lambda_returns(REWARDS, VALUES, MASK, gamma=gamma),
        lambda: gae(REWARDS, VALUES, MASK, gamma=gamma),
    ):
        with pytest.raises(ValueError, match="gamma"):
            call()


@pytest.mark.parametrize(
    "lam",
    [
        -0.1,
        1.1,
        math.nan,
        torch.tensor([1.5]),
        torch.tensor([math.nan]),
        torch.ones(2),
        torch.ones(1, 4),
        torch.full((1, 5), 1.5),
        torch.tensor(0.5),
    ],
)
def test_lam_is_checked(lam: float | Tensor) -> None:
    for function in (gae, lambda_returns):
        with pytest.raises(ValueError, match="lam"):
            function(REWARDS, VALUES, MASK, lam=lam)


def test_shapes_and_n_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        gae(REWARDS, torch.zeros(1, 5, 3), MASK)
    with pytest.raises(ValueError, match="at least 1"):
        n_step_returns(REWARDS, VALUES, MASK, n=0)


def test_length_adaptive_lambda() -> None:
    lam = length_adaptive_lambda(torch.tensor([0, 1, 20, 40, 200, 2000]))
    torch.testing.assert_close(lam, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.9, 0.99]))
    torch.testing.assert_close(length_adaptive_lambda(torch.tensor([20]), alpha=0.5), torch.tensor([0.9]))
    with pytest.raises(ValueError, match="alpha"):
        length_adaptive_lambda(torch.tensor([5]), alpha=0.0)


@pytest.mark.slow
def test_gae_is_ten_times_faster_than_the_loop() -> None:
    path = Path(__file__).parent.parent / "recipes" / "benchmarks" / "gae_speed.py"
    spec = importlib.util.spec_from_file_location("gae_speed", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    rewards, values, _, mask = (x.nan_to_num() for x in random_batch(300))
    expected = recipe.loop_gae(rewards, values, mask, gamma=0.99, lam=0.95)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=0.99, lam=0.95), expected, atol=1e-5, rtol=0)
    # Another process on the machine can only slow a measurement down: the best of three is the cleanest.
    assert max(loop / scan for loop, scan in (recipe.measure() for _ in range(3))) >= 10
