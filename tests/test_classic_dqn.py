"""DQN: the replay buffer, its targets and their schedule by hand, exact action values, and resumption to the bit."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from rl_plugins.classic.dqn import DQNAgent
from rl_plugins.classic.replay import ReplayBuffer, Transitions
from rl_plugins.tabular import MDP, action_values, value_iteration

GAMMA = 0.9


class Corridor(gym.Env):
    """Six cells, 1 to 6, and steps to the left (0) and to the right (1). Leaving pays 0.7 in 0, and 1 in 7.

    At a discount of 0.9 only cell 1 is better left through 0, since 0.9^5 < 0.7, and 0.9^4 > 0.9 * 0.7 in cell 2.
    """

    observation_space = gym.spaces.Discrete(8)  # 0 and 7 are outside
    action_space = gym.spaces.Discrete(2)
    initial_state_distrib = np.array([0, 0, 0, 1.0, 0, 0, 0, 0])

    def __init__(self) -> None:
        def outcome(state: int, action: int) -> tuple[float, int, float, bool]:
            to = state + (1 if action else -1)
            return 1.0, to, {0: 0.7, 7: 1.0}.get(to, 0.0), to in (0, 7)

        self.P = {s: {a: [outcome(s, a)] for a in (0, 1)} for s in range(1, 7)}
        self.P |= {s: {a: [(1.0, s, 0.0, True)] for a in (0, 1)} for s in (0, 7)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = 3
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        ((_, self.state, reward, terminated),) = self.P[self.state][int(action)]
        return self.state, reward, terminated, False, {}


def corridor(limit: int) -> Callable[[], gym.Env]:
    return lambda: gym.wrappers.TimeLimit(Corridor(), limit)


def fit(module: DQNAgent, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
    )
    trainer.fit(module, **options)
    return trainer


def numbered(*numbers: int) -> Transitions:
    """Transitions all of whose fields tell the number."""
    n = torch.tensor(numbers)
    return Transitions(n[:, None].float(), n, n.double() / 2, n[:, None].float() + 1, n % 2 == 0)


# The buffer


def test_ring_keeps_the_newest_in_the_right_rows() -> None:
    buffer = ReplayBuffer(5, 1)
    for size, rows in [((0, 1, 2), [0, 1, 2, 0, 0]), ((3, 4, 5, 6), [5, 6, 2, 3, 4]), ((7,), [5, 6, 7, 3, 4])]:
        buffer.add(numbered(*size))
        assert buffer.storage.actions.tolist() == rows
    assert (len(buffer), buffer.added) == (5, 8)
    expected = numbered(5, 6, 7, 3, 4)
    for stored, new in zip(buffer.storage, expected, strict=True):
        assert torch.equal(stored, new.to(stored))
    assert [x.dtype for x in buffer.storage] == [torch.float32, torch.int64, torch.float32, torch.float32, torch.bool]


def test_draws_are_uniform_over_what_is_stored_and_keep_rows_together() -> None:
    buffer = ReplayBuffer(20, 1, seed=3)
    buffer.add(numbered(*range(10)))
    draws = buffer.sample(20_000)
    counts = draws.actions.bincount(minlength=20)
    assert counts[10:].sum() == 0, "rows that are still empty"
    chi_square = ((counts[:10] - 2000.0) ** 2 / 2000.0).sum()
    assert 0.5 < chi_square < 27.9, "the 0.1 % point of 9 degrees of freedom"
    for drawn, expected in zip(draws, numbered(*draws.actions.tolist()), strict=True):
        assert torch.equal(drawn, expected.to(drawn))
    buffer.add(numbered(*range(10, 30)))
    assert set(buffer.sample(2000).actions.tolist()) == set(range(10, 30)), "the overwritten ones are gone"


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one transition"):
        ReplayBuffer(0, 1)
    buffer = ReplayBuffer(2, 1)
    with pytest.raises(ValueError, match="buffer is empty"):
        buffer.sample(1)
    with pytest.raises(ValueError, match="3 transitions at once do not fit into a buffer of 2"):
        buffer.add(numbered(1, 2, 3))
    state = buffer.state_dict()
    for other in (ReplayBuffer(3, 1), ReplayBuffer(2, 4)):
        with pytest.raises(ValueError, match="same settings"):
            other.load_state_dict(state)


def test_restored_buffer_goes_on_with_the_same_draws() -> None:
    buffer, other = ReplayBuffer(1000, 1, seed=1), ReplayBuffer(1000, 1, seed=2)
    buffer.add(numbered(*range(7)))
    buffer.sample(5)
    state = buffer.state_dict()
    assert state["rows"]["observations"].untyped_storage().nbytes() == 7 * 4, "only the rows in use are saved"
    other.load_state_dict(copy.deepcopy(state))
    for each in (buffer, other):
        each.add(numbered(7, 8))
    assert torch.equal(buffer.sample(50).actions, other.sample(50).actions)
    assert torch.equal(buffer.storage.actions, other.storage.actions)


# Collecting


class Rightwards(DQNAgent):
    """Always goes right, in training too."""

    def act(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        return torch.ones(len(observations), dtype=torch.long)


@pytest.mark.slow
def test_time_limits_are_not_terminations_and_lead_to_the_real_last_state() -> None:
    """From cell 3 rightwards: a limit of 2 cuts at 5, one of 4 lets it leave into 7."""
    for limit, states, ends in [(2, [(3, 4), (4, 5)], [0, 0]), (4, [(3, 4), (4, 5), (5, 6), (6, 7)], [0, 0, 0, 1])]:
        module = Rightwards(
            corridor(limit), rollout_steps=2 * limit, num_envs=2, total_steps=4 * limit, learning_starts=0, seed=0
        )
        fit(module)
        stored = module.replay.storage
        seen = [pair for pair in states * 2 for _ in range(2)]  # two episodes, two environments in turns
        pairs = zip(stored.observations.argmax(1).tolist(), stored.next_observations.argmax(1).tolist(), strict=True)
        assert list(pairs)[: len(module.replay)] == seen
        terminated = [bool(end) for end in ends * 2 for _ in range(2)]
        assert stored.terminated[: len(module.replay)].tolist() == terminated
        assert stored.rewards[: len(module.replay)].tolist() == [float(end) for end in terminated]


@pytest.mark.slow
def test_random_until_learning_starts_then_epsilon_falls_in_a_line() -> None:
    module = DQNAgent(
        corridor(9),
        total_steps=1000,
        gradient_steps=1,
        learning_starts=100,
        epsilon_end=0.2,
        exploration_fraction=0.4,
        seed=0,
    )
    fit(module)
    expected = {0: 1.0, 99: 1.0, 100: 0.8, 200: 0.6, 399: 0.202, 400: 0.2, 1000: 0.2, 2000: 0.2}
    for steps, epsilon in expected.items():
        module.runner.steps = steps
        assert module.epsilon == pytest.approx(epsilon, abs=1e-9), steps
    module.settings = replace(module.settings, exploration_fraction=0.0)
    assert module.epsilon == 0.2


@pytest.mark.slow
def test_share_of_random_actions() -> None:
    """With 2 actions, half of the random ones are the best one."""
    module = DQNAgent(corridor(9), total_steps=512, gradient_steps=9, learning_starts=0, epsilon_end=0.3, seed=0)
    fit(module)
    observations = torch.eye(8)[torch.randint(8, (20_000,), generator=torch.Generator().manual_seed(0))]
    best = module.act(observations, deterministic=True)
    assert set(best.tolist()) == {0, 1}
    different = (module.act(observations) != best).float().mean().item()
    assert different == pytest.approx(0.15, abs=0.0076), "three standard errors"


def test_no_update_before_learning_starts() -> None:
    """After 10 and 20 steps none, after 30 the first ones."""
    settings: dict[str, Any] = {"rollout_steps": 10, "gradient_steps": 7, "learning_starts": 20, "seed": 0}
    module = Recorded(corridor(9), total_steps=30, **settings)
    initial = copy.deepcopy(module.state_dict())
    fit(module)
    assert module.updates == 7 and len(module.replay) == 30
    assert all(torch.equal(initial[f"target.{name}"], weight) for name, weight in module.moves[0][1].items())
    fit(module)
    assert module.updates == 7 and len(module.replay) == 30, "another fit counts anew, and forgets"
    with pytest.raises(ValueError, match="learning_starts=20 with total_steps=20: nothing would be learned"):
        DQNAgent(corridor(9), total_steps=20, **settings)


# Targets


def table(*rows: list[float]) -> nn.Linear:
    """A network that looks one-hot observations up."""
    linear = nn.Linear(len(rows), len(rows[0]), bias=False)
    linear.weight.data = torch.tensor(rows).T.contiguous()
    return linear


STEPS = Transitions(
    observations=torch.eye(3)[[0, 1, 2]],
    actions=torch.tensor([1, 0, 1]),
    rewards=torch.tensor([1.0, 2.0, 4.0]),
    next_observations=torch.eye(3)[[1, 2, 0]],
    terminated=torch.tensor([False, False, True]),  # the second is cut by a time limit, the third has an end
)


def targets_and_loss(**settings: Any) -> tuple[list[float], float, nn.Linear]:
    module = DQNAgent(corridor(9), gamma=0.5, **settings)
    module.network = table([0.0, 3.0], [5.0, 8.0], [7.0, 4.0])
    module.target = table([9.0, 9.0], [16.0, 2.0], [6.0, 32.0])
    targets = module.targets(STEPS)
    assert not targets.requires_grad
    values = module.network(STEPS.observations).gather(1, STEPS.actions[:, None]).squeeze(1)
    loss = module.loss(values, targets)
    loss.backward()
    return targets.tolist(), loss.item(), module.network


def test_targets_by_hand() -> None:
    """Y = (1 + max(16, 2) / 2, 2 + max(6, 32) / 2, 4); values 3, 5, 4: Huber of -6, -13, 0 is 5.5, 12.5, 0."""
    targets, loss, network = targets_and_loss()
    assert targets == [9.0, 18.0, 4.0]
    assert loss == pytest.approx(6.0)
    assert network.weight.grad.T.tolist() == pytest.approx(np.array([[0, -1 / 3], [-1 / 3, 0], [0, 0]]), abs=1e-6), (
        "slope -1 beyond the bend, a mean of 3, and none through the targets"
    )


def test_double_q_targets_by_hand() -> None:
    """The network prefers action 1 in state 1 and action 0 in state 2, which the target puts at 2 and 6."""
    assert targets_and_loss(double_q=True)[0] == [2.0, 5.0, 4.0]


class Recorded(DQNAgent):
    """Remembers both networks before and after every move of the target."""

    def update_target(self) -> None:
        before = copy.deepcopy(self.target.state_dict())
        super().update_target()
        online, after = copy.deepcopy(self.network.state_dict()), copy.deepcopy(self.target.state_dict())
        self.moves = [*getattr(self, "moves", []), (self.updates, before, online, after)]


def recorded(**settings: Any) -> list[tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]:
    module = Recorded(
        *(corridor(9),), rollout_steps=8, gradient_steps=4, learning_starts=0, total_steps=24, seed=0, **settings
    )
    fit(module)
    assert [step for step, *_ in module.moves] == list(range(1, 13))
    return module.moves


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_target_is_copied_every_period_and_still_in_between() -> None:
    """The period counts updates, over the end of an iteration: 4 updates each, a copy every 3."""
    moves = recorded(target_period=3)
    for step, before, online, after in moves:
        assert same(after, online if step % 3 == 0 else before), step
        assert not same(before, online), "the network moves at every update"
    for (_, _, _, after), (_, before, _, _) in zip(moves, moves[1:], strict=False):
        assert same(after, before), "nothing else moves the target"


def test_polyak_target_moves_its_share_at_every_update() -> None:
    for _, before, online, after in recorded(tau=0.25, target_period=3):
        for name in before:
            torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * online[name])


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"double_q": True}, {"tau": 0.05}], ids=["copied", "double", "polyak"])
def test_a_table_of_values_becomes_the_exact_one(settings: dict[str, Any]) -> None:
    """A linear network on one-hot states, random actions, episodes cut after 5 steps: the exact q* all the same."""
    module = DQNAgent(
        corridor(5),
        rollout_steps=64,
        num_envs=4,
        total_steps=2560,
        gradient_steps=64,
        target_period=32,
        learning_starts=0,
        epsilon_end=1.0,
        hidden_sizes=(),
        learning_rate=0.03,
        gamma=GAMMA,
        seed=1,
        **settings,
    )
    fit(module)
    mdp = MDP.from_gymnasium(Corridor(), GAMMA)
    exact = action_values(mdp, value_iteration(mdp).values)[1:7]
    learned = module.network(torch.eye(8))[1:7]
    torch.testing.assert_close(learned.double(), exact, atol=2e-3, rtol=0)
    assert exact.argmax(1).tolist() == [0, 1, 1, 1, 1, 1]


class OwnNetwork(DQNAgent):
    """Another network, another loss and another exploration."""

    def build_network(self, inputs: int, outputs: int, *, gain: float) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 3), nn.Tanh(), nn.Linear(3, outputs))

    def loss(self, values: Tensor, targets: Tensor) -> Tensor:
        return 0 * (values - targets).sum()

    @property
    def epsilon(self) -> float:
        return 0.0


@pytest.mark.slow
def test_network_loss_and_exploration_can_be_replaced() -> None:
    module = OwnNetwork(corridor(9), total_steps=64, rollout_steps=32, learning_starts=0, seed=0)
    before = copy.deepcopy(module.state_dict())
    fit(module)
    assert same(before, module.state_dict()), "Adam with a gradient of 0"
    states = module.replay.storage.observations[:64]
    assert torch.equal(module.replay.storage.actions[:64], module.act(states, deterministic=True))


# Reproducibility and checkpoints


def small(env: Any = "CartPole-v1", seed: int | None = 5, **settings: Any) -> DQNAgent:
    options = {"rollout_steps": 50, "gradient_steps": 8, "learning_starts": 60, "total_steps": 400, **settings}
    return DQNAgent(env, num_envs=2, buffer_size=250, target_period=5, hidden_sizes=(16,), seed=seed, **options)


class SaveAt(Callback):
    """Saves a checkpoint after one iteration."""

    def __init__(self, iteration: int, path: Path) -> None:
        self.iteration, self.path = iteration, path

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.iteration:
            trainer.save_checkpoint(self.path)


@pytest.mark.slow
def test_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    """The buffer has wrapped and an episode is under way when the checkpoint is taken."""
    whole, saved, resumed = small(), small(), small()
    fit(whole)
    torch.manual_seed(77)  # what was drawn elsewhere does not matter
    fit(saved, SaveAt(3, tmp_path / "a.ckpt"))
    assert same(whole.state_dict(), saved.state_dict()) and whole.replay.added == 400

    fit(resumed, ckpt_path=str(tmp_path / "a.ckpt"))
    assert same(whole.state_dict(), resumed.state_dict())
    for mine, theirs in zip(whole.replay.storage, resumed.replay.storage, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(whole.replay.sample(9).actions, resumed.replay.sample(9).actions)
    assert (whole.updates, whole.runner.steps) == (resumed.updates, resumed.runner.steps) == (32, 400)
    assert list(whole.runner.returns) == list(resumed.runner.returns)


def test_checkpoint_can_be_loaded_to_act(tmp_path: Path) -> None:
    module = small()
    fit(module, SaveAt(4, tmp_path / "a.ckpt"))
    loaded = DQNAgent.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.settings.hidden_sizes == (16,) and same(module.state_dict(), loaded.state_dict())
    assert np.array_equal(module.evaluate(5).returns, loaded.evaluate(5).returns)


def test_resuming_with_another_buffer_is_an_error(tmp_path: Path) -> None:
    fit(small(), SaveAt(2, tmp_path / "a.ckpt"))
    other = small()
    other.settings = replace(other.settings, buffer_size=300)
    with pytest.raises(ValueError, match="holds 250 transitions .* this one 300"):
        fit(other, ckpt_path=str(tmp_path / "a.ckpt"))


def test_seeds_differ() -> None:
    one, other = small(seed=1), small(seed=2)
    assert not same(one.state_dict(), other.state_dict())


# Errors


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ("Pendulum-v1", {}, r"Pendulum-v1 has the action space Box.*Discrete actions only"),
        ("CartPole-v1", {"rollout_steps": 0}, "rollout_steps=0: give at least 1"),
        ("CartPole-v1", {"gradient_steps": 0}, "gradient_steps=0"),
        ("CartPole-v1", {"target_period": 0}, "target_period=0"),
        ("CartPole-v1", {"tau": 0.0}, "tau=0.0: give a share"),
        ("CartPole-v1", {"epsilon_end": 1.5}, "epsilon_end=1.5: give a share"),
        ("CartPole-v1", {"num_envs": 2, "buffer_size": 400}, r"buffer_size=400 .* rollout_steps \* num_envs = 512"),
    ],
)
def test_mistakes_are_told_before_any_work(env: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DQNAgent(env, **settings)


@pytest.mark.slow
def test_cartpole() -> None:
    """A third of the usual steps: the pole stands for 200 steps or more on average."""
    module = DQNAgent("CartPole-v1", total_steps=15_000, seed=0)
    fit(module)
    returns = module.evaluate(20).returns
    assert returns.mean() >= 195
