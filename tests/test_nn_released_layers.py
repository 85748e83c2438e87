"""Sequential heads as layers of the model's own checkpoint: what is written, what transformers reads, what is read."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rl_plugins.nn import MTPHeads, SequentialHeads, attach_mtp_heads, expect_mtp_keys, load_mtp_heads, released_layers
from rl_plugins.nn.attaching import prepare_mtp_heads
from rl_plugins.nn.released_layers import count_released_layers

from .helpers.moe_models import make_moe_model
from .helpers.sequential_heads import RELEASED

RELEASED_LAYERS = {"deepseek_v3": 61, "glm4_moe": 46}
SHARD = "model-mtp_layers.safetensors"
OWN = ("mtp_heads.safetensors", "mtp_heads_config.json")
IDS = torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def attach(model: Any, num_heads: int) -> SequentialHeads:
    heads = attach_mtp_heads(model, num_heads, head_type="sequential")
    assert isinstance(heads, SequentialHeads)
    with torch.no_grad():
        for depth in heads:
            depth.mtp_block.mlp.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    return heads


def without_own_files(folder: Path) -> Path:
    """Leave the checkpoint of a model that was released with its layers, and nothing of ours."""
    for name in OWN:
        (folder / name).unlink()
    return folder


def stored_keys(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


@pytest.fixture(params=[(family, k) for family in RELEASED for k in (1, 2)], ids=str)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, SequentialHeads, Path]]:
    """A model, its heads, and where both were saved."""
    family, num_heads = request.param
    model = make_moe_model(family).eval()
    heads = attach(model, num_heads)
    model.save_pretrained(tmp_path)
    heads.save(tmp_path)
    yield model, heads, tmp_path


def test_files_are_those_of_a_released_checkpoint(saved: Any) -> None:
    model, heads, folder = saved
    index = stored_keys(folder)
    for name in set(index.values()):
        with safe_open(folder / name, framework="pt") as file:
            assert {key for key, shard in index.items() if shard == name} == set(file.keys())
    assert not (folder / "model.safetensors").exists() and all((folder / name).is_file() for name in OWN)
    assert all(key.startswith(("model.", "lm_head.")) for key in index)
    new = {key for key, shard in index.items() if shard == SHARD}
    block = {key.removeprefix("model.layers.2.") for key in index if key.startswith("model.layers.2.")}
    assert "mlp.experts.7.gate_proj.weight" in block  # one tensor an expert
    extras = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    layers = range(3, 3 + heads.config.num_heads)
    assert new == {f"model.layers.{i}.{name}" for i in layers for name in block | extras}
    assert AutoConfig.from_pretrained(folder).num_mtp_layers == heads.config.num_heads
    assert count_released_layers(model, folder) == heads.config.num_heads


def test_a_released_checkpoint_gives_the_same_weights(saved: Any) -> None:
    model, heads, folder = saved
    again = AutoModelForCausalLM.from_pretrained(without_own_files(folder))
    own = {name: x for name, x in model.state_dict().items() if not name.startswith("mtp_heads.")}
    assert_same(again.state_dict(), own)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loaded = prepare_mtp_heads(again, heads.config.num_heads, head_type="sequential")
    assert torch.equal(torch.rand(1), expected)
    assert_same(loaded.state_dict(), heads.state_dict())  # their values start at 0
    assert all(p.requires_grad for p in loaded.parameters()) and not loaded.training
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    assert_same(load_mtp_heads(fresh, folder).state_dict(), heads.state_dict())
    # Into attached heads, whose parameters an optimizer knows by now.
    twin = copy.deepcopy(model)
    ours = MTPHeads.of(twin)
    assert ours is not None
    params = list(ours.parameters())
    with torch.no_grad():
        for p in params:
            p.fill_(7.0)
    assert load_mtp_heads(twin, folder) is ours
    assert all(a is b for a, b in zip(params, ours.parameters(), strict=True))
    values = {name: x for name, x in ours.state_dict().items() if name.startswith("value_heads.")}
    assert all((x == 7.0).all() for x in values.values())
    assert_same(ours.state_dict(), heads.state_dict() | values)


def test_saved_heads_come_before_the_checkpoints(saved: Any) -> None:
    """They have values, and stand in the dtype that they were trained in."""
    model, heads, folder = saved
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.25)
    heads.save(folder)
    index = stored_keys(folder)
    without_shard = {key: file for key, file in index.items() if file != SHARD}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": without_shard}))
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert MTPHeads.find(folder) == str(folder) and count_released_layers(again) == 0
    assert_same(load_mtp_heads(again, folder).state_dict(), heads.state_dict())


@pytest.mark.slow
def test_stock_generate_reads_them(saved: Any) -> None:
    model, heads, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    expect_mtp_keys(again)
    again.generation_config.eos_token_id = None
    prompt = IDS[:1, :5]
    plain = again.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(again.generate(prompt, max_new_tokens=12, do_sample=False, use_mtp=True), plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", RELEASED)
def test_released_sizes_need_nothing_but_transformers(family: str, tmp_path: Path) -> None:
    layers = RELEASED_LAYERS[family]
    model = make_moe_model(family, num_hidden_layers=layers, first_k_dense_replace=layers).eval()
    model.save_pretrained(tmp_path)
    attach_mtp_heads(model, 1, head_type="sequential").save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    plain = again.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False)
    assert torch.equal(again.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False, use_mtp=True), plain)


@pytest.mark.parametrize("shard_size", ["40kB", "1GB"])
def test_saving_again(shard_size: str, tmp_path: Path) -> None:
    """Over an earlier checkpoint, whichever way it was sharded, and by us again without the model."""
    model = make_moe_model("deepseek_v3").eval()
    heads = attach(model, 2)
    for size in ("1GB", "40kB", shard_size):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        model.save_pretrained(tmp_path, max_shard_size=size)
        heads.save(tmp_path)
    with torch.no_grad():
        heads.layers[1].eh_proj.weight.mul_(2)
    heads.save(tmp_path)
    found = {path.name for path in without_own_files(tmp_path).glob("*.safetensors")}
    assert found == set(stored_keys(tmp_path).values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    load_mtp_heads(again, tmp_path)
    own = {name: x for name, x in model.state_dict().items() if ".value_heads." not in name}
    assert_same({name: x for name, x in again.state_dict().items() if name in own}, own)
    MTPHeads.detach(model)
    attach(model, 1).save(tmp_path)
    assert count_released_layers(model, tmp_path) == 1
    assert {key for key in stored_keys(tmp_path) if key.startswith("model.layers.4")} == set()


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_job_that_dies_while_it_saves(replaced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is the model's without layers then, and no ruin."""
    model = make_moe_model("glm4_moe")
    heads = attach(model, 1)
    model.save_pretrained(tmp_path)
    calls = [os.replace] * replaced

    def die(*paths: Any) -> None:
        if not calls:
            raise KeyboardInterrupt
        calls.pop()(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(released_layers.os, "replace", die)
        heads.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    assert count_released_layers(again) == 0
    assert_same(load_mtp_heads(again, tmp_path).state_dict(), heads.state_dict())
    heads.save(tmp_path)
    assert count_released_layers(again) == 1


def test_an_engines_state_dict_and_its_gaps(tmp_path: Path) -> None:
    model = make_moe_model("glm4_moe")
    heads = attach(model, 1)
    whole = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    heads.save(tmp_path, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(OWN), "there is no model to add layers to"
    model.save_pretrained(tmp_path)
    heads.save(tmp_path, whole)
    loaded = load_mtp_heads(AutoModelForCausalLM.from_pretrained(tmp_path), without_own_files(tmp_path))
    for name, tensor in heads.layers.state_dict().items():
        assert torch.equal(loaded.layers.state_dict()[name], tensor + 1)
    with pytest.raises(ValueError, match="gather the whole model"):
        heads.save(tmp_path, {k: v for k, v in whole.items() if "eh_proj" not in k})


def test_a_model_in_another_dtype_than_its_checkpoint(tmp_path: Path) -> None:
    """Layers come in the dtype that the model has now, not in that of its config."""
    model = make_moe_model("glm4_moe")
    heads = attach(model, 1)
    model.save_pretrained(tmp_path)
    heads.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(without_own_files(tmp_path), dtype=torch.bfloat16).float()
    before = again.config.name_or_path, again.config.dtype
    loaded = load_mtp_heads(again, tmp_path)
    assert (again.config.name_or_path, again.config.dtype) == before
    assert_same(loaded.state_dict(), heads.state_dict())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in load_mtp_heads(half, tmp_path).parameters()} == {torch.bfloat16}


def test_checkpoints_without_layers_and_with_other_numbers(tmp_path: Path) -> None:
    model = make_moe_model("glm4_moe")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count_released_layers(again) == count_released_layers(make_moe_model("glm4_moe")) == 0
    with pytest.raises(ValueError, match=r"has no MTP layers after layer 2. Train new ones: attach_mtp_heads"):
        SequentialHeads(again, 1).attach(again).read_released(tmp_path)
    MTPHeads.detach(again)
    with pytest.raises(FileNotFoundError, match="No mtp_heads.safetensors in"):
        load_mtp_heads(again, tmp_path)
    assert prepare_mtp_heads(again, 2, head_type="sequential").config.num_heads == 2  # new ones
    again.save_pretrained(tmp_path)
    MTPHeads.of(again).save(tmp_path)  # type: ignore[union-attr]
    without_own_files(tmp_path)
    assert count_released_layers(model, tmp_path) == 2
    model.config.num_mtp_layers = 1
    assert load_mtp_heads(model, tmp_path).config.num_heads == model.config.num_mtp_layers == 2
    for prepared in (AutoModelForCausalLM.from_pretrained(tmp_path), make_moe_model("glm4_moe")):
        path = None if prepared.config.name_or_path else tmp_path
        message = r"has 2 MTP layers after layer 2, but 1 sequential heads are asked for. Set num_mtp_heads=2, or mtp_"
        with pytest.raises(ValueError, match=message):
            prepare_mtp_heads(prepared, 1, head_type="sequential", path=path)
        assert MTPHeads.of(prepared) is None
    parallel = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert prepare_mtp_heads(parallel, 1).config.head_type == "parallel", "the layers are left where they are"
