"""The policy gradient agents for Gymnasium: book-keeping, losses and steps against hand-worked and exact numbers."""

import copy
import logging
import math
import pickle
import subprocess
import sys
import threading
import warnings
from abc import ABC
from dataclasses import FrozenInstanceError, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from rl_plugins.classic import (
    A2CAgent,
    Agent,
    DQNAgent,
    Linear,
    OffPolicyACAgent,
    PPOAgent,
    QACAgent,
    ReinforceAgent,
    TRPOAgent,
)
from rl_plugins.classic.actor_critic import Estimates, estimate, gae_advantages
from rl_plugins.classic.agent import Iterations
from rl_plugins.classic.agent_settings import AgentSettings
from rl_plugins.classic.environments import (
    check_spaces,
    decode_actions,
    encode_observations,
    make_environments,
)
from rl_plugins.classic.networks import CategoricalPolicy, GaussianPolicy, ObservationNorm, mlp
from rl_plugins.classic.off_policy_ac import Experience
from rl_plugins.classic.rollouts import Rollout, collect, episode_steps, next_values
from rl_plugins.classic.runner import Runner
from rl_plugins.functional import conjugate_gradient, flat_gradient, hessian_product, trust_region_step
from rl_plugins.tabular import MDP, discounted_objective, policy_gradient

AGENTS = [A2CAgent, OffPolicyACAgent, PPOAgent, QACAgent, ReinforceAgent, TRPOAgent]
SMALL: dict[str, Any] = {"num_envs": 2, "rollout_steps": 16, "hidden_sizes": (8,), "total_steps": 160, "seed": 3}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Counter(gym.Env):
    """Counts its steps in `[episode, step]`, pays the step's number, ends at step 3 if told to, is cut off at 5."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self) -> None:
        self.episode, self.count = -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self._observation(), float(self.count), bool(action == 1 and self.count == 3), self.count == 5, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.episode, self.count], dtype=np.float32)


class Fork(gym.Env):
    """Three states and an end, every step random: small enough to be solved exactly."""

    observation_space = Discrete(4)
    action_space = Discrete(2)
    transitions = torch.tensor(
        [
            [[0.0, 0.8, 0.2, 0.0], [0.1, 0.2, 0.7, 0.0]],
            [[0.3, 0.0, 0.3, 0.4], [0.0, 0.0, 0.1, 0.9]],
            [[0.0, 0.5, 0.0, 0.5], [0.0, 0.2, 0.0, 0.8]],
            [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
        ],
        dtype=torch.float64,
    )
    rewards = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 1.5], [0.0, 0.0]], dtype=torch.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        reward = float(self.rewards[self.state, action])
        self.state = int(self.np_random.choice(4, p=self.transitions[self.state, action].numpy()))
        return self.state, reward, self.state == 3, False, {}


def started(module: LightningModule) -> Any:
    """The module with its environments, as when fit has begun."""
    module._runner = Runner(make_environments(module.env, module.settings.num_envs))
    module.runner.reset(seed=module.seed)
    return module


def trainer(**settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return Trainer(**(defaults | settings))


def fit(module: Any, *, ckpt_path: Any = None, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(**settings).fit(module, ckpt_path=ckpt_path)
    return module


def rolled(module: Any) -> Rollout:
    """One rollout, as `iterate` collects it."""
    return collect(module, module.settings.rollout_steps, whole_episodes=module.whole_episodes)


def estimated(module: Any, rollout: Rollout) -> Estimates:
    """A rollout with the estimates, as `iterate` takes them."""
    names = ("gamma", "gae_lambda", "normalize_advantages")
    return estimate(module, rollout, **{name: getattr(module.settings, name) for name in names})


def advantages(module: Any, rollout: Rollout, values: Tensor) -> Tensor:
    settings = module.settings
    return gae_advantages(module, rollout, values, gamma=settings.gamma, gae_lambda=settings.gae_lambda)


def weights(module: LightningModule) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in module.state_dict().values()])


# Environments and spaces.


@pytest.mark.slow
def test_runner_reports_real_last_observations() -> None:
    runner = Runner(make_environments(Counter, 2))
    runner.reset()
    seen, reached, ends, cuts = [], [], [], []
    for _ in range(7):
        seen.append(runner.observations.tolist())
        transition = runner.step(np.array([1, 0]))
        reached.append(transition.next_observations.tolist())
        ends.append(transition.terminated.tolist())
        cuts.append(transition.truncated.tolist())
    assert [row[0] for row in seen] == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0]]
    assert [row[0] for row in reached] == [[0, 1], [0, 2], [0, 3], [1, 1], [1, 2], [1, 3], [2, 1]]
    assert [row[1] for row in seen] == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 0], [1, 1]]
    assert [row[1] for row in reached] == [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [1, 1], [1, 2]]
    assert [row[0] for row in ends] == [False, False, True, False, False, True, False]
    assert [row[1] for row in cuts] == [False, False, False, False, True, False, False]
    assert not any(row[1] for row in ends) and not any(row[0] for row in cuts)
    assert list(runner.returns) == [6.0, 15.0, 6.0] and list(runner.lengths) == [3, 5, 3]
    assert runner.steps == 14


def test_spaces_become_rows() -> None:
    image = Box(0, 255, (2, 3), np.uint8)
    assert encode_observations(image, np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
    ]
    assert encode_observations(Discrete(3, start=5), np.array([7, 5])).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert decode_actions(Discrete(3, start=-1), torch.tensor([0, 2])).tolist() == [-1, 1]
    box = Box(np.array([[-1.0], [0.0]], np.float32), np.array([[1.0], [0.5]], np.float32))
    clipped = decode_actions(box, torch.tensor([[-3.0, 0.25], [0.5, 9.0]]))
    assert clipped.dtype == np.float32 and clipped.tolist() == [[[-1.0], [0.25]], [[0.5], [0.5]]]


def test_unsupported_spaces_are_named() -> None:
    flat, two = Box(-1, 1, (2,)), Discrete(2)
    check_spaces("Good-v0", flat, flat)
    with pytest.raises(ValueError, match=r"Bad-v0 has the observation space Dict.*supported are Box and Discrete"):
        check_spaces("Bad-v0", Dict({"a": flat}), two)
    with pytest.raises(ValueError, match=r"action space MultiBinary.*supported are Discrete and Box"):
        check_spaces("Bad-v0", flat, MultiBinary(3))
    with pytest.raises(ValueError, match=r"action space Box.*Discrete actions only.*PPOAgent"):
        check_spaces("Bad-v0", flat, flat, continuous=False)
    with pytest.raises(ValueError, match="must hold floats"):
        check_spaces("Bad-v0", flat, Box(0, 3, (2,), np.int64))
    with pytest.raises(ValueError, match=r"Blackjack-v1 has the observation space Tuple"):
        PPOAgent("Blackjack-v1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"num_envs": 0}, "num_envs=0"),
        ({"rollout_steps": 0}, "rollout_steps=0"),
        ({"gae_lambda": -0.1}, "gae_lambda=-0.1"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOAgent("CartPole-v1", **settings)


@pytest.mark.parametrize("agent", [DQNAgent, *AGENTS], ids=lambda agent: agent.__name__)
def test_text_is_no_number(agent: type) -> None:
    for name in ("learning_rate", "gamma", "rollout_steps", "total_steps", "max_grad_norm"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got the text '1e-3'.*write 1.0e-3"):
            agent("CartPole-v1", **{name: "1e-3"})

    class Own(agent):  # type: ignore[misc,valid-type]
        def __init__(self, env: Any, *, activation: str = "tanh", **settings: Any) -> None:
            super().__init__(env, **settings)

    assert Own("CartPole-v1", activation="relu", total_steps=5000).hparams["activation"] == "relu"


@pytest.mark.parametrize("agent", [DQNAgent, *AGENTS], ids=lambda agent: agent.__name__)
def test_settings_are_frozen_complete_and_known(agent: type) -> None:
    module = agent("CartPole-v1", num_envs=3, hidden_sizes=[8])
    assert (module.settings.num_envs, module.settings.hidden_sizes) == (3, (8,))
    assert {"env"} | {field.name for field in fields(module.settings)} == set(module.hparams)  # defaults as well
    with pytest.raises(FrozenInstanceError):
        module.settings.num_envs = 4
    with pytest.raises(TypeError, match="num_env"):
        agent("CartPole-v1", num_env=3)


# Structure.


@pytest.mark.parametrize("agent", [DQNAgent, *AGENTS], ids=lambda agent: agent.__name__)
def test_agents_are_two_levels_deep(agent: type) -> None:
    ours = [parent.__name__ for parent in agent.__mro__ if parent.__module__.startswith("rl_plugins")]
    print([parent.__name__ for parent in agent.__mro__])
    assert ours == [agent.__name__, "Agent"] and agent.__bases__ == (Agent,)
    assert Agent.__bases__ == (LightningModule, ABC)


def test_an_agent_has_to_act_and_to_iterate() -> None:
    class Idle(Agent):
        def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
            return torch.zeros(len(observations), dtype=torch.long)

    with pytest.raises(TypeError, match="abstract method '?iterate"):
        Idle("CartPole-v1", AgentSettings())  # type: ignore[abstract]


WITHOUT_LANGUAGE_MODELS = """
import importlib.metadata, sys

gone, distribution = ("transformers", "trl"), importlib.metadata.distribution
sys.modules.update(dict.fromkeys(gone))  # an import of theirs fails

def without(name):
    if name in gone:  # torchmetrics, which Lightning imports, goes by this
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)

importlib.metadata.distribution = without
from rl_plugins import classic

classic.PPOAgent("CartPole-v1")
print(*(name for name in sys.modules if name.startswith("rl_plugins.")))
"""


@pytest.mark.slow
def test_agents_need_no_language_model_library() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_LANGUAGE_MODELS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    layers = {name.split(".")[1] for name in done.stdout.split()}
    assert layers == {"classic", "functional", "checkpoints", "extras", "settings"}


# Rollouts.


class Scripted(A2CAgent):
    """In environment 0 always action 1, in environment 1 always action 0; a state's value is 10 episode + step."""

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        return torch.tensor([1, 0])[: len(observations)]

    def build_critic(self) -> nn.Module:
        critic = nn.Linear(2, 1, bias=False)
        critic.weight.data = torch.tensor([[10.0, 1.0]])
        return critic


def test_next_values_at_ends_and_cuts() -> None:
    """Row 0 terminates at steps 3 and 6, row 1 is cut off at step 5 in state [0, 5]; the last state counts."""
    module = started(Scripted(Counter, num_envs=2, rollout_steps=7, gamma=0.5, gae_lambda=0.5))
    rollout = collect(module, 7)
    assert rollout.final_observations.tolist() == [[0, 5]]
    assert rollout.rewards.tolist() == [[1, 2, 3, 1, 2, 3, 1], [1, 2, 3, 4, 5, 1, 2]]
    values = module.values(rollout.observations).detach()
    assert values.tolist() == [[0, 1, 2, 10, 11, 12, 20, 21], [0, 1, 2, 3, 4, 10, 11, 12]]
    following = next_values(rollout, values, torch.tensor([5.0]))
    assert following.tolist() == [[1, 2, 0, 11, 12, 0, 21], [1, 2, 3, 4, 5, 11, 12]]
    # Errors of row 1: 1 + .5, 2 + 1 - 1, 3 + 1.5 - 2, 4 + 2 - 3, 5 + 2.5 - 4 | 1 + 5.5 - 10, 2 + 6 - 11.
    # A_4 = 3.5, A_3 = 3 + 3.5 / 4, A_2 = 2.5 + A_3 / 4 ...; A_6 = -3, A_5 = -3.5 - 3 / 4.
    expected = [2.2734375, 3.09375, 3.46875 - 0.0, 3.875, 3.5, -4.25, -3.0]
    expected[1] = 2 + expected[2] / 4
    expected[0] = 1.5 + expected[1] / 4
    assert advantages(module, rollout, values)[1].tolist() == pytest.approx(expected)
    assert rollout.mask.all()


def test_cuts_of_several_rows_keep_their_order() -> None:
    """Environments that are cut off at different and at the same steps: every value belongs to its own row."""

    class Going(Scripted):
        def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
            return torch.zeros(3, dtype=torch.long)

    module = started(Going(Counter, num_envs=3, rollout_steps=11))
    module.runner.envs.envs[0].unwrapped.count = 3  # three steps ahead of the others
    rollout = rolled(module)
    assert rollout.truncated.nonzero().tolist() == [[0, 1], [0, 6], [1, 4], [1, 9], [2, 4], [2, 9]]
    values = module.values(rollout.observations).detach()
    following = next_values(rollout, values, torch.arange(6.0))
    assert following[rollout.truncated].tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


def slow_gae(rollout: Rollout, values: Tensor, final: list[float], gamma: float, lam: float) -> Tensor:
    """Each episode of each row by itself, in Python floats."""
    out = torch.zeros_like(rollout.rewards)
    cuts = [(t, n) for t, n in rollout.truncated.T.nonzero().tolist()]
    for n in range(out.shape[0]):
        running = 0.0
        for t in reversed(range(out.shape[1])):
            following = values[n, t + 1].item()
            if rollout.terminated[n, t]:
                following = running = 0.0
            elif rollout.truncated[n, t]:
                following, running = final[cuts.index((t, n))], 0.0
            delta = rollout.rewards[n, t].item() + gamma * following - values[n, t].item()
            running = delta + gamma * lam * running
            out[n, t] = running
    return out


def test_gae_over_several_episodes_of_a_row() -> None:
    module = started(A2CAgent("CartPole-v1", num_envs=3, rollout_steps=100, gae_lambda=0.9, gamma=0.95, seed=0))
    for environment in module.runner.envs.envs:
        environment.set_wrapper_attr("_max_episode_steps", 15)
    rollout = rolled(module)
    assert rollout.terminated.sum() > 3 and rollout.truncated.sum() > 3
    with torch.no_grad():
        values, final = module.values(rollout.observations), module.values(rollout.final_observations)
    expected = slow_gae(rollout, values, final.tolist(), 0.95, 0.9)
    torch.testing.assert_close(advantages(module, rollout, values), expected, atol=1e-5, rtol=0)


def test_whole_episodes() -> None:
    """Rows run on after 4 steps until their episode is over, and wait; the next rollout starts anew."""
    module = started(Scripted(Counter, num_envs=2))
    rollout = collect(module, 4, whole_episodes=True)
    assert rollout.mask.tolist() == [[True] * 6, [True] * 5 + [False]]
    assert rollout.ends.tolist() == [[False, False, True] * 2, [False] * 4 + [True, False]]
    assert episode_steps(rollout).tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    again = collect(module, 4, whole_episodes=True)
    assert again.observations[:, 0, 1].tolist() == [0, 0] and again.mask.equal(rollout.mask)
    # An episode that ends with the last of the steps is the row's last.
    assert collect(module, 3, whole_episodes=True).mask.sum(1).tolist() == [3, 5]


def test_reinforce_returns_stop_at_ends() -> None:
    class ScriptedReinforce(ReinforceAgent):
        act = Scripted.act

    module = started(ScriptedReinforce(Counter, num_envs=2, rollout_steps=4, gamma=0.5))
    returns = module.returns(rolled(module))
    assert returns.tolist() == [[2.75, 3.5, 3, 2.75, 3.5, 3], [3.5625, 5.125, 6.25, 6.5, 5, 0]]


def test_reinforce_keeps_to_its_budget() -> None:
    """Iterations of 4 steps: the first rollout takes 12 of two environments, so the next ones do nothing."""

    class ScriptedReinforce(ReinforceAgent):
        act = Scripted.act

    module = fit(ScriptedReinforce(Counter, num_envs=2, rollout_steps=2, total_steps=28))
    # Episodes of 3 and 5 steps: 10 steps a rollout, at 0, 10 and 20; 28 is reached with 30.
    assert module.iteration == 7 and module.runner.steps == 30
    assert fit(ScriptedReinforce(Counter, num_envs=2, rollout_steps=2, total_steps=20)).runner.steps == 20


# Networks.


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_actions_follow_the_distribution(kind: str) -> None:
    torch.manual_seed(0)
    network = mlp([3, 4, 3], output_gain=1.0)
    policy: Any = CategoricalPolicy(network) if kind == "categorical" else GaussianPolicy(network, 3, log_std=-0.5)
    observation = torch.tensor([[0.3, -1.0, 2.0]])
    with torch.no_grad():
        distribution = policy(observation)
        actions = policy.act(observation.expand(100_000, 3), torch.Generator().manual_seed(1))
        best = policy.act(observation, None)
    if kind == "categorical":
        shares = actions.bincount(minlength=3) / len(actions)
        torch.testing.assert_close(shares, distribution.probs[0], atol=6e-3, rtol=0)
        assert best.item() == distribution.probs.argmax().item()
    else:
        torch.testing.assert_close(actions.mean(0), distribution.mean[0], atol=1e-2, rtol=0)
        torch.testing.assert_close(actions.std(0), distribution.stddev[0], atol=1e-2, rtol=0)
        assert torch.equal(best, distribution.mean)


def test_observation_norm_has_the_moments_of_all_it_saw() -> None:
    data = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)) * 4 + 2
    norm = ObservationNorm(3)
    assert torch.equal(norm(data.clamp(-9, 9)), data.clamp(-9, 9) * torch.rsqrt(torch.tensor(1 + 1e-8)))
    for part in data.split([1, 4, 2]):
        norm.update(part)
    rows = data.reshape(-1, 3)
    torch.testing.assert_close(norm.mean, rows.mean(0))
    torch.testing.assert_close(norm.var, rows.var(0, correction=0))
    torch.testing.assert_close(norm(rows).std(0, correction=0), torch.ones(3))


def test_mlp_needs_an_input_and_an_output() -> None:
    with pytest.raises(ValueError, match="input and an output"):
        mlp([3])
    weight = mlp([8, 8, 2], output_gain=0.01)[2].weight  # type: ignore[index]
    torch.testing.assert_close(weight @ weight.T, 1e-4 * torch.eye(2))


# The natural gradient.


def test_conjugate_gradient_solves_a_system() -> None:
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(
        conjugate_gradient(lambda v: matrix @ v, b, steps=2), torch.tensor([1 / 11, 7 / 11]).double()
    )
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, b = factor @ factor.T + torch.eye(12), torch.randn(12, generator=generator, dtype=torch.float64)
    found = conjugate_gradient(lambda v: matrix @ v, b, steps=40, tolerance=1e-20)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, b), atol=1e-8, rtol=0)
    assert conjugate_gradient(lambda v: matrix @ v, torch.zeros(12)).tolist() == [0.0] * 12
    with pytest.raises(ValueError, match="steps=0"):
        conjugate_gradient(lambda v: v, b, steps=0)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_fisher_product_equals_the_hessian_of_the_kl(env: str) -> None:
    policy = TRPOAgent(env, hidden_sizes=(3,), seed=0).double().policy
    size = 4 if env == "CartPole-v1" else 3
    observations = torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in policy.named_parameters()]
    shapes = [parameter.shape for parameter in policy.parameters()]
    start = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    with torch.no_grad():
        old = policy(observations)

    def kl(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(shape) for shape in shapes])
        given = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return kl_divergence(old, torch.func.functional_call(policy, given, observations)).mean()

    hessian = torch.autograd.functional.hessian(kl, start)
    parameters = list(policy.parameters())
    gradient = flat_gradient(kl_divergence(old, policy(observations)).mean(), parameters, create_graph=True)
    for vector in torch.randn(3, len(start), dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        product = hessian_product(gradient, parameters, vector, damping=0.1)
        torch.testing.assert_close(product, hessian @ vector + 0.1 * vector)


def test_trust_region_step_ends_on_the_edge() -> None:
    matrix = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    step = trust_region_step(lambda v: matrix @ v, torch.tensor([3.0, 4.0]).double(), max_kl=0.01)
    # H^-1 g = (3, 1), (3, 1) H (3, 1) = 13
    torch.testing.assert_close(step, torch.tensor([3.0, 1.0]).double() * math.sqrt(0.02 / 13))
    assert trust_region_step(lambda v: v, torch.zeros(2), max_kl=0.01).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="max_kl=0"):
        trust_region_step(lambda v: v, torch.zeros(2), max_kl=0)


@pytest.mark.slow
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_trpo_stays_in_the_trust_region_and_improves(env: str) -> None:
    module = started(TRPOAgent(env, num_envs=4, rollout_steps=100, seed=1, max_kl=0.02))
    for _ in range(3):
        batch = estimated(module, rolled(module))
        old = copy.deepcopy(module.policy)
        before = module.surrogate(batch).item()
        metrics = module.update_policy(batch)
        with torch.no_grad():
            kl = kl_divergence(old(batch.observations), module.policy(batch.observations)).mean().item()
            gain = module.surrogate(batch).item() - before
        assert 0.004 < kl <= 0.02 and gain > 0
        assert float(metrics["kl"]) == pytest.approx(kl) and float(metrics["improvement"]) == pytest.approx(gain)


def test_trpo_takes_no_step_where_none_improves() -> None:
    module = started(TRPOAgent("CartPole-v1", num_envs=2, rollout_steps=20, seed=1))
    batch = estimated(module, rolled(module))
    before = weights(module)
    # A constant surrogate has no direction at all; a worse one than promised is refused.
    assert module.update_policy(batch._replace(advantages=torch.zeros(40)))["step_share"] == 0.0
    values = iter(range(99))

    def falling(batch: Estimates) -> Tensor:
        return sum((parameter.sum() for parameter in module.policy.parameters()), torch.zeros(())) - 1e3 * next(values)

    module.surrogate = falling
    assert module.update_policy(batch)["improvement"] == 0.0
    assert torch.equal(weights(module), before)


# Losses and their gradients.


def linear_agent(agent: type, **settings: Any) -> Any:
    """One weight per state and action: gradients of a softmax table can be written down."""

    class LinearAgent(agent):  # type: ignore[misc]
        def build_network(self, inputs: int, outputs: int, *, gain: float) -> nn.Module:
            network = nn.Linear(inputs, outputs, bias=False)
            nn.init.zeros_(network.weight)
            return network

    return started(LinearAgent(Fork, **settings))


def score(probabilities: Tensor, action: int) -> Tensor:
    """`d ln pi(a) / d logits` of a softmax."""
    return torch.eye(len(probabilities))[action] - probabilities


def table_of(rollout: Rollout, rows: Tensor) -> Tensor:
    """Sum of `rows (N, T, A)` over the states of a rollout, in the shape of a linear layer's weight `(A, S)`."""
    states = rollout.observations[:, :-1]
    return torch.einsum("nta,nts->as", rows, states)


def test_a2c_gradient_by_hand() -> None:
    """`-A score / M` for the policy, and `2 value_coef (V - R) / M` for the critic, which is in no other gradient."""
    module = linear_agent(A2CAgent, num_envs=2, rollout_steps=6, gae_lambda=0.0, gamma=0.9, value_coef=0.25, seed=0)
    torch.manual_seed(0)
    module.policy.network.weight.data.normal_()
    module.critic.weight.data.normal_()
    rollout = rolled(module)
    loss, metrics = module.loss(rollout)
    loss.backward()
    v = module.critic.weight.detach()[0]
    table = torch.softmax(module.policy.network.weight.detach().T, dim=-1)
    policy_rows, errors = torch.zeros(2, 6, 2), torch.zeros(2, 6, 1)
    for n in range(2):
        for t in range(6):
            state = rollout.observations[n, t].argmax()
            following = 0.0 if rollout.terminated[n, t] else v[rollout.observations[n, t + 1].argmax()]
            errors[n, t] = rollout.rewards[n, t] + 0.9 * following - v[state]
            policy_rows[n, t] = -errors[n, t] * score(table[state], rollout.actions[n, t]) / 12
    torch.testing.assert_close(module.policy.network.weight.grad, table_of(rollout, policy_rows))
    torch.testing.assert_close(module.critic.weight.grad, table_of(rollout, -2 * 0.25 * errors / 12))
    assert metrics["value_loss"].item() == pytest.approx((errors**2).mean().item(), rel=1e-5)


def test_qac_gradients_by_hand() -> None:
    """`-q score / M` for the policy, `-2 (r + gamma q' - q) / M` for the critic, `q'` of the next action."""
    module = linear_agent(QACAgent, num_envs=2, rollout_steps=6, gamma=0.9, seed=0)
    torch.manual_seed(0)
    module.policy.network.weight.data.normal_()
    module.critic.weight.data.normal_()
    rollout = rolled(module)
    state_of_generator = module.generator.get_state()
    last_actions = module.act(rollout.observations[:, -1])
    module.generator.set_state(state_of_generator)
    module.policy_loss(rollout)[0].backward()
    module.critic_loss(rollout).backward()
    q = module.critic.weight.detach().T
    table = torch.softmax(module.policy.network.weight.detach().T, dim=-1)
    actions = torch.cat([rollout.actions, last_actions[:, None]], dim=1)
    policy_rows, critic_rows = torch.zeros(2, 6, 2), torch.zeros(2, 6, 2)
    for n in range(2):
        for t in range(6):
            state, action = rollout.observations[n, t].argmax(), actions[n, t]
            following = q[rollout.observations[n, t + 1].argmax(), actions[n, t + 1]]
            target = rollout.rewards[n, t] + 0.9 * (0.0 if rollout.terminated[n, t] else following)
            policy_rows[n, t] = -q[state, action] * score(table[state], action) / 12
            critic_rows[n, t, action] = -2 * (target - q[state, action]) / 12
    torch.testing.assert_close(module.policy.network.weight.grad, table_of(rollout, policy_rows))
    torch.testing.assert_close(module.critic.weight.grad, table_of(rollout, critic_rows))


def test_qac_takes_the_actions_of_a_box_as_input() -> None:
    module = started(QACAgent("Pendulum-v1", num_envs=2, rollout_steps=3, hidden_sizes=(), seed=0))
    module.critic[0].weight.data = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    q = module.action_values(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0.5]]))
    assert q.tolist() == [11.0]
    assert module.targets(rolled(module), torch.zeros(2, 3)).shape == (2, 3)


def test_off_policy_weights_its_gradient_by_the_ratio() -> None:
    """With lambda 0: `-min(rho, clip) delta score / M` for the policy, targets `V + min(rho, clip) delta`."""
    module = linear_agent(
        OffPolicyACAgent,
        num_envs=2,
        rollout_steps=6,
        gae_lambda=0.0,
        gamma=0.9,
        clip_rho=1.5,
        entropy_coef=0.0,
        seed=0,
    )
    rollout = rolled(module)
    module.remember(rollout)  # the behaviour was uniform: beta = 1/2
    assert module.replay[0].behaviour_logps.exp().unique().tolist() == pytest.approx([0.5])
    torch.manual_seed(0)
    module.policy.network.weight.data.normal_()
    module.critic.weight.data.normal_()
    module.loss(module.replay[0])[0].backward()
    v = module.critic.weight.detach()[0]
    table = torch.softmax(module.policy.network.weight.detach().T, dim=-1)
    policy_rows, critic_rows, ratios = torch.zeros(2, 6, 2), torch.zeros(2, 6, 1), []
    for n in range(2):
        for t in range(6):
            state, action = rollout.observations[n, t].argmax(), rollout.actions[n, t]
            ratios.append(table[state, action].item() / 0.5)
            following = 0.0 if rollout.terminated[n, t] else v[rollout.observations[n, t + 1].argmax()]
            delta = rollout.rewards[n, t] + 0.9 * following - v[state]
            policy_rows[n, t] = -min(ratios[-1], 1.5) * delta * score(table[state], action) / 12
            critic_rows[n, t] = -2 * 0.5 * min(ratios[-1], 1.5) * delta / 12
    assert min(ratios) < 1 and max(ratios) > 1.5, "both sides of the clip are to be seen"
    torch.testing.assert_close(module.policy.network.weight.grad, table_of(rollout, policy_rows))
    torch.testing.assert_close(module.critic.weight.grad, table_of(rollout, critic_rows))


def test_off_policy_is_a2c_on_its_own_rollouts() -> None:
    shared: dict[str, Any] = {"num_envs": 2, "rollout_steps": 20, "gae_lambda": 0.9, "hidden_sizes": (8,), "seed": 0}
    ours = started(OffPolicyACAgent("CartPole-v1", entropy_coef=0.0, **shared))
    a2c = started(A2CAgent("CartPole-v1", **shared))
    assert torch.equal(weights(ours), weights(a2c))
    rollout = rolled(ours)
    logps = ours.behaviour_logps(rollout.observations[:, :-1], rollout.actions).detach()
    ours.loss(Experience(rollout, logps))[0].backward()
    a2c.loss(rollout)[0].backward()
    for mine, other in zip(ours.parameters(), a2c.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_ppo_gradient_by_hand() -> None:
    """On the policy that sampled, the gradient of the plain policy gradient; where the clip binds, none."""
    module = linear_agent(PPOAgent, num_envs=2, rollout_steps=6, normalize_advantages=False, value_coef=0.0, seed=0)
    batch = estimated(module, rolled(module))
    batch = batch._replace(advantages=torch.linspace(-1, 2, 12))
    module.loss(batch)[0].backward()
    rows = torch.stack([score(torch.tensor([0.5, 0.5]), action) for action in batch.actions])
    expected = torch.einsum("ma,ms->as", -batch.advantages[:, None] * rows / 12, batch.observations)
    torch.testing.assert_close(module.policy.network.weight.grad, expected)
    module.policy.network.weight.grad = None
    # A ratio of 2 is clipped where the advantage is positive, of 1/2 where it is negative.
    shift = torch.where(batch.advantages > 0, math.log(2), -math.log(2))
    module.loss(batch._replace(logps=batch.logps - shift))[0].backward()
    assert not module.policy.network.weight.grad.any()


def test_minibatches_are_a_partition() -> None:
    index = torch.arange(10)
    batch = Estimates(index[:, None], index, index, index, index)
    parts = list(batch.minibatches(4, torch.Generator().manual_seed(0)))
    assert [len(part.logps) for part in parts] == [4, 4, 2]
    order = torch.cat([part.logps for part in parts])
    assert not torch.equal(order, index) and torch.equal(order.sort().values, index)
    assert all(torch.equal(part.observations[:, 0], part.advantages) for part in parts)
    assert next(batch.minibatches(10, torch.Generator())) is batch


def test_normalized_advantages_leave_the_returns_alone() -> None:
    shared: dict[str, Any] = {"num_envs": 2, "rollout_steps": 20, "seed": 0}
    plain = started(PPOAgent("CartPole-v1", normalize_advantages=False, **shared))
    rollout = rolled(plain)
    raw = estimated(plain, rollout)
    scaled = estimated(PPOAgent("CartPole-v1", **shared), rollout)
    torch.testing.assert_close(scaled.returns, raw.returns)
    values = plain.values(rollout.observations[:, :-1]).flatten()
    torch.testing.assert_close(raw.returns, raw.advantages + values)
    torch.testing.assert_close(
        scaled.advantages, (raw.advantages - raw.advantages.mean()) / raw.advantages.std(correction=0)
    )


def test_ppo_weighs_the_error_of_its_critic() -> None:
    """`2 value_coef (V - R) / M` per state, with V = 0."""
    module = linear_agent(PPOAgent, num_envs=2, rollout_steps=6, value_coef=0.25, seed=0)
    batch = estimated(module, rolled(module))
    module.loss(batch)[0].backward()
    expected = -2 * 0.25 * batch.returns @ batch.observations / 12
    assert batch.returns.abs().max() > 0.5
    torch.testing.assert_close(module.critic.weight.grad[0], expected)


def test_entropy_bonus_enters_every_loss() -> None:
    """At the uniform policy the entropy is ln 2, and a bonus of 0.5 lowers the loss by half of it."""
    for agent in (A2CAgent, PPOAgent, QACAgent, ReinforceAgent, OffPolicyACAgent):
        losses = []
        for coefficient in (0.0, 0.5):
            module = linear_agent(agent, num_envs=2, rollout_steps=6, entropy_coef=coefficient, seed=0)
            rollout = rolled(module)
            if agent is QACAgent:
                losses.append(module.policy_loss(rollout)[0].item())
            elif agent is OffPolicyACAgent:
                module.remember(rollout)
                losses.append(module.loss(module.replay[0])[0].item())
            else:
                losses.append(module.loss(estimated(module, rollout) if agent is PPOAgent else rollout)[0].item())
        assert losses[0] - losses[1] == pytest.approx(0.5 * math.log(2), rel=1e-4), agent


@pytest.mark.slow
def test_reinforce_gradient_is_the_exact_one_on_average() -> None:
    """Episodes of a tiny MDP: the mean gradient per episode against the policy gradient theorem."""
    module = linear_agent(
        ReinforceAgent,
        num_envs=64,
        rollout_steps=400,
        gamma=0.9,
        normalize_advantages=False,
        discounted_objective=True,
        seed=0,
    )
    logits = torch.tensor([[0.5, -0.5], [0.0, 1.0], [-1.0, 0.3], [0.0, 0.0]])
    module.policy.network.weight.data = logits.T.clone()
    rollout = rolled(module)
    module.loss(rollout)[0].backward()
    episodes = (rollout.ends & rollout.mask).sum()
    estimate = -module.policy.network.weight.grad.T * rollout.mask.sum() / episodes
    start = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    mdp = MDP(Fork.transitions, Fork.rewards, 0.9, start=start)
    exact = policy_gradient(mdp, logits).float()
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(estimate, exact, atol=0.03, rtol=0)
    first = module.returns(rollout)[episode_steps(rollout).eq(0) & rollout.mask].mean()
    assert first.item() == pytest.approx(
        discounted_objective(mdp, torch.softmax(logits.double(), -1)).item(), abs=0.03
    )


# Training.


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_every_parameter_learns_and_runs_repeat(agent: type) -> None:
    """Bit for bit the same whatever was drawn before the run, and another seed gives another run."""
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        np.random.seed(noise)
        module = agent("CartPole-v1", **SMALL)
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        with torch.no_grad():
            module.act(torch.zeros(noise, 4))
        runs.append(fit(module))
    for name, parameter in runs[0].named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert list(runs[0].runner.returns) == list(runs[1].runner.returns)
    assert not torch.equal(weights(runs[0]), weights(fit(agent("CartPole-v1", **(SMALL | {"seed": 4})))))


@pytest.mark.parametrize("agent", AGENTS)
def test_continuous_actions(agent: type) -> None:
    module = fit(agent("Pendulum-v1", normalize_observations=True, **(SMALL | {"total_steps": 64})))
    assert module.runner.steps >= 64 and weights(module).isfinite().all()
    assert module.policy.log_std.shape == (1,)
    if agent is not ReinforceAgent:
        assert module.normalizer.count == 64
    with torch.no_grad():
        assert module.act(torch.zeros(3, 3), deterministic=True).shape == (3, 1)


def test_seed_is_drawn_from_the_global_generator() -> None:
    torch.manual_seed(5)
    first = PPOAgent("CartPole-v1")
    torch.manual_seed(5)
    assert PPOAgent("CartPole-v1").seed == first.seed
    before = torch.get_rng_state()
    with first.seeded():
        one = torch.rand(3)
    with first.seeded():
        two = torch.rand(3)
    # Networks that are built one after the other are not copies, and nobody else's numbers change.
    assert not torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)


def test_an_epoch_is_total_steps() -> None:
    module = fit(PPOAgent("CartPole-v1", **(SMALL | {"total_steps": 161})), max_epochs=None)
    assert module.iteration == 6 and module.runner.steps == 192
    assert module.trainer.global_step == 6 * module.settings.epochs


def test_learning_rate_and_clip_follow_their_schedules() -> None:
    rates: list[tuple[float, float]] = []

    class Watched(PPOAgent):
        def loss(self, batch: Estimates) -> tuple[Tensor, dict[str, Tensor]]:
            assert callable(self.settings.clip_range)
            rates.append((self.optimizer.param_groups[0]["lr"], self.settings.clip_range(self.remaining)))
            return super().loss(batch)

    fit(Watched("CartPole-v1", learning_rate=Linear(0.8, 0.3), clip_range=Linear(0.5), epochs=1, **SMALL))
    # The rate is that of the iteration's beginning, the clip that of the rollout's end.
    expected = [(0.8, 0.4), (0.7, 0.3), (0.6, 0.2), (0.5, 0.1), (0.4, 0.0)]
    assert np.allclose(rates, expected)


def test_qac_trains_its_networks_at_their_own_pace() -> None:
    module = fit(QACAgent("CartPole-v1", critic_updates=3, learning_rate=0.1, critic_learning_rate=0.2, **SMALL))
    assert [optimizer.param_groups[0]["lr"] for optimizer in module.trainer.optimizers] == [0.1, 0.2]
    assert module.trainer.global_step == 5 * (3 + 1)


def test_actions_that_the_old_policy_never_takes_leave_the_losses_finite() -> None:
    """Ratios above e^88 are infinite in float32, and 0 times infinity is no number, whatever bounds the weight."""
    module = started(OffPolicyACAgent("CartPole-v1", **SMALL))
    module.remember(rolled(module))
    rollout, logps = module.replay[0]
    strange = logps.clone()
    strange[0, 0], strange[0, 1] = -200.0, -math.inf
    loss, metrics = module.loss(module.replay[0]._replace(behaviour_logps=strange))
    gradient = torch.autograd.grad(loss, list(module.parameters()))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradient)
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-5)

    trpo = started(TRPOAgent("CartPole-v1", num_envs=1, rollout_steps=20, seed=1))
    batch = estimated(trpo, rolled(trpo))
    strange = batch.logps.clone()
    strange[0] = -200.0
    advantages = batch.advantages.clone()
    advantages[0] = 0.0
    ordinary = trpo.surrogate(batch._replace(advantages=advantages))
    torch.testing.assert_close(trpo.surrogate(batch._replace(logps=strange, advantages=advantages)), ordinary)


def test_a_second_fit_starts_without_old_rollouts() -> None:
    module = OffPolicyACAgent("CartPole-v1", **SMALL)
    assert len(fit(module).replay) == 5 and len(fit(module).replay) == 5
    assert module.iteration == 5 and module.runner.steps == 160


def test_gradients_are_clipped() -> None:
    module = A2CAgent("CartPole-v1", max_grad_norm=0.1, **SMALL)

    class Plain:
        def step(self) -> None:
            pass

    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    module.optimize(sum((p**2).sum() * 50 for p in module.parameters()), Plain(), list(module.parameters()))  # type: ignore[arg-type]
    norm = torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm()  # type: ignore[union-attr]
    assert norm.item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.slow
def test_metrics_and_progress() -> None:
    training = trainer(log_every_n_steps=1, limit_val_batches=1)
    module = PPOAgent("CartPole-v1", eval_episodes=3, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.fit(module)
    metrics = training.callback_metrics
    assert metrics["time/env_steps"] == 160 == training.progress_bar_metrics["time/env_steps"]
    assert metrics["rollout/return_mean"].item() == pytest.approx(np.mean(module.runner.returns))
    assert metrics["rollout/length_mean"] == metrics["rollout/return_mean"]  # CartPole pays 1 a step
    assert {"train/policy_loss", "train/value_loss"} <= set(metrics)
    returns, lengths, _ = module.evaluate(3)
    assert metrics["eval/return_mean"].item() == pytest.approx(returns.mean())
    assert metrics["eval/return_std"].item() == pytest.approx(returns.std())
    assert metrics["eval/length_mean"].item() == pytest.approx(lengths.mean())
    alone = trainer(limit_val_batches=1).validate(module, verbose=False)[0]
    assert alone["eval/return_mean"] == pytest.approx(returns.mean())


def test_evaluation_is_deterministic_and_plays_its_share() -> None:
    """20 episodes on 16 environments: 4 of them play two, and a script ends each after 3 steps."""

    class AllEnd(A2CAgent):
        def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
            assert deterministic
            return torch.ones(len(observations), dtype=torch.long)

    module = AllEnd(Counter)
    state = module.generator.get_state()
    returns, lengths, _ = module.evaluate(20)
    assert returns.tolist() == [6.0] * 20 and lengths.tolist() == [3] * 20
    assert torch.equal(module.generator.get_state(), state)


class Endless(gym.Env):
    """Pays 1 a step and goes on for ever, unless the first action of an episode is 1."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return np.zeros(1, np.float32), 1.0, bool(action == 1 and self.count == 1), False, {}


@pytest.mark.slow
def test_an_evaluation_without_a_time_limit_is_bounded_and_says_so() -> None:
    class Half(A2CAgent):
        def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
            return torch.tensor([0, 1, 0, 0, 0])[: len(observations)]

    with pytest.warns(UserWarning, match="cut off 2 of 3 episodes after 10000 steps: Endless has no time limit"):
        result = Half(Endless).evaluate(3)
    assert result.returns.tolist() == [10_000.0, 1.0, 10_000.0] and result.lengths.tolist() == [10_000, 1, 10_000]
    assert result.cut_off.tolist() == [True, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for needs no warning
        result = Half(Endless, max_episode_steps=7).evaluate(5)
    assert result.lengths.tolist() == [7, 1, 7, 7, 7] and result.cut_off.tolist() == [True, False, True, True, True]
    # A limit of the environment's own is part of the task.
    limited = Half(lambda: gym.wrappers.TimeLimit(Endless(), 12)).evaluate(3)
    assert limited.lengths.tolist() == [12, 1, 12] and not limited.cut_off.any()
    with pytest.raises(ValueError, match="max_episode_steps=0"):
        A2CAgent(Endless, max_episode_steps=0)
    with pytest.raises(ValueError, match="episodes=0"):
        Half(Endless).evaluate(0)


@pytest.mark.slow
@pytest.mark.parametrize("agent", [DQNAgent, *AGENTS], ids=lambda agent: agent.__name__)
def test_training_starts_where_no_episode_need_end(agent: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation before the first step, and whole episodes of REINFORCE."""
    monkeypatch.setattr("rl_plugins.classic.agent._MAX_EPISODE_STEPS", 40)
    settings = SMALL | ({"learning_starts": 16} if agent is DQNAgent else {})
    module = agent("CliffWalking-v1", **settings)
    run = trainer(limit_val_batches=1, num_sanity_val_steps=1, val_check_interval=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module)
    assert module.runner.steps >= 160
    metrics = run.callback_metrics
    lengths = module.evaluate(10).lengths
    assert metrics["eval/cut_off_share"].item() == pytest.approx((lengths == 40).mean())
    assert max(module.runner.lengths, default=0) <= (40 if agent is ReinforceAgent else 160)


def test_reinforce_learns_from_episodes_that_its_bound_cuts_off() -> None:
    class Going(ReinforceAgent):
        def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
            return torch.zeros(len(observations), dtype=torch.long)

    module = fit(Going(Endless, num_envs=2, rollout_steps=4, total_steps=24, max_episode_steps=6))
    assert module.runner.lengths == [6, 6, 6, 6] and module.runner.steps == 24


class ReusingCounter(Counter):
    """Writes all observations into one array."""

    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(2, dtype=np.float32)

    def _observation(self) -> np.ndarray:
        self.array[:] = self.episode, self.count
        return self.array


@pytest.mark.slow
@pytest.mark.parametrize("agent", [DQNAgent, *AGENTS], ids=lambda agent: agent.__name__)
def test_environments_may_reuse_their_arrays(agent: type) -> None:
    settings = SMALL | ({"learning_starts": 16, "gradient_steps": 2} if agent is DQNAgent else {})
    fresh, reusing = (fit(agent(env, **settings)) for env in (Counter, ReusingCounter))
    assert torch.equal(weights(fresh), weights(reusing))
    if agent is DQNAgent:
        rows = reusing.replay.storage
        used = slice(0, len(reusing.replay))
        assert torch.equal(rows.next_observations[used], fresh.replay.storage.next_observations[used])
        # The next state is one step further in the same episode, also where the episode ends.
        assert (rows.next_observations[used] - rows.observations[used]).tolist() == [[0.0, 1.0]] * 160


class ShortOrLong(gym.Env):
    """Episodes of 1 or 60 steps, as likely; pays 1 a step, so that the mean return is 30.5."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 60 if self.np_random.random() < 0.5 else 1
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


@pytest.mark.slow
def test_logged_returns_of_whole_episodes_favour_no_length() -> None:
    """Episodes that rows play while they wait for others are mostly short: the long ones are still running."""
    module = started(ReinforceAgent(ShortOrLong, num_envs=8, rollout_steps=16, hidden_sizes=(4,), seed=0))
    means = []
    for _ in range(150):
        rollout = rolled(module)
        counts = [len(group) for group in module.runner._episodes]
        assert counts[-1] == int((rollout.ends & rollout.mask).sum())  # those that are learned from
        assert sum(counts) >= min(100, counts[-1]) and sum(counts[1:]) < 100
        means.append(np.mean(module.runner.returns))
    # Standard error of the mean of 140 rollouts of about 20 episodes: 29.5 / sqrt(140 * 20) = 0.6.
    assert np.mean(means[10:]) == pytest.approx(30.5, abs=1.5)


# Networks with modes.


class Modes(nn.Module):
    """Counts in which mode it is called, with and without gradient, and has dropout and running statistics."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(inputs, outputs), nn.Dropout(0.5), nn.BatchNorm1d(inputs)
        self.calls: set[tuple[bool, bool]] = set()

    def forward(self, observations: Tensor) -> Tensor:
        self.calls.add((torch.is_grad_enabled(), self.training))
        rows = self.norm(observations.reshape(-1, observations.shape[-1]))
        return self.linear(self.dropout(rows)).reshape(*observations.shape[:-1], -1)


@pytest.mark.slow
@pytest.mark.parametrize("agent", [DQNAgent, *AGENTS], ids=lambda agent: agent.__name__)
def test_networks_act_and_judge_in_evaluation_mode(agent: type) -> None:
    """One environment and one last state: batch statistics of a single row would raise."""

    class Mine(agent):  # type: ignore[misc,valid-type]
        def build_network(self, inputs: int = 4, outputs: int = 2, *, gain: float = 1.0) -> nn.Module:
            return Modes(inputs, outputs)

    settings = SMALL | {"num_envs": 1} | ({"learning_starts": 16, "double_q": True} if agent is DQNAgent else {})
    module = fit(Mine(partial(gym.make, "CartPole-v1", max_episode_steps=9), **settings))
    networks = [part for part in module.modules() if isinstance(part, Modes)]
    learning = [network for network in networks if network is not getattr(module, "target", None)]
    for network in learning:
        is_natural = agent is TRPOAgent and network is module.policy.network
        assert network.calls == ({(True, False)} if is_natural else {(True, True)}) | {(False, False)}
        assert (network.norm.num_batches_tracked == 0) == is_natural
    if agent is DQNAgent:
        assert module.target.calls == {(False, False)}
    assert module.training  # as before
    first, second = module.evaluate(4), module.evaluate(4)
    assert np.array_equal(first.returns, second.returns)  # dropout does nothing
    assert module.training and all(network.training for network in learning)


@pytest.mark.parametrize("tau", [None, 0.5])
def test_the_target_network_copies_running_statistics(tau: float | None) -> None:
    class Mine(DQNAgent):
        def build_network(self, inputs: int, outputs: int, *, gain: float) -> nn.Module:
            return Modes(inputs, outputs)

    settings = {"learning_starts": 16, "target_period": 1, "gradient_steps": 3, "tau": tau}
    module = fit(Mine("CartPole-v1", **(SMALL | settings)))
    ours, theirs = dict(module.network.named_buffers()), dict(module.target.named_buffers())
    assert ours["norm.num_batches_tracked"] == module.updates > 0
    for name, buffer in ours.items():
        assert torch.equal(theirs[name], buffer)
    assert torch.equal(module.network.linear.weight, module.target.linear.weight) == (tau is None)


# Subclasses.


def test_own_network_and_own_loss() -> None:
    class Shared(PPOAgent):
        """Another network, and a loss that leaves the critic alone."""

        def __init__(self, env: Any, *, width: int = 5, **settings: Any) -> None:
            super().__init__(env, **settings)
            self.width = width

        def build_network(self, inputs: int, outputs: int, *, gain: float) -> nn.Module:
            width = self.hparams["width"]
            return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))

        def loss(self, batch: Estimates) -> tuple[Tensor, dict[str, Tensor]]:
            loss = -self.policy(batch.observations).log_prob(batch.actions).mean()
            return loss, {"imitation": loss}

    module = Shared("CartPole-v1", width=7, **SMALL)
    critic = copy.deepcopy(module.critic.state_dict())
    assert module.policy.network[0].out_features == 7  # type: ignore[index,union-attr]
    fit(module)
    assert all(torch.equal(tensor, critic[name]) for name, tensor in module.critic.state_dict().items())
    assert set(module.trainer.callback_metrics) >= {"train/imitation"}


def test_own_exploration() -> None:
    class Greedy(A2CAgent):
        def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
            return super().act(observations, deterministic=True)

    module = fit(Greedy("CartPole-v1", **SMALL))
    again = fit(Greedy("CartPole-v1", **SMALL))
    assert torch.equal(weights(module), weights(again))
    assert torch.equal(module.generator.get_state(), torch.Generator().manual_seed(3).get_state())


# Checkpoints.


def interrupted(agent: type, folder: Path, env: Any = "CartPole-v1", **settings: Any) -> Path:
    """A checkpoint after 2 of 5 iterations."""

    class Stop(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if module.iteration == 2:
                trainer.save_checkpoint(folder / "two.ckpt")
                trainer.should_stop = True

    fit(agent(env, **(SMALL | settings)), callbacks=[Stop()], enable_checkpointing=True, default_root_dir=folder)
    return folder / "two.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_a_resumed_run_equals_an_uninterrupted_one(agent: type, tmp_path: Path) -> None:
    settings = SMALL | {"normalize_observations": True, "learning_rate": Linear(1e-2)}
    path = interrupted(agent, tmp_path, **settings)
    whole, resumed = fit(agent("CartPole-v1", **settings)), fit(agent("CartPole-v1", **settings), ckpt_path=path)
    assert torch.equal(weights(whole), weights(resumed))
    assert resumed.iteration == whole.iteration == 5
    assert resumed.runner.steps == whole.runner.steps
    assert list(whole.runner.returns) == list(resumed.runner.returns)
    assert list(whole.runner.lengths) == list(resumed.runner.lengths)
    assert np.array_equal(whole.runner.observations, resumed.runner.observations)
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())
    assert torch.equal(*(optimizer_state(module) for module in (whole, resumed)))


def optimizer_state(module: Any) -> Tensor:
    states = [state for optimizer in module.trainer.optimizers for state in optimizer.state.values()]
    return torch.cat([tensor.flatten() for state in states for tensor in state.values()])


@pytest.mark.slow
def test_a_checkpoint_gives_the_agent_back(tmp_path: Path) -> None:
    path = interrupted(A2CAgent, tmp_path, learning_rate=Linear(1e-2), hidden_sizes=(6,))
    module = A2CAgent.load_from_checkpoint(path)  # torch.load's safe mode is the default here
    assert (
        module.settings.hidden_sizes == (6,)
        and module.settings.learning_rate == Linear(1e-2)
        and module.env == "CartPole-v1"
    )
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    # It is an agent, not an interrupted run: training it starts at 0.
    assert fit(module).iteration == 5


def test_callables_stay_out_of_a_checkpoint(tmp_path: Path) -> None:
    """torch.load's safe mode would refuse to read them back."""
    path = interrupted(A2CAgent, tmp_path, env=Counter, learning_rate=math.sqrt)
    assert not {"env", "learning_rate"} & set(torch.load(path, weights_only=True)["hyper_parameters"])
    assert A2CAgent.load_from_checkpoint(path, env=Counter).hparams["num_envs"] == 2


def test_an_environment_that_cannot_be_pickled_starts_anew(tmp_path: Path) -> None:
    def make() -> gym.Env:
        env = gym.make("CartPole-v1")
        env.unwrapped.lock = threading.Lock()  # type: ignore[attr-defined]
        return env

    with pytest.warns(UserWarning, match="starts new episodes"):
        module = started(A2CAgent(make, **SMALL))
        module.runner.state_dict()
    path = interrupted(A2CAgent, tmp_path, env=make)
    resumed = fit(A2CAgent(make, **SMALL), ckpt_path=path)
    assert resumed.iteration == 5 and resumed.runner.steps == 160
    with pytest.raises(TypeError, match="env"):
        A2CAgent.load_from_checkpoint(path)
    assert A2CAgent.load_from_checkpoint(path, env=make).iteration == 0


def test_resuming_with_another_architecture(tmp_path: Path) -> None:
    path = interrupted(A2CAgent, tmp_path)
    with pytest.raises(
        ValueError, match=r"policy.network.0.weight: \(8, 4\) in the checkpoint, \(9, 4\) here.*hidden_sizes: .8,. in"
    ):
        fit(A2CAgent("CartPole-v1", **(SMALL | {"hidden_sizes": (9,)})), ckpt_path=path)
    with pytest.raises(ValueError, match=r"normalizer.mean: None in the checkpoint, \(4,\) here"):
        fit(A2CAgent("CartPole-v1", normalize_observations=True, **SMALL), ckpt_path=path)
    with pytest.raises(ValueError, match=r"agent of the checkpoint is A2CAgent, but here it is PPOAgent"):
        fit(PPOAgent("CartPole-v1", **SMALL), ckpt_path=path)
    with pytest.raises(ValueError, match=r"2 environments, this run 3"):
        fit(A2CAgent("CartPole-v1", **(SMALL | {"num_envs": 3})), ckpt_path=path)


def test_resuming_with_another_environment(tmp_path: Path) -> None:
    path = interrupted(A2CAgent, tmp_path)
    with pytest.raises(ValueError, match="environment of the checkpoint is CartPole-v1, but here it is Acrobot-v1"):
        fit(A2CAgent("Acrobot-v1", **SMALL), ckpt_path=path)
    with pytest.raises(ValueError, match="environment of the checkpoint is CartPole-v1, but here it is CartPole-v0"):
        fit(A2CAgent("CartPole-v0", **SMALL), ckpt_path=path)
    with pytest.raises(ValueError, match="observation space of the checkpoint is Box"):
        A2CAgent.load_from_checkpoint(path, env="Acrobot-v1")


def test_other_checkpoints_and_several_processes_are_refused() -> None:
    module: Any = A2CAgent("CartPole-v1", **SMALL)
    with pytest.raises(ValueError, match="not of an agent"):
        module.on_load_checkpoint({"state_dict": {}})
    module._trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="world_size=2.*num_envs"):
        module.on_fit_start()


def test_iterations_resume_in_the_middle() -> None:
    loader = Iterations(5)
    rows = iter(loader)
    assert [next(rows), next(rows)] == [0, 1]
    other = Iterations(5)
    other.load_state_dict(loader.state_dict())
    assert list(other) == [2, 3, 4] and list(other) == [0, 1, 2, 3, 4]
    assert len(other) == 5


def test_linear_schedule() -> None:
    assert [Linear(3.0, 1.0)(remaining) for remaining in (1.0, 0.5, 0.0)] == [3.0, 2.0, 1.0]
    assert pickle.loads(pickle.dumps(Linear(0.1))) == Linear(0.1, 0.0)


def test_distributions_have_the_textbook_entropy() -> None:
    """The two of torch.distributions that the policies give, with the KL that TRPO's region is made of."""
    module = started(TRPOAgent("Pendulum-v1", num_envs=1, seed=0))
    with torch.no_grad():
        distribution = module.policy(torch.zeros(1, 3))
    assert isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal)
    assert distribution.entropy().item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e))
    assert isinstance(TRPOAgent("CartPole-v1").policy(torch.zeros(1, 4)), Categorical)
