"""Our path for the policy loss equals TRL's own `_compute_loss`, loss and gradient, with everything that TRL adds."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from rl_plugins.signals import POLICY_LOSSES
from rl_plugins.signals.online import reference_kl
from rl_plugins.signals.policy import PolicyLoss, clip_shares, policy_loss
from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer, MTPCriticTrainer

from .helpers.tiny import ON_CPU

Make = Callable[..., GRPOVariantTrainer]
TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
NEW_LOSSES = tuple(name for name in POLICY_LOSSES if name not in TRL_LOSSES)
# TRL's cispo caps the ratio at epsilon_high itself.
BOUNDS = {"epsilon": 0.1, "epsilon_high": 0.15}


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, dataset: Any, reward: Any, tmp_path: Path) -> Make:
    """Factory: a trainer on a tiny model; keywords go to the config."""

    def factory(model: Any = None, **options: Any) -> GRPOVariantTrainer:
        args = GRPOVariantConfig(
            **{
                "output_dir": str(tmp_path / "run"),
                **ON_CPU,
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": 6,
                "learning_rate": 1e-3,
                "loss_type": "grpo",
                **options,
            }
        )
        return GRPOVariantTrainer(
            tiny_model() if model is None else model, reward, args, dataset, processing_class=tokenizer
        )

    return factory


def batch_for(trainer: GRPOVariantTrainer, *, token_level: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Completions with ragged ends and a hole, old log-probabilities well away from the policy's."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 16, (8, 10), generator=g)
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[1, 4:], mask[2, 2:], mask[3, 5:], mask[5, 1:] = 0, 0, 0, 0
    tools = torch.ones_like(mask)
    tools[4, 2:4] = 0
    batch = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(8, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": mask,
        "tool_mask": tools,
        "advantages": torch.randn((8, 6) if token_level else (8,), generator=g),
        "num_items_in_batch": (mask * tools).sum() * 3,
        "groups": torch.arange(8) // 4,
    }
    logps = trainer.log_probs(batch)
    batch["old_per_token_logps"] = logps + 0.4 * torch.randn(8, 6, generator=g)
    batch["ref_per_token_logps"] = logps + 0.3 * torch.randn(8, 6, generator=g)
    batch["sampling_per_token_logps"] = batch["old_per_token_logps"] + 0.5 * torch.randn(8, 6, generator=g)
    # TRL's own ratio is 1 on padding, which its vespo counts on.
    batch["importance_sampling_ratio"] = torch.where(
        mask * tools == 1, torch.rand(8, 6, generator=g) + 0.5, torch.ones(8, 6)
    )
    return batch


def loss_and_gradient(
    trainer: GRPOVariantTrainer, compute: Callable[..., Tensor], batch: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.zero_grad()
    loss = compute(trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def assert_equal_to_trl(trainer: GRPOVariantTrainer, name: str, batch: dict[str, Tensor], **attributes: Any) -> None:
    for key, value in attributes.items():
        setattr(trainer, key, value)
    ours, our_gradient = loss_and_gradient(trainer, trainer._compute_loss, batch)
    our_metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    trainer.loss_type = name
    theirs, gradient = loss_and_gradient(trainer, lambda *a: GRPOTrainer._compute_loss(trainer, *a), batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for mine, other in zip(our_gradient, gradient, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert any(g.abs().max() > 1e-3 for g in gradient)
    for key, values in trainer._metrics["train"].items():
        if key.startswith(("kl", "entropy", "policy_loss", "aux_loss")):
            assert our_metrics[key] == pytest.approx(values[-1], abs=1e-6), key


# vespo has a sequence weight of its own; TRL ignores the level.
NAMES_AND_LEVELS = [(name, "token") for name in TRL_LOSSES] + [(n, "sequence") for n in TRL_LOSSES if n != "vespo"]


@pytest.mark.parametrize("token_level", [False, True], ids=["per_sequence", "per_token"])
@pytest.mark.parametrize(("name", "level"), NAMES_AND_LEVELS)
def test_every_loss_of_trl(make: Make, name: str, level: str, token_level: bool) -> None:
    trainer = make(policy_loss=name, importance_sampling_level=level, **BOUNDS)
    assert_equal_to_trl(trainer, name, batch_for(trainer, token_level=token_level))


SURROUNDINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kl": ({"beta": 0.3}, {}),
    "kl_uncorrected": ({"beta": 0.3, "use_bias_correction_kl": False}, {}),
    "entropy_bonus": ({"entropy_coef": 0.2, "beta": 0.3}, {}),
    "entropy_quantile": ({"top_entropy_quantile": 0.5}, {}),
    "both_entropies": ({"top_entropy_quantile": 0.5, "entropy_coef": 0.2}, {}),
    "off_policy_mask": ({"off_policy_mask_threshold": 0.05}, {}),
    "vllm": ({}, {"use_vllm": True}),
    "delta": ({"delta": 1.1}, {}),
    "everything": (
        {"beta": 0.3, "entropy_coef": 0.2, "top_entropy_quantile": 0.7, "off_policy_mask_threshold": 0.05},
        {"use_vllm": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "luspo", "bnpo", "vespo"])
def test_what_trl_adds_to_a_loss(
    make: Make, name: str, surrounding: str, tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    options, attributes = SURROUNDINGS[surrounding]
    tiny_model().save_pretrained(tmp_path / "model")  # a KL term needs a path for the reference
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make(str(tmp_path / "model"), policy_loss=name, **BOUNDS, **options)
    assert_equal_to_trl(trainer, name, batch_for(trainer), **attributes)


def test_the_router_loss_of_a_mixture_of_experts(make: Make) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    trainer = make(model, policy_loss="dapo", router_aux_loss_coef=0.5, **BOUNDS)
    assert trainer.aux_loss_enabled
    assert_equal_to_trl(trainer, "dapo", batch_for(trainer))


# The new losses: what surrounds them is the host's


# TRL's loss type that averages its KL term in the same way.
ALIKE = {
    "token": "dapo",
    "sequence": "grpo",
    "constant": "dr_grpo",
    "sequence_sum": "luspo",
    "micro_batch": "bnpo",
}


def parts(trainer: GRPOVariantTrainer, batch: dict[str, Tensor]) -> Tensor:
    """The loss without a policy term: what the host adds."""
    loss = trainer._policy_loss
    assert loss is not None
    trainer.loss_type = ALIKE[loss.aggregation]
    return GRPOTrainer._compute_loss(trainer, trainer.model, {**batch, "advantages": torch.zeros(8)}).detach()


@pytest.mark.parametrize("name", NEW_LOSSES)
def test_new_losses_are_weighed_like_the_hosts(
    make: Make, name: str, tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options, attributes = SURROUNDINGS["everything"]
    trainer = make(str(tmp_path / "model"), policy_loss=name, **options)
    for key, value in attributes.items():
        setattr(trainer, key, value)
    batch = batch_for(trainer)
    ours, _ = loss_and_gradient(trainer, trainer._compute_loss, batch)

    logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer,
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        6,
        compute_entropy=True,
    )
    mask = batch["completion_mask"] * batch["tool_mask"]
    loss = trainer._policy_loss
    assert loss is not None
    torch.manual_seed(0)
    per_token = loss.per_token(
        logps, batch["old_per_token_logps"], batch["advantages"], mask, {"groups": batch["groups"]}
    )
    weights = trainer.get_off_policy_mask(
        batch["advantages"][:, None], logps, batch["sampling_per_token_logps"], mask, 0.05
    ) * trainer.get_high_entropy_mask(entropies, mask, 1 - 0.7)
    weighted = per_token * weights * batch["importance_sampling_ratio"] * mask
    if loss.aggregation == "sequence":
        expected = (weighted.sum(1) / mask.sum(1)).mean() / 2
    else:
        # per_device batches of one generation: 3 * mask.sum() tokens in all, of which 2 / 1 accumulation steps count
        expected = weighted.sum() / (batch["num_items_in_batch"] * 2 / trainer.args.steps_per_generation)
    torch.testing.assert_close(ours - parts(trainer, batch), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_garbage_in_padding_reaches_neither_loss_nor_gradient(make: Make) -> None:
    for name in POLICY_LOSSES:
        trainer = make(policy_loss=name)
        batch = batch_for(trainer)
        clean = loss_and_gradient(trainer, trainer._compute_loss, batch)
        dirty = {key: value.clone() for key, value in batch.items()}
        padding = (batch["completion_mask"] * batch["tool_mask"]) == 0
        dirty["old_per_token_logps"][padding] = 3.0
        loss, gradient = loss_and_gradient(trainer, trainer._compute_loss, dirty)
        torch.testing.assert_close(loss, clean[0], rtol=0, atol=0, msg=name)
        for mine, other in zip(gradient, clean[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0, msg=name)


# Tokens of a ratio that float32 does not hold


def forced(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A token forced upon the sampler, one that a filter forbade it, one that the reference never says, and more."""
    batch["old_per_token_logps"][0, 1] = -200.0
    batch["old_per_token_logps"][2, 0] = -torch.inf
    batch["old_per_token_logps"][4, 2] = -1e4  # a tool's
    batch["ref_per_token_logps"][3, 2] = -torch.inf
    batch["advantages"][4] = 0.0
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_forced_tokens_leave_loss_and_gradient_finite(
    make: Make, name: str, tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make(str(tmp_path / "model"), policy_loss=name, beta=0.3)
    loss, gradient = loss_and_gradient(trainer, trainer._compute_loss, forced(batch_for(trainer)))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradient)
    assert any(g.any() for g in gradient)
    # The control: TRL has no clamp, not even where the advantages are 0.
    batch = {**forced(batch_for(trainer)), "advantages": torch.zeros(8)}
    loss, _ = loss_and_gradient(trainer, lambda *a: GRPOTrainer._compute_loss(trainer, *a), batch)
    assert not loss.isfinite()


def test_a_reference_that_is_far_more_certain_leaves_the_kl_finite() -> None:
    logps = torch.tensor([[-150.0, -1.0]], requires_grad=True)
    reference, old = torch.tensor([[-0.5, -0.8]]), torch.tensor([[-0.1, -1.0]])
    divergence = reference_kl(logps, old, reference, torch.ones(1, 2), correct=False)
    torch.testing.assert_close(divergence[0, 1].item(), math.exp(0.2) - 0.2 - 1, rtol=1e-6, atol=1e-6)
    assert divergence[0, 0].item() == pytest.approx(math.exp(20) - 20 - 1, rel=1e-6)  # not of 149.5
    (gradient,) = torch.autograd.grad(divergence.sum(), logps)
    assert gradient[0, 0] == 0 and gradient[0, 1] == pytest.approx(1 - math.exp(0.2), rel=1e-5)


# Clip metrics


def test_clip_metrics_are_trls_for_the_clipped_loss(make: Make) -> None:
    trainer = make(policy_loss="grpo", **BOUNDS)
    batch = batch_for(trainer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch)
    ours = {key: list(values) for key, values in trainer._metrics["train"].items() if key.startswith("clip_ratio")}
    trainer._metrics["train"].clear()
    GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    theirs = {key: list(values) for key, values in trainer._metrics["train"].items() if key.startswith("clip_ratio")}
    assert set(ours) == set(theirs) and len(theirs) == 5
    for key, values in theirs.items():
        assert len(ours[key]) == 1
        assert ours[key] == pytest.approx(values, abs=1e-6), key
    assert ours["clip_ratio/region_mean"][0] > 0.1


def test_cut_tokens_by_hand() -> None:
    logps = torch.tensor([[0.0, 0.5, 0.5, -0.5, 0.5]]).requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0]])
    mask = torch.ones(1, 5)
    _, cut = policy_loss(PolicyLoss("ppo_clip"), logps, torch.zeros(1, 5), advantages, mask)
    assert cut.tolist() == [[False, True, False, True, False]]
    means, rows = clip_shares(cut, advantages, mask)
    assert {name.split("/")[1]: round(value.item(), 6) for name, value in means.items()} == {
        "low_mean": 0.2,
        "high_mean": 0.2,
        "region_mean": 0.4,
    }
    torch.testing.assert_close(rows, torch.tensor([[0.2, 0.2]]))
    with torch.no_grad():  # evaluation
        loss, again = policy_loss(PolicyLoss("ppo_clip"), logps, torch.zeros(1, 5), advantages, mask)
    assert not loss.requires_grad and torch.equal(cut, again)


# Names and options


def test_unknown_names_list_the_valid_ones(make: Make) -> None:
    with pytest.raises(ValueError, match="Unknown policy_loss 'ppo'; choose one of grpo, .*gvpo"):
        make(policy_loss="ppo")
    with pytest.raises(ValueError, match="Unknown aggregation 'mean'; choose one of token, "):
        make(policy_loss="grpo", aggregation="mean")
    with pytest.raises(ValueError, match="'dppo' has no option 'treshold'; it has divergence, threshold, max_ratio"):
        make(policy_loss="dppo", policy_loss_kwargs={"treshold": 0.1})


def test_options_come_from_kwargs_then_trls_fields_then_the_paper(make: Make) -> None:
    def options(**settings: Any) -> dict[str, Any]:
        loss = make(policy_loss="gspo_token", **settings)._policy_loss
        assert loss is not None
        return dict(loss.options)

    assert options() == {}
    assert options(epsilon=0.1) == {"epsilon_low": 0.1, "epsilon_high": 0.1}
    assert options(epsilon_high=0.3) == {"epsilon_high": 0.3}
    assert options(epsilon=0.1, policy_loss_kwargs={"epsilon_high": 0.5}) == {"epsilon_low": 0.1, "epsilon_high": 0.5}
    # as from the command line
    assert options(policy_loss_kwargs='{"epsilon_low": 0.2}') == {"epsilon_low": 0.2}


@pytest.mark.parametrize("aggregation", ALIKE)
def test_aggregation_is_separate_from_the_loss(make: Make, aggregation: str) -> None:
    trainer = make(policy_loss="ppo_clip", aggregation=aggregation, **BOUNDS)
    assert_equal_to_trl(trainer, ALIKE[aggregation], batch_for(trainer))


@pytest.mark.slow
def test_aggregation_alone_keeps_trls_loss(make: Make) -> None:
    trainer = make(loss_type="sapo", aggregation="token")
    assert trainer._policy_loss is not None and trainer._policy_loss.name == "sapo"
    batch = batch_for(trainer)
    ours, _ = loss_and_gradient(trainer, trainer._compute_loss, batch)
    trainer.args.loss_type = trainer.loss_type = "sapo"
    rows, mask = [], batch["completion_mask"] * batch["tool_mask"]
    for i in range(8):  # TRL's own mean over one sequence at a time
        row = {k: v[i : i + 1] if v.ndim else v for k, v in batch.items()}
        rows.append(GRPOTrainer._compute_loss(trainer, trainer.model, row).detach() * 2)
    expected = (torch.stack(rows) * mask.sum(1)).sum() / (batch["num_items_in_batch"] * 2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


# Prompts that count alike


@pytest.mark.slow
def test_prompts_count_alike_however_a_batch_is_cut(
    make: Make, tiny_model: Callable[..., Any], tokenizer: Any, dataset: Any, tmp_path: Path
) -> None:
    """1 x 8 is 8 x 1, in another order too, and both are the papers' equation, KL term and gradient included."""
    path = str(tmp_path / "model")
    tiny_model(initializer_range=0.2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    options = {"policy_loss": "ppo_clip", "aggregation": "prompt", "beta": 0.3, "num_iterations": 2, **BOUNDS}
    whole = make(path, **options)
    cut = make(path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    whole.model.train(), cut.model.train()
    torch.manual_seed(0)
    batch = whole._generate_and_score_completions([dict(dataset[8 + i // 4]) for i in range(8)])
    mask = batch["completion_mask"].bool()
    assert len(mask.sum(1).unique()) > 2
    batch["advantages"] = torch.randn(8)
    for key, spread in (("old_per_token_logps", 0.4), ("ref_per_token_logps", 0.3)):
        batch[key] = batch[key] + spread * torch.randn(mask.shape)

    logps = whole.log_probs(batch)
    ratio = (logps - batch["old_per_token_logps"]).exp()
    gap = batch["ref_per_token_logps"] - logps
    advantages = batch["advantages"][:, None]
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.15) * advantages)
    divergence = (gap.exp() - gap - 1) * ratio
    total = per_token + 0.3 * divergence
    expected = torch.stack([total[rows][mask[rows]].mean() for rows in (slice(0, 4), slice(4, 8))]).mean()

    found = []
    for trainer, slices in ((whole, [torch.arange(8)]), (cut, torch.randperm(8).split(1))):
        trainer.current_gradient_accumulation_steps = len(slices)
        trainer.model.zero_grad()
        loss = torch.zeros(())
        for rows in slices:
            part = {key: value[rows] if value.ndim else value for key, value in batch.items()}
            term = trainer._compute_loss(trainer.model, part)
            term.backward()
            loss += term.detach()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        found.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert whole._metrics["train"]["kl"][-1] == pytest.approx(float(divergence[mask].mean()), rel=1e-5)


# A loss that cannot act says so

INERT = "compares the policy with the one that sampled, but with gradient_accumulation_steps=1, steps_per_generation=1"


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"preset": "dapo"}, True),
        ({"preset": "scale_rl"}, True),
        ({"policy_loss": "fipo"}, True),
        ({"policy_loss": "fipo", "num_iterations": 2}, False),
        ({"policy_loss": "fipo", "steps_per_generation": 2}, False),
        ({"policy_loss": "fipo", "replay_buffer_size": 4, "advantage": "reward"}, False),
        ({"preset": "opo"}, False),  # its loss is the plain one
        ({"policy_loss": "clip_cov"}, False),
        ({}, False),  # none is named
    ],
    ids=str,
)
def test_a_loss_that_cannot_act_says_so_once(make: Make, settings: dict[str, Any], warned: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(**settings)
    messages = [str(w.message) for w in caught if INERT in str(w.message)]
    assert len(messages) == warned
    assert all("Set num_iterations above 1, or steps_per_generation to a larger multiple of g" in m for m in messages)


# The critic takes the same losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspo_token", "dppo", "cispo", "gmpo", "clip_cov"])
def test_the_critics_token_advantages_with_any_loss(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    dataset: Any,
    reward: Any,
    critic_args: Callable[..., Any],
    tmp_path: Path,
    name: str,
) -> None:
    args = critic_args(tmp_path, policy_loss=name, num_iterations=2, value_loss_coef=0.0, mtp_loss_coef=0.0)
    trainer = MTPCriticTrainer(tiny_model(), reward, args, dataset, processing_class=tokenizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs([dataset[i] for i in range(8)])
    assert batch["advantages"].shape == batch["completion_ids"].shape
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.3 * torch.randn_like(batch["old_per_token_logps"])
    torch.manual_seed(3)
    loss = trainer._compute_loss(trainer.model, batch)
    torch.manual_seed(3)
    expected, _ = policy_loss(
        PolicyLoss(name),
        trainer.log_probs(batch),
        batch["old_per_token_logps"],
        batch["advantages"],
        batch["completion_mask"],
        num_items=batch["num_items_in_batch"],
    )
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    trainer.train()
    assert trainer.state.global_step == 2
