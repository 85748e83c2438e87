"""Model cards name the method, cite its papers, and their code loads what stands beside the weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rl_plugins.moe import get_router_balancer
from rl_plugins.nn import MTPHeads, ValueModel
from rl_plugins.papers import PAPERS, PRESET_METHODS
from rl_plugins.signals.presets import GRPO_PRESETS, PPO_PRESETS
from rl_plugins.trl import (
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MoEBalancingCallback,
    MTPCriticTrainer,
    MTPSFTConfig,
    MTPSFTTrainer,
    PPOConfig,
    PPOTrainer,
)

from .helpers.moe_models import make_moe_model
from .helpers.tiny import ON_CPU, digit_reward, make_critic_args, make_dataset, make_tiny_model, make_tokenizer

ROOT = Path(__file__).parents[1]


def saved_card(trainer: Any) -> str:
    """The card that a trainer writes, beside the model that it saves."""
    folder = Path(trainer.args.output_dir)
    trainer.save_model(str(folder))
    trainer.create_model_card()
    text = (folder / "README.md").read_text()
    assert text.count("```") % 2 == 0 and "None" not in text
    return text


def method_of(card: str) -> str:
    (name,) = re.findall(r"^This model was trained with (.+?)(?:, a method introduced in .*)?\.$", card, re.M)
    return name


def cited(card: str) -> set[str]:
    """Keys of the bibliography, without TRL's own."""
    return {*re.findall(r"^@article\{(.+),$", card, re.M)}


def run_blocks(card: str, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the blocks of code that load something, where the folder of the card is."""
    monkeypatch.chdir(Path(trainer.args.output_dir).parent)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(blocks) >= 2 and "pipeline(" in blocks[0]
    for block in blocks[1:]:
        exec(block, names)
    return names


def online(trainer_class: type, args: Any, **options: Any) -> Any:
    return trainer_class(
        make_tiny_model(),
        digit_reward,
        args,
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        **options,
    )


SMALL = {**ON_CPU, "per_device_train_batch_size": 8, "max_completion_length": 6}


@pytest.mark.slow
@pytest.mark.parametrize("head_type", ["parallel", "sequential"])
def test_card_of_the_critic(head_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make_critic_args(tmp_path / "run", mtp_head_type=head_type, speculative=True, phasic_every=4)
    trainer = online(MTPCriticTrainer, args)
    with torch.no_grad():
        for parameter in trainer.mtp_heads.parameters():
            parameter.add_(0.1)
    card = saved_card(trainer)
    assert method_of(card) == "a critic inside the policy" and "# Model Card for run" in card
    kind = {"parallel": "mtp", "sequential": "deepseek_v3"}[head_type]
    assert cited(card) == {kind, "gae", "ppg", "speculative_decoding", "speculative_sampling"}
    assert f"It has 2 {head_type} multi-token-prediction heads." in card
    names = run_blocks(card, trainer, monkeypatch)
    assert type(names["heads"]) is type(trainer.mtp_heads) and MTPHeads.of(names["model"]) is names["heads"]
    for name, value in trainer.mtp_heads.state_dict().items():
        assert torch.equal(names["heads"].state_dict()[name], value), name
    assert names["values"].shape == (1, names["tokens"].shape[1], 2) and names["values"].any()


@pytest.mark.slow
def test_card_without_the_critic_is_that_of_grpo(tmp_path: Path) -> None:
    args = make_critic_args(tmp_path / "run", use_critic=False, num_generations=4)
    card = saved_card(online(MTPCriticTrainer, args))
    assert method_of(card) == "GRPO" and cited(card) == {"grpo"} and "load_mtp_heads" not in card


@pytest.mark.slow
@pytest.mark.parametrize("preset", [None, *PPO_PRESETS])
def test_card_of_ppo(preset: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = online(PPOTrainer, PPOConfig(str(tmp_path / "run"), **SMALL, preset=preset, beta=0.0))
    with torch.no_grad():
        trainer.value_model.head.weight.fill_(0.25)
    card = saved_card(trainer)
    if preset is None:
        assert method_of(card) == "PPO" and cited(card) == {"ppo", "instruct_gpt", "gae"}
    else:
        assert method_of(card) == "REINFORCE with a learned baseline" and cited(card) == {"reinforce"}
    names = run_blocks(card, trainer, monkeypatch)
    assert isinstance(names["value_model"], ValueModel)
    expected = trainer.value_model(names["tokens"])
    assert torch.allclose(names["values"], expected) and names["values"].any()


@pytest.fixture(scope="module")
def variant() -> Any:
    """A trainer whose card does not depend on how it was made, but for the config."""
    return online(GRPOVariantTrainer, GRPOVariantConfig("unused", **SMALL, num_generations=4))


@pytest.mark.slow
@pytest.mark.parametrize("preset", [None, *GRPO_PRESETS])
def test_card_of_each_preset(preset: str | None, variant: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_generations": 4} if preset not in ("reinforce++", "spo") else {}
    if preset == "pass_at_k":
        options["advantage_kwargs"] = {"k": 2}  # fewer than there are completions of a prompt
    with pytest.MonkeyPatch.context() as patch:
        args = GRPOVariantConfig(str(tmp_path / "run"), **SMALL, **options, preset=preset)
        patch.setattr(variant, "args", args)
        Path(args.output_dir).mkdir()
        variant.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    if preset is None:
        assert method_of(card) == "a variant of GRPO" and cited(card) == {"grpo"}
        return
    name, papers = PRESET_METHODS[preset]
    first = PAPERS[papers[0]]
    assert method_of(card) == name and cited(card) == set(papers)
    assert f"introduced in [{first.title}](https://huggingface.co/papers/{first.arxiv})" in card
    assert f"The preset {preset!r} has set" in card


@pytest.mark.slow
@pytest.mark.parametrize("scored", [False, True])
def test_card_of_fine_tuning(scored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"prompt": ["1+1="] * 8, "completion": ["2"] * 8, **({"reward": [1.0] * 8} if scored else {})}
    args = MTPSFTConfig(str(tmp_path / "run"), **ON_CPU, num_mtp_heads=2, freeze_trunk=scored)
    trainer = MTPSFTTrainer(
        make_tiny_model(), args, train_dataset=Dataset.from_dict(rows), processing_class=make_tokenizer()
    )
    card = saved_card(trainer)
    assert method_of(card) == ("heads on a frozen trunk" if scored else "supervised fine-tuning with heads")
    assert cited(card) == ({"mtp", "vc_ppo"} if scored else {"mtp"})
    names = run_blocks(card, trainer, monkeypatch)
    assert len(list(names["heads"].parameters())) == len(list(trainer.mtp_heads.parameters()))
    assert ("values" in names) == scored, "heads that have learnt no values have none to show"


BALANCED = {
    "loss_free": ({"rate": 1e-3}, {"loss_free"}),
    "quantile": ({"rate": 1.0, "rule": "quantile"}, {"quantile"}),
    "auxiliary": (
        {"rate": 0.0, "aux_loss_coef": 0.01, "batch": "global", "z_loss_coef": 1e-3},
        {"switch", "global_batch", "st_moe"},
    ),
    "deepseek": (
        {"rate": 1e-3, "aux_loss_coef": 1e-4, "aux_loss_type": "sequence"},
        {"loss_free", "deepseek_v3"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("balancing", BALANCED)
@pytest.mark.parametrize("host", ["ours", "TRL", "transformers"])
def test_card_of_balancing(host: str, balancing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, papers = BALANCED[balancing]
    model, folder = make_moe_model("qwen3_moe"), tmp_path / "run"
    rows = Dataset.from_dict({"input_ids": [[2, 3, 4, 5]] * 8, "labels": [[2, 3, 4, 5]] * 8})
    callback = MoEBalancingCallback(**settings)
    options = {**ON_CPU, "max_steps": 1, "save_steps": 1, "save_strategy": "steps", "router_aux_loss_coef": 0.0}
    trainer: Any
    if host == "transformers":
        del options["router_aux_loss_coef"]
        folder.mkdir()
        (folder / "README.md").write_text("# A card of the user\n")
        trainer = Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows)
    elif host == "TRL":
        trainer = SFTTrainer(
            model, SFTConfig(str(folder), **options), train_dataset=rows, processing_class=make_tokenizer()
        )
    else:
        trainer = MTPSFTTrainer(
            model, MTPSFTConfig(str(folder), **options), train_dataset=rows, processing_class=make_tokenizer()
        )
    callback.add_to(trainer)
    trainer.train()
    trainer.save_model(str(folder))
    make_tokenizer().save_pretrained(folder)
    card = (folder / "README.md").read_text()
    own = {"mtp"} if host == "ours" else set()
    assert cited(card) - {"sft"} == papers | own
    if settings["rate"]:
        assert f"selection bias (rate={settings['rate']:g}, rule={settings.get('rule', 'sign')!r})" in card
        monkeypatch.chdir(tmp_path)
        (block,) = re.findall(r"```python\n(?=[^`]*load_selection_bias)(.*?)```", card, re.S)
        names: dict[str, Any] = {}
        exec(block, names)
        found = {router.name: router.bias for router in callback.run.balancer.routers}  # type: ignore[union-attr]
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert get_router_balancer(loaded) is None and type(names["model"]) is type(loaded)
        assert any(bias.any() for bias in found.values())
    else:
        assert "load_selection_bias" not in card and "auxiliary loss (aux_loss_coef=0.01" in card


# ---------------------------------------------------------------------------------------------- the table of papers


def test_every_preset_has_a_method() -> None:
    assert PRESET_METHODS.keys() == GRPO_PRESETS.keys() | PPO_PRESETS.keys()
    assert all(key in PAPERS for method in PRESET_METHODS.values() for key in method.papers)


def test_docs_know_the_papers_by_the_same_numbers_and_names() -> None:
    text = " ".join((ROOT / "docs" / "papers.md").read_text().split())
    for paper in PAPERS.values():
        assert (paper.arxiv or str(paper.venue)) in text, paper.title
        surname = paper.authors.split(" and ")[0].split()[-1]
        before = re.findall(
            rf"([A-Z][\w-]+)(?: et al\.| and [A-Z]\w+),(?: later [A-Z]\w+ et al\.,)? {paper.arxiv}", text
        )
        assert not before or surname in before, (paper.title, before)


def test_presets_cite_the_paper_of_the_table_of_presets() -> None:
    rows = re.findall(r"^\| `([\w+]+)` \| (\d{4}\.\d{5}) \|", (ROOT / "docs" / "variants.md").read_text(), re.M)
    assert dict(rows).keys() == GRPO_PRESETS.keys()
    for preset, number in rows:
        assert PAPERS[PRESET_METHODS[preset].papers[0]].arxiv == number, preset


def test_an_entry_of_the_bibliography() -> None:
    lines = PAPERS["reinforce"].bibtex("reinforce").splitlines()
    assert lines[0] == "@article{reinforce," and lines[-1] == "}"
    assert lines[1].startswith("    title   = {{Simple Statistical Gradient-Following Algorithms for ")
    assert lines[2:5] == [
        "    author  = {Ronald J. Williams},",
        "    year    = 1992,",
        "    journal = {Machine Learning 8},",
    ]
    assert PAPERS["dapo"].link == f"[{PAPERS['dapo'].title}](https://huggingface.co/papers/2503.14476)"
    assert PAPERS["quantile"].link == "MoE travelogue 6: Quantile Balancing (kexue.fm/archives/11619, 2026)"
