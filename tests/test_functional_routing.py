"""Balance of MoE routers: numbers worked by hand, slow loops, transformers' own loss, garbage in the padding."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rl_plugins.functional import (
    BIAS_RULES,
    Scoring,
    expert_counts,
    load_entropy,
    load_fractions,
    max_violation,
    router_probabilities,
    router_z_loss,
    routing,
    selection_bias_quantile,
    selection_bias_update,
    sequence_balance_loss,
    switch_balance_loss,
)

SCORINGS: tuple[Scoring, ...] = ("softmax", "sigmoid")
# Two tokens of probabilities (3/4, 1/4) and (1/2, 1/2), and one of padding.
LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [math.nan, math.inf]])
INDICES = torch.tensor([[0], [0], [1]])
MASK = torch.tensor([1, 1, 0])


def routers(layers: int, *shape: int, k: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Random logits of every layer, and the experts of the largest."""
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(*shape, generator=g).requires_grad_() for _ in range(layers)]
    return logits, [x.detach().topk(k).indices for x in logits]


def own_shares(logits: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """Load of the experts over these tokens."""
    return load_fractions(expert_counts(indices, logits.shape[-1], mask), indices.shape[-1])


def some(*shape: int) -> Tensor:
    """A mask of about three in four."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.75


@pytest.fixture(params=["selects rows", "masks rows"])
def either_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU, and as on devices that would have to wait."""
    if request.param == "masks rows":
        monkeypatch.setattr(routing, "_is_free_to_select", lambda x: False)


# Probabilities and counts


def test_probabilities() -> None:
    torch.testing.assert_close(router_probabilities(LOGITS[:2]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    scores = router_probabilities(LOGITS[:2], "sigmoid")  # 3/4 and 1/2, 1/2 and 1/2
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.4], [0.5, 0.5]]))
    assert router_probabilities(LOGITS[:2].bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="'softmax' or 'sigmoid'"):
        router_probabilities(LOGITS, "tanh")  # type: ignore[arg-type]


def test_sigmoid_scores_that_underflow() -> None:
    logits = torch.tensor([-200.0, -200.0, -200.0 - math.log(2)], requires_grad=True)
    p = router_probabilities(logits, "sigmoid")
    torch.testing.assert_close(p, torch.tensor([0.4, 0.4, 0.2]))
    p[0].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([0.24, -0.16, -0.08]))


def test_counts() -> None:
    indices = torch.tensor([[0, 3], [3, 1], [-1, 99], [3, 0]])
    mask = torch.tensor([1, 1, 0, 1])
    assert expert_counts(indices, 5, mask).tolist() == [2, 1, 0, 3, 0]
    assert expert_counts(indices.int(), 5, mask.bool()).dtype == torch.int64
    assert expert_counts(indices[mask.bool()], 5).tolist() == [2, 1, 0, 3, 0]
    assert expert_counts(indices, 5, torch.zeros(4)).tolist() == [0] * 5
    for i, m in ((indices[2:], None), (indices, torch.tensor([1, 1, 1, 1]))):
        with pytest.raises(RuntimeError, match="out of bounds"):
            expert_counts(i, 5, m)


def test_counts_are_those_of_bincount() -> None:
    indices, mask = torch.randint(7, (500, 3), generator=torch.Generator().manual_seed(0)), some(500)
    assert expert_counts(indices, 7).equal(indices.flatten().bincount(minlength=7))
    assert expert_counts(indices, 7, mask).equal(indices[mask].flatten().bincount(minlength=7))


# Balance over the batch


@pytest.mark.usefixtures("either_path")
def test_switch_by_hand() -> None:
    """All tokens on the first expert: `f = (1, 0)`, `P = (5/8, 3/8)`, `2 * 5/8`."""
    logits = LOGITS.clone().requires_grad_()
    loss = switch_balance_loss(logits, own_shares(LOGITS, INDICES, MASK), MASK)
    assert loss.shape == () and loss.item() == pytest.approx(1.25)
    loss.backward()
    # dP_0 = 1/2 p_0 p_1 per token, times 2
    expected = torch.tensor([[3 / 16, -3 / 16], [1 / 4, -1 / 4], [0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected)


def slow_switch(logits: Tensor, indices: Tensor, mask: Tensor, scoring: Scoring) -> float:
    """One layer, token by token."""
    experts = logits.shape[-1]
    f, p, tokens = [0.0] * experts, [0.0] * experts, 0
    for x, chosen, real in zip(logits.tolist(), indices.tolist(), mask.tolist(), strict=True):
        if not real:
            continue
        scores = [math.exp(a) if scoring == "softmax" else 1 / (1 + math.exp(-a)) for a in x]
        tokens += 1
        for i in range(experts):
            f[i] += chosen.count(i)
            p[i] += scores[i] / sum(scores)
    return experts * sum(a / tokens * b / tokens for a, b in zip(f, p, strict=True))


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("scoring", SCORINGS)
def test_switch_is_the_slow_loop(scoring: Scoring) -> None:
    """Layers of 5 and of 3 experts, with indices that are not those of the largest logits."""
    (a,), _ = routers(1, 40, 5, k=2)
    (b,), _ = routers(1, 40, 3, k=1, seed=1)
    mask = some(40)
    indices = [torch.rand(40, 5, generator=torch.Generator().manual_seed(2)).topk(2).indices, torch.ones(40, 1).long()]
    for x, i in zip((a, b), indices, strict=True):
        slow = slow_switch(x, i, mask, scoring)
        ours = switch_balance_loss(x, own_shares(x, i, mask), mask, scoring=scoring)
        assert ours.item() == pytest.approx(slow, rel=1e-6)
    whole = slow_switch(a, indices[0], torch.ones(40), scoring)
    ours = switch_balance_loss(a, own_shares(a, indices[0]), scoring=scoring)
    assert ours.item() == pytest.approx(whole, rel=1e-6)


def pooled(logits: list[Tensor], indices: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean loss of the layers, each with the mean load of all."""
    shares = torch.stack([own_shares(x, i, mask) for x, i in zip(logits, indices, strict=True)]).mean(0)
    return torch.stack([switch_balance_loss(x, shares, mask) for x in logits]).mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("either_path")
def test_with_the_mean_shares_of_all_layers_it_is_transformers(masked: bool) -> None:
    logits, indices = routers(4, 3 * 16, 8, k=2)
    mask = some(3, 16) if masked else None
    flat = None if mask is None else mask.flatten()
    ours = pooled(logits, indices, flat)
    theirs = load_balancing_loss_func(tuple(logits), 8, 2, mask)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    mine, other = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(mine, other, atol=1e-7, rtol=0)
    assert max(x.abs().max().item() for x in other) > 1e-4, "1e-7 is a thousandth of it"


def test_layers_collapsed_onto_opposite_experts() -> None:
    """Pooled they look balanced, as in transformers#31464; each on its own they are as bad as can be."""
    collapsed = torch.tensor([50.0, -50.0]).expand(10, 2)
    logits = [collapsed, -collapsed]
    indices = [x.topk(1).indices for x in logits]
    assert pooled(logits, indices).item() == pytest.approx(1.0)
    for x, i in zip(logits, indices, strict=True):
        assert switch_balance_loss(x, own_shares(x, i)).item() == pytest.approx(2.0)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_balanced_router_has_k(scoring: Scoring) -> None:
    """Every expert twice, equal logits."""
    indices = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 3, 1], [4, 2, 5]])
    shares = own_shares(torch.ones(4, 6), indices)
    assert switch_balance_loss(torch.ones(4, 6), shares, scoring=scoring).item() == pytest.approx(3.0)


def test_fractions() -> None:
    """Tokens of an expert over all tokens; they get no gradient, and uniform ones balance any router."""
    (logits,), (indices,) = routers(1, 30, 6, k=2)
    mask = some(30)
    own = (expert_counts(indices, 6, mask) / mask.sum()).requires_grad_()
    loss = switch_balance_loss(logits, own, mask)
    torch.testing.assert_close(loss, switch_balance_loss(logits, own_shares(logits, indices, mask), mask))
    loss.backward()
    assert own.grad is None and logits.grad is not None
    uniform = torch.full((6,), 2 / 6)
    assert switch_balance_loss(logits, uniform, mask).item() == pytest.approx(2.0)  # E sum_i k/E P_i


def test_fractions_of_the_window_make_micro_batches_add_up() -> None:
    """With the fractions of all tokens the gradients of two halves are those of the whole."""
    (logits,), (indices,) = routers(1, 40, 6, k=2)
    fractions = expert_counts(indices, 6) / 40
    whole = torch.autograd.grad(switch_balance_loss(logits, own_shares(logits, indices)), logits)[0]
    halves = [switch_balance_loss(logits[i : i + 20], fractions) for i in (0, 20)]
    parts = torch.autograd.grad((halves[0] + halves[1]) / 2, logits)[0]
    torch.testing.assert_close(parts, whole, atol=1e-9, rtol=1e-5)


# Balance within sequences


def test_sequence_by_hand() -> None:
    """`f = (2, 0)` and `P = (0.6, 0.4)`; a uniform sequence has 1; one of padding does not count."""
    logits = torch.tensor([[[math.log(3.0), 0.0]] * 2, [[0.0, 0.0], [math.nan, math.inf]], [[math.nan] * 2] * 2])
    logits.requires_grad_()
    indices = torch.tensor([[[0], [0]], [[1], [0]], [[-1], [9]]])
    loss = sequence_balance_loss(logits, indices, torch.tensor([[1, 1], [1, 0], [0, 0]]))
    assert loss.shape == () and loss.item() == pytest.approx((1.2 + 1.0) / 2)
    loss.backward()
    # p_0 = 3/5: d ln s_0 = 1 - s_0 = 1/4 and d ln s_1 = 1/2, so 1/2 * 2 * 1/2 * p_0 p_1 (1/4, -1/2)
    row = [0.12 / 4, -0.12 / 2]
    # p_0 = 1/2, f = (0, 2): 1/2 * 2 * 1/4 (-1/2, 1/2)
    expected = torch.tensor([[row, row], [[-1 / 8, 1 / 8], [0.0, 0.0]], [[0.0, 0.0]] * 2])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_sequence_is_the_scaled_switch_loss_of_each(scoring: Scoring) -> None:
    (logits,), (indices,) = routers(1, 3, 20, 5, k=2)
    mask = some(3, 20)
    each = [slow_switch(*rows, scoring) / 2 for rows in zip(logits, indices, mask, strict=True)]
    loss = sequence_balance_loss(logits, indices, mask, scoring=scoring)
    assert loss.item() == pytest.approx(sum(each) / 3, rel=1e-6)
    whole = [slow_switch(*rows, torch.ones(20), scoring) / 2 for rows in zip(logits, indices, strict=True)]
    loss = sequence_balance_loss(logits, indices, scoring=scoring)
    assert loss.item() == pytest.approx(sum(whole) / 3, rel=1e-6)


# Size of the logits


def test_z_loss_by_hand() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = router_z_loss(logits, MASK)
    assert loss.item() == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)
    loss.backward()
    # mean of 2 lse p
    expected = torch.tensor([[0.75 * math.log(4), 0.25 * math.log(4)], [math.log(2) / 2] * 2, [0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected)
    torch.testing.assert_close(router_z_loss(LOGITS[:2]), loss.detach())


# What all losses share


def switch(logits: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    return switch_balance_loss(logits, own_shares(logits, indices, mask), mask)


def switch_sigmoid(logits: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    return switch_balance_loss(-logits, own_shares(logits, indices, mask), mask, scoring="sigmoid")


def sequence(logits: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    rows = [None if x is None else x.unflatten(0, (2, 10)) for x in (logits, indices, mask)]
    return sequence_balance_loss(*rows)  # type: ignore[arg-type]


def z(logits: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    return router_z_loss(logits, mask)


LOSSES = [switch, switch_sigmoid, sequence, z]
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("either_path")
def test_garbage_in_the_padding(loss: Loss) -> None:
    (logits,), (indices,) = routers(1, 20, 5, k=2)
    mask = some(20)
    value = loss(logits, indices, mask)
    slope = torch.autograd.grad(value, logits)[0]
    for garbage, expert in ((math.nan, -1), (math.inf, 5), (-math.inf, 0), (1e30, 2**40)):
        bad = logits.detach().masked_fill(~mask[:, None], garbage).requires_grad_()
        out = loss(bad, indices.masked_fill(~mask[:, None], expert), mask)
        out.backward()
        assert out.item() == value.item()
        assert bad.grad is not None and bad.grad.equal(slope)
        assert bad.grad[~mask].abs().sum() == 0 and bad.grad[mask].abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("either_path")
def test_no_token_at_all_is_zero(loss: Loss) -> None:
    logits = torch.full((20, 5), math.nan, requires_grad=True)
    out = loss(logits, torch.zeros(20, 2, dtype=torch.int64), torch.zeros(20))
    out.backward()
    assert out.item() == 0.0
    assert logits.grad is not None and logits.grad.abs().sum() == 0


def test_no_token_at_all_is_zero_with_fractions() -> None:
    logits = torch.full((4, 2), math.nan, requires_grad=True)
    assert switch_balance_loss(logits, torch.ones(2), torch.zeros(4)).item() == 0.0
    nothing = torch.zeros(0, 2)
    assert switch_balance_loss(nothing, own_shares(nothing, torch.zeros(0, 1).long())).item() == 0.0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("either_path")
def test_float32_whatever_comes_in(loss: Loss) -> None:
    (logits,), (indices,) = routers(1, 20, 5, k=2)
    half, mask = logits.detach().bfloat16(), some(20)
    for m in (None, mask):
        expected = loss(half.float(), indices, m)
        with torch.autocast("cpu", torch.bfloat16):
            out = loss(half, indices, m)
        assert out.dtype == torch.float32 and out.item() == expected.item()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_differences(loss: Loss) -> None:
    (logits,), (indices,) = routers(1, 20, 5, k=2)
    double = logits.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, indices, some(20)), double)


# The selection bias


def test_bias_update_by_hand() -> None:
    """Three stacked layers, of which the second has seen no token."""
    bias = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 4.0], [0.5, 0.0, -0.5]])
    counts = torch.tensor([[6, 3, 0], [0, 0, 0], [1, 2, 9]])
    signs = selection_bias_update(bias, counts, rate=0.3)
    torch.testing.assert_close(signs, torch.tensor([[-0.3, 0.0, 0.3], [1.0, 2.0, 4.0], [0.7, 0.2, -0.9]]))
    parts = selection_bias_update(bias, counts, rate=0.4, rule="proportional")
    torch.testing.assert_close(parts, torch.tensor([[-0.4, 0.0, 0.4], [1.0, 2.0, 4.0], [0.8, 0.2, -1.0]]))
    targets = torch.tensor([[3.0, 0.0, 0.0], [9.0, 9.0, 0.0], [0.5, 0.0, -0.5]])
    moved = selection_bias_update(bias, counts, rate=0.5, rule="quantile", targets=targets)
    torch.testing.assert_close(moved, torch.tensor([[1.0, -0.5, -0.5], [1.0, 2.0, 4.0], [0.5, 0.0, -0.5]]))
    assert bias[0].abs().sum() == 0, "the old bias is left as it was"
    for layer in range(3):
        torch.testing.assert_close(selection_bias_update(bias[layer], counts[layer], rate=0.3), signs[layer])


@pytest.mark.parametrize("rule", BIAS_RULES)
def test_bias_does_not_drift_and_rate_0_leaves_it(rule: str) -> None:
    g = torch.Generator().manual_seed(0)
    bias, counts, targets = torch.randn(4, 8, generator=g), torch.randint(50, (4, 8), generator=g), torch.ones(4, 8)
    new = selection_bias_update(bias, counts, rate=0.1, rule=rule, targets=targets)  # type: ignore[arg-type]
    torch.testing.assert_close(new.mean(-1), bias.mean(-1))
    assert not new.equal(bias)
    same = selection_bias_update(bias, counts, rate=0.0, rule=rule, targets=targets)  # type: ignore[arg-type]
    assert same.equal(bias)


def test_bias_update_is_exact_beyond_float32() -> None:
    counts = 2**25 + torch.tensor([1, 0, -1])
    assert selection_bias_update(torch.zeros(3), counts, rate=1.0).tolist() == [-1.0, 0.0, 1.0]


def test_bias_in_bfloat16_comes_back_in_float32() -> None:
    bias = torch.tensor([0.5, 0.5], dtype=torch.bfloat16)
    new = selection_bias_update(bias, torch.tensor([1, 3]), rate=1e-3)
    torch.testing.assert_close(new, torch.tensor([0.501, 0.499]))


def test_quantile_by_hand() -> None:
    """Expert 0 leads by 1, 2, 3, 4: half of the tokens are to stay, so it must give up 2.5."""
    scores = torch.tensor([[1.0, 0.0], [2.0, 0.0], [math.nan, math.inf], [3.0, 0.0], [4.0, 0.0]])
    mask = torch.tensor([1, 1, 0, 1, 1])
    targets = selection_bias_quantile(scores, torch.zeros(2), 1, mask)
    assert targets.tolist() == [-2.5, 0.0]
    counts = expert_counts(scores.argmax(-1, keepdim=True), 2, mask)
    bias = selection_bias_update(torch.zeros(2), counts, rate=1.0, rule="quantile", targets=targets)
    assert bias.tolist() == [-1.25, 1.25]
    assert expert_counts((scores + bias).topk(1).indices, 2, mask).tolist() == [2, 2]


@pytest.mark.parametrize("masked", [False, True])
def test_quantile_is_that_of_torch(masked: bool) -> None:
    g = torch.Generator().manual_seed(0)
    scores, bias = torch.randn(101, 7, generator=g), torch.randn(7, generator=g)
    mask = some(101) if masked else None
    real = scores if mask is None else scores[mask]
    margins = real - (real + bias).sort(descending=True).values[:, 3:4]
    expected = -torch.quantile(margins, 1 - 3 / 7, dim=0)
    torch.testing.assert_close(selection_bias_quantile(scores, bias, 3, mask), expected)
    assert selection_bias_quantile(scores, bias, 3, torch.zeros(101)).equal(bias)


@pytest.mark.parametrize("make_scores", [torch.sigmoid, lambda x: x.softmax(-1), lambda x: x])
def test_quantile_balances_within_a_few_steps(make_scores: Callable[[Tensor], Tensor]) -> None:
    """16 experts of which some are favourites of all tokens, on fixed scores: against 5 steps by the sign."""
    g = torch.Generator().manual_seed(0)
    scores = make_scores(torch.randn(8192, 16, generator=g) + torch.linspace(-2, 2, 16))
    violations = {}
    for rule in ("quantile", "sign"):
        bias = torch.zeros(16)
        violations[rule] = []
        for _ in range(6):
            counts = expert_counts((scores + bias).topk(4).indices, 16)
            violations[rule].append(max_violation(counts).item())
            targets = selection_bias_quantile(scores, bias, 4)
            rate = 1.0 if rule == "quantile" else 1e-3
            bias = selection_bias_update(bias, counts, rate=rate, rule=rule, targets=targets)  # type: ignore[arg-type]
    start, first, *_, last = violations["quantile"]
    assert start > 1.5 and first < 0.3 * start and last < 0.05
    assert violations["sign"][-1] > 0.9 * start


# Measures


def test_measures() -> None:
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]])
    assert max_violation(counts).tolist() == [0.0, 3.0, 1.0, 0.0]
    torch.testing.assert_close(load_entropy(counts), torch.tensor([1.0, 0.0, 0.5, 1.0]))
    assert load_entropy(torch.tensor([7])).item() == 1.0
    assert max_violation(torch.tensor([0.5, 0.25])).item() == pytest.approx(1 / 3)


# Errors


def test_wrong_shapes() -> None:
    x, i = torch.zeros(6, 4), torch.zeros(6, 2, dtype=torch.int64)
    for call, match in [
        (lambda: expert_counts(i[:, 0], 4), r"\(N, k\)"),
        (lambda: expert_counts(i.float(), 4), "integer"),
        (lambda: expert_counts(i, 4, torch.ones(5)), r"mask \(5,\).*\(6,\)"),
        (lambda: switch_balance_loss(x, torch.ones(3)), r"give \(E,\)"),
        (lambda: switch_balance_loss(x[None], torch.ones(4)), "flatten"),
        (lambda: switch_balance_loss(x, torch.ones(4), torch.ones(2, 3)), "one entry per token"),
        (lambda: sequence_balance_loss(x, i), r"\(B, T, k\)"),
        (lambda: sequence_balance_loss(x[None, :5], i[None]), "same tokens"),
        (lambda: sequence_balance_loss(x[None], i[None], torch.ones(6)), r"\(1, 6\)"),
        (lambda: router_z_loss(x[None]), "flatten"),
        (lambda: router_z_loss(x, torch.ones(5)), "one entry per token"),
        (lambda: selection_bias_quantile(x, torch.zeros(3), 2), "one per expert"),
        (lambda: selection_bias_quantile(x, torch.zeros(4), 4), "nothing to select"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


def test_bias_update_errors() -> None:
    bias, counts = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=", ".join(BIAS_RULES)):
        selection_bias_update(bias, counts, rate=0.1, rule="adam")  # type: ignore[arg-type]
    for rate in (-0.1, math.nan):
        with pytest.raises(ValueError, match="rate"):
            selection_bias_update(bias, counts, rate=rate)
    with pytest.raises(ValueError, match="selection_bias_quantile"):
        selection_bias_update(bias, counts, rate=0.1, rule="quantile")
    with pytest.raises(ValueError, match=r"\(\.\.\., E\)"):
        selection_bias_update(bias, counts[:2], rate=0.1)


def test_load_fractions_by_hand() -> None:
    counts = torch.tensor([[3, 1, 0, 4], [0, 0, 0, 0]])
    assert load_fractions(counts, 2).tolist() == [[0.75, 0.25, 0.0, 1.0], [0.0] * 4]
