"""The base of all agents: environments, evaluation, logs, checkpoints. An algorithm adds `act` and `iterate`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rl_plugins.checkpoints import check_same_shapes
from rl_plugins.classic.agent_settings import AgentSettings, Linear, Schedule, value_at
from rl_plugins.classic.environments import (
    EnvSpec,
    action_size,
    check_spaces,
    decode_actions,
    environment_name,
    has_time_limit,
    make_environments,
    observation_size,
    to_tensor,
)
from rl_plugins.classic.networks import evaluation_mode, mlp
from rl_plugins.classic.runner import Runner, Transition

_STATE = "classic"
_SPACES = ("observation space", "action space")
_LOG_EVERY_ENV_STEPS = 2000
_MAX_EVAL_ENVS = 16
_MAX_EPISODE_STEPS = 10_000


class Evaluation(NamedTuple):
    """Episodes under the deterministic policy, ordered by environment."""

    returns: np.ndarray
    """Undiscounted returns `(episodes,)`."""
    lengths: np.ndarray
    """Steps `(episodes,)`."""
    cut_off: np.ndarray
    """`(episodes,)`, bool: whether the agent's bound on steps ended the episode, rather than the environment."""


class Iterations:
    """The loader behind a training epoch. It exists for Lightning alone: an agent makes its own data.

    Lightning trains over a loader, so this one yields the number of each iteration. Its length gives Lightning a
    progress bar, and keeps Lightning from fetching ahead. Its state keeps Lightning from warning that a run which
    resumes in the middle would see data twice.

    Args:
        length: Number of iterations.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.done = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # A restored position holds for the epoch that was interrupted; the next one starts anew.
        start, self.done = self.done % self.length, 0
        for index in range(start, self.length):
            self.done = index + 1
            yield index

    def state_dict(self) -> dict[str, int]:
        """Return the number of iterations handed out in this epoch."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the iterations that were handed out."""
        self.done = state["done"]


class Agent(LightningModule, ABC):
    """A reinforcement learning agent as a LightningModule, the base of all agents in this folder.

    One training step is one iteration of the algorithm: it collects steps from `num_envs` environments, then updates
    the networks. An epoch is `total_steps` environment steps:

    ```python
    Trainer(max_epochs=1).fit(PPOAgent("CartPole-v1", total_steps=100_000))
    ```

    `Trainer(val_check_interval=n)` evaluates the deterministic policy every `n` iterations, and
    `trainer.validate(agent)` evaluates it once. A checkpoint holds all that training needs, the environments included,
    so that a resumed run equals one that was never interrupted; resuming unpickles the environments, so resume from
    files that you trust only. Callables among the settings, except `Linear`, are not stored: give them to
    `load_from_checkpoint` again.

    An algorithm is one class that derives from this one. It builds its networks in `__init__` inside
    `with self.seeded():` and defines `act`, `iterate` and `configure_optimizers`; everything else that it has to
    remember goes into `training_state`.

    The log has `time/env_steps`, `rollout/return_mean` and `rollout/length_mean` of the last 100 episodes, `train/...`
    as `iterate` returns it, and `eval/return_mean`, `eval/return_std`, `eval/length_mean`, `eval/cut_off_share`.

    Networks act and compute values in evaluation mode. Only the forward passes that a gradient goes through run in
    training mode, in which dropout is random and batch statistics are used.

    Args:
        env: The id of a registered environment, or a callable that makes one.
        settings: The settings of the algorithm, which are the keyword arguments of its agent.

    Raises:
        ValueError: If the spaces of the environment are not supported.
    """

    continuous: ClassVar[bool] = True
    """Whether the algorithm can act in a Box."""
    whole_episodes: ClassVar[bool] = False
    """Whether the algorithm waits for the ends of episodes, so that training needs a bound on their steps, too."""

    settings: AgentSettings

    def __init__(self, env: EnvSpec, settings: AgentSettings) -> None:
        super().__init__()
        self.settings = settings
        # Store all settings, also defaults, which may change later; then the arguments of the constructors of
        # subclasses.
        self.save_hyperparameters({field.name: getattr(settings, field.name) for field in fields(settings)})
        self.save_hyperparameters(ignore="settings")
        # A checkpoint that torch.load's safe mode can read holds no callables.
        for name in [n for n, value in self.hparams.items() if callable(value) and not isinstance(value, Linear)]:
            del self.hparams[name]
        self.automatic_optimization = False
        self.env = env
        self._warned_of_cuts = False
        self.seed = int(torch.randint(2**31, ())) if settings.seed is None else settings.seed
        self.generator = torch.Generator().manual_seed(self.seed)
        self._init_state = self.generator.get_state()
        self.iteration = 0
        self._runner: Runner | None = None
        self._resumed: dict[str, Any] | None = None
        self._logged_steps = 0
        self._read_spaces()

    def _read_spaces(self) -> None:
        envs = make_environments(self.env, 1)
        self.env_name = environment_name(envs.envs[0])
        self._has_time_limit = has_time_limit(envs.envs[0])
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space
        envs.close()
        check_spaces(self.env_name, self.observation_space, self.action_space, continuous=self.continuous)
        self.observation_size = observation_size(self.observation_space)
        self.action_size = action_size(self.action_space)

    def _step_limit(self, *, waits_for_ends: bool) -> int | None:
        """Return the limit of an episode's steps besides the environment's own; None for no other limit."""
        if self.settings.max_episode_steps is None and waits_for_ends and not self._has_time_limit:
            return _MAX_EPISODE_STEPS
        return self.settings.max_episode_steps

    # An algorithm defines these.

    @abstractmethod
    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        """Choose actions; called without gradients.

        Args:
            observations: `(N, D)`.
            deterministic: Whether to take the best actions, as in an evaluation, or to explore.

        Returns:
            Indices `(N,)` of Discrete actions, vectors `(N, A)` of a Box.
        """

    @abstractmethod
    def iterate(self) -> Mapping[str, Tensor | float]:
        """Collect with `step_environments`, update with `optimize`; the metrics returned are logged as `train/...`."""

    # An algorithm uses these.

    def build_network(self, inputs: int, outputs: int, *, gain: float) -> nn.Module:
        """Make a network from `(..., inputs)` to `(..., outputs)`; override this method for another network.

        Args:
            inputs: Numbers that go in.
            outputs: Numbers that come out.
            gain: Scale of the initial weights of the last layer.

        Returns:
            A perceptron with `hidden_sizes`. An override can read `self.settings`, and finds the other arguments of a
            subclass's constructor in `self.hparams`.
        """
        return mlp([inputs, *self.settings.hidden_sizes, outputs], output_gain=gain)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps of one training step, of all environments together."""
        return self.settings.num_envs * self.settings.rollout_steps

    @property
    def runner(self) -> Runner:
        """The training environments, which exist from the start of fit on."""
        assert self._runner is not None, "the environments are made when fit starts"
        return self._runner

    @property
    def remaining(self) -> float:
        """Share of the training that is left, from 1 down to 0."""
        return max(0.0, 1.0 - self.runner.steps / self.settings.total_steps)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Let torch's global generator draw from `seed` inside; each use goes on where the last one ended."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._init_state)
            yield
            self._init_state = torch.get_rng_state()

    def step_environments(self, actions: Tensor, counted: np.ndarray | None = None) -> Transition:
        """Take actions `(N,)` or `(N, A)` from `act` in the training environments.

        Args:
            actions: One for each environment.
            counted: `(N,)`, bool: the environments whose episodes enter the logged means; all by default.
        """
        return self.runner.step(decode_actions(self.action_space, actions), counted)

    @property
    def optimizer(self) -> LightningOptimizer:
        """The optimizer of an agent that has only one."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer), "there are several: take them from self.optimizers()"
        return optimizer

    def optimize(self, loss: Tensor, optimizer: LightningOptimizer, parameters: list[torch.nn.Parameter]) -> None:
        """Take one step on a loss, with its gradient clipped to `max_grad_norm`.

        Args:
            loss: 0-d.
            optimizer: The optimizer that takes the step.
            parameters: All parameters that the optimizer updates.
        """
        for parameter in parameters:  # this is zero_grad without its records for the profiler
            parameter.grad = None
        self.manual_backward(loss)
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        optimizer.step()

    @property
    def learning_rates(self) -> list[Schedule]:
        """The learning rate of each optimizer."""
        return [self.settings.learning_rate for _ in self.trainer.optimizers]

    # Training.

    def train_dataloader(self) -> Iterations:
        """Give Lightning as many iterations as `total_steps` takes."""
        return Iterations(math.ceil(self.settings.total_steps / self.steps_per_iteration))

    def on_fit_start(self) -> None:
        """Make the environments, or go on from a checkpoint.

        Raises:
            ValueError: If there is more than one process.
        """
        if self.trainer.world_size > 1:
            raise ValueError(
                f"world_size={self.trainer.world_size}: agents train in one process. Set devices=1 and num_nodes=1 of "
                "the Trainer. For more environments at a time, raise num_envs."
            )
        limit = self._step_limit(waits_for_ends=self.whole_episodes)
        self._runner = Runner(make_environments(self.env, self.settings.num_envs, max_episode_steps=limit))
        self.generator.manual_seed(self.seed)
        self.iteration = self._logged_steps = 0
        self.forget()
        if self._resumed is None:
            self.runner.reset(seed=self.seed)
        else:
            self.load_training_state(self._resumed)
            self._resumed = None

    def forget(self) -> None:
        """Forget what an earlier fit left; called when fit starts, before the state of a checkpoint is loaded."""

    def training_step(self, batch: int, batch_idx: int) -> None:
        """Run one iteration, at the learning rates of its beginning."""
        self.iteration += 1
        for optimizer, rate in zip(self.trainer.optimizers, self.learning_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = value_at(rate, self.remaining)
        metrics = self.iterate()
        if self._is_logging():
            self._log_iteration(metrics)

    def on_train_epoch_end(self) -> None:
        """Stop after `total_steps`, whatever the Trainer's number of epochs."""
        self.trainer.should_stop = True

    def _is_logging(self) -> bool:
        # Every call of self.log takes about as long as a step of CartPole.
        return (
            self.iteration % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
            or self.runner.steps - self._logged_steps >= _LOG_EVERY_ENV_STEPS
            or self.trainer.is_last_batch
        )

    def _log_iteration(self, metrics: Mapping[str, Tensor | float]) -> None:
        self._logged_steps = self.runner.steps
        self.log("time/env_steps", float(self.runner.steps), prog_bar=True)
        if self.runner.returns:
            self.log("rollout/return_mean", float(np.mean(self.runner.returns)), prog_bar=True)
            self.log("rollout/length_mean", float(np.mean(self.runner.lengths)))
        detached = {name: x.detach() if isinstance(x, Tensor) else x for name, x in metrics.items()}
        self.log_dict({f"train/{name}": value for name, value in detached.items()})

    # Evaluation.

    def val_dataloader(self) -> Iterations:
        """Give Lightning one evaluation."""
        return Iterations(1)

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Evaluate the deterministic policy, always from the same initial states."""
        result = self.evaluate(self.settings.eval_episodes)
        self.log("eval/return_mean", float(result.returns.mean()), prog_bar=True, batch_size=1)
        self.log("eval/return_std", float(result.returns.std()), batch_size=1)
        self.log("eval/length_mean", float(result.lengths.mean()), batch_size=1)
        self.log("eval/cut_off_share", float(result.cut_off.mean()), batch_size=1)

    @torch.no_grad()
    def evaluate(self, episodes: int, *, seed: int | None = None) -> Evaluation:
        """Play episodes with the deterministic policy, in fresh environments and in evaluation mode.

        Every environment plays a fixed share of the episodes: taking the episodes that end first would favour short
        ones.

        Args:
            episodes: Number of episodes.
            seed: Seed of the environments; by default one that training does not use, and always the same.

        Returns:
            Returns and lengths of the episodes, and which of them were cut off after `max_episode_steps`, or after
            10,000 steps where the environment has no time limit.

        Raises:
            ValueError: If `episodes` is below 1.
        """
        if episodes < 1:
            raise ValueError(f"episodes={episodes}: give at least 1.")
        count, limit = min(episodes, _MAX_EVAL_ENVS), self._step_limit(waits_for_ends=True)
        quotas = [episodes // count + (index < episodes % count) for index in range(count)]
        runner = Runner(make_environments(self.env, count, max_episode_steps=limit), window=1)
        runner.reset(seed=self.seed + 2**20 if seed is None else seed)
        finished: list[list[tuple[float, int, bool]]] = [[] for _ in range(count)]
        with evaluation_mode(self):
            while any(len(rows) < quota for rows, quota in zip(finished, quotas, strict=True)):
                actions = self.act(to_tensor(runner.observations, self.device), deterministic=True)
                ended = runner.step(decode_actions(self.action_space, actions)).terminated
                for index, episode_return, length in runner.finished:
                    if len(finished[index]) < quotas[index]:
                        cut_off = limit is not None and length >= limit and not ended[index]
                        finished[index].append((episode_return, length, cut_off))
        runner.close()
        columns = zip(*(row for rows in finished for row in rows), strict=True)
        result = Evaluation(*(np.array(column) for column in columns))
        self._warn_of_cuts(result, limit)
        return result

    def _warn_of_cuts(self, result: Evaluation, limit: int | None) -> None:
        if self.settings.max_episode_steps is not None or self._warned_of_cuts or not result.cut_off.any():
            return
        self._warned_of_cuts = True
        rank_zero_warn(
            f"The evaluation cut off {result.cut_off.sum()} of {len(result.returns)} episodes after {limit} steps: "
            f"{self.env_name} has no time limit, and the deterministic policy did not end them. The return of "
            f"such an episode is the sum of its first {limit} rewards, and eval/cut_off_share is the share of such "
            "episodes. Set max_episode_steps to change the limit."
        )

    # Checkpoints.

    def training_state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides networks and optimizers: extend it with `super()`."""
        return {
            "seed": self.seed,
            "iteration": self.iteration,
            "generator": self.generator.get_state(),
            "runner": self.runner.state_dict(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from a `training_state`, when fit starts and the environments are made."""
        self.seed, self.iteration = state["seed"], state["iteration"]
        self.generator.set_state(state["generator"])
        self.runner.load_state_dict(state["runner"], fresh_seed=self.seed + state["runner"]["steps"])
        self._logged_steps = self.runner.steps

    def _identity(self) -> dict[str, str]:
        return {
            "agent": type(self).__name__,
            "environment": self.env_name,
            "observation space": str(self.observation_space),
            "action space": str(self.action_space),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state that Lightning does not know about."""
        checkpoint[_STATE] = {"identity": self._identity()}
        if self._runner is not None:
            checkpoint[_STATE]["training"] = self.training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, before weights are copied.

        Raises:
            ValueError: If the checkpoint is of another agent, environment or architecture.
        """
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if _STATE not in checkpoint:
            raise ValueError(
                "The checkpoint is not of an agent of rl_plugins.classic. Give one that such an agent has written."
            )
        theirs, ours = checkpoint[_STATE]["identity"], self._identity()
        for key in ours if fitting else _SPACES:  # to act, only spaces and networks have to fit
            if theirs[key] != ours[key]:
                raise ValueError(
                    f"The {key} of the checkpoint is {theirs[key]}, but here it is {ours[key]}. Use the "
                    f"{key} of the checkpoint, or leave out the checkpoint."
                )
        check_same_shapes(
            _shapes(checkpoint["state_dict"]),
            _shapes(self.state_dict()),
            type(self).__name__,
            settings={
                name: (value, self.hparams[name])
                for name, value in checkpoint.get("hyper_parameters", {}).items()
                if name in self.hparams and value != self.hparams[name]
            },
        )
        self._resumed = checkpoint[_STATE].get("training") if fitting else None


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
