"""Native MTP layers: equal to transformers' own, blind to padding, their loss by hand, and on disk."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rl_plugins.moe import find_routers
from rl_plugins.nn import NativeMTP, attach_native_mtp, native_mtp_files, native_token_loss, token_loss

from .helpers.moe_models import make_moe_model
from .helpers.native_mtp import FAMILIES, doubled, slow_losses, transformers_layers, trunk_states

RELEASED_LAYERS = {"deepseek_v3": 61, "glm4_moe": 46}
K, LENGTH = 2, 9
IDS = torch.randint(2, 40, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def make(family: str = "glm4_moe", num_layers: int = K, **overrides: Any) -> tuple[Any, NativeMTP]:
    """A model in float64 with native layers, in evaluation mode."""
    model = doubled(make_moe_model(family, **overrides))
    return model, attach_native_mtp(model, num_layers)


def run_all(native: NativeMTP, hidden: Tensor, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Every depth on all the positions that have the tokens ahead of them."""
    found = []
    for depth in range(1, native.num_layers + 1):
        length = ids.shape[1] - depth
        positions = torch.arange(depth, ids.shape[1]).expand(len(ids), -1)
        seen = None if mask is None else mask[:, :length]
        hidden = native.run(depth, hidden[:, :length], ids[:, depth:], positions, seen)
        found.append(hidden)
    return found


# Depth modules


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_run_equals_transformers(family: str, attention: str) -> None:
    model = make_moe_model(family).eval()
    model.set_attn_implementation(attention)
    native = attach_native_mtp(model, K)
    mtp = transformers_layers(model, native)
    hidden = expected = trunk_states(model, IDS)
    for depth in range(1, K + 1):
        length = LENGTH - depth
        positions = torch.arange(depth, LENGTH).expand(2, -1)
        hidden = native.run(depth, hidden[:, :length], IDS[:, depth:], positions, torch.ones(2, length))
        expected = mtp.forward_layer(depth - 1, expected[:, :length], positions, None, input_ids=IDS[:, depth:])
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(native.logits(hidden), mtp._project_to_logits(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, attention: str, side: str) -> None:
    model = make_moe_model(family).eval()
    model.set_attn_implementation(attention)
    native = attach_native_mtp(model, K)
    pad = 3
    real = slice(pad, None) if side == "left" else slice(0, LENGTH)
    mask = torch.zeros(2, LENGTH + pad, dtype=torch.long)
    mask[:, real] = 1
    alone = run_all(native, trunk_states(model, IDS), IDS, None)
    found = []
    for garbage in (5, 33):
        ids = torch.full_like(mask, garbage)
        ids[:, real] = IDS
        hidden = trunk_states(model, ids, mask)
        hidden = torch.where(mask.bool()[..., None], hidden, torch.full_like(hidden, float(garbage)))
        states = run_all(native, hidden, ids, mask)
        assert all(padded.isfinite().all() for padded in states)
        found.append([padded[:, real][:, : LENGTH - depth] for depth, padded in enumerate(states, 1)])
    for first, second, expected in zip(*found, alone, strict=True):
        for padded in (first, second):
            torch.testing.assert_close(padded, expected, rtol=0, atol=2e-5)  # rotated elsewhere, in float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_with_holes(family: str, attention: str) -> None:
    """Slots that were drafted and thrown away stay in the cache, masked out."""
    model = make_moe_model(family).eval()
    model.set_attn_implementation(attention)
    native = attach_native_mtp(model, K)
    states = [trunk_states(model, IDS), *run_all(native, trunk_states(model, IDS), IDS, None)]
    cache = DynamicCache()
    for depth in range(1, K + 1):
        length = LENGTH - depth
        hidden, tokens = states[depth - 1][:, :length], IDS[:, depth:]
        positions = torch.arange(depth, LENGTH).expand(2, -1)
        noise = torch.full_like(hidden[:, :2], 7.0)
        first = native.run(depth, hidden[:, :4], tokens[:, :4], positions[:, :4], torch.ones(2, 4), cache)
        mask = torch.ones(2, 6)
        native.run(depth, noise, tokens[:, :2], positions[:, :2], mask, cache)
        mask = torch.cat([mask, torch.ones(2, length - 4)], dim=1)
        mask[:, 4:6] = 0  # the hole
        rest = native.run(depth, hidden[:, 4:], tokens[:, 4:], positions[:, 4:], mask, cache)
        torch.testing.assert_close(torch.cat([first, rest], dim=1), states[depth], rtol=0, atol=2e-5)
        assert cache.get_seq_length(depth - 1) == length + 2


def test_run_refuses_what_does_not_fit() -> None:
    model, native = make()
    hidden, positions = trunk_states(model, IDS), torch.arange(LENGTH).expand(2, -1)
    with pytest.raises(ValueError, match="depth 1 to 2"):
        native.run(3, hidden, IDS, positions, None)
    cache = DynamicCache()
    native.run(1, hidden, IDS, positions, torch.ones(2, LENGTH), cache)
    with pytest.raises(ValueError, match="covers 9 slots, but cache and input have 18"):
        native.run(1, hidden, IDS, positions, torch.ones(2, LENGTH), cache)


# Attaching


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_alone_are_registered(family: str) -> None:
    model = make_moe_model(family)
    before, keys = dict(model.named_parameters()), set(model.state_dict())
    native = attach_native_mtp(model, K)
    added = {name: p for name, p in model.named_parameters() if name not in before}
    assert all(name.startswith("native_mtp.layers.") for name in added)
    assert {id(p) for p in added.values()}.isdisjoint(map(id, before.values()))
    assert sum(p.numel() for p in added.values()) == sum(p.numel() for p in native.parameters())
    assert model.config.num_mtp_layers == K
    assert NativeMTP.detach(model) is native and NativeMTP.of(model) is None
    assert set(model.state_dict()) == keys and not model._keys_to_ignore_on_save


@pytest.mark.parametrize("family", FAMILIES)
def test_new_layers_are_seeded_and_initialised_as_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_moe_model(family, num_hidden_layers=2) for _ in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    first, same, other = (attach_native_mtp(m, 2, seed=seed) for m, seed in zip(models, (1, 1, 2), strict=True))
    assert torch.equal(torch.rand(1), expected) and not seeds, "generators of GPUs included"
    for name, p in first.named_parameters():
        assert torch.equal(p, same.state_dict()[name])
        assert torch.equal(p, other.state_dict()[name]) == bool((p == 1).all())  # norms only
        if p.ndim > 1:
            assert 0.15 < p.std() < 0.25, name  # initializer_range is 0.2, the routers' too
    assert not torch.equal(first.layers[0].eh_proj.weight, first.layers[1].eh_proj.weight)
    assert not first.layers[0].mtp_block.mlp.gate.e_score_correction_bias.any()


def test_a_copy_of_the_model_uses_its_own_embedding() -> None:
    model, native = make()
    hidden = trunk_states(model, IDS)
    expected = run_all(native, hidden, IDS, None)[-1]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
        model.get_output_embeddings().weight.zero_()
    found = NativeMTP.of(twin)
    assert found is not None and found is not native
    assert torch.equal(run_all(found, hidden, IDS, None)[-1], expected)
    assert found.logits(expected).any() and not native.logits(expected).any()


def test_attach_refuses_what_does_not_fit(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="not for qwen3.*attach_mtp_heads"):
        attach_native_mtp(tiny_model())
    model = make_moe_model("glm4_moe")
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        attach_native_mtp(model, 0)
    assert attach_native_mtp(model).num_layers == 1  # what the config says
    with pytest.raises(ValueError, match="already"):
        attach_native_mtp(model)
    with pytest.raises(ValueError, match="comes with 1 native MTP layers, not 2"):
        NativeMTP.prepare(model, 2)
    NativeMTP.detach(model)
    with pytest.raises(ValueError, match="to detach"):
        NativeMTP.detach(model)
    with pytest.raises(ValueError, match="came from no checkpoint.*attach_native_mtp"):
        NativeMTP.from_checkpoint(model)


def test_routers_of_the_layers_are_left_out() -> None:
    model = make_moe_model("deepseek_v3")
    names = [router.name for router in find_routers(model)]
    attach_native_mtp(model, 2)
    assert [router.name for router in find_routers(model)] == names and len(names) == 2


# Token loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_loss_by_hand(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", 40 * 3)  # three positions at once
    model, native = make(family)
    labels = IDS.clone()
    labels[0, :4], labels[1, 6] = -100, -100
    expected = slow_losses(model, native, IDS, labels, temperature=1.5)
    pad = 2
    padded = [nn.functional.pad(x, (pad, 0) if side == "left" else (0, pad), value=v) for x, v in
              ((IDS, 3), (labels, -100), (torch.ones_like(IDS), 0))]  # fmt: skip
    losses, counts = native_token_loss(
        native,
        trunk_states(model, padded[0], padded[2]),
        padded[0],
        padded[1],
        model.lm_head,
        attention_mask=padded[2],
        temperature=1.5,
    )
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-6, atol=0)
    assert counts.tolist() == [5 + 6, 5 + 5]


def test_packed_documents_are_those_alone() -> None:
    model, native = make()
    lengths = [5, 4]
    rows = [IDS[i : i + 1, :length] for i, length in enumerate(lengths)]
    alone = [native_token_loss(native, trunk_states(model, row), row, row, model.lm_head)[0] for row in rows]
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    hidden = model.model(input_ids=packed, position_ids=positions, use_cache=False).last_hidden_state
    losses, counts = native_token_loss(native, hidden, packed, packed, model.lm_head, position_ids=positions)
    torch.testing.assert_close(losses, sum(alone), rtol=1e-6, atol=0)
    assert counts.tolist() == [3 + 2, 2 + 1]


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_of_the_loss(detach: bool) -> None:
    """Embedding and LM head are constants, and the trunk learns where it is asked to."""
    model, native = make()
    model.train()
    with native.running(model.lm_head, IDS, IDS, detach_trunk=detach) as run:
        model(input_ids=IDS)
    assert run.token_losses is not None and run.values is None
    run.token_losses.sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    of_layers = {f"native_mtp.{name}" for name, _ in native.named_parameters()}
    of_trunk = {name for name, _ in model.named_parameters() if name.startswith("model.")}
    assert of_layers <= learned and "lm_head.weight" not in learned
    assert learned - of_layers == (set() if detach else of_trunk)
    if detach:
        return
    # The embedding learns through the trunk alone: as if the depth modules read another table.
    table = copy.deepcopy(model.get_input_embeddings())
    found = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    hidden = trunk_states(model, IDS)
    trunk_table = model.get_input_embeddings()
    model.set_input_embeddings(table)
    native_token_loss(native, hidden, IDS, IDS, model.lm_head)[0].sum().backward()
    torch.testing.assert_close(trunk_table.weight.grad, found)
    assert table.weight.grad is None


def test_no_labels_cost_nothing_and_reach_every_parameter() -> None:
    """DDP waits for every parameter, also where a row is too short for any depth."""
    model, native = make()
    for ids, labels in ((IDS, torch.full_like(IDS, -100)), (IDS[:, :1], IDS[:, :1])):
        model.zero_grad()
        losses, counts = native_token_loss(native, trunk_states(model, ids).detach(), ids, labels, model.lm_head)
        assert losses.tolist() == [0.0, 0.0] and counts.tolist() == [0.0, 0.0]
        losses.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in native.parameters())


def test_the_layers_do_not_show_in_the_models_outputs() -> None:
    model, native = make()
    plain = model(input_ids=IDS, labels=IDS, output_hidden_states=True, output_router_logits=True)
    with native.running(model.lm_head, IDS, IDS) as run:
        assert run.token_losses is None and not run.is_filled
        watched = model(input_ids=IDS, labels=IDS, output_hidden_states=True, output_router_logits=True)
        first = run.token_losses
        model(input_ids=IDS)
    assert run.token_losses is first  # the first forward counts
    assert torch.equal(plain.logits, watched.logits) and torch.equal(plain.loss, watched.loss)
    assert len(plain.hidden_states) == len(watched.hidden_states) == 4
    assert native.observer is None


@pytest.mark.parametrize("attach_first", [True, False])
def test_gradient_checkpointing(attach_first: bool) -> None:
    """The layers recompute as the trunk does, whichever came first."""
    grads = []
    for checkpointing in (False, True):
        model = doubled(make_moe_model("glm4_moe")).train()
        if checkpointing and not attach_first:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        native = attach_native_mtp(model, K)
        if checkpointing and attach_first:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        runs: list[int] = []
        native.layers[0].mtp_block.mlp.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))
        with native.running(model.lm_head, IDS, IDS, detach_trunk=False) as run:
            model(input_ids=IDS, use_cache=False)
        assert run.token_losses is not None
        run.token_losses.sum().backward()
        assert len(runs) == 1 + checkpointing
        grads.append([p.grad for p in (*native.parameters(), model.model.layers[0].mlp.up_proj.weight)])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


# On disk


@pytest.fixture(params=[(family, k) for family in FAMILIES for k in (1, 2)], ids=str)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, NativeMTP, Path]]:
    """A model, its native layers, and where both were saved."""
    family, num_layers = request.param
    model = make_moe_model(family).eval()
    native = attach_native_mtp(model, num_layers)
    with torch.no_grad():
        for layer in native.layers:
            layer.mtp_block.mlp.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    model.save_pretrained(tmp_path)
    NativeMTP.of(model).save(tmp_path)
    yield model, native, tmp_path


def stored_keys(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_files_are_those_of_a_released_checkpoint(saved: Any) -> None:
    model, native, folder = saved
    index = stored_keys(folder)
    for name in set(index.values()):
        with safe_open(folder / name, framework="pt") as file:
            assert {key for key, shard in index.items() if shard == name} == set(file.keys())
    assert not (folder / "model.safetensors").exists()
    assert all(key.startswith(("model.", "lm_head.")) for key in index)
    new = {key for key, shard in index.items() if shard == "model-native_mtp.safetensors"}
    block = {key.removeprefix("model.layers.2.") for key in index if key.startswith("model.layers.2.")}
    assert "mlp.experts.7.gate_proj.weight" in block  # one tensor an expert
    extras = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    layers = range(3, 3 + native.num_layers)
    assert new == {f"model.layers.{i}.{name}" for i in layers for name in block | extras}
    assert AutoConfig.from_pretrained(folder).num_mtp_layers == native.num_layers


def test_load_gives_the_same_weights(saved: Any) -> None:
    model, native, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loaded = NativeMTP.prepare(again, native.num_layers)
    assert torch.equal(torch.rand(1), expected)
    assert loaded.state_dict().keys() == native.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, native.state_dict()[name]), name
    assert all(p.requires_grad for p in loaded.parameters()) and not loaded.training
    # Into attached layers, whose parameters an optimizer knows by now.
    fresh = copy.deepcopy(model)
    ours = NativeMTP.of(fresh)
    assert ours is not None
    params = list(ours.parameters())
    with torch.no_grad():
        for p in params:
            p.zero_()
    assert NativeMTP.from_checkpoint(fresh, folder) is ours
    assert all(a is b for a, b in zip(params, ours.parameters(), strict=True))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, native.state_dict()[name]), name


@pytest.mark.slow
def test_stock_generate_reads_them(saved: Any) -> None:
    model, native, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    NativeMTP.expect_keys(again)
    again.generation_config.eos_token_id = None
    prompt = IDS[:1, :5]
    plain = again.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(again.generate(prompt, max_new_tokens=12, do_sample=False, use_mtp=True), plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_released_sizes_need_nothing_but_transformers(family: str, tmp_path: Path) -> None:
    layers = RELEASED_LAYERS[family]
    model = make_moe_model(family, num_hidden_layers=layers, first_k_dense_replace=layers).eval()
    model.save_pretrained(tmp_path)
    attach_native_mtp(model)
    NativeMTP.of(model).save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    plain = again.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False)
    assert torch.equal(again.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False, use_mtp=True), plain)


@pytest.mark.parametrize("shard_size", ["40kB", "1GB"])
def test_saving_again(shard_size: str, tmp_path: Path) -> None:
    """Over an earlier checkpoint, whichever way it was sharded, and by us again without the model."""
    model = make_moe_model("deepseek_v3").eval()
    native = attach_native_mtp(model, 2)
    for size in ("1GB", "40kB", shard_size):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        model.save_pretrained(tmp_path, max_shard_size=size)
        NativeMTP.of(model).save(tmp_path)
    with torch.no_grad():
        native.layers[1].eh_proj.weight.mul_(2)
    NativeMTP.of(model).save(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(stored_keys(tmp_path).values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    NativeMTP.from_checkpoint(again)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    NativeMTP.detach(model)
    attach_native_mtp(model, 1)
    NativeMTP.of(model).save(tmp_path)
    assert NativeMTP.layers_in(model, tmp_path) == 1


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_job_that_dies_while_it_saves(replaced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is the model's without native layers then, and no ruin."""
    model = make_moe_model("glm4_moe")
    attach_native_mtp(model, 1)
    model.save_pretrained(tmp_path)
    calls = [os.replace] * replaced

    def die(*paths: Any) -> None:
        if not calls:
            raise KeyboardInterrupt
        calls.pop()(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(native_mtp_files.os, "replace", die)
        NativeMTP.of(model).save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    assert NativeMTP.layers_in(again) == 0
    NativeMTP.of(model).save(tmp_path)
    assert NativeMTP.layers_in(again) == 1


def test_an_engines_state_dict_and_its_gaps(tmp_path: Path) -> None:
    model = make_moe_model("glm4_moe")
    native = attach_native_mtp(model, 1)
    whole = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with pytest.raises(FileNotFoundError, match="save the model first"):
        NativeMTP.of(model).save(tmp_path, whole)
    model.save_pretrained(tmp_path)
    NativeMTP.of(model).save(tmp_path, whole)
    loaded = NativeMTP.from_checkpoint(AutoModelForCausalLM.from_pretrained(tmp_path))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, native.state_dict()[name] + 1)
    with pytest.raises(ValueError, match="gather the whole model"):
        NativeMTP.of(model).save(tmp_path, {k: v for k, v in whole.items() if "eh_proj" not in k})


def test_a_model_in_another_dtype_than_its_checkpoint(tmp_path: Path) -> None:
    """Layers come in the dtype that the model has now, not in that of its config."""
    model = make_moe_model("glm4_moe")
    native = attach_native_mtp(model, 1)
    model.save_pretrained(tmp_path)
    NativeMTP.of(model).save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float()
    before = again.config.name_or_path, again.config.dtype
    loaded = NativeMTP.from_checkpoint(again, tmp_path)
    assert (again.config.name_or_path, again.config.dtype) == before
    assert all(torch.equal(x, native.state_dict()[name]) for name, x in loaded.state_dict().items())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in NativeMTP.from_checkpoint(half).parameters()} == {torch.bfloat16}


def test_checkpoints_without_layers(tmp_path: Path) -> None:
    model = make_moe_model("glm4_moe")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert NativeMTP.layers_in(again) == NativeMTP.layers_in(make_moe_model("glm4_moe")) == 0
    with pytest.raises(ValueError, match="no native MTP layers after layer 2.*attach_native_mtp"):
        NativeMTP.from_checkpoint(again)
    assert NativeMTP.prepare(again, 2).num_layers == 2  # new ones
    again.save_pretrained(tmp_path)
    NativeMTP.of(again).save(tmp_path)
    assert NativeMTP.layers_in(model, tmp_path) == 2
    assert NativeMTP.from_checkpoint(model, tmp_path).num_layers == model.config.num_mtp_layers == 2  # it said 1
    NativeMTP.detach(model)
    attach_native_mtp(model, 1)
    with pytest.raises(ValueError, match="has 2 native MTP layers, but 1 are attached"):
        NativeMTP.from_checkpoint(model, tmp_path)
