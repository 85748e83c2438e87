"""Gymnasium environments side by side: how they are made, which spaces are supported, and conversion to tensors."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from torch import Tensor

EnvSpec = str | Callable[[], gym.Env]
"""The id of a registered environment, or a callable that makes one."""


class OwnLastObservation(gym.Wrapper):
    """Copies the last observation of an episode.

    The vector environment keeps a reference to the last observation and resets at once. An environment that writes all
    its observations into one array would overwrite it with the first observation of the next episode.
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, info


def make_environments(
    env: EnvSpec, num_envs: int, seed: int | None = None, *, max_episode_steps: int | None = None
) -> SyncVectorEnv:
    """Make `num_envs` copies of an environment, which start a new episode in the step that ends one.

    The real last observations of the episodes are then in `infos["final_obs"]`.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        num_envs: Number of copies.
        seed: If given, the copies are reset, copy `i` with `seed + i`.
        max_episode_steps: Steps after which an episode is cut off, besides the environment's own limit.

    Returns:
        The vector environment.

    Raises:
        ValueError: If `num_envs` is below 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs={num_envs}: give at least 1 environment.")
    # Gymnasium's checker takes time at every step, and one checked copy is enough.
    first = partial(gym.make, env) if isinstance(env, str) else env
    others = partial(gym.make, env, disable_env_checker=True) if isinstance(env, str) else env

    def wrapped(make: Callable[[], gym.Env]) -> gym.Env:
        made = make() if max_episode_steps is None else TimeLimit(make(), max_episode_steps)
        return OwnLastObservation(made)

    makers = [partial(wrapped, make) for make in [first] + [others] * (num_envs - 1)]
    envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    if seed is not None:
        envs.reset(seed=seed)
    return envs


def environment_name(env: gym.Env) -> str:
    """Return the id under which an environment is registered, else the name of its class."""
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def has_time_limit(env: gym.Env) -> bool:
    """Tell whether a wrapper cuts off the episodes of an environment; `gym.make` adds such a wrapper to most."""
    while isinstance(env, gym.Wrapper):
        if isinstance(env, TimeLimit):
            return True
        env = env.env
    return False


def check_spaces(name: str, observation_space: gym.Space, action_space: gym.Space, *, continuous: bool = True) -> None:
    """Refuse spaces that the agents cannot handle.

    Args:
        name: The environment's name, for the message.
        observation_space: Supported are Box of any shape, which is flattened, and Discrete, which becomes one-hot.
        action_space: Supported are Discrete and, for a `continuous` algorithm, Box of floats.
        continuous: Whether the algorithm can act in a Box.

    Raises:
        ValueError: If a space is not supported.
    """
    if not isinstance(observation_space, Box | Discrete):
        raise ValueError(
            f"{name} has the observation space {observation_space}; supported are Box and Discrete. "
            "Wrap the environment, for example in gymnasium.wrappers.FlattenObservation."
        )
    if isinstance(action_space, Discrete):
        return
    if not isinstance(action_space, Box):
        supported = "supported are Discrete and Box" if continuous else "this algorithm supports Discrete alone"
        raise ValueError(f"{name} has the action space {action_space}; {supported}. Wrap the environment.")
    if not continuous:
        raise ValueError(
            f"{name} has the action space {action_space}; this algorithm supports Discrete actions only. "
            "Choose an agent for continuous actions, such as PPOAgent."
        )
    if not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(f"{name} has the action space {action_space}; a Box of actions must hold floats.")


def observation_size(space: gym.Space) -> int:
    """Count the numbers in an observation as the networks see it: entries of a Box, or values of a Discrete."""
    return int(space.n) if isinstance(space, Discrete) else int(np.prod(space.shape or ()))


def action_size(space: gym.Space) -> int:
    """Count the actions of a Discrete, or the dimensions of a Box."""
    return int(space.n) if isinstance(space, Discrete) else int(np.prod(space.shape or ()))


def encode_observations(space: gym.Space, observations: Any) -> np.ndarray:
    """Turn observations into float32 rows `(N, D)`: a Box is flattened, a Discrete one-hot.

    Args:
        space: The space of one observation.
        observations: `N` of them, `(N, ...)`.

    Returns:
        `(N, D)`, an array of its own.
    """
    if isinstance(space, Discrete):
        return np.eye(int(space.n), dtype=np.float32)[np.asarray(observations) - space.start]
    return np.array(observations, dtype=np.float32).reshape(len(observations), -1)


def decode_actions(space: gym.Space, actions: Tensor) -> np.ndarray:
    """Turn actions into those of the environment: Discrete values count from `start`, a Box is clipped to its bounds.

    Args:
        space: The space of one action.
        actions: Indices `(N,)` for Discrete, `(N, A)` for Box.

    Returns:
        `(N,)`, or `(N, ...)` in the shape of the Box.
    """
    array = actions.numpy(force=True)
    if isinstance(space, Discrete):
        return array + space.start
    assert isinstance(space, Box)
    return np.clip(array.reshape(len(array), *space.shape), space.low, space.high).astype(space.dtype)


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Turn an array into a tensor on the device; on a CPU the two share memory."""
    return torch.from_numpy(array).to(device)
