"""Rows of experience: `N` environments side by side for `T` steps, with any number of episodes in a row."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rl_plugins.classic.agent import Agent
from rl_plugins.classic.environments import to_tensor
from rl_plugins.classic.networks import ObservationNorm, evaluation_mode


class Rollout(NamedTuple):
    """Experience of `N` environments in `T` steps, `M` of which cut an episode off."""

    observations: Tensor
    """`(N, T + 1, D)`: the states acted in, and the one after the last step."""
    actions: Tensor
    """`(N, T)` indices, or `(N, T, A)` vectors."""
    rewards: Tensor
    """`(N, T)`."""
    terminated: Tensor
    """`(N, T)`, bool: the step ended the task."""
    truncated: Tensor
    """`(N, T)`, bool: the step cut an episode off that had not ended."""
    final_observations: Tensor
    """`(M, D)`: the states in which episodes were cut off, by step and then by environment."""
    mask: Tensor
    """`(N, T)`, bool: the steps to learn from."""

    @property
    def ends(self) -> Tensor:
        """`(N, T)`, bool: the last steps of episodes."""
        return self.terminated | self.truncated


@torch.inference_mode()
def collect(agent: Agent, steps: int, *, whole_episodes: bool = False) -> Rollout:
    """Act in the training environments.

    With `whole_episodes`, all environments start anew, and every row runs on after `steps` until its episode is over.
    A row's number of episodes is then a stopping time, so that sums over its steps are unbiased (Wald's identity).
    They would be biased if unfinished episodes, which are mostly long, were thrown away.

    Args:
        agent: The agent, whose `act` explores.
        steps: `T`; with `whole_episodes`, the smallest `T`.
        whole_episodes: Whether rows consist of whole episodes; what comes after the last one is masked.

    Returns:
        The rows.
    """
    runner = agent.runner
    if whole_episodes:
        runner.reset(whole_episodes=True)
    observations: list[np.ndarray] = []
    actions: list[Tensor] = []
    rewards: list[np.ndarray] = []
    terminated: list[np.ndarray] = []
    truncated: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    # An episode that is cut off goes on in the next step of its row with the first state of another one. The state in
    # which it was cut off has a value that the last step needs, and is stored only here.
    final = np.empty((0, agent.observation_size), dtype=np.float32)
    # The rows that are still learned from. Two environments, steps=4, whole episodes of 3, 3 and 5 steps:
    #     row 0   1 2 3 | 1 2 3   closes at step 6, the first end of an episode at or after step 4
    #     row 1   1 2 3 4 5 | .   closes at step 5; step 6 is played, since all rows are stepped together, and masked
    open_rows = np.ones(runner.num_envs, dtype=bool)
    with evaluation_mode(agent):
        while len(rewards) < steps or (whole_episodes and open_rows.any()):
            observations.append(runner.observations)
            actions.append(agent.act(to_tensor(runner.observations, agent.device)))
            # Episodes of rows that wait for the others are not learned from, and do not count in the logged means
            # either. Only short ones would end in time, since the next rollout starts anew.
            transition = agent.step_environments(actions[-1], counted=open_rows)
            # An environment may report both at once. The task is then over, and the state reached has no value.
            cut = transition.truncated & ~transition.terminated
            if cut.any():
                final = np.concatenate([final, transition.next_observations[cut]])
            rewards.append(transition.rewards)
            terminated.append(transition.terminated)
            truncated.append(cut)
            mask.append(open_rows)  # as before this step, so that the step which closes a row counts
            if whole_episodes and len(rewards) >= steps:
                open_rows = open_rows & ~(cut | transition.terminated)  # a new array: the old one is in the mask
    observations.append(runner.observations)  # the state after the last step, whose value the last step needs

    def rows(arrays: list[np.ndarray]) -> Tensor:
        return to_tensor(np.stack(arrays, axis=1), agent.device)

    with torch.inference_mode(False):  # what autograd is to use may not be an inference tensor
        return Rollout(
            observations=rows(observations),
            actions=torch.stack(actions, dim=1),
            rewards=rows(rewards).float(),
            terminated=rows(terminated),
            truncated=rows(truncated),
            final_observations=to_tensor(final, agent.device),
            mask=rows(mask),
        )


def next_values(rollout: Rollout, values: Tensor, final_values: Tensor) -> Tensor:
    """Return `V(s_{t+1})` of every step: 0 where the task ended, that of the last state where an episode was cut off.

    Args:
        rollout: `N` rows of `T` steps.
        values: `V(s_t) (N, T + 1)`.
        final_values: `V` of `rollout.final_observations`, `(M,)`.

    Returns:
        `(N, T)`.
    """
    following = torch.where(rollout.terminated, 0.0, values[:, 1:])
    # `collect` stored the final states by step, then by environment: the order of a transposed mask. Row 0 cut off at
    # step 5 and row 1 at steps 2 and 5 gives (2, row 1), (5, row 0), (5, row 1).
    following.T[rollout.truncated.T] = final_values
    return following


def episode_steps(rollout: Rollout) -> Tensor:
    """Count for each step the earlier steps of its episode; rows must start with an episode.

    Args:
        rollout: `N` rows of `T` steps.

    Returns:
        `(N, T)`, from 0.
    """
    index = torch.arange(rollout.ends.shape[1], device=rollout.ends.device).expand_as(rollout.ends)
    # The step after an end is the first of an episode: carry its index on to the next one. Ends at steps 2 and 4 of 6:
    # 0 0 3 0 5 0, cummax 0 0 3 3 5 5, shifted by one 0 0 0 3 3 5, index minus this 0 1 2 0 1 0.
    starts = torch.where(rollout.ends, index + 1, 0).cummax(dim=1).values.roll(1, dims=1)
    starts[:, 0] = 0
    return index - starts


def update_normalizer(normalizer: nn.Module, rollout: Rollout) -> None:
    """Update the normalizer by a rollout, after the gradient steps, which must see the observations as the policy did.

    Args:
        normalizer: From `make_normalizer`.
        rollout: The rollout, of which only the steps that were learned from count.
    """
    if isinstance(normalizer, ObservationNorm):
        normalizer.update(rollout.observations[:, :-1][rollout.mask])
