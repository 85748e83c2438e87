"""The online modules: a critic inside the policy, PPO, and GRPO with its variants."""

from dataclasses import fields
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.lightning.module import RLModule
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.nn.value_model import ValueModel
from rl_plugins.rollouts.batch import Batch, num_rows, reordered
from rl_plugins.rollouts.rewards import RewardFunc
from rl_plugins.signals.checks import check_head_reach
from rl_plugins.signals.critics import CriticSignal
from rl_plugins.signals.head_critic import HeadCritic
from rl_plugins.signals.options import (
    OnlineValueOptions,
    Options,
    PhasicOptions,
    PolicyOptions,
    PPOValueOptions,
    SamplingOptions,
    ValueHeadOptions,
    ValueModelOptions,
    ValueReplayOptions,
    VariantOptions,
    split_options,
)
from rl_plugins.signals.phasic import PhasicSchedule
from rl_plugins.signals.policy import PolicyLoss
from rl_plugins.signals.presets import GRPO_PRESETS, PPO_PRESETS, Preset, find_preset
from rl_plugins.signals.signals import GroupSignal
from rl_plugins.signals.value_model_critic import ValueModelCritic
from rl_plugins.signals.value_tracker import ValueTracker

RewardFuncs: TypeAlias = RewardFunc | PreTrainedModel | str | list[RewardFunc | PreTrainedModel | str] | None

LOSS_OPTIONS = {
    "epsilon": "epsilon_low",
    "epsilon_high": "epsilon_high",
    "importance_sampling_level": "level",
}
"""Fields of TRL's configs that presets set, and the options of our policy losses that take their place."""
OF_ENGINES = ("vllm_importance_sampling_correction",)
"""Fields of TRL's configs for inference engines, which Lightning's modules do not have."""


def preset_options(preset: Preset, given: dict[str, Any], *kinds: tuple[Options, Options]) -> dict[str, Any]:
    """Translate a preset, which sets fields of TRL's configs, into options of modules. The user's options stay.

    Args:
        preset: The preset.
        given: Options that were given one by one. They override the preset.
        kinds: Pairs of dataclasses, as given and with the defaults. Fields that differ override the preset.

    Returns:
        Options by name, those of `given` included.
    """
    values = dict(given)
    for own, default in kinds:
        changed = {f.name: getattr(own, f.name) for f in fields(own)}  # type: ignore[arg-type]
        values = {**{name: x for name, x in changed.items() if x != getattr(default, name)}, **values}
    options = {name: x for name, x in preset.items() if name not in LOSS_OPTIONS and name not in OF_ENGINES}
    options |= values
    accepted = PolicyLoss.accepted(options["policy_loss"])
    loss = {option: preset[field] for field, option in LOSS_OPTIONS.items() if field in preset}
    if "policy_loss_kwargs" not in values:
        loss |= preset.get("policy_loss_kwargs", {})
    loss = {name: x for name, x in loss.items() if name in accepted}
    loss |= values.get("policy_loss_kwargs") or {}
    return {**options, "policy_loss_kwargs": loss} if loss else options


class MTPCriticModule(RLModule):
    r"""Online reinforcement learning with a critic inside the policy: multi-token-prediction heads that also output a
    value. There is one network, one completion per prompt is enough, and every token has its own advantage.

    `L = L_policy + lambda_1 L_MTP + lambda_2 L_TD`; see [`~rl_plugins.signals.critic_targets`] for the equations and
    [`~rl_plugins.signals.HeadCritic`] for the critic.

    ```python
    from lightning.pytorch import Trainer
    from rl_plugins.lightning import MTPCriticModule, PromptDataModule

    module = MTPCriticModule("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward)
    Trainer(max_steps=1000, gradient_clip_val=1.0).fit(module, PromptDataModule(dataset, batch_size=64))
    module.save_pretrained("qwen3-critic")  # loads in TRL: MTPCriticTrainer(model="qwen3-critic", ...)
    ```

    Args:
        model: See [`RLModule`]. Heads attached to it, or saved beside its weights, are trained on.
        tokenizer: See [`RLModule`].
        reward_funcs: See [`RLModule`].
        heads: The heads, which also draft where rollouts are speculative.
        values: Value targets, advantages and value loss.
        replay: The replay of values: a copy of the heads learns further from cached states.
        phasic: The phasic mode: phases in which only the values learn.
        num_generations: Completions per prompt; a critic needs one.
        kwargs: For [`RLModule`], or fields of `heads`, `values`, `replay` and `phasic`.

    Raises:
        TypeError: As [`RLModule`].
        ValueError: As [`RLModule`]; also if the model's heads do not match the options.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFuncs = None,
        *,
        heads: ValueHeadOptions = ValueHeadOptions(),  # noqa: B008  # frozen
        values: OnlineValueOptions = OnlineValueOptions(),  # noqa: B008
        replay: ValueReplayOptions = ValueReplayOptions(),  # noqa: B008
        phasic: PhasicOptions = PhasicOptions(),  # noqa: B008
        num_generations: int = 1,
        **kwargs: Any,
    ) -> None:
        made = split_options(kwargs, heads=heads, values=values, replay=replay, phasic=phasic)
        temperature = kwargs.get("temperature", 1.0)
        critic = HeadCritic(made["heads"], made["values"], made["replay"], temperature=temperature)
        signal = CriticSignal(critic)
        super().__init__(model, tokenizer, reward_funcs, signal=signal, num_generations=num_generations, **kwargs)
        made["values"].check_online(self.beta, self.policy_loss, "GRPOModule")
        check_head_reach(critic.options.num_mtp_heads, self.max_completion_length, "max_completion_length")
        if made["phasic"].phasic_every:
            self.phasic = PhasicSchedule(made["phasic"], self.batch_repeats)

    @property
    def mtp_heads(self) -> MTPHeads:
        """The heads, which are a submodule of the model."""
        assert isinstance(self.critic, HeadCritic)
        return self.critic.training.heads

    @property
    def polyak_target(self) -> PolyakTarget | None:
        """The slow heads. `None` where a replay trains the copy of the heads, and before a Trainer has set the module
        up, when the online heads give the values instead."""
        assert isinstance(self.critic, HeadCritic)
        return self.critic.polyak_target


class PPOModule(RLModule):
    r"""Proximal Policy Optimization with a separate value model (Schulman et al., 1707.06347; for
    language models Ouyang et al., 2203.02155).

    `L = L_clip + lambda_2 L_value - c H`. The advantages come from GAE. The reward of every token is a KL penalty, to
    which the score is added at the last token. Slices are shuffled anew for each pass over a batch of completions.
    Policy and value model are trained by one optimizer and one engine. The critic is a
    [`~rl_plugins.signals.ValueModelCritic`].

    ```python
    from lightning.pytorch import Trainer
    from rl_plugins.lightning import PPOModule, PromptDataModule

    module = PPOModule("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward, steps_per_generation=4)
    Trainer(max_steps=1000, gradient_clip_val=1.0).fit(module, PromptDataModule(dataset, batch_size=64))
    ```

    Args:
        model: See [`RLModule`].
        tokenizer: See [`RLModule`].
        reward_funcs: See [`RLModule`].
        value_model: A [`ValueModel`], a transformers model whose trunk is copied, or a path or hub id; by default the
            one attached to or saved with the policy, else a copy of the policy's trunk.
        preset: `"vpg"`: REINFORCE with a learned baseline. Options that you set override the preset; in a dataclass
            these are the fields that differ from their defaults.
        network: Where the value model comes from, and its learning rate.
        values: Value targets, advantages and value loss.
        policy: The policy loss; PPO's clipped loss if none is named.
        beta: Coefficient of the KL penalty.
        num_iterations: Passes over each batch of completions.
        num_generations: Completions per prompt.
        kwargs: For [`RLModule`], or fields of `network` and `values`.

    Raises:
        TypeError: As [`RLModule`]; also if the value model is none of the above.
        ValueError: As [`RLModule`]; also if the value model does not know the policy's tokens.
    """

    usual_loss = "ppo_clip"

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFuncs = None,
        *,
        value_model: ValueModel | PreTrainedModel | str | None = None,
        preset: str | None = None,
        network: ValueModelOptions = ValueModelOptions(),  # noqa: B008  # frozen
        values: PPOValueOptions = PPOValueOptions(),  # noqa: B008
        policy: PolicyOptions = PolicyOptions(),  # noqa: B008
        beta: float = 0.05,
        num_iterations: int | None = None,
        num_generations: int = 1,
        **kwargs: Any,
    ) -> None:
        passes = num_iterations
        if preset is not None:
            chosen = find_preset(preset, PPO_PRESETS)
            kwargs = preset_options(chosen, kwargs, (policy, PolicyOptions()), (values, PPOValueOptions()))
            own = kwargs.pop("num_iterations", passes)
            passes = own if passes is None else passes
        made = split_options(kwargs, network=network, values=values)
        checkpointing = {"use_reentrant": False} if kwargs.get("gradient_checkpointing") else None
        critic = ValueModelCritic(made["network"], made["values"], value_model, checkpointing=checkpointing)
        super().__init__(
            model,
            tokenizer,
            reward_funcs,
            signal=CriticSignal(critic),
            policy=policy,
            beta=beta,
            num_iterations=4 if passes is None else passes,
            num_generations=num_generations,
            **kwargs,
        )
        made["values"].check_online(self.beta, self.policy_loss, "GRPOModule")
        critic.module.train()

    @property
    def value_model(self) -> ValueModel:
        """The critic's network, which is a submodule of the policy."""
        assert isinstance(self.critic, ValueModelCritic)
        return self.critic.module

    def next_epoch(self, slices: list[Batch]) -> list[Batch]:
        """Shuffle the slices anew for another pass over the same completions."""
        return reordered(slices, torch.randperm(sum(map(num_rows, slices))))


class GRPOModule(RLModule):
    r"""Group Relative Policy Optimization (2402.03300) and its variants. Choose advantage, policy loss and way of
    sampling by name, or all settings of a paper by `preset`.

    `A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)` by default; [`~rl_plugins.signals.ADVANTAGES`] and
    [`~rl_plugins.signals.POLICY_LOSSES`] list the choices.

    ```python
    from lightning.pytorch import Trainer
    from rl_plugins.lightning import GRPOModule, PromptDataModule

    module = GRPOModule("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward, preset="dapo")
    Trainer(max_steps=1000, gradient_clip_val=1.0).fit(module, PromptDataModule(dataset, batch_size=8))
    ```

    Args:
        model: See [`RLModule`].
        tokenizer: See [`RLModule`].
        reward_funcs: See [`RLModule`].
        preset: Name for the settings of a paper, such as `"dapo"`, `"gspo"` or `"maxrl"`. Options that you set
            override the preset; in a dataclass these are the fields that differ from their defaults.
        variant: The advantage; `group_normalized` if none is named.
        policy: The policy loss; TRL's default, `dapo`, if none is named.
        sampling: Dynamic sampling, rejection of uniform groups, replay, and the penalty on length.
        num_generations: G, completions per prompt; 8, or the preset's, by default.
        beta: Coefficient of the KL to the reference; 0, or the preset's, by default.
        kwargs: For [`RLModule`], or fields of `variant`.

    Raises:
        TypeError: As [`RLModule`].
        ValueError: As [`RLModule`]; also for an unknown advantage, for options that do not suit it, or for one
            completion per prompt where the advantage compares several.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFuncs = None,
        *,
        preset: str | None = None,
        variant: VariantOptions = VariantOptions(),  # noqa: B008  # frozen
        policy: PolicyOptions = PolicyOptions(),  # noqa: B008
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
        num_generations: int | None = None,
        beta: float | None = None,
        **kwargs: Any,
    ) -> None:
        if preset is not None:
            kwargs = preset_options(
                find_preset(preset, GRPO_PRESETS),
                kwargs,
                (variant, VariantOptions()),
                (policy, PolicyOptions()),
                (sampling, SamplingOptions()),
            )
        group, kl = kwargs.pop("num_generations", 8), kwargs.pop("beta", 0.0)
        group, kl = group if num_generations is None else num_generations, kl if beta is None else beta
        kwargs = {"advantage": variant.advantage or "group_normalized", **kwargs}
        made = split_options(kwargs, variant=variant, sampling=sampling)
        signal, samples = GroupSignal(made["variant"]), made["sampling"]
        super().__init__(
            model,
            tokenizer,
            reward_funcs,
            signal=signal,
            policy=policy,
            sampling=samples,
            num_generations=group,
            beta=kl,
            **kwargs,
        )
        signal.options.check_variant(group, kl, self.policy_loss)
        samples.check_sampling(signal.options.advantage, group, self.max_completion_length)

    @property
    def value_tracker(self) -> ValueTracker | None:
        """Tracker of the success on every prompt so far; `None` where the advantage does not track it."""
        return self.signal.value_tracker if isinstance(self.signal, GroupSignal) else None
