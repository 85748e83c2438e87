"""Rollout functions of TRL: episodes with a text environment, and empty completions that do not stop the run."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl_plugins.nn.sharding import gathers_in_forward
from rl_plugins.rollouts.completions import Completions, generate_completions
from rl_plugins.rollouts.episodes import TextEnvironment, Turns, play_episodes
from rl_plugins.rollouts.step_rewards import rewards_per
from rl_plugins.signals.scores import OVERLONG_NAME
from rl_plugins.trl.environments import TERMINATED, TRUNCATED

RolloutFunc = Callable[..., dict[str, Any]]

TOKEN_REWARDS = "token_rewards"
"""Column in which a rollout says what each token earned."""


class EpisodeRollouts:
    """A rollout function of TRL that plays episodes of several turns with a text environment.

    TRL's own `environment_factory` needs a model that calls tools. Here the policy's text is the action, so that any
    model can play, also one without a chat template. Give the object itself as `rollout_func`, and its `earned` among
    the reward functions:

    ```python
    episodes = EpisodeRollouts(Game, max_turns=8, max_turn_length=16)
    trainer = MTPCriticTrainer(model, episodes.earned, config, train_dataset=prompts, rollout_func=episodes)
    ```

    Args:
        environment: Makes a [`~rl_plugins.rollouts.TextEnvironment`], which plays many episodes. Its `reset` gets the
            prompt.
        max_turns: Largest number of the policy's turns in an episode.
        max_turn_length: Longest turn in tokens.

    Attributes:
        earned: Reward function that returns the environment's rewards, at the tokens after which they were paid.
    """

    def __init__(
        self,
        environment: Callable[[], TextEnvironment],
        *,
        max_turns: int | None = None,
        max_turn_length: int | None = None,
    ) -> None:
        self.environment, self.max_turns, self.max_turn_length = environment, max_turns, max_turn_length
        self.environments: list[TextEnvironment] = []
        self._has_paid = False

        @rewards_per("token")
        def earned(completions: Sequence[Any], **columns: Any) -> list[list[float | None]]:
            return columns[TOKEN_REWARDS]

        self.earned = earned

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Play an episode for every prompt.

        Raises:
            ValueError: If the trainer generates with vLLM, which is not supported here, or if the environment pays
                nothing in the first batch of episodes and there are no other reward functions.
        """
        args, model, tokenizer = trainer.args, trainer.model, trainer._tokenizer
        if trainer.use_vllm:
            raise ValueError("EpisodeRollouts generates with the model itself; set use_vllm=False.")
        sampling = {
            name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        }
        eos, pad = list(trainer.eos_token_ids), tokenizer.pad_token_id

        def generate(prompts: Sequence[Sequence[int]], max_length: int) -> Completions:
            return generate_completions(
                model,
                prompts,
                pad_token_id=pad,
                eos=eos,
                max_completion_length=max_length,
                sampling={**sampling, **(args.generation_kwargs or {})},
                decoder=getattr(trainer, "decoder", None),
            )

        def any_rank(holds: bool) -> bool:
            flag = torch.tensor([float(holds)], device=trainer.accelerator.device)
            return bool(trainer.accelerator.reduce(flag, reduction="sum") > 0)

        told = any(func is self.earned for func in trainer.reward_funcs)
        alone = told and not set(trainer.reward_func_names) - {self.earned.__name__, OVERLONG_NAME}
        self.environments += [self.environment() for _ in range(len(prompts) - len(self.environments))]
        played = play_episodes(
            generate,
            prompts,
            self.environments[: len(prompts)],
            Turns(tokenizer, eos, args.max_completion_length, self.max_turns, self.max_turn_length),
            pad_token_id=pad,
            any_rank=any_rank if gathers_in_forward(model) else bool,
            must_pay=any_rank if alone and not self._has_paid else None,
        )
        assert played.rewards is not None and played.truncated is not None
        if not self._has_paid:
            self._has_paid = any_rank(not bool(played.rewards.isnan().all()))
            if self._has_paid and not told:
                warnings.warn(
                    "The environment pays, but nothing is learnt from it: `earned` of these EpisodeRollouts is not "
                    "among the reward functions. Add it to reward_funcs.",
                    stacklevel=2,
                )
        real = played.completion_mask.bool()
        rewards = [row[mask].tolist() for row, mask in zip(played.rewards, real, strict=True)]
        prompt_rows = zip(played.prompt_ids, played.prompt_mask.bool(), strict=True)
        return {
            "prompt_ids": [ids[mask].tolist() for ids, mask in prompt_rows],
            "completion_ids": played.token_lists(),
            "logprobs": None,
            "env_mask": played.policy_lists(),
            TOKEN_REWARDS: [[None if math.isnan(reward) else reward for reward in row] for row in rewards],
            TERMINATED: played.ended.tolist(),
            TRUNCATED: played.truncated.tolist(),
        }


def fill_empty(rollout_func: RolloutFunc, eos_token_id: int) -> RolloutFunc:
    """Give every empty completion of a rollout function one masked end-of-text token.

    TRL reads the last token of every completion and fails on one that has none. Masked, the token teaches nothing, and
    the completion is counted in `critic/skipped_completions`.

    Args:
        rollout_func: Rollout function of TRL; returns `prompt_ids`, `completion_ids`, `logprobs` and maybe `env_mask`.
        eos_token_id: The token to fill in.
    """

    def rollout(*args: Any, **kwargs: Any) -> dict[str, Any]:
        output = rollout_func(*args, **kwargs)
        completions = output["completion_ids"]
        if all(len(ids) > 0 for ids in completions):
            return output
        env_mask = output.get("env_mask") or [[1] * len(ids) for ids in completions]
        logprobs = output.get("logprobs")
        return {
            **output,
            "completion_ids": [list(ids) or [eos_token_id] for ids in completions],
            "env_mask": [list(mask) or [0] for mask in env_mask],
            "logprobs": logprobs and [list(row) or [0.0] for row in logprobs],
        }

    return rollout
