"""Steps of environments side by side, and records of their episodes."""

import pickle
from collections import deque
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from lightning.pytorch.utilities import rank_zero_warn

from rl_plugins.classic.environments import encode_observations


class Transition(NamedTuple):
    """The outcome of a step, one row per environment."""

    next_observations: np.ndarray
    """`(N, D)`: the states reached; where an episode ended, its real last observation, not that of the new one."""
    rewards: np.ndarray
    """`(N,)`."""
    terminated: np.ndarray
    """`(N,)`: the episode reached an end of the task, after which values are 0."""
    truncated: np.ndarray
    """`(N,)`: the episode was cut off, and the value of the last state still counts."""


class Runner:
    """Steps `N` environments and counts steps and episodes.

    Args:
        envs: Environments that restart in the step that ends an episode, as `make_environments` gives them.
        window: Number of the last episodes whose returns and lengths are kept.
    """

    # The window holds groups of episodes, which leave as a whole. A rollout of whole episodes is one group, any other
    # episode is a group of its own. In a rollout of whole episodes the last one of a row is longer than most: a long
    # episode is more likely to be the one that is running when time is up. A window that cut through a rollout would
    # hold too many of them. With a window of 100 and rollouts of 60 episodes, the last two rollouts stay.

    def __init__(self, envs: SyncVectorEnv, *, window: int = 100) -> None:
        self.envs = envs
        self.num_envs = envs.num_envs
        self.space = envs.single_observation_space
        self.steps = 0
        """Steps of all environments together."""
        self.window = window
        self._episodes: deque[list[tuple[float, int]]] = deque()
        self._whole_episodes = False
        self.observations = np.empty((0, 0), dtype=np.float32)
        """The current states `(N, D)`."""
        self.finished: list[tuple[int, float, int]] = []
        """Environment, return and length of the episodes that ended in the last step."""
        self._running_returns = np.zeros(self.num_envs)
        self._running_lengths = np.zeros(self.num_envs, dtype=np.int64)

    @property
    def returns(self) -> list[float]:
        """Undiscounted returns of the last episodes."""
        return [episode_return for group in self._episodes for episode_return, _ in group]

    @property
    def lengths(self) -> list[int]:
        """Steps of the last episodes."""
        return [length for group in self._episodes for _, length in group]

    def reset(self, seed: int | None = None, *, whole_episodes: bool = False) -> None:
        """Start new episodes in all environments.

        Args:
            seed: Environment `i` is seeded with `seed + i`.
            whole_episodes: Whether all episodes until the next reset enter and leave `returns` and `lengths` together,
                which may then hold more than `window`.
        """
        self._whole_episodes = whole_episodes
        if whole_episodes:
            self._episodes.append([])
        self.observations = encode_observations(self.space, self.envs.reset(seed=seed)[0])
        self._running_returns[:] = 0
        self._running_lengths[:] = 0

    def step(self, actions: np.ndarray, counted: np.ndarray | None = None) -> Transition:
        """Take one step in every environment.

        Args:
            actions: `(N, ...)`, as the environments take them; see `decode_actions`.
            counted: `(N,)`, bool: the environments whose episodes enter `returns` and `lengths`; all by default.

        Returns:
            The transition; `observations` are then the states to act in next.
        """
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        self.observations = encode_observations(self.space, observations)
        self.steps += self.num_envs
        self._running_returns += rewards
        self._running_lengths += 1
        self.finished = []
        # Where an episode ended, Gymnasium has reset already: `observations` holds the first state of the next one, in
        # which to act, and "final_obs" the state that the step reached, which values and replay need.
        reached = self.observations
        if "final_obs" in infos:
            ends = np.flatnonzero(terminated | truncated)
            reached = reached.copy()  # `self.observations` keeps the first states
            reached[ends] = encode_observations(self.space, [infos["final_obs"][end] for end in ends])
            self._finish(ends, counted)
        return Transition(reached, rewards, terminated, truncated)

    def _finish(self, ends: np.ndarray, counted: np.ndarray | None) -> None:
        for end in ends.tolist():
            episode = float(self._running_returns[end]), int(self._running_lengths[end])
            self.finished.append((end, *episode))
            if counted is not None and not counted[end]:
                continue
            if self._whole_episodes:
                self._episodes[-1].append(episode)
            else:
                self._episodes.append([episode])
        self._running_returns[ends] = 0
        self._running_lengths[ends] = 0
        kept = sum(len(group) for group in self._episodes)
        # The oldest group leaves once the others alone fill the window, so that at least `window` episodes stay.
        while self._episodes and kept - len(self._episodes[0]) >= self.window:
            kept -= len(self._episodes.popleft())

    def state_dict(self) -> dict[str, Any]:
        """Return counters, running episodes and, where they can be pickled, the environments as they stand."""
        return {
            "steps": self.steps,
            "returns": self.returns,
            "lengths": self.lengths,
            "groups": [len(group) for group in self._episodes],
            "observations": torch.from_numpy(self.observations),
            "running_returns": torch.from_numpy(self._running_returns),
            "running_lengths": torch.from_numpy(self._running_lengths),
            "envs": _pickled(self.envs),
        }

    def load_state_dict(self, state: dict[str, Any], *, fresh_seed: int) -> None:
        """Go on where `state_dict` was taken.

        This unpickles the environments, which runs code of the checkpoint: load those that you trust only.

        Args:
            state: From `state_dict`, of as many environments.
            fresh_seed: Seed of new episodes, if the environments could not be pickled.

        Raises:
            ValueError: If the number of environments differs.
        """
        if len(state["observations"]) != self.num_envs:
            raise ValueError(
                f"The checkpoint has {len(state['observations'])} environments, this run {self.num_envs}: "
                "resume with the same num_envs."
            )
        self.steps = state["steps"]
        episodes = iter(zip(state["returns"], state["lengths"], strict=True))
        self._episodes = deque(list(islice(episodes, size)) for size in state["groups"])
        if state["envs"] is None:
            self.reset(seed=fresh_seed)
            return
        # `_pickled` stored the bytes in a tensor, since torch.load's safe mode admits no pickle of a class.
        self.envs.envs = pickle.loads(state["envs"].numpy().tobytes())
        self.observations = state["observations"].numpy().copy()
        self._running_returns = state["running_returns"].numpy().copy()
        self._running_lengths = state["running_lengths"].numpy().copy()

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()


def _pickled(envs: SyncVectorEnv) -> torch.Tensor | None:
    """Pickle the single environments into bytes; the vector around them may hold lambdas, which cannot be pickled."""
    try:
        data = pickle.dumps(envs.envs)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        rank_zero_warn(
            f"The environments cannot be pickled into the checkpoint ({error}): resuming from it starts new episodes."
        )
        return None
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
