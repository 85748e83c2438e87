"""`Attachment`: all that a module of one's own gets from ten lines, and files that older versions wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rl_plugins.nn import Attachment, MTPHeads, MTPHeadsConfig, ParallelHeads, ValueModel, load_mtp_heads
from rl_plugins.nn.attaching import prepare_mtp_heads
from rl_plugins.nn.mtp_heads import CONFIG_NAME
from rl_plugins.nn.released_layers import count_released_layers
from rl_plugins.trl.host import without_attachments

from .helpers.moe_models import make_moe_model

TinyModel = Callable[..., Any]

IDS = torch.tensor([[3, 12, 3, 14], [4, 5, 12, 9]])


class Probe(Attachment):
    """A third party's critic: values linear in the trunk's states."""

    name = "probe"
    mark = "probe.safetensors"

    def __init__(self, hidden_size: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (B, S) of states (B, S, D)."""
        return hidden.float() @ self.weight.float()


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


# A module of one's own


@pytest.mark.parametrize("wrap", [lambda model: model, lora])
def test_a_module_of_ones_own_lives_in_a_model(tiny_model: TinyModel, wrap: Callable[[Any], Any]) -> None:
    model = wrap(tiny_model().to(torch.bfloat16).eval())
    keys, logits = list(model.state_dict()), model(input_ids=IDS).logits
    assert Probe.of(model) is None
    probe = Probe().attach(model)
    assert Probe.of(model) is probe and MTPHeads.of(model) is None
    assert probe.weight.dtype == torch.bfloat16 and not probe.training
    (added,) = set(model.state_dict()) - set(keys)
    assert added.endswith("probe.weight")
    seen: list[Tensor] = []

    def observe(hidden: Tensor) -> list[Tensor]:
        seen.append(probe(hidden))
        return seen[-1:]

    with probe.watching(observe):
        assert torch.equal(model(input_ids=IDS).logits, logits)
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    assert len(seen) == 1 and torch.equal(seen[0], hidden.float() @ probe.weight.float())
    seen[0].sum().backward()
    torch.testing.assert_close(probe.weight.grad, hidden.detach().float().sum((0, 1)).bfloat16())
    with pytest.raises(ValueError, match=r"has `probe` already. Call Probe.of\(model\) to reach it, or Probe.detach"):
        Probe().attach(model)
    assert Probe.detach(model) is probe and list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no `probe` to detach"):
        Probe.detach(model)


def test_all_that_is_attached_is_known_by_name(tiny_model: TinyModel) -> None:
    assert Attachment.names() >= {"mtp_heads", "value_model", "probe"}
    model = lora(tiny_model())
    Probe().attach(model)
    ParallelHeads(MTPHeadsConfig(1, 32, 4)).attach(model)
    own = {name for name, _ in without_attachments(iter(model.named_parameters()))}
    assert own == {name for name, _ in lora(tiny_model()).named_parameters()}


def test_a_name_that_is_the_models_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model()
    probe = Probe()
    probe.name = "lm_head"  # type: ignore[misc]
    with pytest.raises(ValueError, match="has `lm_head` already"):
        probe.attach(model)
    assert isinstance(model.lm_head, nn.Linear)


def test_hooks_that_were_taken_off_come_back_once(tiny_model: TinyModel) -> None:
    """Lightning's DeepSpeed strategy takes all hooks off before it evaluates."""
    model = tiny_model()
    probe, critic = Probe().attach(model), ValueModel(tiny_model(seed=2).model).attach(model)
    calls: list[str] = []

    def count() -> list[str]:
        calls.clear()
        with probe.watching(lambda hidden: calls.append("probe")), critic.watching(lambda v: calls.append("critic")):
            model(input_ids=IDS)
        return calls

    for module in (probe, critic):
        module.hook(model)
    assert count() == ["critic", "probe"]
    for part in (model, model.base_model):
        part._forward_hooks.clear()
    model._forward_pre_hooks.popitem()
    assert count() == []
    for module in (probe, critic, probe, critic):
        module.hook(model)
    assert count() == ["critic", "probe"]
    assert len(model.base_model._forward_hooks) == len(model._forward_pre_hooks) == 1


def test_its_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    probe = Probe().attach(model)
    with torch.no_grad():
        probe.weight.mul_(3.0)
    model.save_pretrained(tmp_path)
    assert Probe.find(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="No probe.safetensors in .*Probe.save wrote.*gets a new probe"):
        probe.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="No probe.safetensors in /nowhere: there is no such folder"):
        probe.load("/nowhere")
    assert probe.save(tmp_path) == tmp_path / "probe.safetensors"
    assert Probe.find(str(tmp_path)) == str(tmp_path)
    # Engines would take the file for a part of the model, if an index did not name the model's own.
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model.safetensors"} and "probe.weight" not in index
    again = Probe().attach(AutoModelForCausalLM.from_pretrained(tmp_path))
    again.load(tmp_path)
    assert torch.equal(again.weight, probe.weight)
    with pytest.raises(ValueError, match=r"1 weights differ, such as weight, which is \(32,\) instead of \(16,\)"):
        Probe(16).load(tmp_path)


def test_its_part_of_an_engines_state_dict(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Keys come with the prefixes of wrappers, and a value model may hold a copy of the same module."""
    probe = Probe()
    whole = {
        "module.base_model.model.probe.weight": probe.weight.detach() + 1,
        "module.base_model.model.my_probe.weight": torch.zeros(32),
        "module.base_model.model.value_model.trunk.probe.weight": torch.zeros(32),
        "module.base_model.model.lm_head.weight": torch.zeros(2),
    }
    assert torch.equal(load_file(probe.save(tmp_path / "new", whole))["weight"], probe.weight + 1)
    del whole["module.base_model.model.probe.weight"]
    with pytest.raises(ValueError, match="not hold all weights of Probe; gather the whole model. Missing are 1 of 1"):
        probe.save(tmp_path / "other", whole)
    assert not (tmp_path / "other").exists()


def test_a_file_in_a_folder_of_its_own(tmp_path: Path) -> None:
    class Deep(Probe):
        name = "deep"
        mark = "deep/er/weights.safetensors"

    Deep().save(tmp_path)
    assert (tmp_path / "deep" / "er" / "weights.safetensors").is_file()
    assert Deep.find(tmp_path) == str(tmp_path)


def test_what_has_no_file_says_so(tmp_path: Path) -> None:
    class Unsaved(Attachment):
        name = "unsaved"

    for call in (lambda: Unsaved().save(tmp_path), lambda: Unsaved().load(tmp_path), lambda: Unsaved.find(tmp_path)):
        with pytest.raises(TypeError, match="Unsaved has no `mark`: name the file that it is saved in"):
            call()


# Files of version 0.1, name by name


def test_files_of_older_versions_load(tiny_model: TinyModel, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {"norm.weight": (32,), "up.weight": (5, 32), "down.weight": (32, 5)}
    shapes |= {"value.rmsnorm_weight": (32,), "value.weight": (32,), "value.bias": (1,)}
    heads = {f"heads.{k}.{name}": random(*shape) for k in range(2) for name, shape in shapes.items()}
    save_file(heads, tmp_path / "mtp_heads.safetensors")
    written = {"num_heads": 2, "hidden_size": 32, "inner_size": 5, "norm_eps": 1e-6}
    (tmp_path / "mtp_heads_config.json").write_text(json.dumps(written, indent=2) + "\n")
    loaded = load_mtp_heads(tiny_model(), tmp_path)
    assert loaded.state_dict().keys() == heads.keys()
    assert all(torch.equal(loaded.state_dict()[name], x) for name, x in heads.items())
    prepared = prepare_mtp_heads(tiny_model(), 2, inner_size=5, path=tmp_path)
    assert all(torch.equal(prepared.state_dict()[name], x) for name, x in heads.items())
    again = loaded.save(tmp_path / "again")  # which writes what kind of heads they are, besides
    assert again.read_bytes() == (tmp_path / "mtp_heads.safetensors").read_bytes()
    assert json.loads(again.with_name(CONFIG_NAME).read_text()) == written | {"head_type": "parallel"}

    trunk = tiny_model(seed=5).model
    trunk.save_pretrained(tmp_path / "value_model")
    head = {"rmsnorm_weight": random(32), "weight": random(32), "bias": random(1)}
    save_file(head, tmp_path / "value_model" / "value_head.safetensors")
    critic = ValueModel(tiny_model().model)
    critic.load(tmp_path)
    expected = {f"head.{name}": x for name, x in head.items()}
    expected |= {f"trunk.{name}": x for name, x in trunk.state_dict().items()}
    assert critic.state_dict().keys() == expected.keys()
    assert all(torch.equal(critic.state_dict()[name], x) for name, x in expected.items())


def test_layers_in_a_checkpoint_of_older_versions_load(tmp_path: Path) -> None:
    model = make_moe_model("glm4_moe")
    model.save_pretrained(tmp_path)
    assert count_released_layers(model, tmp_path) == 0
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    layers = make_moe_model("glm4_moe", num_hidden_layers=model.config.num_hidden_layers + 1).state_dict()
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    block = {name: x.contiguous() for name, x in layers.items() if name.startswith(prefix)}
    extra = {"eh_proj.weight": weight}
    extra |= {name: torch.full((32,), i) for i, name in enumerate(("enorm.weight", "hnorm.weight"), 2)}
    extra |= {"shared_head.norm.weight": torch.full((32,), 4.0)}
    shard = _per_expert(block) | {prefix + name: x.float() for name, x in extra.items()}
    save_file(shard, tmp_path / "model-native_mtp.safetensors", {"format": "pt"})
    single, index_file = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    index = dict.fromkeys(load_file(single), "model-00001-of-00001.safetensors")
    index |= dict.fromkeys(shard, "model-native_mtp.safetensors")
    single.rename(tmp_path / "model-00001-of-00001.safetensors")
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))

    assert MTPHeads.find(tmp_path) is None and count_released_layers(model, tmp_path) == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    heads = prepare_mtp_heads(again, 1, head_type="sequential")
    found, loaded = heads.state_dict(), load_mtp_heads(model, tmp_path).state_dict()
    assert torch.equal(found["layers.0.eh_proj.weight"], weight)
    assert found["layers.0.post_norm.weight"].eq(4.0).all() and found["layers.0.enorm.weight"].eq(2.0).all()
    for name, x in block.items():
        assert torch.equal(found[f"layers.0.mtp_block.{name.removeprefix(prefix)}"], x), name
    assert all(torch.equal(loaded[name], x) for name, x in found.items())
    # They are saved beside the model and in its checkpoint, where the shard of old has no place in the index.
    heads.save(tmp_path)
    written = tmp_path / "model-mtp_layers.safetensors"
    assert written.read_bytes() == (tmp_path / "model-native_mtp.safetensors").read_bytes()
    index |= dict.fromkeys(shard, written.name)
    assert json.loads(index_file.read_text())["weight_map"] == index
    assert MTPHeads.find(tmp_path) == str(tmp_path) and count_released_layers(again) == 1


def _per_expert(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one, as released checkpoints have them."""
    found: dict[str, Tensor] = {}
    for name, x in block.items():
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(x):
                gate, up = expert.chunk(2)
                stem = name.removesuffix("gate_up_proj")
                found |= {
                    f"{stem}{i}.gate_proj.weight": gate.contiguous(),
                    f"{stem}{i}.up_proj.weight": up.contiguous(),
                }
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            found |= {f"{stem}{i}.down_proj.weight": expert.contiguous() for i, expert in enumerate(x)}
        else:
            found[name] = x
    return found
