"""Routers of every tested architecture: found, biased without a trace at zero, counted as a slow loop counts them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_plugins.moe import BalancingConfig, Router, RouterBalancer, find_routers

from .helpers.moe_models import make_moe_model

IDS = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
REAL = MASK.flatten().bool()
FAVOURITE = 3

# Where each family keeps its routers, and its own selection bias; "" where we add one.
FAMILIES: dict[str, tuple[str, str]] = {
    "mixtral": ("model.layers.{0,1,2}.mlp.gate", ""),
    "qwen2_moe": ("model.layers.{1,2}.mlp.gate", ""),
    "qwen3_moe": ("model.layers.{1,2}.mlp.gate", ""),
    "qwen3_next": ("model.layers.{1,2}.mlp.gate", ""),
    "olmoe": ("model.layers.{0,1,2}.mlp.gate", ""),
    "flex_olmo": ("model.layers.{0,1,2}.mlp.gate", ""),
    "gpt_oss": ("model.layers.{0,1,2}.mlp.router", ""),
    "granitemoe": ("model.layers.{0,1,2}.block_sparse_moe.router", ""),
    "hunyuan_v1_moe": ("model.layers.{0,1,2}.mlp.gate", ""),
    # Its attention heads are experts, too.
    "jetmoe": (
        "model.layers.{0.mlp,0.self_attention.experts,1.mlp,1.self_attention.experts,2.mlp,2.self_attention.experts}"
        ".router",
        "",
    ),
    "jamba": ("model.layers.{1,3}.feed_forward.router", ""),
    "deepseek_v2": ("model.layers.{1,2}.mlp.gate", ""),
    "deepseek_v2_group": ("model.layers.{1,2}.mlp.gate", ""),
    "llama4": ("model.layers.{1,3}.feed_forward.router", ""),
    "llama4_top2": ("model.layers.{1,3}.feed_forward.router", ""),
    "deepseek_v3": ("model.layers.{1,2}.mlp.gate", "mlp.gate.e_score_correction_bias"),
    "glm4_moe": ("model.layers.{1,2}.mlp.gate", "mlp.gate.e_score_correction_bias"),
    "dots1": ("model.layers.{1,2}.mlp.gate", "mlp.gate.e_score_correction_bias"),
    "exaone_moe": ("model.layers.{1,2}.mlp.gate", "mlp.gate.e_score_correction_bias"),
    "minimax_m2": ("model.layers.{0,1,2}.mlp.gate", "mlp.e_score_correction_bias"),
    "ernie4_5_moe": ("model.layers.{1,2}.mlp.gate", "mlp.gate.moe_statics.e_score_correction_bias"),
    "lfm2_moe": ("model.layers.{1,2}.feed_forward.gate", "feed_forward.expert_bias"),
    "afmoe": ("model.layers.{1,2}.mlp.router", "mlp.expert_bias"),
}
PARAMETERS = ("ernie4_5_moe", "afmoe")  # Their own bias is a parameter; elsewhere it is a buffer.
ADDED = [family for family, (_, own) in FAMILIES.items() if not own]
OWN = [family for family, (_, own) in FAMILIES.items() if own]
SIGMOID = ("llama4", "llama4_top2", *(family for family in OWN if family != "ernie4_5_moe"))
LOGIT_SPACE = ("gpt_oss", "granitemoe", "jetmoe", "llama4", "llama4_top2")
GROUPED = {"deepseek_v2_group": (2, 1), "deepseek_v3": (4, 2), "glm4_moe": (2, 1)}  # Groups, and how many are kept.


def forward_and_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits, loss, and the gradient of every parameter, in training mode."""
    model.train()
    output = model(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits, "loss": output.loss, **gradients}


def router_outputs(model: nn.Module, routers: list[Router], **inputs: Tensor) -> list[Any]:
    """What each router returns in one forward."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output

        return hook

    handles = [router.module.register_forward_hook(keep(router.name)) for router in routers]
    model(**({"input_ids": IDS, "attention_mask": MASK} | inputs))
    for handle in handles:
        handle.remove()
    return [seen[router.name] for router in routers]


def read_jetmoe(output: Any, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, E), weights (N, k) and indices (N, k), one slot after the other, from slots sorted by expert."""
    slots, tokens, gates, counts, logits = output
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    weights, indices = torch.zeros(len(logits), top_k), torch.full((len(logits), top_k), -1)
    for slot, token, gate, expert in zip(slots.tolist(), tokens.tolist(), gates, experts, strict=True):
        assert slot // top_k == token
        weights[token, slot % top_k], indices[token, slot % top_k] = gate, expert
    return logits, weights, indices


def chosen(output: Any, top_k: int) -> list[list[int]]:
    """Experts of each token, sorted, from what a router of any convention returns."""
    if len(output) == 5:
        output = read_jetmoe(output, top_k)
    if len(output) == 3:
        return [sorted(row) for row in output[2].tolist()]
    return [sorted(i for i, score in enumerate(row) if score > 0.0) for row in output[0].tolist()]


def counts_by_loop(output: Any, top_k: int, mask: Tensor) -> list[int]:
    """Real tokens of each of 8 experts."""
    counts = Counter[int]()
    for experts, real in zip(chosen(output, top_k), mask.flatten().tolist(), strict=True):
        if real:
            counts.update(experts)
    return [counts[i] for i in range(8)]


@torch.no_grad()
def set_bias(router: Router, values: Tensor) -> None:
    router.bias.copy_(values.view_as(router.bias))


def favour(router: Router, by: float = 100.0) -> None:
    set_bias(router, torch.eye(8)[FAVOURITE] * by)


def scores_of(family: str, logits: Tensor) -> Tensor:
    """What a family's router adds the bias to."""
    if family in LOGIT_SPACE:
        return logits.float()
    return logits.float().sigmoid() if family in SIGMOID else logits.float().softmax(-1)


# Which routers are found


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_found_and_dense_layers_are_not(family: str) -> None:
    pattern, own = FAMILIES[family]
    before, _, rest = pattern.partition("{")
    layers, _, after = rest.partition("}")
    model = make_moe_model(family)
    routers = find_routers(model)
    assert [router.name for router in routers] == [f"{before}{layer}{after}" for layer in layers.split(",")]
    for router, layer in zip(routers, layers.split(","), strict=True):
        assert router.module is model.get_submodule(router.name)
        assert router.num_experts == 8
        assert router.top_k == (1 if family == "llama4" else 2)
        assert router.scoring == ("sigmoid" if family in SIGMOID else "softmax")
        assert router.injected is None
        assert router.has_bias == bool(own)
        assert router.bias_key == (f"{before}{layer}.{own}" if own else "")
        if own:
            assert router.bias.numel() == 8
            assert router.bias is model.get_parameter_or_buffer(router.bias_key)
            assert isinstance(router.bias, nn.Parameter) == (family in PARAMETERS)


def test_lfm2_moe_without_its_own_bias_gets_one() -> None:
    model = make_moe_model("lfm2_moe", use_expert_bias=False)
    routers = find_routers(model)
    assert [router.has_bias for router in routers] == [False, False]
    for router in routers:
        router.add_bias()
        assert router.bias_owner is None and router.injected is not None
        favour(router)
    for output in router_outputs(model, routers):
        assert all(FAVOURITE in row for row in chosen(output, 2))


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2", "ernie4_5_moe"])
def test_a_model_that_names_no_recorder_falls_back_to_the_sibling_rule(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_moe_model(family)
    expected = [(router.name, router.bias_key) for router in find_routers(model)]
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            monkeypatch.setattr(module, "_can_record_outputs", None)
    assert [(router.name, router.bias_key) for router in find_routers(model)] == expected
    balancer = RouterBalancer(model)
    outputs = router_outputs(model.train(), balancer.routers)
    balancer.update()
    for output, counts in zip(outputs, balancer.last_counts, strict=True):
        assert counts.tolist() == counts_by_loop(output, 2, MASK)


# Bias


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_of_zero_leaves_no_trace(family: str, dtype: torch.dtype) -> None:
    stock = forward_and_gradients(make_moe_model(family).to(dtype))
    model = make_moe_model(family).to(dtype)
    balancer = RouterBalancer(model)
    assert all(router.has_bias and not router.bias.any() for router in balancer.routers)
    ours = forward_and_gradients(model)
    assert ours.keys() == stock.keys() and len(stock) > 10
    for name in stock:
        assert torch.equal(ours[name], stock[name]), name
    assert stock["logits"].isfinite().all()
    for router in balancer.routers:
        weight = next(p for name, p in router.module.named_parameters() if name.endswith("weight"))
        assert weight.grad is not None and weight.grad.any(), "a test of gradients needs some"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_bias_sends_every_token_to_its_expert(family: str) -> None:
    model = make_moe_model(family)
    routers = find_routers(model)
    before = router_outputs(model, routers)
    for output in before:
        assert not all(FAVOURITE in row for row in chosen(output, 2))
    for router in routers:
        router.add_bias()
        favour(router)
    for router, output in zip(routers, router_outputs(model, routers), strict=True):
        rows = chosen(output, router.top_k)
        assert all(FAVOURITE in row and len(row) == router.top_k for row in rows)
        assert len({row[-1] for row in rows} | {row[0] for row in rows}) > 1 or router.top_k == 1
        if family == "deepseek_v2_group":
            assert {expert for row in rows for expert in row} <= {0, 1, 2, 3}, "the group of the favourite"
    for router in routers:
        favour(router, by=-100.0)
    for output in router_outputs(model, routers):
        assert not any(FAVOURITE in row for row in chosen(output, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_is_the_best_of_scores_plus_bias(family: str) -> None:
    model = make_moe_model(family)
    routers = find_routers(model)
    generator = torch.Generator().manual_seed(5)
    for router in routers:
        router.add_bias()
        set_bias(router, torch.randn(8, generator=generator) * (2.0 if family in LOGIT_SPACE else 0.3))
    moved = 0
    for router, output in zip(routers, router_outputs(model, routers), strict=True):
        logits = output[{2: 1, 3: 0, 5: 4}[len(output)]]
        scores = scores_of(family, logits)
        biased = scores + router.bias.view(8)
        if family in GROUPED:
            groups, kept = GROUPED[family]
            by_group = biased.view(-1, groups, 8 // groups)
            # DeepSeek-V2 compares groups by their best expert, V3 by the sum of the best two.
            strength = by_group.topk(1 if family == "deepseek_v2_group" else 2, dim=-1).values.sum(-1)
            keep = torch.zeros_like(strength).scatter(1, strength.topk(kept, dim=-1).indices, 1.0).bool()
            biased = biased.masked_fill(~keep.repeat_interleave(8 // groups, dim=-1), -torch.inf)
        expected = [sorted(row) for row in biased.topk(router.top_k, dim=-1).indices.tolist()]
        unbiased = [sorted(row) for row in scores.topk(router.top_k, dim=-1).indices.tolist()]
        assert chosen(output, router.top_k) == expected
        moved += sum(a != b for a, b in zip(expected, unbiased, strict=True))
    assert moved > 5, "a bias of this size changes the experts of many tokens"


WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mixtral": lambda x, i: (p := x.softmax(-1).gather(1, i)) / p.sum(-1, keepdim=True),
    "gpt_oss": lambda x, i: x.gather(1, i).softmax(-1),
    "granitemoe": lambda x, i: x.gather(1, i).softmax(-1),
    "jetmoe": lambda x, i: x.gather(1, i).softmax(-1),
    "deepseek_v2": lambda x, i: x.softmax(-1).gather(1, i),
    "deepseek_v2_group": lambda x, i: x.softmax(-1).gather(1, i),
    "deepseek_v3": lambda x, i: 2.5 * (p := x.sigmoid().gather(1, i)) / p.sum(-1, keepdim=True),
    "minimax_m2": lambda x, i: (p := x.sigmoid().gather(1, i)) / p.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("family", WEIGHTS)
def test_bias_never_enters_the_weights(family: str) -> None:
    model = make_moe_model(family)
    routers = find_routers(model)
    for router in routers:
        router.add_bias()
        favour(router)
    for router, output in zip(routers, router_outputs(model, routers), strict=True):
        logits, weights, indices = read_jetmoe(output, router.top_k) if family == "jetmoe" else output
        torch.testing.assert_close(weights, WEIGHTS[family](logits, indices))
        assert (weights < 2.5).all() and weights.std() > 0.01


def test_bias_never_enters_the_scores_of_llama4() -> None:
    model = make_moe_model("llama4_top2")
    routers = find_routers(model)
    for router in routers:
        router.add_bias()
        favour(router)
    for scores, logits in router_outputs(model, routers):
        torch.testing.assert_close(scores[scores > 0], logits.sigmoid()[scores > 0])
        assert (scores > 0).sum(-1).tolist() == [2] * len(scores)


def test_gradient_reaches_the_router_through_biased_weights() -> None:
    """The weights of mixtral under a bias, differentiated by hand."""
    model = make_moe_model("mixtral")
    router = find_routers(model)[0]
    router.add_bias()
    favour(router)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    coefficients = torch.tensor([1.0, -2.0])
    _, weights, indices = router.module(x)
    (weights @ coefficients).sum().backward()
    ours = router.module.weight.grad
    plain = router.module.weight.detach().clone().requires_grad_()
    by_hand = WEIGHTS["mixtral"](x @ plain.T, indices)
    (by_hand @ coefficients).sum().backward()
    torch.testing.assert_close(ours, plain.grad)
    assert ours.abs().sum() > 0.1


def test_adding_a_bias_twice_keeps_the_first() -> None:
    router = find_routers(make_moe_model("olmoe"))[0]
    router.add_bias()
    favour(router)
    router.add_bias()
    assert router.bias.tolist() == [0, 0, 0, 100, 0, 0, 0, 0]


def test_a_router_that_selects_in_another_way_is_told_at_its_first_token() -> None:
    model = make_moe_model("mixtral")
    router = find_routers(model)[1]
    router.add_bias()
    router.module.top_k = 3
    with pytest.raises(RuntimeError, match="did not select its experts with the topk"):
        model(input_ids=IDS)


# Counts


@pytest.mark.parametrize("family", [*FAMILIES, "phimoe"])
def test_counts_equal_a_brute_force_recount(family: str) -> None:
    model = make_moe_model(family).train()
    rate = 0.0 if family == "phimoe" else 1e-3
    balancer = RouterBalancer(model, BalancingConfig(rate=rate, count_only=rate == 0.0))
    generator = torch.Generator().manual_seed(7)
    if rate:
        for router in balancer.routers:
            set_bias(router, torch.randn(8, generator=generator) * 0.1)
    expected = [[0] * 8 for _ in balancer.routers]
    for mask in (MASK, MASK.flip(0), torch.ones_like(MASK)):
        outputs = router_outputs(model, balancer.routers, attention_mask=mask)
        for row, router, output in zip(expected, balancer.routers, outputs, strict=True):
            row[:] = [a + b for a, b in zip(row, counts_by_loop(output, router.top_k, mask), strict=True)]
    balancer.update()
    assert [counts.tolist() for counts in balancer.last_counts] == expected
    tokens = 2 * int(MASK.sum()) + MASK.numel()
    assert [sum(row) for row in expected] == [router.top_k * tokens for router in balancer.routers]


# Models that cannot be balanced, or not in every way


def test_phimoe_takes_no_bias() -> None:
    with pytest.raises(TypeError, match=r"model\.layers\.0\.mlp\.router \(PhimoeTopKRouter\).*aux_loss_coef"):
        RouterBalancer(make_moe_model("phimoe"))


def test_phimoe_needs_its_scoring_told_for_a_loss() -> None:
    model = make_moe_model("phimoe").train()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.router.*scoring='softmax'"):
        RouterBalancer(model, BalancingConfig(rate=0.0, aux_loss_coef=0.1))
    balancer = RouterBalancer(model, BalancingConfig(rate=0.0, aux_loss_coef=0.1, scoring="softmax"))
    model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    metrics = balancer.update()
    assert 2.0 < metrics["moe/aux_loss"] < 4.0
    assert "moe/bias_range" not in metrics


def test_a_router_of_unknown_scoring_is_refused_before_any_router_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_moe_model("ernie4_5_moe")
    routers = find_routers(model)
    for router in routers:
        router.stored_bias.requires_grad_(True)  # as `from_pretrained` leaves them
    last = routers[-1].module
    monkeypatch.setattr("rl_plugins.moe.routers._scoring", lambda module: None if module is last else "softmax")
    with pytest.raises(ValueError, match="scoring='softmax'"):
        RouterBalancer(model, BalancingConfig(rate=0.1, rule="quantile"))
    assert len(routers) == 2 and all(router.stored_bias.requires_grad for router in routers)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("dbrx", r"transformer\.blocks\.0\.ffn\.router \(DbrxRouter\)"),
        ("gemma4", r"model\.layers\.0\.router \(Gemma4TextRouter\)"),
    ],
)
def test_models_that_cannot_be_balanced_say_why(family: str, name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}.*does not say how many experts.*cannot be balanced"):
        find_routers(make_moe_model(family))


def test_a_dense_model_has_no_load(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="Qwen3ForCausalLM has no routers: it is a dense model"):
        RouterBalancer(tiny_model())


def test_a_wrapped_model_is_refused() -> None:
    with pytest.raises(TypeError, match="Unwrap the model"):
        find_routers(nn.Sequential(make_moe_model("mixtral")))


@pytest.mark.parametrize(
    "output",
    [torch.zeros(4, 8), (torch.zeros(4, 8), torch.zeros(4, 2)), tuple(torch.zeros(4, 8) for _ in range(4))],
    ids=["tensor", "pair", "four"],
)
def test_outputs_of_other_shapes_are_refused(output: Any) -> None:
    router = find_routers(make_moe_model("mixtral"))[0]
    with pytest.raises(TypeError, match=r"model\.layers\.0\.mlp\.gate \(MixtralTopKRouter\) returns neither"):
        router.read(output)


# PEFT


@pytest.mark.parametrize("saved", [None, "lm_head", "router", "mlp"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2", "afmoe"])
def test_peft_models(family: str, saved: str | None) -> None:
    if saved == "router" and family != "afmoe":
        saved = "gate"
    whole = None if saved is None else [saved]
    peft = get_peft_model(
        make_moe_model(family), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=whole)
    )
    stock = [(router.name, router.bias_key) for router in find_routers(make_moe_model(family))]
    balancer = RouterBalancer(peft.train())
    assert [(router.name, router.bias_key) for router in balancer.routers] == stock
    outputs = router_outputs(peft, balancer.routers)
    balancer.update()
    for output, counts in zip(outputs, balancer.last_counts, strict=True):
        assert counts.tolist() == counts_by_loop(output, 2, MASK)
    for router in balancer.routers:
        favour(router)
    for output in router_outputs(peft, balancer.routers):
        assert all(FAVOURITE in row for row in chosen(output, 2))


def test_peft_routers_of_an_idle_adapter_are_left_out() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    peft = get_peft_model(make_moe_model("mixtral"), config)
    peft.add_adapter("ref", config)
    in_use = [layer.mlp.gate.modules_to_save["default"] for layer in peft.get_base_model().model.layers]
    assert [router.module for router in find_routers(peft)] == in_use
