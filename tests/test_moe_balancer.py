"""`RouterBalancer` without a host: what it counts and when, how biases move, and the gradient of its losses."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpModel

from rl_plugins.functional.routing import (
    expert_counts,
    router_z_loss,
    sequence_balance_loss,
    switch_balance_loss,
)
from rl_plugins.moe import BalancingConfig, Router, RouterBalancer, find_routers
from rl_plugins.nn import attach_mtp_heads
from rl_plugins.nn.cache_name import cache_name

from .helpers.moe_models import make_moe_model, mean_switch_loss, pooled_switch_loss, spread_routers

IDS = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
OTHER_MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0]])
AUX, Z, SCALE = 0.3, 0.1, 0.25  # Coefficients, and what the host multiplies a micro-batch's loss by.
Batch = tuple[Tensor, Tensor]
BATCH: Batch = (IDS, MASK)
OTHER: Batch = (IDS.flip(0).roll(3, 1), OTHER_MASK)

CHECKPOINTING = pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])


def forward(model: nn.Module, batch: Batch = BATCH) -> Any:
    return model(input_ids=batch[0], attention_mask=batch[1], labels=batch[0], use_cache=False)


def trained(family: str = "mixtral", reentrant: bool | None = None, **overrides: Any) -> Any:
    """A model in training mode, perhaps with gradient checkpointing."""
    model = make_moe_model(family, **overrides).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: nn.Module, expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    ours = gradients(model)
    assert ours.keys() == expected.keys() and len(expected) > 3
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def recorded(model: nn.Module, batch: Batch = BATCH) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Output of one forward, and every router's logits (N, E) and indices (N, k)."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(router: Router) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(router.read(output))

        return hook

    handles = [router.module.register_forward_hook(keep(router)) for router in find_routers(model)]
    output = forward(model, batch)
    for handle in handles:
        handle.remove()
    return output, [logits for logits, _ in seen], [indices for _, indices in seen]


def counts_of(model: nn.Module, *batches: Batch) -> list[list[int]]:
    """Tokens per expert and layer, from forwards that no balancer sees."""
    with torch.no_grad():
        total: list[Tensor] = []
        for ids, mask in batches:
            _, logits, indices = recorded(model, (ids, mask))
            counts = [expert_counts(i, x.shape[-1], mask.flatten()) for x, i in zip(logits, indices, strict=True)]
            total = [a + b for a, b in zip(total, counts, strict=True)] if total else counts
    return [counts.tolist() for counts in total]


def last_counts(balancer: RouterBalancer) -> list[list[int]]:
    return [counts.tolist() for counts in balancer.last_counts]


def moved_by_hand(bias: Sequence[float], counts: Sequence[int], rate: float, rule: str = "sign") -> list[float]:
    """One step of algorithm 1 of 2408.15664, in plain Python, re-centred."""
    mean = sum(counts) / len(counts)
    error = [mean - c for c in counts]
    steps = [rate * ((e > 0) - (e < 0) if rule == "sign" else e / mean) for e in error]
    centre = sum(steps) / len(steps)
    return [b + step - centre for b, step in zip(bias, steps, strict=True)]


# What counts


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4"])
def test_only_training_forwards_count(family: str) -> None:
    model = trained(family)
    balancer = RouterBalancer(model)
    forward(model.eval())
    with torch.no_grad():
        forward(model.train())
    with torch.inference_mode():
        forward(model)
    model.generate(IDS[:, -3:], max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match="No router of .* ran in a training forward"):
        balancer.update()
    forward(model.train())
    forward(model.eval())
    balancer.update()
    assert last_counts(balancer) == counts_of(model, BATCH)


@CHECKPOINTING
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_checkpointing_counts_once(family: str, reentrant: bool | None) -> None:
    model = trained(family, reentrant)
    expected = counts_of(model, BATCH)
    balancer = RouterBalancer(model)
    for _ in range(2):
        forward(model).loss.backward()
        balancer.update()
        assert last_counts(balancer) == expected
        for router in balancer.routers:  # as before the first step
            router.bias.zero_()


def test_a_step_without_a_forward_counts_nothing_and_moves_nothing() -> None:
    model = trained()
    balancer = RouterBalancer(model)
    forward(model)
    balancer.update()
    before = [bias.clone() for bias in balancer.float32_biases]
    metrics = balancer.update()
    assert last_counts(balancer) == [[0] * 8] * 3
    assert all(torch.equal(a, b) for a, b in zip(before, balancer.float32_biases, strict=True))
    assert metrics["moe/max_violation"] == 0.0


@CHECKPOINTING
def test_a_forward_that_fails_leaves_the_next_one_right(reentrant: bool | None) -> None:
    config = BalancingConfig(rate=0.0, aux_loss_coef=0.3)
    model = trained(reentrant=reentrant)
    forward(model).loss.backward()
    model.zero_grad()
    balancer = RouterBalancer(model, config)

    def fail(*_: Any) -> None:
        raise MemoryError("out of memory")

    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        forward(model)
    handle.remove()
    forward(model.eval())
    forward(model.train()).loss.backward()
    metrics = balancer.update()
    balancer.detach()
    ours = gradients(model)
    assert last_counts(balancer) == counts_of(model, BATCH)

    fresh = trained(reentrant=reentrant)
    balancer = RouterBalancer(fresh, config)
    forward(fresh).loss.backward()
    assert balancer.update() == metrics
    assert_same_gradients(fresh, ours, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4_top2"])
def test_eight_micro_batches_are_one_batch(family: str, rule: str) -> None:
    ids = torch.randint(2, 40, (8, 9), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(9) >= torch.arange(8)[:, None]).long()
    balancers = []
    for rows in (8, 1):
        model = trained(family)
        balancer = RouterBalancer(model, BalancingConfig(rate=0.02, rule=rule))
        for _ in range(3):
            for part in zip(ids.split(rows), mask.split(rows), strict=True):
                forward(model, part).loss.backward()
            balancer.update()
        balancers.append(balancer)
    whole, parts = balancers
    assert last_counts(whole) == last_counts(parts)
    tokens = int(mask.sum())
    assert [sum(counts) for counts in last_counts(whole)] == [2 * tokens] * len(whole.routers)
    for ours, theirs, router in zip(whole.float32_biases, parts.float32_biases, parts.routers, strict=True):
        assert torch.equal(ours, theirs) and ours.any()
        assert torch.equal(router.bias, theirs)


def test_what_padding_holds_does_not_matter() -> None:
    results = []
    for seed in (0, 1):
        model = trained()
        garbage = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(seed)) * 1e4
        embeds = model.get_input_embeddings()(IDS).detach()
        embeds = torch.where(MASK[..., None] > 0, embeds, garbage)
        balancer = RouterBalancer(model, BalancingConfig(aux_loss_coef=0.1, z_loss_coef=0.1))
        # The last token of left padding predicts the first real one; no data collator trains on that either.
        labels = IDS.masked_fill((MASK * MASK.roll(1, 1)) == 0, -100)
        model(inputs_embeds=embeds, attention_mask=MASK, labels=labels).loss.backward()
        metrics = balancer.update()
        results.append((last_counts(balancer), metrics, gradients(model)))
    (counts, metrics, first), (other_counts, other_metrics, second) = results
    assert counts == other_counts and [sum(row) for row in counts] == [2 * int(MASK.sum())] * 3
    assert metrics == other_metrics
    gate = "model.layers.1.mlp.gate.weight"
    torch.testing.assert_close(first[gate], second[gate], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["layer", "sequence"])
def test_padding_may_hold_nan(kind: str) -> None:
    model = trained()
    config = BalancingConfig(rate=0.0, aux_loss_coef=AUX, z_loss_coef=Z, aux_loss_type=kind)
    balancer = RouterBalancer(model, config)
    results = []
    for filler in (math.nan, 0.0):
        hidden = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0))
        hidden = torch.where(MASK[..., None] > 0, hidden, filler).requires_grad_()
        with balancer.counting(MASK):
            logits, _, _ = balancer.routers[1].module(hidden)
        logits[MASK.flatten() > 0].square().mean().backward()
        metrics = balancer.update()
        results.append((last_counts(balancer), metrics["moe/aux_loss"], metrics["moe/z_loss"], hidden.grad))
    (counts, aux, z, gradient), (other_counts, other_aux, other_z, other_gradient) = results
    assert counts == other_counts and [sum(row) for row in counts] == [0, 2 * int(MASK.sum()), 0]
    assert aux == other_aux and z == other_z and aux.isfinite()
    assert torch.equal(gradient, other_gradient)
    assert gradient[MASK > 0].any(-1).all() and not gradient[MASK == 0].any()


def test_masks_of_other_shapes() -> None:
    model = trained()
    balancer = RouterBalancer(model)
    model.model(IDS, MASK)  # by position, and the trunk alone
    balancer.update()
    assert [sum(counts) for counts in last_counts(balancer)] == [2 * int(MASK.sum())] * 3
    model(input_ids=IDS)
    balancer.update()
    assert [sum(counts) for counts in last_counts(balancer)] == [2 * 27] * 3
    model(input_ids=IDS, attention_mask=torch.zeros(3, 1, 9, 9))  # packed rows: nothing is padding
    balancer.update()
    assert [sum(counts) for counts in last_counts(balancer)] == [2 * 27] * 3
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:, :5], attention_mask=MASK[:, :5], **{cache_name(): cache})
    model(input_ids=IDS[:, 5:], attention_mask=MASK, **{cache_name(): cache})
    balancer.update()
    assert [sum(counts) for counts in last_counts(balancer)] == [2 * int(MASK[:, 5:].sum())] * 3


def uneven() -> Any:
    """A mixtral whose second layer has 4 experts instead of 8."""
    model = trained()
    model.model.layers[1].mlp = make_moe_model("mixtral", seed=1, num_local_experts=4).train().model.layers[1].mlp
    return model


@pytest.mark.parametrize("rule", ["sign", "proportional", "quantile"])
def test_layers_with_different_numbers_of_experts(rule: str) -> None:
    model = uneven()
    expected = counts_of(model, BATCH)
    assert [len(counts) for counts in expected] == [8, 4, 8]
    balancer = RouterBalancer(model, BalancingConfig(rate=0.1, rule=rule, aux_loss_coef=0.1))
    forward(model).loss.backward()
    balancer.update()
    assert last_counts(balancer) == expected
    assert [len(bias) for bias in balancer.float32_biases] == [8, 4, 8]
    if rule != "quantile":
        for master, counts in zip(balancer.float32_biases, expected, strict=True):
            by_hand = moved_by_hand([0.0] * len(counts), counts, 0.1, rule)
            torch.testing.assert_close(master.tolist(), by_hand, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="equal numbers of experts; use 'layer'"):
        RouterBalancer(uneven(), BalancingConfig(rate=0.0, aux_loss_coef=0.1, aux_loss_type="pooled"))


# Bias


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "ernie4_5_moe", "afmoe"])
def test_three_steps_by_hand(family: str, rule: str) -> None:
    model = trained(family)
    balancer = RouterBalancer(model, BalancingConfig(rate=0.05, rule=rule))
    expected = [[0.0] * 8 for _ in balancer.routers]
    for batch in (BATCH, OTHER, BATCH):
        counts = counts_of(model, batch)
        forward(model, batch)
        balancer.update()
        assert last_counts(balancer) == counts
        expected = [moved_by_hand(b, c, 0.05, rule) for b, c in zip(expected, counts, strict=True)]
        for bias, master, router in zip(expected, balancer.float32_biases, balancer.routers, strict=True):
            torch.testing.assert_close(master.tolist(), bias, rtol=0, atol=1e-6)
            assert torch.equal(router.bias.flatten(), master)
            assert abs(sum(bias)) < 1e-6
    assert last_counts(balancer) != counts_of(model, BATCH), "the third step moved some token"


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    model = trained("deepseek_v3").to(torch.bfloat16)
    for router in find_routers(model):
        router.bias.fill_(0.75)
    balancer = RouterBalancer(model)
    forward(model)
    balancer.update()
    counts = last_counts(balancer)
    for router, master, row in zip(balancer.routers, balancer.float32_biases, counts, strict=True):
        assert router.stored_bias.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert set(router.stored_bias.tolist()) == {0.75}, "bfloat16 does not resolve 0.75 + 0.001"
        assert torch.equal(router.bias, master), "the router sees float32"
        torch.testing.assert_close(master.tolist(), moved_by_hand([0.75] * 8, row, 1e-3), rtol=0, atol=1e-7)
    for _ in range(4):
        forward(model)
        balancer.update()
    for router, master in zip(balancer.routers, balancer.float32_biases, strict=True):
        assert torch.equal(router.stored_bias, master.to(torch.bfloat16))
        assert len(set(router.stored_bias.tolist())) > 1


def test_schedule() -> None:
    model = trained()
    balancer = RouterBalancer(model, BalancingConfig(rate=0.1, start=0.25, stop=0.75))
    moves = []
    for step in range(8):
        before = [bias.clone() for bias in balancer.float32_biases]
        forward(model)
        balancer.update(progress=step / 8)
        moves.append(not all(torch.equal(a, b) for a, b in zip(before, balancer.float32_biases, strict=True)))
    assert moves == [False, False, True, True, True, True, False, False]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_rate_of_zero_never_moves_a_bias(family: str) -> None:
    model = trained(family)
    own = [router.bias.fill_(0.1) for router in find_routers(model) if router.has_bias]
    balancer = RouterBalancer(model, BalancingConfig(rate=0.0, count_only=True))
    for _ in range(2):
        forward(model)
        metrics = balancer.update()
    assert [router.injected for router in balancer.routers] == [None] * len(balancer.routers)
    assert all(bias.unique().tolist() == own[0].unique().tolist() for bias in own)
    assert ("moe/bias_range" in metrics) == bool(own)
    assert last_counts(balancer) == counts_of(model, BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_top2", "deepseek_v2", "dots1", "ernie4_5_moe"])
def test_quantile_rule_balances_a_fixed_batch(family: str) -> None:
    ids = torch.randint(2, 40, (8, 32), generator=torch.Generator().manual_seed(2))
    model = trained(family)
    balancer = RouterBalancer(model, BalancingConfig(rate=0.5, rule="quantile"))
    violations = []
    for _ in range(12):
        forward(model, (ids, torch.ones_like(ids)))
        violations.append(balancer.update()["moe/max_violation"].item())
    assert violations[0] > 0.5
    assert violations[-1] < 0.15, violations


@pytest.mark.slow
def test_sign_rule_balances_a_fixed_batch() -> None:
    ids = torch.randint(2, 40, (8, 32), generator=torch.Generator().manual_seed(2))
    model = trained()
    balancer = RouterBalancer(model, BalancingConfig(rate=0.005))
    violations = []
    for _ in range(60):
        model.model(ids)
        violations.append(balancer.update()["moe/max_violation"].item())
    assert violations[0] > 0.5 and max(violations[-5:]) < 0.35, violations


def test_metrics_by_hand() -> None:
    model = trained()
    balancer = RouterBalancer(model, BalancingConfig(rate=0.1, aux_loss_coef=0.1, z_loss_coef=0.01))
    aux, z = [], []
    for batch in (BATCH, OTHER):
        output, logits, indices = recorded(model, batch)
        output.loss.backward()
        mask = batch[1].flatten()
        aux.append(mean_switch_loss(logits, indices, mask).item())
        z += [router_z_loss(x, mask).item() for x in logits]
    metrics = balancer.update()
    counts = last_counts(balancer)
    violations = [(max(c) - sum(c) / 8) / (sum(c) / 8) for c in counts]
    entropies = [-sum(x / sum(c) * math.log(x / sum(c)) for x in c if x) / math.log(8) for c in counts]
    expected = {
        "moe/max_violation": sum(violations) / 3,
        "moe/max_violation_worst": max(violations),
        "moe/load_entropy": sum(entropies) / 3,
        "moe/unused_experts": sum(x == 0 for c in counts for x in c) / 24,
        "moe/bias_range": 0.2,
        "moe/aux_loss": sum(aux) / 2,
        "moe/z_loss": sum(z) / 6,
    }
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.shape == ()
        assert value.item() == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


# Auxiliary losses


def explicit_loss(kind: str, family: str, logits: list[Tensor], indices: list[Tensor], mask: Tensor) -> Tensor:
    """The weighted auxiliary losses of one forward, in the graph."""
    scoring = "sigmoid" if family in ("deepseek_v3", "glm4_moe", "llama4_top2") else "softmax"
    if kind == "sequence":
        shape = (*mask.shape, -1)
        per_layer = [
            sequence_balance_loss(x.view(shape), i.view(shape), mask, scoring=scoring)
            for x, i in zip(logits, indices, strict=True)
        ]
        aux = torch.stack(per_layer).mean()
    else:
        switch = pooled_switch_loss if kind == "pooled" else mean_switch_loss
        aux = switch(logits, indices, mask.flatten(), scoring=scoring)
    z = torch.stack([router_z_loss(x, mask.flatten()) for x in logits]).mean()
    return AUX * aux + Z * z


def explicit_gradients(kind: str, family: str, *batches: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of each batch, and the gradient of `(loss + auxiliary losses) * SCALE` summed over them."""
    model, outputs = trained(family), []
    for batch in batches:
        output, logits, indices = recorded(model, batch)
        ((output.loss + explicit_loss(kind, family, logits, indices, batch[1])) * SCALE).backward()
        outputs.append(output.logits)
    return outputs, gradients(model)


@pytest.mark.slow
@CHECKPOINTING
@pytest.mark.parametrize("kind", ["layer", "pooled", "sequence"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_top2"])
def test_gradient_of_the_losses(family: str, kind: str, reentrant: bool | None) -> None:
    outputs, expected = explicit_gradients(kind, family, BATCH, OTHER)
    model = trained(family, reentrant)
    config = BalancingConfig(rate=0.0, aux_loss_coef=AUX, z_loss_coef=Z, aux_loss_type=kind)
    balancer = RouterBalancer(model, config)
    balancer.scale_losses(SCALE)
    for batch, logits in zip((BATCH, OTHER), outputs, strict=True):
        output = forward(model, batch)
        assert torch.equal(output.logits, logits), "the forward stays as it was"
        (output.loss * SCALE).backward()
    assert_same_gradients(model, expected)
    stock = trained(family)
    for batch in (BATCH, OTHER):
        (forward(stock, batch).loss * SCALE).backward()
    name = next(name for name in expected if name.endswith(("gate.weight", "router.weight")))
    assert (expected[name] - gradients(stock)[name]).abs().max() > 1e-3, "the losses matter"
    balancer.update()
    assert last_counts(balancer) == counts_of(model, BATCH, OTHER)


@CHECKPOINTING
def test_two_forwards_before_one_backward(reentrant: bool | None) -> None:
    _, expected = explicit_gradients("sequence", "mixtral", BATCH, OTHER)
    model = trained("mixtral", reentrant)
    config = BalancingConfig(rate=0.0, aux_loss_coef=AUX, z_loss_coef=Z, aux_loss_type="sequence")
    RouterBalancer(model, config).scale_losses(SCALE)
    ((forward(model, BATCH).loss + forward(model, OTHER).loss) * SCALE).backward()
    assert_same_gradients(model, expected)


@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "non-reentrant"])
def test_two_forwards_then_two_backwards_in_the_order_of_the_forwards(reentrant: bool | None) -> None:
    _, expected = explicit_gradients("sequence", "mixtral", BATCH, OTHER)
    model = trained("mixtral", reentrant)
    config = BalancingConfig(rate=0.0, aux_loss_coef=AUX, z_loss_coef=Z, aux_loss_type="sequence")
    RouterBalancer(model, config).scale_losses(SCALE)
    losses = [forward(model, batch).loss * SCALE for batch in (BATCH, OTHER)]
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, expected)


@CHECKPOINTING
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_pooled_is_the_loss_of_transformers(mask: Tensor | None, reentrant: bool | None) -> None:
    stock = make_moe_model("mixtral", output_router_logits=True, router_aux_loss_coef=AUX).train()
    theirs = stock(input_ids=IDS, attention_mask=mask, labels=IDS)
    model = trained("mixtral", reentrant)
    balancer = RouterBalancer(model, BalancingConfig(rate=0.0, aux_loss_coef=AUX, aux_loss_type="pooled"))
    output = model(input_ids=IDS, attention_mask=mask, labels=IDS)
    # The gradient of this loss alone, beside which rounding of the other's is not small.
    (AUX * theirs.aux_loss).backward()
    (0.0 * output.loss).backward()
    aux = balancer.update()["moe/aux_loss"]
    assert aux.item() == pytest.approx(theirs.aux_loss.item(), abs=1e-6)
    assert (output.loss + AUX * aux).item() == pytest.approx(theirs.loss.item(), abs=1e-6)
    ours, expected = gradients(model), gradients(stock)
    assert expected["model.layers.0.mlp.gate.weight"].abs().max() > 1e-2
    for name, gradient in ours.items():
        assert (gradient - expected.get(name, torch.zeros_like(gradient))).abs().max() < 1e-7, name
    assert set(expected) <= set(ours)


def fractions_of(counts: list[list[int]], more: Tensor | None = None) -> list[Tensor]:
    rows = torch.tensor(counts) if more is None else torch.tensor(counts) + more
    return [2 * row / row.sum() for row in rows]


@CHECKPOINTING
@pytest.mark.parametrize("batch", ["accumulated", "global"])
def test_balance_batch(batch: str, reentrant: bool | None) -> None:
    """The load of the second micro-batch's loss includes the first, and with `global` what other ranks counted."""
    elsewhere = torch.randint(1, 40, (3, 8), generator=torch.Generator().manual_seed(9))
    model = trained()
    for batches in ([BATCH], [BATCH, OTHER]):
        load = fractions_of(counts_of(model, *batches), elsewhere if batch == "global" else None)
        output, logits, _ = recorded(model, batches[-1])
        mask = batches[-1][1].flatten()
        aux = torch.stack([switch_balance_loss(x, f, mask) for x, f in zip(logits, load, strict=True)]).mean()
        ((output.loss + AUX * aux) / 2).backward()
    expected = gradients(model)

    model = trained(reentrant=reentrant)
    calls = []

    def reduce(x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x  # values of the losses
        calls.append(x.shape)
        return x + elsewhere.flatten()

    config = BalancingConfig(rate=0.0, aux_loss_coef=AUX, batch=batch)
    balancer = RouterBalancer(model, config, reduce=reduce)
    balancer.scale_losses(0.5)
    for each in (BATCH, OTHER):
        (forward(model, each).loss / 2).backward()
    assert len(calls) == (2 if batch == "global" else 0)
    assert_same_gradients(model, expected)
    balancer.update()
    assert last_counts(balancer) == (torch.tensor(counts_of(model, BATCH, OTHER)) + elsewhere).tolist()
    # The next optimizer step starts afresh.
    model.zero_grad()
    forward(model, OTHER).loss.backward()
    balancer.update()
    assert last_counts(balancer) == (torch.tensor(counts_of(model, OTHER)) + elsewhere).tolist()


@CHECKPOINTING
def test_frozen_routers_still_pass_the_gradient_on_to_lora(reentrant: bool | None) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    results = []
    for explicit in (True, False):
        torch.manual_seed(3)
        base = trained(reentrant=None if explicit else reentrant)
        model = get_peft_model(base, lora)
        if explicit:
            output, logits, indices = recorded(model)
            (output.loss + explicit_loss("layer", "mixtral", logits, indices, MASK)).backward()
        else:
            RouterBalancer(model, BalancingConfig(rate=0.0, aux_loss_coef=AUX, z_loss_coef=Z))
            forward(model).loss.backward()
        assert all("lora" in name for name in gradients(model)) and len(gradients(model)) == 12
        results.append(model)
    assert_same_gradients(results[1], gradients(results[0]))


def test_losses_that_reach_no_router_are_told() -> None:
    model = trained()
    balancer = RouterBalancer(model, BalancingConfig(rate=0.0, aux_loss_coef=AUX))
    forward(model)
    with pytest.raises(RuntimeError, match="has not reached any router"):
        balancer.update()


@CHECKPOINTING
def test_half_precision_gradients(reentrant: bool | None) -> None:
    """The loss is computed in float32, and its gradient has the dtype of the logits."""
    model = trained("mixtral", reentrant).to(torch.bfloat16)
    balancer = RouterBalancer(model, BalancingConfig(rate=0.0, aux_loss_coef=AUX, z_loss_coef=Z))
    forward(model).loss.backward()
    ours, metrics = gradients(model), balancer.update()
    balancer.detach()
    model.zero_grad()
    if reentrant:
        model.gradient_checkpointing_disable()
    output, logits, indices = recorded(model)
    assert logits[0].dtype == torch.bfloat16
    aux = mean_switch_loss(logits, indices, MASK.flatten())
    assert metrics["moe/aux_loss"].item() == pytest.approx(aux.item(), abs=1e-6)
    (output.loss + explicit_loss("layer", "mixtral", logits, indices, MASK)).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=0.05, atol=0.05 * gradient.abs().max().item())


# Ranks


def test_loss_free_balancing_reduces_once_per_step() -> None:
    calls: list[Tensor] = []

    def reduce(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    model = trained()
    balancer = RouterBalancer(model, reduce=reduce)
    for step in range(1, 4):
        expected = counts_of(model, BATCH, OTHER)
        for batch in (BATCH, OTHER):
            forward(model, batch).loss.backward()
        balancer.update()
        assert len(calls) == step and calls[-1].dtype == torch.int64
        assert last_counts(balancer) == [[2 * count for count in row] for row in expected]


# Life


def test_a_second_balancer_is_refused_until_the_first_is_gone() -> None:
    model = trained()
    first = RouterBalancer(model)
    with pytest.raises(ValueError, match="being balanced already; call detach"):
        RouterBalancer(model)
    first.detach()
    assert len(RouterBalancer(model).routers) == 3


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks)
        + len(m._forward_pre_hooks)
        + len(m._forward_hooks_with_kwargs)
        + len(m._forward_pre_hooks_with_kwargs)
        + len(m._forward_hooks_always_called)
        + len(m._backward_hooks)
        for m in model.modules()
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_detach(family: str) -> None:
    model = trained(family)
    before, attributes = hooks(model), set(vars(model.model))
    balancer = RouterBalancer(model, BalancingConfig(rate=0.5, aux_loss_coef=0.1))
    assert hooks(model) > before
    forward(model).loss.backward()
    balancer.update()
    biased = counts_of(model, BATCH)
    balancer.detach()
    assert hooks(model) == before and set(vars(model.model)) == attributes
    assert counts_of(model, BATCH) == biased, "the bias stays"
    balancer.last_counts = []
    forward(model)
    balancer.update()
    assert last_counts(balancer) == [[0] * 8] * len(balancer.routers)


def test_state_goes_on_identically() -> None:
    def step(balancer: RouterBalancer, model: nn.Module, batch: Batch) -> None:
        forward(model, batch)
        balancer.update()

    through, resumed = trained(), trained()
    first = RouterBalancer(through, BalancingConfig(rate=0.05))
    step(first, through, BATCH)
    state = {name: bias.clone() for name, bias in first.state_dict().items()}
    assert list(state) == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    second = RouterBalancer(resumed, BalancingConfig(rate=0.05))
    second.load_state_dict(state)
    for batch in (OTHER, BATCH):
        step(first, through, batch)
        step(second, resumed, batch)
        assert last_counts(first) == last_counts(second)
        for a, b, router in zip(first.float32_biases, second.float32_biases, second.routers, strict=True):
            assert torch.equal(a, b) and torch.equal(router.bias, b)
    # What was saved is a snapshot.
    assert not any(torch.equal(state[name], bias) for name, bias in first.state_dict().items())


def test_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model = trained()
    balancer = RouterBalancer(model)
    state = balancer.state_dict()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate: 4 instead of 8"):
        balancer.load_state_dict({**{k: v + 1 for k, v in state.items()}, "model.layers.1.mlp.gate": torch.ones(4)})
    with pytest.raises(ValueError, match=r"the model lacks: \['other'\].*without a bias: \['model\.layers\.0"):
        balancer.load_state_dict({"other": torch.ones(8), **dict(list(state.items())[1:])})
    assert not any(bias.any() for bias in balancer.float32_biases)
    assert not any(router.bias.any() for router in balancer.routers)


def test_a_copy_of_a_balanced_model_counts_for_nobody_and_has_its_own_bias() -> None:
    model = trained()
    balancer = RouterBalancer(model, BalancingConfig(rate=0.5))
    forward(model)
    balancer.update()
    routed = counts_of(model, BATCH)
    twin = copy.deepcopy(model)
    assert counts_of(twin, BATCH) == routed
    forward(twin.train()).loss.backward()
    balancer.update()
    assert last_counts(balancer) == [[0] * 8] * 3
    for ours, theirs in zip(balancer.routers, find_routers(twin), strict=True):
        assert torch.equal(ours.bias, theirs.bias) and ours.bias is not theirs.bias
        theirs.bias.copy_(torch.eye(8)[2] * 100)
    assert all(row[2] == int(MASK.sum()) for row in counts_of(twin, BATCH))
    assert counts_of(model, BATCH) == routed
    forward(model)
    balancer.update()
    assert last_counts(balancer) == routed


@CHECKPOINTING
def test_a_copy_between_forward_and_backward_takes_no_gradient_away(reentrant: bool | None) -> None:
    """A critic's trunk is a copy of the policy's, and learns in the same step."""
    config = BalancingConfig(rate=0.0, aux_loss_coef=AUX)
    alone = trained(reentrant=reentrant)
    RouterBalancer(alone, config)
    forward(alone).loss.backward()
    model = trained(reentrant=reentrant)
    balancer = RouterBalancer(model, config)
    twin = copy.deepcopy(model)
    loss = forward(model).loss
    (loss + forward(twin).loss).backward()
    assert_same_gradients(model, gradients(alone))
    stock = trained()
    forward(stock).loss.backward()
    assert_same_gradients(twin, gradients(stock))
    balancer.update()
    assert last_counts(balancer) == counts_of(model, BATCH)


def test_a_copy_can_be_balanced_on_its_own() -> None:
    model = trained()
    first = RouterBalancer(model, BalancingConfig(rate=0.1))
    twin = copy.deepcopy(model)
    second = RouterBalancer(twin, BalancingConfig(rate=0.2))
    forward(model, BATCH)
    forward(twin, OTHER)
    first.update()
    second.update()
    plain = trained()
    assert last_counts(first) == counts_of(plain, BATCH)
    assert last_counts(second) == counts_of(plain, OTHER)
    second.detach()
    before = first.state_dict()
    forward(twin)
    forward(model)
    first.update()
    assert [sum(counts) for counts in last_counts(first)] == [2 * int(MASK.sum())] * 3
    assert all(not torch.equal(bias, before[name]) for name, bias in first.state_dict().items())


# MTP modules


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_sequential_heads(family: str, rule: Any) -> None:
    """Their routers come last, and count in the forward of the trunk that their layers run in."""
    model = trained(family)
    inside = [router.name for router in find_routers(model)]
    heads = attach_mtp_heads(model, 2, head_type="sequential")
    balancer = RouterBalancer(model, BalancingConfig(rule=rule))
    gates = [f"mtp_heads.layers.{k}.mtp_block.mlp.gate" for k in range(2)]
    assert [router.name for router in balancer.routers] == inside + gates
    routed: list[Tensor] = []
    balancer.routers[-1].module.register_forward_hook(lambda module, args, output: routed.append(output[2]))
    with heads.running(lambda x: x, value_grad_scale=0.0) as run:
        forward(model)
    assert run.values is not None
    before = [bias.clone() for bias in balancer.float32_biases]
    balancer.update()
    assert last_counts(balancer)[-1] == expert_counts(routed[0], 8, MASK.flatten()).tolist()
    assert [sum(counts) for counts in last_counts(balancer)] == [2 * int(MASK.sum())] * len(balancer.routers)
    moved = [bias.clone() for bias in balancer.float32_biases]
    assert all(not torch.equal(x, y) for x, y in zip(before, moved, strict=True))
    forward(model)  # without the heads
    balancer.update()
    assert [sum(counts) for counts in last_counts(balancer)] == [2 * int(MASK.sum())] * len(inside) + [0, 0]
    assert all(torch.equal(x, y) for x, y in zip(moved[-2:], balancer.float32_biases[-2:], strict=True))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_modules_outside_the_model(family: str) -> None:
    model = trained(family, num_mtp_layers=1)
    mtp = MtpModel(model, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in mtp.layers.modules():
            model._init_weights(module)
        spread_routers(mtp.layers)
    mtp.layers.train()
    balancer = RouterBalancer(model, BalancingConfig(aux_loss_coef=AUX), extra_modules=[mtp.layers])
    inside = find_routers(model)
    assert [router.name for router in balancer.routers] == [
        *(router.name for router in inside),
        "extra.0.0.mtp_block.mlp.gate",
    ]
    seen: list[Tensor] = []
    balancer.routers[-1].module.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    mask = MASK[:, 1:] * MASK[:, :-1]

    def depth_one(hidden: Tensor) -> Tensor:
        position = (MASK.cumsum(-1) - 1).clamp(min=0)[:, 1:]
        embeds = mtp.embed_tokens(IDS[:, 1:])
        causal = create_causal_mask(
            config=mtp.config, inputs_embeds=embeds, attention_mask=mask, position_ids=position, **{cache_name(): None}
        )
        return mtp.layers[0](embeds, hidden, mtp.rotary_emb(embeds, position), causal, position, None)

    trunk = model.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    with balancer.counting(mask):
        hidden = depth_one(trunk[:, :-1])
    with torch.no_grad(), balancer.counting(mask):
        depth_one(trunk[:, :-1])
    depth_one(trunk[:, :-1])
    mtp._project_to_logits(hidden).square().mean().backward()
    assert mtp.layers[0].mtp_block.mlp.gate.weight.grad.any()
    metrics = balancer.update()
    expected = expert_counts(seen[0], 8, mask.flatten()).tolist()
    assert last_counts(balancer)[-1] == expected and sum(expected) == 2 * int(mask.sum())
    assert [sum(row) for row in last_counts(balancer)[:-1]] == [2 * int(MASK.sum())] * len(inside)
    by_hand = moved_by_hand([0.0] * 8, expected, 1e-3)
    torch.testing.assert_close(balancer.float32_biases[-1].tolist(), by_hand, rtol=0, atol=1e-7)
    assert torch.equal(mtp.layers[0].mtp_block.mlp.gate.e_score_correction_bias, balancer.float32_biases[-1])
    assert metrics["moe/aux_loss"] > 1.9
