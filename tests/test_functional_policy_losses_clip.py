"""Policy losses of the GRPO family: worked numbers, the papers' equations in slow loops, and TRL's own arithmetic."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.policy_losses.aggregation import aggregate
from rl_plugins.functional.policy_losses.clip import cispo, gmpo, gspo_token, ppo_clip, sapo, vanilla, vespo
from rl_plugins.functional.policy_losses.gvpo import gvpo

LENGTHS = (7, 3, 1, 5)
MASK = torch.arange(7)[None, :] < torch.tensor(LENGTHS)[:, None]
GROUPS = torch.tensor([0, 0, 1, 1])

Loss = Callable[..., Tensor]


def off_policy(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """`vanilla` in the signature of the others."""
    return vanilla(logps, advantages, mask)


def centred(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """`gvpo` in the signature of the others."""
    return gvpo(logps, old, advantages, mask, groups=torch.arange(len(logps)) // 2)


PER_TOKEN: dict[str, Loss] = {
    "vanilla": off_policy,
    "ppo_clip": ppo_clip,
    "ppo_clip-delta": lambda *a: ppo_clip(*a, delta=1.5),
    "ppo_clip-sequence": lambda *a: ppo_clip(*a, level="sequence"),
    "gspo_token": gspo_token,
    "gmpo": gmpo,
    "cispo": cispo,
    "cispo-sequence": lambda *a: cispo(*a, level="sequence"),
    "sapo": sapo,
    "sapo-sequence": lambda *a: sapo(*a, level="sequence"),
    "vespo": vespo,
}
LOSSES = PER_TOKEN | {"gvpo": centred}


def batch(seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (a leaf), those of the sampler, and one advantage per sequence, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(4, 7, generator=generator)
    logps = (old + spread * torch.randn(4, 7, generator=generator)).requires_grad_()
    return logps, old, torch.tensor([1.5, -0.5, -2.0, 0.7])


def gradient(loss: Tensor, logps: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logps)[0]


# Worked by hand.


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (5.0, -1.0, 3.0, 0.0),  # beyond delta with a loss: capped at 3, no more pull
        (2.0, -1.0, 2.0, 2.0),  # between the bound and delta: pulled back in full
        (5.0, 1.0, -1.2, 0.0),  # with a gain the clip bites first
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_two_sided_clip(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps = torch.tensor([[math.log(ratio) - 2.0]], requires_grad=True)
    out = ppo_clip(logps, torch.full((1, 1), -2.0), torch.tensor([advantage]), delta=3.0)
    assert out.item() == pytest.approx(loss, rel=1e-5)
    assert gradient(out.sum(), logps).item() == pytest.approx(slope, rel=1e-5)


def test_sequence_level_by_hand() -> None:
    """Ratios 4 and 1 over two real tokens: their geometric mean is 2."""
    old = torch.tensor([[-3.0, -2.0, -1.0]])
    logps = (old + torch.tensor([[math.log(4.0), 0.0, 7.0]])).requires_grad_()
    mask = torch.tensor([[1, 1, 0]])
    out = ppo_clip(logps, old, torch.tensor([-3.0]), mask, level="sequence")
    torch.testing.assert_close(out, torch.tensor([[6.0, 6.0, 0.0]]))
    # The mean over the sequence is 3 s; ds/dlogp_t = s / 2.
    torch.testing.assert_close(gradient(aggregate(out, mask, "sequence"), logps), torch.tensor([[3.0, 3.0, 0.0]]))


def test_cispo_by_hand() -> None:
    """Ratios 4 and 0.5 under a cap of 3: weights 3 and 0.5, and no gradient through them."""
    old = torch.tensor([[-2.0, -1.0]])
    logps = (old + torch.tensor([[4.0, 0.5]]).log()).requires_grad_()
    out = cispo(logps, old, torch.tensor([2.0]), epsilon_high=3.0)
    torch.testing.assert_close(out, -2 * torch.tensor([[3.0, 0.5]]) * logps.detach())
    torch.testing.assert_close(gradient(out.sum(), logps), torch.tensor([[-6.0, -1.0]]))


def test_sapo_by_hand() -> None:
    """Ratio 2: the gate is 4/tau sigmoid(tau), its slope 4 s (1 - s) times the ratio."""
    old = torch.tensor([[-1.0], [-1.0]])
    logps = (old + math.log(2.0)).requires_grad_()
    out = sapo(logps, old, torch.tensor([1.0, -1.0]), temperature_pos=1.0, temperature_neg=2.0)
    one, two = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    torch.testing.assert_close(out, torch.tensor([[-4 * one], [2 * two]]))
    slopes = torch.tensor([[-8 * one * (1 - one)], [8 * two * (1 - two)]])
    torch.testing.assert_close(gradient(out.sum(), logps), slopes)


def test_vespo_by_hand() -> None:
    """Ratios 2 and 0.25: W = 0.5, phi = 0.5^2 e^1.5 for the gain and 0.5^3 e^1 for the loss."""
    old = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    logps = (old + torch.tensor([[2.0, 0.25]]).log()).requires_grad_()
    out = vespo(logps, old, torch.tensor([1.0, -1.0]))
    weights = torch.tensor([[0.25 * math.exp(1.5)], [-0.125 * math.exp(1.0)]])
    torch.testing.assert_close(out, -weights * logps.detach())
    torch.testing.assert_close(gradient(out.sum(), logps), -weights.expand(2, 2))


def test_vespo_limits() -> None:
    """Far off on either side the weight is 0, never inf or NaN."""
    old = torch.full((2, 3), -30.0)
    logps = torch.tensor([[-0.1] * 3, [-900.0] * 3], requires_grad=True)
    out = vespo(logps, old, torch.tensor([1.0, 1.0]))
    assert out[0].tolist() == [0.0, 0.0, 0.0]
    assert out[1].abs().max() < 1e-10
    assert torch.isfinite(gradient(out.sum(), logps)).all()


def test_gmpo_by_hand() -> None:
    """Log ratios 1, -1, 0.2: with a gain only the first is cut (to 0.4), with a loss only the second (to -0.4)."""
    steps = torch.tensor([[1.0, -1.0, 0.2]]).expand(2, 3)
    old = torch.full((2, 3), -3.0)
    logps = (old + steps).requires_grad_()
    out = gmpo(logps, old, torch.tensor([2.0, -3.0]))
    gain, loss = math.exp((0.4 - 1 + 0.2) / 3), math.exp((1 - 0.4 + 0.2) / 3)
    torch.testing.assert_close(out, torch.tensor([[-2 * gain] * 3, [3 * loss] * 3]))
    # The sum over three equal tokens undoes the 1/|y| of the mean log ratio.
    expected = torch.tensor([[0.0, -2 * gain, -2 * gain], [3 * loss, 0.0, 3 * loss]])
    torch.testing.assert_close(gradient(out.sum(), logps), expected)


def test_gmpo_with_advantages_per_token() -> None:
    """Each token is clipped by its own sign and weighs the sequence's one ratio by its own advantage."""
    old = torch.full((1, 2), -3.0)
    logps = old + torch.tensor([[1.0, -1.0]])
    out = gmpo(logps, old, torch.tensor([[2.0, -3.0]]), epsilon_low=0.5, epsilon_high=0.3)
    ratio = math.exp((0.3 - 0.5) / 2)
    torch.testing.assert_close(out, torch.tensor([[-2 * ratio, 3 * ratio]]))


# The equations as the papers write them, one token at a time.


def looped(token: Callable[[list[float], list[float], float, int], float], logps: Tensor, old: Tensor) -> Tensor:
    """Fill `(B, T)` with `token(logps of the sequence, old ones, advantage, t)`."""
    out = torch.zeros(4, 7)
    advantages = batch()[2].tolist()
    for i, length in enumerate(LENGTHS):
        now, then = logps[i, :length].tolist(), old[i, :length].tolist()
        for t in range(length):
            out[i, t] = token(now, then, advantages[i], t)
    return out


def ratio_of(now: list[float], then: list[float]) -> float:
    """Product of the token ratios."""
    return math.prod(math.exp(a - b) for a, b in zip(now, then, strict=True))


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def gspo_equation(now: list[float], then: list[float], advantage: float, t: int) -> float:
    s = ratio_of(now, then) ** (1 / len(now))
    return -min(s * advantage, clip(s, 0.9, 1.05) * advantage)


def gmpo_equation(now: list[float], then: list[float], advantage: float, t: int) -> float:
    sign = math.copysign(1, advantage)
    product = 1.0
    for a, b in zip(now, then, strict=True):
        power = math.exp(a - b) ** sign
        product *= min(power, clip(power, math.exp(-0.4), math.exp(0.4))) ** sign
    return -(product ** (1 / len(now))) * advantage


def sapo_equation(now: list[float], then: list[float], advantage: float, t: int) -> float:
    tau = 1.0 if advantage > 0 else 1.05
    return -4 / tau / (1 + math.exp(-tau * (math.exp(now[t] - then[t]) - 1))) * advantage


def vespo_equation(now: list[float], then: list[float], advantage: float, t: int) -> float:
    k, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    w = ratio_of(now, then)
    return -(w**k) * math.exp(rate * (1 - w)) * advantage * now[t]


@pytest.mark.parametrize(
    ("loss", "equation"),
    [
        (lambda *a: ppo_clip(*a, epsilon_low=0.1, epsilon_high=0.05, level="sequence"), gspo_equation),
        (lambda *a: gspo_token(*a, epsilon_low=0.1, epsilon_high=0.05), gspo_equation),
        (gmpo, gmpo_equation),
        (sapo, sapo_equation),
        (vespo, vespo_equation),
        (cispo, lambda now, then, a, t: -min(math.exp(now[t] - then[t]), 5.0) * a * now[t]),
        (off_policy, lambda now, then, a, t: -a * now[t]),
        (
            ppo_clip,
            lambda now, then, a, t: (
                -min(math.exp(now[t] - then[t]) * a, clip(math.exp(now[t] - then[t]), 0.8, 1.2) * a)
            ),
        ),
    ],
)
def test_equation_of_the_paper(loss: Loss, equation: Callable[..., float]) -> None:
    logps, old, advantages = batch(spread=1.0)
    expected = looped(equation, logps, old)
    torch.testing.assert_close(loss(logps, old, advantages, MASK).detach(), expected, rtol=1e-5, atol=1e-6)


# TRL's own loss on the same numbers.


def trl_loss(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, loss_type: str, **settings: Any) -> Tensor:
    """Call TRL's `_compute_loss` on a trainer that has only what the loss reads."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    cls = settings.pop("trainer", grpo_trainer.GRPOTrainer)
    mask = mask.long()
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    if "importance_sampling_ratio" in settings:
        inputs["importance_sampling_ratio"] = settings.pop("importance_sampling_ratio")
    args = SimpleNamespace(
        delta=settings.pop("delta", None),
        use_bias_correction_kl=False,
        steps_per_generation=1,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        args=args,
        loss_type=loss_type,
        importance_sampling_level=settings.pop("level", "token"),
        epsilon_low=settings.pop("epsilon_low", 0.2),
        epsilon_high=settings.pop("epsilon_high", 0.28),
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=11,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **k: x, gather=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    assert not settings
    return cls._compute_loss(stub, None, inputs)


CLIPPED = {"epsilon_low": 0.2, "epsilon_high": 0.28}
TRL_TYPES = {
    "grpo": (lambda *a, **k: ppo_clip(*a, **CLIPPED, **k), "sequence"),
    "bnpo": (lambda *a, **k: ppo_clip(*a, **CLIPPED, **k), "micro_batch"),
    "dr_grpo": (lambda *a, **k: ppo_clip(*a, **CLIPPED, **k), "constant"),
    "dapo": (lambda *a, **k: ppo_clip(*a, **CLIPPED, **k), "token"),
    "luspo": (lambda *a, **k: ppo_clip(*a, **CLIPPED, **k), "sequence_sum"),
    "cispo": (lambda *a, **k: cispo(*a, epsilon_high=0.28, **k), "token"),
    "sapo": (sapo, "sequence"),
}


def check_against_trl(logps: Tensor, ours: Tensor, theirs: Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(gradient(ours, logps), gradient(theirs, logps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_token", [False, True], ids=["sequence-advantages", "token-advantages"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_TYPES)
def test_equals_trl(loss_type: str, level: str, per_token: bool) -> None:
    logps, old, advantages = batch()
    if per_token:
        advantages = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    loss, how = TRL_TYPES[loss_type]
    tokens = loss(logps, old, advantages, MASK, level=level)
    ours = aggregate(tokens, MASK, how, num_items=MASK.sum(), max_length=11)
    check_against_trl(logps, ours, trl_loss(logps, old, advantages, MASK, loss_type, level=level))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_equals_trl_with_delta(level: str) -> None:
    logps, old, advantages = batch(spread=1.0)
    tokens = ppo_clip(logps, old, advantages, MASK, **CLIPPED, delta=1.4, level=level)
    theirs = trl_loss(logps, old, advantages, MASK, "dapo", delta=1.4, level=level)
    check_against_trl(logps, aggregate(tokens, MASK, "token"), theirs)


@pytest.mark.parametrize("per_token", [False, True], ids=["sequence-advantages", "token-advantages"])
@pytest.mark.parametrize("corrected", [False, True])
def test_vespo_equals_trl(corrected: bool, per_token: bool) -> None:
    logps, old, advantages = batch(spread=0.3)
    if per_token:
        advantages = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Tensor] = {}
    weights = None
    if corrected:
        weights = 0.5 + torch.rand(4, 7, generator=torch.Generator().manual_seed(2))
        weights[0, 2] = 0.0  # what TRL's token_mask leaves of a token too far from its sampler
        # TRL sums over padding, too, where its weights are 1.
        settings = {"importance_sampling_ratio": weights.masked_fill(~MASK, 1.0)}
    tokens = vespo(logps, old, advantages, MASK, sampler_weights=weights)
    theirs = trl_loss(logps, old, advantages, MASK, "vespo", **settings)
    check_against_trl(logps, aggregate(tokens, MASK, "token"), theirs)


@pytest.mark.parametrize("rate", [0.0, 3.0])
def test_vespo_limits_equal_trl(rate: float) -> None:
    """Token ratios, sampler weights and sequence weights beyond their limits, and a weight that overflows."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    log_ratio = torch.tensor([[30.0, 0.0], [30.0, -25.0], [-30.0, 0.0], [9.2, 0.0], [0.3, -0.2]])
    weights = torch.tensor([[1.0, 1.0], [1e12, 1e-12], [1.0, 1e9], [1.0, math.nan], [1.0, 1.0]])
    parameters = {"k_pos": 20.0, "lambda_pos": rate, "k_neg": 0.1, "lambda_neg": rate}
    old = torch.full((5, 2), -40.0)
    for sampler_weights in (None, weights):
        for sign in (1.0, -1.0):
            advantages = torch.full((5,), sign)
            phi = trainer.get_gamma_weights(
                advantages[:, None], log_ratio, torch.ones(5, 2), sampler_weights, **parameters
            )
            out = vespo(old + log_ratio, old, advantages, sampler_weights=sampler_weights, **parameters)
            # Ratios are exact to the rounding of logps near -40, which k = 20 and the exponential magnify.
            torch.testing.assert_close(out, -phi * sign * (old + log_ratio), rtol=1e-3, atol=1e-6)


def test_gmpo_equals_trl() -> None:
    trainer = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer
    logps, old, advantages = batch()
    tokens = gmpo(logps, old, advantages, MASK, epsilon_low=0.3, epsilon_high=0.4)
    theirs = trl_loss(logps, old, advantages, MASK, "grpo", trainer=trainer, epsilon_low=0.3, epsilon_high=0.4)
    check_against_trl(logps, aggregate(tokens, MASK, "sequence"), theirs)


# What the losses have in common.


@pytest.mark.parametrize("name", ["ppo_clip", "ppo_clip-delta", "cispo", "sapo", "gspo_token", "vespo"])
def test_gradient_at_ratio_one_is_vanilla(name: str) -> None:
    logps, _, advantages = batch()
    old = logps.detach().clone()
    expected = -(advantages[:, None] * MASK)
    torch.testing.assert_close(gradient(LOSSES[name](logps, old, advantages, MASK).sum(), logps), expected)


@pytest.mark.parametrize("name", ["ppo_clip-sequence", "gmpo", "sapo-sequence", "cispo-sequence"])
def test_sequence_gradient_at_ratio_one_is_vanilla(name: str) -> None:
    """Sequence ratios spread the pull over their tokens: the sum is the same."""
    logps, _, advantages = batch()
    tokens = LOSSES[name](logps, logps.detach().clone(), advantages, MASK)
    torch.testing.assert_close(gradient(tokens.sum(), logps), -(advantages[:, None] * MASK))


def test_values_at_ratio_one() -> None:
    logps, _, advantages = batch()
    old = logps.detach().clone()
    signed = advantages[:, None] * MASK
    torch.testing.assert_close(sapo(logps, old, advantages, MASK, temperature_neg=1.0), -2 * signed)
    for loss in (vespo, cispo):
        torch.testing.assert_close(loss(logps, old, advantages, MASK), vanilla(logps, advantages, MASK))


@pytest.mark.parametrize("width", [0.05, 10.0], ids=["clipped", "unclipped"])
def test_gspo_token_is_gspo_for_constant_advantages(width: float) -> None:
    logps, old, advantages = batch()
    tokens = gspo_token(logps, old, advantages, MASK, epsilon_low=width, epsilon_high=width)
    sequences = ppo_clip(logps, old, advantages, MASK, epsilon_low=width, epsilon_high=width, level="sequence")
    torch.testing.assert_close(tokens, sequences)
    torch.testing.assert_close(
        gradient(aggregate(tokens, MASK, "sequence"), logps), gradient(aggregate(sequences, MASK, "sequence"), logps)
    )


def test_gspo_token_pulls_each_token_by_its_own_advantage() -> None:
    logps, old, _ = batch()
    advantages = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))
    tokens = gspo_token(logps, old, advantages, MASK, epsilon_low=10.0, epsilon_high=10.0)
    # Unclipped the loss is -s A_t, and so is its derivative: s is under stop-gradient.
    torch.testing.assert_close(gradient(tokens.sum(), logps), tokens.detach())


@pytest.mark.parametrize("loss", [ppo_clip, cispo, sapo])
def test_levels_agree_on_one_token(loss: Loss) -> None:
    logps, old, advantages = (x[:, :1] if x.ndim == 2 else x for x in batch())
    token, sequence = (loss(logps, old, advantages, level=level) for level in ("token", "sequence"))
    torch.testing.assert_close(token, sequence)
    torch.testing.assert_close(gradient(token.sum(), logps), gradient(sequence.sum(), logps))


def test_gmpo_of_one_token_is_ppo() -> None:
    logps, old, advantages = (x[:, :1] if x.ndim == 2 else x for x in batch())
    ours = gmpo(logps, old, advantages, epsilon_low=99.0, epsilon_high=99.0)
    theirs = ppo_clip(logps, old, advantages, epsilon_low=99.0, epsilon_high=99.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours.sum(), logps), gradient(theirs.sum(), logps))


@pytest.mark.parametrize("name", PER_TOKEN)
def test_advantages_per_sequence_are_repeated(name: str) -> None:
    logps, old, advantages = batch()
    repeated = advantages[:, None].expand(4, 7)
    for mask in (MASK, None):
        torch.testing.assert_close(
            LOSSES[name](logps, old, advantages, mask), LOSSES[name](logps, old, repeated, mask), rtol=0, atol=0
        )


@pytest.mark.parametrize("name", LOSSES)
def test_padding_reaches_nothing(name: str) -> None:
    logps, old, advantages = batch()
    if name != "gvpo":
        advantages = advantages[:, None].repeat(1, 7)
    mask = MASK.clone()
    mask[0, 2] = False  # a hole
    clean = LOSSES[name](logps, old, advantages, mask)
    expected = gradient(aggregate(clean, mask, "sequence"), logps)
    assert (clean[~mask] == 0).all()
    assert (expected[~mask] == 0).all()
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = logps.detach().masked_fill(~mask, garbage).requires_grad_()
        spoiled = advantages.masked_fill(~mask, garbage) if advantages.ndim == 2 else advantages
        out = LOSSES[name](dirty, old.masked_fill(~mask, -garbage), spoiled, mask)
        torch.testing.assert_close(out, clean, rtol=0, atol=0)
        torch.testing.assert_close(gradient(aggregate(out, mask, "sequence"), dirty), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_without_tokens_changes_nothing(name: str) -> None:
    logps, old, advantages = batch()
    mask = MASK.clone()
    mask[1] = False
    spoiled = advantages.clone()
    spoiled[1] = math.nan
    out = LOSSES[name](logps, old, spoiled, mask)
    assert torch.isfinite(out).all() and (out[1] == 0).all()
    assert torch.isfinite(gradient(out.sum(), logps)).all()
    rows = [0, 2, 3] if name != "gvpo" else [2, 3]  # the row's partner loses its group
    torch.testing.assert_close(out[rows], LOSSES[name](logps, old, advantages, MASK)[rows])


def test_garbage_in_masked_sampler_weights() -> None:
    logps, old, advantages = batch()
    weights = 0.5 + torch.rand(4, 7, generator=torch.Generator().manual_seed(2))
    clean = vespo(logps, old, advantages, MASK, sampler_weights=weights)
    for garbage in (math.nan, math.inf, -1.0):
        dirty = vespo(logps, old, advantages, MASK, sampler_weights=weights.masked_fill(~MASK, garbage))
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_upcast(name: str) -> None:
    logps, old, advantages = (x.bfloat16() for x in batch())
    out = LOSSES[name](logps, old, advantages, MASK)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, LOSSES[name](logps.float(), old.float(), advantages.float(), MASK))
    assert LOSSES[name](logps.double(), old.double(), advantages.double(), MASK).dtype == torch.float64


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"cispo", "cispo-sequence", "vespo", "gspo_token"}))
def test_derivative_by_finite_differences(name: str) -> None:
    """Away from the kinks, and for all losses without a stop-gradient, the gradient is the value's derivative."""
    logps, old, advantages = (x.detach().double() for x in batch())
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, old, advantages, MASK), logps.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_are_checked(name: str) -> None:
    logps, old, advantages = batch()
    with pytest.raises(ValueError, match="advantages"):
        LOSSES[name](logps, old, advantages[:, None], MASK)
    with pytest.raises(ValueError, match="mask"):
        LOSSES[name](logps, old, advantages, MASK[:, :6])
    if name != "vanilla":
        with pytest.raises(ValueError, match="old_logps"):
            LOSSES[name](logps, old[:, :6], advantages, MASK)


def test_parameters_are_checked() -> None:
    logps, old, advantages = batch()
    for loss, bad in (
        (ppo_clip, {"epsilon_low": -0.1}),
        (ppo_clip, {"epsilon_high": -0.1}),
        (ppo_clip, {"delta": -1.0}),
        (gspo_token, {"epsilon_low": -0.1}),
        (gmpo, {"epsilon_high": -0.1}),
        (cispo, {"epsilon_high": -0.1}),
        (sapo, {"temperature_pos": 0.0}),
        (sapo, {"temperature_neg": -1.0}),
        (vespo, {"k_neg": -1.0}),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            loss(logps, old, advantages, MASK, **bad)
    for loss in (ppo_clip, cispo, sapo):
        with pytest.raises(ValueError, match="sentence"):
            loss(logps, old, advantages, MASK, level="sentence")
    with pytest.raises(ValueError, match="sampler_weights"):
        vespo(logps, old, advantages, MASK, sampler_weights=torch.ones(4, 1))
