"""The online trainers, which complete `RLTrainer`: a critic inside the policy, PPO, and the variants of GRPO."""

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.nn.value_model import ValueModel
from rl_plugins.papers import PRESET_METHODS
from rl_plugins.rollouts.batch import num_rows, reordered
from rl_plugins.signals.critics import CriticSignal
from rl_plugins.signals.head_critic import HeadCritic
from rl_plugins.signals.options import (
    OnlineValueOptions,
    PhasicOptions,
    PPOValueOptions,
    SamplingOptions,
    ValueHeadOptions,
    ValueModelOptions,
    ValueReplayOptions,
    VariantOptions,
)
from rl_plugins.signals.phasic import PhasicSchedule
from rl_plugins.signals.replay import ReplayBuffer
from rl_plugins.signals.sampling import GroupSampling
from rl_plugins.signals.signals import GroupSignal, Signal
from rl_plugins.signals.value_model_critic import ValueModelCritic
from rl_plugins.signals.value_tracker import ValueTracker
from rl_plugins.trl.card_text import VALUE_MODEL_CODE, Method
from rl_plugins.trl.configs import GRPOVariantConfig, MTPCriticConfig, PPOConfig
from rl_plugins.trl.trainer import RLTrainer


class MTPCriticTrainer(RLTrainer):
    r"""
    Trainer for online reinforcement learning with a critic inside the policy: multi-token-prediction heads that also
    output a value. It needs one network and one completion per prompt, and gives every token its own advantage.

    `L = L_policy + lambda_1 L_MTP + lambda_2 L_TD`, where `L_policy` is any TRL loss type, or any loss of
    [`~rl_plugins.signals.POLICY_LOSSES`] but `gvpo`, on the critic's advantages (see
    [`~rl_plugins.signals.critic_targets`] for the equations and [`~rl_plugins.signals.HeadCritic`] for the critic).

    Takes the arguments of [`~trl.GRPOTrainer`], with an [`MTPCriticConfig`] for `args`. With `use_critic=False` it
    trains like `GRPOTrainer`.

    Example:

    ```python
    from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer

    trainer = MTPCriticTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=MTPCriticConfig("qwen3-critic"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Attributes:
        last_rollout: The newest batch of completions of this process (train or eval): a
            [`~rl_plugins.rollouts.Batch`] without images, with `old_values` (B, T, K), `returns`, `td_errors`,
            `critic_mask` (B, T) and `scores` (B,).

    Raises:
        TypeError: If `args` is not an `MTPCriticConfig`.
        ValueError: If the model has no LM head, or its heads do not fit the config.
    """

    _tag_names = ["trl", "mtp-critic"]
    _name = "MTPCritic"
    config_class = MTPCriticConfig

    def make_signal(self, args: MTPCriticConfig) -> Signal:
        """Make the critic inside the policy; with `use_critic=False`, leave the advantages to TRL."""
        if not args.use_critic:
            return super().make_signal(args)
        heads, values, replay = ValueHeadOptions.of(args), OnlineValueOptions.of(args), ValueReplayOptions.of(args)
        return CriticSignal(HeadCritic(heads, values, replay, temperature=args.temperature))

    def make_phasic(self, args: MTPCriticConfig) -> PhasicSchedule | None:
        """Make the schedule of the phasic mode, if it is on."""
        if not args.use_critic or not args.phasic_every:
            return None
        return PhasicSchedule(PhasicOptions.of(args), args.steps_per_generation * self.num_iterations)

    def describe_method(self) -> Method:
        """Say which critic has trained the policy, for its card."""
        args, method = self.args, super().describe_method()
        if not args.use_critic:
            return dataclasses.replace(method, name="GRPO", own_papers=("grpo",))
        estimator = ("gae",) if args.advantage_estimator == "gae" else ()
        parts = [(f"Its heads were the critic (advantage_estimator={args.advantage_estimator!r}).", estimator)]
        if args.length_adaptive_alpha is not None:
            parts.append((f"Lambda followed the length (alpha={args.length_adaptive_alpha:g}).", ("vapo",)))
        if args.phasic_every:
            parts.append((f"Auxiliary phases followed every {args.phasic_every} rollouts.", ("ppg",)))
        return dataclasses.replace(method, name="a critic inside the policy", parts=(*method.parts, *parts))

    @property
    def mtp_heads(self) -> MTPHeads | None:
        """The heads; `None` without a critic."""
        return self.critic.training.heads if isinstance(self.critic, HeadCritic) else None

    @property
    def polyak_target(self) -> PolyakTarget | None:
        """The slow heads; `None` without a critic, and with a replay, which teaches the copy of the heads."""
        return self.critic.polyak_target if isinstance(self.critic, HeadCritic) else None


class PPOTrainer(RLTrainer):
    r"""
    Trainer for Proximal Policy Optimization with a separate value model (Schulman et al.,
    1707.06347; for language models Ouyang et al., 2203.02155).

    `L = L_clip + lambda_2 L_value - c H`: clipped policy and value losses, and an entropy bonus. GAE makes the
    advantages from token rewards: the score is paid at the last token, and a KL penalty is subtracted at each.
    Minibatches are shuffled anew for each epoch over a batch of completions. One engine and one optimizer train both
    policy and value model.

    Takes the arguments of [`~trl.GRPOTrainer`] (reward functions and reward models alike), with a [`PPOConfig`] for
    `args`. The critic is a [`~rl_plugins.signals.ValueModelCritic`].

    Args:
        value_model: A [`ValueModel`], a transformers model whose trunk is copied, or a path or hub id. By default
            `args.value_model_path`, else the one attached to or saved with the policy, else a copy of the policy's
            trunk as it is before training.

    Example:

    ```python
    from rl_plugins.trl import PPOConfig, PPOTrainer

    trainer = PPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=PPOConfig("qwen3-ppo"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Attributes:
        value_model: The critic's network.
        last_rollout: Like that of [`MTPCriticTrainer`], with values (B, T, 1).

    Raises:
        TypeError: If `args` is not a `PPOConfig`, or the value model is none of the above.
        ValueError: If the value model does not know the policy's tokens.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    config_class = PPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        *host_args: Any,
        value_model: ValueModel | PreTrainedModel | str | None = None,
        **host_kwargs: Any,
    ) -> None:
        self._value_source = value_model
        super().__init__(model, reward_funcs, args, *host_args, **host_kwargs)
        if self.args.disable_dropout:  # the host has done so for the policy
            disable_dropout_in_model(self.value_model)

    def make_signal(self, args: PPOConfig) -> Signal:
        """Make the critic that is a network of its own."""
        checkpointing = (args.gradient_checkpointing_kwargs or {}) if args.gradient_checkpointing else None
        options, values = ValueModelOptions.of(args), PPOValueOptions.of(args)
        return CriticSignal(ValueModelCritic(options, values, self._value_source, checkpointing=checkpointing))

    def describe_method(self) -> Method:
        """Say that PPO has trained the policy, or REINFORCE, for its card."""
        preset, method = self.args.preset, super().describe_method()
        name, papers = ("PPO", ("ppo", "instruct_gpt")) if preset is None else PRESET_METHODS[preset]
        part = ("A separate value model was the critic.", ("gae",) if self.args.advantage_estimator == "gae" else ())
        code = (*method.code, ("Loading the value model", VALUE_MODEL_CODE))
        return Method(name, papers, (*method.parts, part), code)

    @property
    def value_model(self) -> ValueModel:
        """The critic's network."""
        assert isinstance(self.critic, ValueModelCritic)
        return self.critic.module

    def _start_epoch(self) -> None:
        """Shuffle the minibatches anew for another pass over a batch of completions."""
        steps, slices = self.args.steps_per_generation, self._buffered_inputs
        again = self._step % steps == 0 and self._step % (steps * self.num_iterations) != 0
        if again and slices is not None and "pixel_values" not in slices[0]:  # images are not stored row by row
            self._buffered_inputs = reordered(slices, torch.randperm(sum(map(num_rows, slices))))


class GRPOVariantTrainer(RLTrainer):
    r"""
    Trainer for the variants of GRPO: options choose an advantage, a policy loss and a way of sampling, and `preset`
    chooses all three as in a paper.

    Takes the arguments of [`~trl.GRPOTrainer`], with a [`GRPOVariantConfig`] for `args`. Without any of these choices
    it trains like `GRPOTrainer`.

    Example:

    ```python
    from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer

    trainer = GRPOVariantTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=GRPOVariantConfig("qwen3-dapo", preset="dapo"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Raises:
        TypeError: If `args` is not a `GRPOVariantConfig`, or `dynamic_sampling` has a dataset without a length.
    """

    _tag_names = ["trl", "grpo-variant"]
    _name = "GRPO variant"
    config_class = GRPOVariantConfig

    def make_signal(self, args: GRPOVariantConfig) -> Signal:
        """Make the advantages of the variant."""
        return GroupSignal(VariantOptions.of(args))

    def make_sampling(self, args: GRPOVariantConfig) -> GroupSampling:
        """Make dynamic sampling, rejection and replay, as far as they are on."""
        return GroupSampling(SamplingOptions.of(args), seed=args.seed + args.process_index)

    def describe_method(self) -> Method:
        """Say which variant of GRPO has trained the policy, for its card."""
        args, method = self.args, super().describe_method()
        if args.preset is not None:
            name, papers = PRESET_METHODS[args.preset]
            part = f"The preset {args.preset!r} has set what its paper sets, as far as no option said otherwise."
        else:
            name, papers = "a variant of GRPO", ("grpo",)
            part = f"advantage={args.advantage!r}, policy_loss={args.policy_loss!r}, aggregation={args.aggregation!r}."
        return Method(name, papers, ((part, ()), *method.parts), method.code)

    @property
    def value_tracker(self) -> ValueTracker | None:
        """Tracker of the success of every prompt; `None` for an advantage that tracks none."""
        return self.signal.value_tracker if isinstance(self.signal, GroupSignal) else None

    @property
    def replay_buffer(self) -> ReplayBuffer | None:
        """Groups of earlier batches that are used again; `None` without replay."""
        return None if self.sampling is None else self.sampling.replay_buffer
