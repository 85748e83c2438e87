"""Selection biases in files: saved beside a model that got one, loaded in one call, refused where they do not fit."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rl_plugins.moe import (
    BalancingConfig,
    RouterBalancer,
    find_routers,
    load_selection_bias,
    remove_selection_bias,
    save_selection_bias,
)

from .helpers.moe_models import make_moe_model

IDS = torch.randint(2, 40, (2, 8), generator=torch.Generator().manual_seed(0))
FILE = "selection_bias.safetensors"
NAMES = [f"model.layers.{i}.mlp.gate" for i in range(3)]
OWN = ["deepseek_v3", "minimax_m2", "ernie4_5_moe", "lfm2_moe", "afmoe"]


@torch.no_grad()
def biased(model: Any, seed: int = 3) -> Any:
    """The model with a random selection bias."""
    generator = torch.Generator().manual_seed(seed)
    for router in find_routers(model):
        router.add_bias()
        router.bias.copy_((torch.randn(8, generator=generator) * 2.0).view_as(router.bias))
    return model


def trained(model: Any, steps: int = 3) -> RouterBalancer:
    """A balancer whose biases have moved."""
    balancer = RouterBalancer(model.train(), BalancingConfig(rate=0.2))
    for _ in range(steps):
        model(input_ids=IDS)
        balancer.update()
    model.eval()
    return balancer


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def reloaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


def biases(model: nn.Module) -> list[Tensor]:
    return [router.bias.detach().clone() for router in find_routers(model)]


# Beside the model


@pytest.mark.parametrize("family", ["mixtral", "llama4_top2", "deepseek_v2_group"])
def test_a_saved_model_brings_its_biases(family: str, tmp_path: Path) -> None:
    model = make_moe_model(family).eval()
    balancer = trained(model)
    expected = logits(model)
    with pytest.warns(UserWarning, match=rf"{FILE}; without them.*load_selection_bias\(model, directory\)"):
        model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE)
    assert {name: bias.tolist() for name, bias in saved.items()} == {
        name: bias.tolist() for name, bias in balancer.state_dict().items()
    }
    assert all(bias.dtype == torch.float32 for bias in saved.values())
    assert "selection_bias" not in "".join(load_file(tmp_path / "model.safetensors"))

    again = reloaded(tmp_path)
    assert (logits(again) - expected).abs().max() > 1e-3, "other experts, without the biases"
    load_selection_bias(again, tmp_path)
    assert torch.equal(logits(again), expected)
    # And it keeps on bringing them.
    with pytest.warns(UserWarning, match=FILE):
        again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / FILE).keys() == saved.keys()


def test_a_bias_is_saved_as_float32_from_a_bfloat16_model(tmp_path: Path) -> None:
    model = biased(make_moe_model("mixtral").to(torch.bfloat16))
    assert save_selection_bias(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / FILE
    again = make_moe_model("mixtral").to(torch.bfloat16)
    load_selection_bias(again, str(tmp_path / "new" / "folder"))
    assert all(bias.dtype == torch.float32 for bias in biases(again))
    assert torch.equal(torch.stack(biases(again)), torch.stack(biases(model)))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("saved_whole", [None, ["gate"]], ids=["lora", "saved routers"])
def test_peft_adapters_bring_the_biases(saved_whole: list[str] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved_whole, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(make_moe_model("mixtral"), lora).eval()
    trained(model)
    expected = logits(model)
    with pytest.warns(UserWarning, match=f"MixtralForCausalLM was saved with selection biases.*{FILE}"):
        model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / FILE)) == NAMES
    assert not (tmp_path / "model.safetensors").exists()
    again = PeftModel.from_pretrained(make_moe_model("mixtral"), tmp_path)
    assert not torch.equal(logits(again), expected)
    load_selection_bias(again, tmp_path)
    assert torch.equal(logits(again), expected)
    # The merged model is a model of its own, with the same routers.
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    remove_selection_bias(merged)
    load_selection_bias(merged, tmp_path)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    model = make_moe_model("mixtral")
    trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("family", OWN)
def test_models_with_a_bias_of_their_own_need_no_file(family: str, tmp_path: Path) -> None:
    model = make_moe_model(family).eval()
    trained(model)
    assert all(bias.any() for bias in biases(model))
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    assert save_selection_bias(model, tmp_path) is None
    assert not (tmp_path / FILE).exists()
    again = reloaded(tmp_path)
    for ours, theirs in zip(biases(again), biases(model), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(logits(again), expected)


def test_a_model_without_biases_writes_nothing(tmp_path: Path) -> None:
    model = make_moe_model("mixtral")
    RouterBalancer(model, BalancingConfig(rate=0.0, aux_loss_coef=0.1))
    assert save_selection_bias(model, tmp_path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_balancing_goes_on_from_loaded_biases(tmp_path: Path) -> None:
    model = biased(make_moe_model("mixtral"))
    save_selection_bias(model, tmp_path)
    again = make_moe_model("mixtral")
    load_selection_bias(again, tmp_path)
    balancer = RouterBalancer(again.train(), BalancingConfig(rate=0.01))
    for master, bias in zip(balancer.float32_biases, biases(model), strict=True):
        assert torch.equal(master, bias) and bias.any()
    again(input_ids=IDS)
    balancer.update()
    for master, bias in zip(balancer.float32_biases, biases(model), strict=True):
        step = master - bias
        assert 0.005 < step.abs().max() < 0.02
        torch.testing.assert_close(step.mean().item(), 0.0, rtol=0, atol=1e-7)


# What does not fit


def test_no_file(tmp_path: Path) -> None:
    model = make_moe_model("mixtral")
    with pytest.raises(FileNotFoundError, match=f"No {FILE} in .*save_pretrained writes this file"):
        load_selection_bias(model, tmp_path)
    assert not any(router.has_bias for router in find_routers(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NAMES[1]: torch.ones(4)}, r"model\.layers\.1\.mlp\.gate: 4 instead of 8"),
        ({"model.layers.7.mlp.gate": torch.ones(8)}, r"the model lacks: \['model\.layers\.7\.mlp\.gate'\]"),
        ({NAMES[2]: None}, r"without a bias: \['model\.layers\.2\.mlp\.gate'\]"),
    ],
    ids=["experts", "unknown router", "missing router"],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_biases_that_do_not_fit_change_nothing(
    change: dict[str, Tensor | None], message: str, has_bias: bool, tmp_path: Path
) -> None:
    state = {name: torch.ones(8) for name in NAMES} | change
    save_file({name: bias for name, bias in state.items() if bias is not None}, tmp_path / FILE)
    model = make_moe_model("mixtral").eval()
    if has_bias:
        biased(model)
    expected = logits(model)
    with pytest.raises(ValueError, match=message) as error:
        load_selection_bias(model, tmp_path)
    assert str(tmp_path / FILE) in str(error.value)
    assert torch.equal(logits(model), expected)
    assert [router.has_bias for router in find_routers(model)] == [has_bias] * 3


def test_biases_of_a_larger_model_do_not_fit(tmp_path: Path) -> None:
    wide = make_moe_model("mixtral", num_local_experts=12)
    for router in find_routers(wide):
        router.add_bias()
    save_selection_bias(wide, tmp_path)
    with pytest.raises(ValueError, match=r"gate: 12 instead of 8.*gate: 12 instead of 8.*Load the model"):
        load_selection_bias(make_moe_model("mixtral"), tmp_path)


# Taking them off


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2_group", "llama4"])
def test_removing_a_bias_restores_the_router(family: str, tmp_path: Path) -> None:
    model = make_moe_model(family).eval()
    attributes = [set(vars(module)) for module in model.modules()]
    expected = logits(model)
    biased(model)
    assert not torch.equal(logits(model), expected)
    remove_selection_bias(model)
    assert torch.equal(logits(model), expected)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(router.has_bias for router in find_routers(model))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    remove_selection_bias(model)  # again does nothing


def test_removing_leaves_hooks_of_accelerate_alone() -> None:
    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, counter = make_moe_model("mixtral"), Counter()
    add_hook_to_module(model.get_submodule(NAMES[1]), counter)
    for step in (biased, remove_selection_bias, biased):
        step(model)
        counter.calls = 0
        logits(model)
        assert counter.calls == 1


def test_removing_leaves_a_bias_of_the_architecture_alone() -> None:
    model = biased(make_moe_model("deepseek_v3"))
    expected = biases(model)
    remove_selection_bias(model)
    for ours, theirs in zip(biases(model), expected, strict=True):
        assert torch.equal(ours, theirs) and ours.any()


def test_a_copied_model_has_copied_biases(tmp_path: Path) -> None:
    model = biased(make_moe_model("mixtral")).eval()
    expected, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    remove_selection_bias(twin)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(twin), logits(make_moe_model("mixtral").eval()))
    # The weights of a copy are its own too.
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin), expected)
    save_selection_bias(twin, tmp_path)
    assert sorted(load_file(tmp_path / FILE)) == NAMES


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = make_moe_model("mixtral").eval()
    trained(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.5)
        for router in find_routers(twin):
            router.bias.fill_(7.0)
    with pytest.warns(UserWarning, match=FILE):
        twin.save_pretrained(tmp_path)
    assert all(bias.unique().tolist() == [7.0] for bias in load_file(tmp_path / FILE).values())
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].unique().tolist() == [0.5]


# A bias of the architecture's own in a model of half precision

CASTS: dict[str, Any] = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "there and back": lambda model: model.to(torch.bfloat16).float().to(torch.bfloat16),
}
ALL_OWN = [*OWN, "glm4_moe", "dots1", "exaone_moe"]


def at_five(family: str, **overrides: Any) -> Any:
    """A model whose routers know nothing but their bias, which is 5."""
    model = make_moe_model(family, **overrides).train()
    with torch.no_grad():
        for router in find_routers(model):
            router.stored_bias.fill_(5.0)
            for weight in router.module.parameters():
                if weight.ndim == 2 and len(weight) == router.num_experts:
                    weight.zero_()
    return model


def loads(model: Any, balancer: RouterBalancer, steps: int = 6) -> list[list[int]]:
    """Tokens of every expert in some steps."""
    found = []
    for _ in range(steps):
        model(input_ids=IDS)
        balancer.update()
        found.append(torch.cat(balancer.last_counts).tolist())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL_OWN)
def test_steps_of_a_thousandth_at_five_change_the_routing(family: str) -> None:
    """Bfloat16 has 5 and 5.03, and nothing between."""
    whole = at_five(family)
    balancer = RouterBalancer(whole, BalancingConfig(rate=1e-3))
    expected = loads(whole, balancer)
    assert expected[0] != expected[1] != expected[2]
    for cast in CASTS.values() if family in ("deepseek_v3", "ernie4_5_moe") else [CASTS["bfloat16"]]:
        model = at_five(family)
        ours = RouterBalancer(model, BalancingConfig(rate=1e-3))
        cast(model)
        assert loads(model, ours) == expected
        for bias, master, theirs in zip(biases(model), ours.float32_biases, balancer.float32_biases, strict=True):
            assert bias.dtype == torch.float32 and torch.equal(bias.reshape(-1), master)
            assert torch.equal(master, theirs)
        assert {router.stored_bias.dtype for router in find_routers(model)} <= {torch.bfloat16, torch.float16}
        model.float()
        model(input_ids=IDS)
        assert all(
            torch.equal(r.stored_bias.reshape(-1), m) for r, m in zip(ours.routers, ours.float32_biases, strict=True)
        )
    late = at_five(family).to(torch.bfloat16)  # as after from_pretrained(dtype="bfloat16")
    assert loads(late, RouterBalancer(late, BalancingConfig(rate=1e-3))) == expected


@pytest.mark.parametrize("family", ALL_OWN)
def test_checkpoints_hold_the_bias_that_the_router_used(family: str, tmp_path: Path) -> None:
    model = at_five(family)
    balancer = RouterBalancer(model, BalancingConfig(rate=1e-3))
    model.to(torch.bfloat16)
    loads(model, balancer, 3)
    state = model.state_dict()
    for router, master in zip(balancer.routers, balancer.float32_biases, strict=True):
        assert torch.equal(state[router.bias_key].reshape(-1), master) and master.dtype == torch.float32
        assert not torch.equal(master.bfloat16().float(), master)
    with pytest.warns(UserWarning, match=rf"biases that its dtype cannot hold.*{FILE}.*load_selection_bias"):
        model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
        if dtype == torch.bfloat16:
            load_selection_bias(again, tmp_path)
        for bias, master in zip(biases(again), balancer.float32_biases, strict=True):
            assert torch.equal(bias.reshape(-1), master)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_a_loaded_state_and_a_copy_route_in_float32(family: str) -> None:
    model, again = at_five(family), at_five(family)
    balancer = RouterBalancer(model, BalancingConfig(rate=1e-3))
    model.to(torch.bfloat16)
    loads(model, balancer, 3)
    RouterBalancer(again, BalancingConfig(rate=1e-3))
    again.to(torch.bfloat16)
    again.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    loads(model, balancer, 1)
    for other in (again, twin):
        assert all(torch.equal(x, y) for x, y in zip(biases(other), biases(again), strict=True))
        assert not torch.equal(biases(other)[0], biases(model)[0])
    assert torch.equal(logits(twin.eval()), logits(again.eval()))


def test_lora_on_a_bfloat16_model() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    expected = loads(whole := at_five("glm4_moe"), RouterBalancer(whole, BalancingConfig(rate=1e-3)))
    model = get_peft_model(at_five("glm4_moe").to(torch.bfloat16), lora)
    assert loads(model, RouterBalancer(model.train(), BalancingConfig(rate=1e-3))) == expected
