"""MTP heads: what they compute at the start, and that attaching them leaves the model as it was."""

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rl_plugins.nn import (
    MTPHeads,
    MTPHeadsConfig,
    ParallelHeads,
    PolyakTarget,
    attach_mtp_heads,
    base_model_of,
    load_mtp_heads,
)

ModelFactory = Callable[..., Any]

IDS = torch.tensor([[0, 0, 3, 12, 3, 14], [4, 5, 12, 4, 5, 14]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def randomise(heads: MTPHeads, seed: int = 1) -> None:
    """Give every parameter a random value, so that nothing is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def hidden_states(model: nn.Module) -> torch.Tensor:
    return base_model_of(model).base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


# What the heads compute


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_a_fresh_head_repeats_the_main_head_and_says_zero(tiny_model: ModelFactory, num_heads: int) -> None:
    model = tiny_model()
    heads = attach_mtp_heads(model, num_heads)
    hidden = hidden_states(model)
    features = heads.features(hidden)
    assert features.shape == (2, 6, num_heads, 32)
    assert heads(hidden).shape == (2, 6, num_heads)
    assert torch.equal(heads(hidden), torch.zeros(2, 6, num_heads))
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    for k in range(num_heads):
        assert torch.equal(features[:, :, k], hidden)
        assert torch.equal(model.lm_head(features[:, :, k]), logits)


def test_head_equation() -> None:
    heads = ParallelHeads(MTPHeadsConfig(2, 4, 3))
    randomise(heads)
    h = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for k, head in enumerate(heads):
        rms = (h.square().mean() + 1e-6).sqrt()
        up = head.up.weight @ (h / rms * head.norm.weight)
        x = h + head.down.weight @ (up * torch.sigmoid(up))
        value = (
            head.value.weight @ (x / (x.square().mean() + 1e-6).sqrt() * head.value.rmsnorm_weight) + head.value.bias
        )
        torch.testing.assert_close(heads.features(h.view(1, 1, 4))[0, 0, k], x)
        torch.testing.assert_close(heads(h.view(1, 1, 4))[0, 0, k], value[0])


def test_values_are_float32_in_a_bf16_model(tiny_model: ModelFactory) -> None:
    model = tiny_model().to(torch.bfloat16)
    heads = attach_mtp_heads(model, 2)
    randomise(heads)
    assert {p.dtype for p in heads.parameters()} == {torch.bfloat16}
    hidden = hidden_states(model)
    values = heads(hidden)
    assert values.dtype == torch.float32
    for k, head in enumerate(heads):
        x = head(hidden).float()  # the features are bf16, all that follows is not
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * head.value.rmsnorm_weight.float()
        torch.testing.assert_close(values[..., k], x @ head.value.weight.float() + head.value.bias.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heads(hidden), values)


def test_seed_decides_the_heads_and_leaves_the_random_state_alone(tiny_model: ModelFactory) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    same = [attach_mtp_heads(tiny_model(), 2, seed=3).state_dict() for _ in range(2)]
    other = attach_mtp_heads(tiny_model(), 2, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])
    assert not torch.equal(same[0]["heads.0.up.weight"], other["heads.0.up.weight"])
    assert not torch.equal(same[0]["heads.0.up.weight"], same[0]["heads.1.up.weight"])


def test_new_heads_leave_the_generators_of_gpus_alone(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank has seeded its own by then; reseeded alike, all ranks would sample the same noise."""
    model, seeds = tiny_model(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    attach_mtp_heads(model, seed=3)
    assert not seeds
    torch.manual_seed(7)
    assert seeds == [7], "what torch.manual_seed does to them"


# Attach and detach


def test_inner_size(tiny_model: ModelFactory) -> None:
    heads = attach_mtp_heads(tiny_model(), 1, inner_size=5)
    assert [tuple(p.shape) for p in heads.parameters()] == [(32,), (5, 32), (32, 5), (32,), (32,), (1,)]


def test_attach_refuses_what_cannot_work(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        attach_mtp_heads(model, 0)
    with pytest.raises(ValueError, match="has no LM head. Load the model with AutoModelForCausalLM"):
        attach_mtp_heads(AutoModel.from_config(model.config))
    with pytest.raises(ValueError, match="hidden size 16, but Qwen3ForCausalLM has 32"):
        attach_mtp_heads(model, heads=ParallelHeads(MTPHeadsConfig(2, 16, 16)))
    with pytest.raises(TypeError, match="got Linear. Unwrap the model"):
        attach_mtp_heads(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no `mtp_heads` to detach"):
        MTPHeads.detach(model)
    assert MTPHeads.of(model) is None
    attach_mtp_heads(model)
    with pytest.raises(ValueError, match=r"has `mtp_heads` already. Call MTPHeads.of\(model\)"):
        attach_mtp_heads(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", ["no", "before", "after"])
def test_logits_and_generation_are_bit_identical(tiny_model: ModelFactory, tied: bool, fused: str) -> None:
    def outputs(model: Any) -> list[torch.Tensor]:
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        greedy = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)
        torch.manual_seed(0)
        sampled = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=True)
        if fused != "no":
            labels = IDS.masked_fill(MASK == 0, -100)
            scored = model(input_ids=IDS, attention_mask=MASK, labels=labels, fused_lm_head=True)
            return [logits, greedy, sampled, scored.log_probs]
        return [logits, greedy, sampled]

    stock, model = tiny_model(tie_word_embeddings=tied), tiny_model(tie_word_embeddings=tied)
    if fused != "no":
        add_fused_lm_head(stock)
    if fused == "before":
        add_fused_lm_head(model)
    randomise(attach_mtp_heads(model, 3))
    if fused == "after":
        add_fused_lm_head(model)
    seen: list[torch.Tensor] = []
    with MTPHeads.of(model).watching(seen.append):  # type: ignore[union-attr]
        watched = outputs(model)
    # The prefill and four steps of each `generate`, and one or two forwards more.
    assert len(seen) == 10 + (1 if fused == "no" else 2)
    for expected, unwatched, got in zip(outputs(stock), outputs(model), watched, strict=True):
        assert torch.equal(expected, unwatched)
        assert torch.equal(expected, got)


def test_detach_restores_the_model(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    keys, hooks = list(model.state_dict()), len(model.base_model._forward_hooks)
    heads = attach_mtp_heads(model, 2)
    assert [key for key in model.state_dict() if "mtp_heads" not in key] == keys
    assert len(model.state_dict()) == len(keys) + 12
    assert MTPHeads.detach(model) is heads
    assert list(model.state_dict()) == keys
    assert len(model.base_model._forward_hooks) == hooks
    assert MTPHeads.of(model) is None and not model._keys_to_ignore_on_save
    with heads.watching(lambda hidden: pytest.fail("a detached head is still watched")):
        model(input_ids=IDS)
    assert attach_mtp_heads(model, heads=heads) is heads


def test_the_innermost_observer_is_called_and_the_outer_one_comes_back(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    heads = attach_mtp_heads(model)
    calls: list[str] = []
    with heads.watching(lambda hidden: calls.append("outer")):
        with pytest.raises(KeyError), heads.watching(lambda hidden: calls.append("inner")):
            model(input_ids=IDS)
            raise KeyError
        model(input_ids=IDS)
    model(input_ids=IDS)
    assert calls == ["inner", "outer"]
    assert heads.observer is None


def test_a_copy_of_the_model_has_heads_of_its_own(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    heads = attach_mtp_heads(model)
    twin = copy.deepcopy(model)
    twin_heads = MTPHeads.of(twin)
    assert twin_heads is not None and twin_heads is not heads
    seen: list[torch.Tensor] = []
    with twin_heads.watching(seen.append):
        model(input_ids=IDS)
        assert not seen
        twin(input_ids=IDS)
    assert len(seen) == 1
    MTPHeads.detach(twin)
    assert len(twin.base_model._forward_hooks) == 0 and len(model.base_model._forward_hooks) == 1


def test_targets_do_not_copy_other_hooks_of_the_trunk(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    lock = threading.Lock()  # cannot be copied
    model.base_model.register_forward_hook(lambda module, args, output, lock=lock: None)
    model.base_model.register_forward_hook(_Hook(lock).hook)
    target = PolyakTarget(attach_mtp_heads(model))
    assert target.heads._handles == () and target.heads.observer is None


class _Hook:
    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """Does nothing."""


def test_heads_on_a_lora_model_sit_on_its_base(tiny_model: ModelFactory) -> None:
    model = lora(tiny_model())
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = attach_mtp_heads(model, 2)
    assert MTPHeads.of(model) is heads and base_model_of(model).mtp_heads is heads
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if "mtp_heads" in name} == trainable - adapters
    assert len(trainable - adapters) == 12
    seen: list[torch.Tensor] = []
    with heads.watching(seen.append):
        model(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(seen[0], hidden_states(model), rtol=0, atol=0)


# Files


def test_stock_transformers_reloads_the_policy_without_surprises(tiny_model: ModelFactory, tmp_path: Path) -> None:
    for tied in (True, False):
        model = tiny_model(tie_word_embeddings=tied)
        plain = {key: value.clone() for key, value in model.state_dict().items()}
        attach_mtp_heads(model)
        model.save_pretrained(tmp_path / str(tied))
        assert MTPHeads.find(tmp_path / str(tied)) is None
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert list(loaded.state_dict()) == list(plain)
        assert all(torch.equal(value, plain[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_round_trip_bit_for_bit(tiny_model: ModelFactory, tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    heads = attach_mtp_heads(model, 3, inner_size=7)
    randomise(heads)
    assert MTPHeads.of(model).save(tmp_path / "new") == tmp_path / "new" / "mtp_heads.safetensors"
    assert MTPHeads.find(tmp_path / "new") is not None
    loaded = load_mtp_heads(tiny_model().to(dtype), tmp_path / "new")
    assert loaded.config == MTPHeadsConfig(3, 32, 7)
    into = tiny_model().to(dtype)
    attached = attach_mtp_heads(into, 3, inner_size=7, seed=9)
    assert load_mtp_heads(into, tmp_path / "new") is attached
    for key, value in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value) and loaded.state_dict()[key].dtype == dtype
        assert torch.equal(attached.state_dict()[key], value)


def test_an_index_tells_engines_which_files_are_the_model(tiny_model: ModelFactory, tmp_path: Path) -> None:
    """vLLM takes all safetensors files of a folder for the model unless there is an index."""
    model = tiny_model()
    attach_mtp_heads(model)
    for folder in ("whole", "sharded"):
        model.save_pretrained(tmp_path / folder, **({"max_shard_size": "10KB"} if folder == "sharded" else {}))
        shards = {path.name for path in (tmp_path / folder).glob("*.safetensors")}
        assert (len(shards) > 1) == (folder == "sharded")
        MTPHeads.of(model).save(tmp_path / folder)
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(index.values()) == shards and not any("mtp_heads" in key for key in index)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_heads_are_found_in_the_state_dict_of_a_wrapped_model(tiny_model: ModelFactory, tmp_path: Path) -> None:
    model = lora(tiny_model())
    randomise(attach_mtp_heads(model, 2))
    full = {key: value + 1 if "mtp_heads" in key else value for key, value in model.state_dict().items()}
    MTPHeads.of(model).save(tmp_path, full)
    loaded = load_mtp_heads(tiny_model(), tmp_path).state_dict()
    for key, value in MTPHeads.of(model).state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(loaded[key], value + 1)
    with pytest.raises(ValueError, match="does not hold all weights of MTPHeads; gather the whole model"):
        MTPHeads.of(model).save(tmp_path, {"lm_head.weight": torch.zeros(1)})


def test_load_errors_say_what_to_do(tiny_model: ModelFactory, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="No mtp_heads.safetensors in .*saved with MTPHeads.*gets a new mtp_heads"
    ):
        load_mtp_heads(tiny_model(), tmp_path)
    model = tiny_model()
    attach_mtp_heads(model, 2)
    MTPHeads.of(model).save(tmp_path)
    with pytest.raises(ValueError, match="hidden size 32, but Qwen3ForCausalLM has 16"):
        load_mtp_heads(tiny_model(hidden_size=16), tmp_path)
    other = tiny_model()
    attach_mtp_heads(other, 3)
    with pytest.raises(ValueError, match="Ask for 2 heads with inner size 32"):
        load_mtp_heads(other, tmp_path)


def test_gradient_of_the_value_reaches_every_parameter(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    heads = attach_mtp_heads(model, 2)
    randomise(heads)
    F.mse_loss(heads(hidden_states(model)), torch.ones(2, 6, 2)).backward()
    for name, p in heads.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
