"""Rewards of steps in both hosts: a list with everything at the last token is the number, rewards by hand reach the
critic where they were paid, and episodes that were cut are worth what would follow."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from rl_plugins.functional import batch_normalized, discounted_returns, process_normalized
from rl_plugins.lightning import PPOModule, PromptDataModule
from rl_plugins.nn import base_model_of
from rl_plugins.rollouts import Completions, TokenRewards, rewards_per
from rl_plugins.rollouts.batch import Batch, loss_mask
from rl_plugins.rollouts.completions import pad_left
from rl_plugins.rollouts.step_rewards import Completed, StepRewards
from rl_plugins.signals import CriticSignal, GroupSignal, OnlineValueOptions, VariantOptions, critic_targets
from rl_plugins.signals.critics import Critic, Values
from rl_plugins.signals.scores import pay
from rl_plugins.trl import EpisodeRollouts, PPOTrainer

from .helpers.host_pairs import (
    GROUPS,
    HOSTS,
    QUIET,
    Make,
    assert_batches_agree,
    attach_trainer,
    hash_of,
    pair_factory,
    rollout_func,
    rollouts,
    save_start,
    scripted,
)
from .helpers.lightning_runs import LORA, Numbers, every_step, fit, perturb

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
NAN = math.nan


@pytest.fixture(scope="session")
def start(tiny_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_start(tiny_model, tokenizer, tmp_path_factory.mktemp("start"))


@pytest.fixture
def make(start: str, dataset: Dataset, reward: Any, tmp_path: Path) -> Make:
    return pair_factory(start, dataset, reward, tmp_path)


# A list with everything at the last token


def some(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """No reward, an infinite one, or a number."""
    return [[None, math.inf, 0.1, 1.0, 0.7][sum(ids) % 5] for ids in completion_ids]


def shares(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Shares of odd tokens, which no float holds exactly."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def at_the_end(func: Callable[..., Any], before: float | None) -> Callable[..., Any]:
    """A function that pays what another one does at the last token, and `before` at those before."""

    def listed(completion_ids: list[list[int]], **columns: Any) -> list[list[float | None] | None]:
        rewards = func(completion_ids=completion_ids, **columns)
        return [
            None if reward is None else [*[before] * (len(ids) - 1), reward]
            for ids, reward in zip(completion_ids, rewards, strict=True)
        ]

    listed.__name__ = func.__name__
    return listed


SCALARS = [some, shares]
LISTS = [at_the_end(some, None), at_the_end(shares, 0.0)]
LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "critic": ("critic", {"policy_loss": "dapo"}),
    "critic_kl": ("critic", {"beta": 0.1, "kl_in_reward": True, "num_iterations": 2, "policy_loss": "dapo"}),
    "ppo": ("ppo", {"beta": 0.1, "trl": {"policy_loss": "ppo_clip"}}),
    "group_normalized": ("grpo", {"advantage": "group_normalized", "policy_loss": "dapo"}),
    "batch_normalized": (
        "grpo",
        {"advantage": "batch_normalized", "beta": 0.1, "kl_in_reward": True, "policy_loss": "ppo_clip"},
    ),
    "reward_to_go": ("grpo", {"advantage": "reward_to_go", "policy_loss": "dapo"}),
    "value_tracker": ("grpo", {"advantage": "value_tracker", "num_generations": 1, "policy_loss": "dapo"}),
    "lambda_trace": ("grpo", {"advantage": "lambda_trace", "policy_loss": "dapo"}),
    "plain": ("plain", {}),
}


def run(make: Make, name: str, functions: Sequence[Any]) -> list[tuple[dict[str, Tensor], Any, list[Any]]]:
    """Movement of the weights, last rollout and logs of four steps, of both hosts."""
    host, options = LEARNERS[name]
    group = options.get("num_generations", 4 if host in ("grpo", "plain") else 1)
    trainer, module = make(
        host, prompts=8 // group, reward_funcs=list(functions), reward_weights=[0.3, 0.5], attached=False,
        **{**options, "trl": {"max_steps": 4, **options.get("trl", {})}},
    )  # fmt: skip
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    torch.manual_seed(3)
    trainer.train()
    numbers = Numbers()
    torch.manual_seed(3)
    data = PromptDataModule(trainer.train_dataset, batch_size=8 // group, shuffle=False)
    fit(module, data, numbers, max_steps=4)
    moved = [{key: p.detach() - before[key] for key, p in host.model.named_parameters()} for host in (trainer, module)]
    return [
        (moved[0], trainer.last_rollout, trainer.state.log_history),
        (moved[1], module.last_rollout, numbers.rows),
    ]


def same(ours: Any, theirs: Any) -> bool:
    """Equal to the bit; NaN equals NaN."""
    if isinstance(ours, Tensor):
        return torch.equal(ours.nan_to_num(nan=-123.0), theirs.nan_to_num(nan=-123.0))
    return ours == theirs or (ours != ours and theirs != theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_everything_at_the_last_token_is_the_number(make: Make, name: str) -> None:
    for ours, theirs in zip(run(make, name, LISTS), run(make, name, SCALARS), strict=True):
        assert all(change.any() for change in theirs[0].values())
        assert all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0])
        assert ours[1].keys() == theirs[1].keys() >= {"rewards", "paid", "scores", "advantages"}
        for key in theirs[1].keys() - {"paid"}:  # a step worth 0 is a step
            assert same(ours[1][key], theirs[1][key]), key
        assert len(ours[2]) == len(theirs[2]) >= 4
        for row, other in zip(ours[2], theirs[2], strict=True):
            new = {key for key in row if key.startswith("step_rewards/")}
            timed = {key for key in row if key.startswith(("step_time", "train_"))}
            assert row.keys() - new == other.keys() and (timed or len(new) == 2)
            for key in other.keys() - timed:
                assert same(row[key], other[key]), key
        assert ours[1]["scores"].isfinite().any()
    assert not any(key.startswith("step_rewards/") for row in theirs[2] for key in row)


# Rewards by hand


class Episode(SimpleNamespace):
    """A completion that is there already: its tokens, which of them are the policy's, and rewards of its turns."""

    ids: list[int]
    own: list[int]
    turns: list[float | None] | None
    rewards: list[float]


EPISODES = [
    Episode(ids=[4, 5, 9, 9, 6, 1], own=[1, 1, 0, 0, 1, 1], turns=[1.0, -0.5], rewards=[0, 1, 0, 0, 0, -0.5]),
    Episode(ids=[7, 3, 8], own=[1, 1, 1], turns=[2.0], rewards=[0, 0, 2]),
    Episode(
        ids=[5, 8, 8, 6, 9, 2, 1],
        own=[1, 0, 0, 1, 0, 1, 1],
        turns=[0.25, None, 1.5],
        rewards=[0.25, 0, 0, 0, 0, 0, 1.5],
    ),
    Episode(ids=[2, 3, 1], own=[1, 1, 1], turns=None, rewards=[0, 0, 0]),
]
WIDTH = max(len(episode.ids) for episode in EPISODES)


def padded(rows: list[list[Any]], fill: Any = 0) -> Tensor:
    return torch.tensor([[*row, *[fill] * (WIDTH - len(row))] for row in rows])


REWARDS = padded([[float(x) for x in episode.rewards] for episode in EPISODES], 0.0)
OWN = padded([episode.own for episode in EPISODES])


def of(ids: list[int]) -> Episode:
    return next(episode for episode in EPISODES if episode.ids == list(ids))


@rewards_per("turn")
def per_turn(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    return [of(ids).turns for ids in completion_ids]


def per_token(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    return [None if of(ids).turns is None else of(ids).rewards for ids in completion_ids]


def played(prompts: list[str], trainer: Any, **columns: Any) -> dict[str, Any]:
    """A rollout function of TRL."""
    return {
        "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
        "completion_ids": [episode.ids for episode in EPISODES],
        "env_mask": [episode.own for episode in EPISODES],
        "logprobs": None,
        **columns,
    }


def playing(cls: Any, *, earned: bool = False, scored: bool = False, truncated: list[bool] | None = None) -> Any:
    """A module with the same rollouts, whose environment pays, or which scores tokens."""
    unpaid = padded([[NAN if episode.turns is None else x for x in episode.rewards] for episode in EPISODES], NAN)

    class Plays(cls):
        def generate(self, prompts: Any) -> Completions:
            prompt_ids, prompt_mask = pad_left(self.tokenizer(text=list(prompts))["input_ids"], 0, "cpu")
            return Completions(
                prompt_ids,
                prompt_mask,
                padded([episode.ids for episode in EPISODES]),
                padded([[1] * len(episode.ids) for episode in EPISODES]),
                torch.tensor([episode.ids[-1] == 1 for episode in EPISODES]),
                tool_mask=padded([episode.own for episode in EPISODES], 1),
                rewards=unpaid if earned else None,
                truncated=None if truncated is None else torch.tensor(truncated),
            )

        def score(self, rows: Any, completions: Completions) -> Any:
            return TokenRewards(unpaid) if scored else super().score(rows, completions)

    return Plays


def pair(make: Make, name: str, functions: Any, **options: Any) -> tuple[Any, Any]:
    """Trainer and module with these rollouts, and targets of their own values."""
    trl, rollout = options.pop("trl", {}), options.pop("rollout_func", played)
    own = {key: options.pop(key) for key in ("earned", "scored", "truncated") if key in options}
    cls = playing(HOSTS[name][2], **own)
    options = {"max_completion_length": 8, "advantage_scaling": "none", "calibrate_values": False, **options}
    trainer, module = make(
        name, prompts=4, reward_funcs=functions, given={"rollout_func": rollout}, cls=cls, trl=trl, attached=False,
        **options,
    )  # fmt: skip
    attach_trainer(module)
    if name == "critic":
        module.polyak_target.load_state_dict(trainer.polyak_target.state_dict())
    return trainer, module


ESTIMATES: dict[str, dict[str, Any]] = {
    "gae": {"gamma": 0.9, "lam_policy": 0.7, "lam_value": 0.8},
    "turns": {"gamma": 0.9, "lam_policy": 0.7, "time_unit": "turn"},
    "td": {"advantage_estimator": "td"},
    "mc": {"advantage_estimator": "mc", "gamma": 0.5, "time_unit": "turn"},
}


def expected(batch: Any, rewards: Tensor, mask: Tensor, options: dict[str, Any], after: Tensor | None = None) -> Any:
    """Targets of rewards by hand, with the recorded values, which are the slow ones, too."""
    names = {"advantage_estimator": "estimator"}
    values = batch["old_values"]
    return critic_targets(
        rewards, values, values, mask, after=after, **{names.get(key, key): x for key, x in options.items()}
    )


def assert_targets(batch: Any, rewards: Tensor, mask: Tensor, options: dict[str, Any]) -> None:
    targets = expected(batch, rewards, mask, options)
    for key in ("advantages", "returns", "td_errors"):
        torch.testing.assert_close(batch[key], getattr(targets, key), rtol=1e-6, atol=1e-6, msg=key)
    assert torch.equal(batch["critic_mask"], mask.bool())


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("name", ["critic", "ppo"])
def test_rewards_by_hand_reach_the_critic(make: Make, dataset: Dataset, name: str, estimate: str) -> None:
    options = {"beta": 0.0, **ESTIMATES[estimate]}
    function = per_turn if estimate in ("gae", "mc") else per_token
    trainer, module = pair(make, name, function, trl={"policy_loss": "dapo"}, **options)
    theirs, ours, metrics = rollouts(trainer, module, dataset, 4)
    scored = OWN * torch.tensor([1, 1, 1, 0])[:, None]  # the last one has no reward
    for batch in (trainer.last_rollout, module.last_rollout):
        assert torch.equal(batch["rewards"], REWARDS)
        assert batch["scores"].nan_to_num(9.0).tolist() == [0.5, 2.0, 1.75, 9.0]
        assert_targets(batch, REWARDS, scored, ESTIMATES[estimate])
    for key in ("advantages", "returns", "old_values", "td_errors"):
        torch.testing.assert_close(ours[key][OWN.bool()], theirs[key][OWN.bool()], rtol=1e-6, atol=1e-6)
    # (1 - 0.5), 2 and (0.25 + 1.5) over three; five tokens are paid; 1 and 0.25 of 5.25 before the end.
    for number in (metrics, {key: x[-1] for key, x in trainer._metrics["train"].items()}):
        assert float(number[f"rewards/{function.__name__}/mean"]) == pytest.approx((0.5 + 2.0 + 1.75) / 3)
        paid = 5 if function is per_turn else 6 + 3 + 7 - 5  # at the policy's tokens
        assert float(number["step_rewards/per_completion"]) == pytest.approx(paid / 4)
        assert float(number["step_rewards/before_end"]) == pytest.approx(1.25 / 5.25)


WAYS: dict[str, dict[str, Any]] = {
    "environment": {"earned": True},
    "scored": {"scored": True},
    "both": {"earned": True, "scored": True},
    "mixed": {"earned": True, "functions": [shares, per_turn], "reward_weights": [0.5, 3.0]},
}


@pytest.mark.parametrize("way", WAYS)
def test_rewards_of_a_rollout_of_ones_own_in_lightning(make: Make, dataset: Dataset, way: str) -> None:
    options = dict(WAYS[way])
    _, module = pair(make, "critic", options.pop("functions", per_turn), policy_loss="dapo", **options)
    batch, metrics = module.rollout([dict(dataset[i]) for i in range(8, 12)])
    batch = module.last_rollout
    factor = {"environment": 2.0, "scored": 1.0, "both": 2.0, "mixed": 4.0}[way]
    hand, scored = factor * REWARDS, torch.tensor([1, 1, 1, int(way == "mixed")])
    if way == "mixed":
        for row, last in enumerate((5, 2, 6, 2)):
            hand[row, last] += 0.5 * shares([EPISODES[row].ids])[0]
        assert float(metrics["rewards/environment/mean"]) == pytest.approx(4.25 / 3)
    torch.testing.assert_close(batch["rewards"], hand)
    assert_targets(batch, hand, OWN * scored[:, None], {})


@pytest.mark.parametrize("columns", [1, 2])
def test_an_overridden_score_beside_an_environment_that_pays(make: Make, dataset: Dataset, columns: int) -> None:
    """A number for each completion and the environment's rewards add up, each under a name of its own."""
    plays = playing(HOSTS["critic"][2], earned=True)

    class Scores(plays):
        def score(self, rows: Any, completions: Completions) -> Tensor:
            return torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].repeat(1, columns)

    _, module = make("critic", cls=Scores, attached=False, lightning={"reward_funcs": None}, max_completion_length=8)
    attach_trainer(module)
    _, metrics = module.rollout([dict(dataset[i]) for i in range(8, 12)])
    hand = REWARDS.clone()
    hand[range(4), [5, 2, 6, 2]] += columns * torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(module.last_rollout["rewards"], hand)
    torch.testing.assert_close(module.last_rollout["scores"], hand.sum(1))
    for name in ["score"] if columns == 1 else ["score_1", "score_2"]:
        assert float(metrics[f"rewards/{name}/mean"]) == 2.5
    assert float(metrics["rewards/environment/mean"]) == pytest.approx(4.25 / 3)


@pytest.mark.slow
def test_gdpo_works_on_sums(make: Make, dataset: Dataset) -> None:
    """TRL's own advantage of several rewards, without one of ours."""
    seen = []
    with pytest.raises(
        ValueError, match=r"'normalize_then_sum' \(GDPO\) is an advantage of TRL's own.* would take its"
    ):
        make("plain", trl={"multi_objective_aggregation": "normalize_then_sum"}, given={"signal": GroupSignal(GROUPS)})
    for functions in ([per_odd_token, shares], [number_odd, shares]):
        trainer, _ = make("grpo", reward_funcs=functions, trl={"multi_objective_aggregation": "normalize_then_sum"})
        torch.manual_seed(7)
        seen.append(trainer._generate_and_score_completions([dict(dataset[8 + i // 4]) for i in range(16)]))
    assert torch.equal(seen[0]["advantages"], seen[1]["advantages"]) and seen[0]["advantages"].any()


@pytest.mark.parametrize("name", ["critic", "ppo"])
def test_kl_penalty_on_length_and_masks_come_on_top(make: Make, dataset: Dataset, name: str) -> None:
    options = {"beta": 0.2, "kl_in_reward": True, "overlong_shaping": True, "overlong_cache": 4}
    trainer, module = pair(
        make, name, per_turn, trl={"policy_loss": "dapo"}, mask_truncated_completions=True, **options
    )
    rollouts(trainer, module, dataset, 4)
    hand, mask = REWARDS.clone(), OWN.clone()
    hand[0, 5] -= 2 / 4  # six tokens, two beyond 8 - 4
    hand[2, 6] -= 3 / 4
    mask[1], mask[3] = 0, 0  # without an end, and without a reward
    for batch in (trainer.last_rollout, module.last_rollout):
        assert batch["completion_mask"][1].sum() == 0
        kl = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
        assert kl[mask.bool()].abs().min() > 0
        lambdas = {"lam_policy": 0.95 if name == "ppo" else 1.0}
        assert_targets(batch, torch.where(mask.bool(), hand - 0.2 * kl, 0.0), mask, lambdas)


@pytest.mark.parametrize("name", ["critic", "grpo"])
def test_metrics_say_where_rewards_fall_and_how_often_steps_end(make: Make, dataset: Dataset, name: str) -> None:
    @rewards_per("step", separator="7")
    def steps(completion_ids: list[list[int]], **_: Any) -> list[Any]:
        # Token 9 is the text "7": "23[77]4", "516", "3[66]4[7]0" and "01".
        return [{4: [1.0, 3.0], 7: [2.0], 5: [None, -1.0, 0.25], 2: [0.5]}[ids[0]] for ids in completion_ids]

    options = {"advantage": "reward_to_go", "policy_loss": "dapo"} if name == "grpo" else {"policy_loss": "dapo"}
    trainer, module = make(
        name, prompts=4 if name == "critic" else 1, reward_funcs=steps, given={"rollout_func": played},
        cls=playing(HOSTS[name][2]), attached=False, max_completion_length=8, **options
    )  # fmt: skip
    attach_trainer(module)
    rows = [dict(dataset[8])] * 4
    trainer._generate_and_score_completions(rows)
    _, metrics = module.rollout(rows[: 4 if name == "critic" else 1])
    for number in (metrics, {key: x[-1] for key, x in trainer._metrics["train"].items()}):
        # 1 + 3, 2, -1 + 0.25 and 0.5; of 7.75 in all, 2 are paid before the end; the policy writes no 7 at all.
        assert float(number["rewards/steps/mean"]) == pytest.approx(5.75 / 4)
        assert float(number["rewards/steps/no_separator"]) == 1.0
        assert float(number["step_rewards/per_completion"]) == pytest.approx(6 / 4)
        assert float(number["step_rewards/before_end"]) == pytest.approx(2 / 7.75)


def test_without_steps_no_metric_speaks_of_them(make: Make, dataset: Dataset) -> None:
    trainer, module = make("critic", policy_loss="dapo")
    _, _, metrics = rollouts(trainer, module, dataset, 4)
    assert not any("step_rewards" in key or "no_separator" in key for key in [*metrics, *trainer._metrics["train"]])


# Tokens of an environment


class Counting(Critic):
    """Values that depend on the policy's tokens alone; states of the environment's have none."""

    def __init__(self, values: OnlineValueOptions, table: Tensor) -> None:
        super().__init__(values)
        self.table = table

    attach = start = scoring = learning = Critic.place

    def recorded(self, batch: Batch, host: Any) -> Values:
        mask = loss_mask(batch)
        rows = torch.arange(len(mask))[:, None]
        values = self.table[rows, (mask.cumsum(1) - 1).clamp(min=0)]  # (B, T, 2)
        online = values.masked_fill(mask[..., None] == 0, NAN)
        return Values(online, online + 0.1, torch.tensor([0.3, -0.2]) if "truncated" in batch else None)


TURNS = [[3, 1, 2], [2, 4]]  # lengths
EARNED = [[1.0, None, -0.5], [0.25, 2.0]]
ALONE: Any = SimpleNamespace(
    device=torch.device("cpu"), beta=0.0, group_size=2, training=True,
    sum_over_ranks=lambda x: x, gather_rows=lambda x: x, own_rows=lambda x: x,
)  # fmt: skip


def observed(signal: Any, lengths: list[list[int]], cut: bool) -> tuple[Batch, Tensor]:
    """What a signal makes of the turns with observations of these lengths between them."""
    rows = [[] for _ in TURNS]
    for row, turns, observations in zip(rows, TURNS, lengths, strict=True):
        for turn, observation in zip(turns, [*observations, 0], strict=True):
            row += [1] * turn + [0] * observation
    width = max(map(len, rows)) + 1
    own = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    batch: Batch = {"completion_ids": real, "completion_mask": real, "tool_mask": own}
    steps = StepRewards(Completed(rows, rows))
    sums = steps.take(0, rewards_per("turn")(lambda: None), "It returned", "", EARNED)
    batch["scores"] = torch.tensor(sums)
    pay(batch, batch["scores"][:, None], None, ["f"], steps, ALONE)
    if cut:
        batch["truncated"] = torch.tensor([True, False])
    signal.advantages(batch, batch["scores"], ["p", "p"], ALONE)
    return batch, own.bool()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("estimator", ["gae", "td", "mc"])
@pytest.mark.parametrize("unit", ["token", "turn"])
def test_longer_observations_change_nothing_for_a_critic(unit: str, estimator: str, cut: bool) -> None:
    table = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    options = OnlineValueOptions(
        gamma=0.9,
        lam_policy=0.8,
        lam_value=0.7,
        time_unit=unit,
        advantage_estimator=estimator,
        discounted_objective=True,
    )
    signal = CriticSignal(Counting(options, table))
    short, own = observed(signal, [[1, 1], [1]], cut)
    for lengths in ([[5, 2], [1]], [[1, 40], [30]]):
        long, there = observed(signal, lengths, cut)
        for key in ("advantages", "returns", "td_errors"):
            torch.testing.assert_close(long[key][there], short[key][own], rtol=1e-5, atol=1e-6, msg=key)
            assert not long[key][~there].any()


@pytest.mark.parametrize(
    "advantage", ["reward_to_go", "process_normalized", "turn_normalized", "group_normalized", "lambda_trace"]
)
def test_longer_observations_change_nothing_for_groups(advantage: str) -> None:
    signal = GroupSignal(VariantOptions(advantage=advantage))
    short, own = observed(signal, [[1, 1], [1]], False)
    long, there = observed(signal, [[1, 40], [30]], False)
    ours, theirs = long["advantages"], short["advantages"]
    if ours.ndim == 2:
        ours, theirs = ours[there], theirs[own]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert theirs.any()


# Episodes that were cut


@torch.no_grad()
def value_after(host: Any, ids: Tensor) -> float:
    """V(s_T) of tokens (S,), by a plain pass over them alone."""
    if isinstance(host, PPOTrainer | PPOModule):
        return float(host.critic.module(ids[None])[0, -1])
    hidden = base_model_of(host.model).model(input_ids=ids[None], use_cache=False).last_hidden_state
    return float(host.critic.target(hidden)[0, -1, 0])


def assert_bootstrapped(host: Any, cut: list[bool], gamma: float) -> None:
    """Monte Carlo returns by hand, from V(s_T) where an episode was cut."""
    batch = host.last_rollout
    if not any(cut):
        assert "truncated" not in batch
    else:
        assert batch["truncated"].tolist() == cut
    host.model.eval()
    own, real = loss_mask(batch).bool() & batch["critic_mask"], batch["completion_mask"].bool()
    for row, goes_on in enumerate(cut):
        ids = torch.cat(
            [batch["prompt_ids"][row][batch["prompt_mask"][row].bool()], batch["completion_ids"][row][real[row]]]
        )
        total = value_after(host, ids) if goes_on else 0.0
        assert not goes_on or abs(total) > 1e-3
        for t in reversed(own[row].nonzero().flatten().tolist()):
            total = float(batch["rewards"][row, t]) + gamma * total
            assert float(batch["returns"][row, t]) == pytest.approx(total, abs=1e-5), (row, t)
    host.model.train()


def unended(host: Any) -> list[bool]:
    """Completions that max_completion_length cut."""
    batch = host.last_rollout
    last = batch["completion_mask"].sum(1, keepdim=True) - 1
    return (batch["completion_ids"].gather(1, last) != 1).flatten().tolist()


MC = {"advantage_estimator": "mc", "gamma": 0.9}
CUTS: dict[str, dict[str, Any]] = {
    "own": {},
    "off_policy": {"num_iterations": 2, "beta": 0.1, "kl_in_reward": False},
    "speculative": {"speculative": True, "num_draft_tokens": 2, "num_mtp_heads": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("name", ["critic", "ppo"])
def test_completions_cut_by_their_length_are_worth_what_would_follow(
    make: Make, dataset: Dataset, name: str, case: str
) -> None:
    options = {"beta": 0.0, **MC, **CUTS[case], "trl": {"policy_loss": "dapo"}}
    trainer, module = make(name, prompts=12, reward_funcs=per_odd_token, bootstrap_truncated=True, **options)
    rollouts(trainer, module, dataset, 12)
    for host in (trainer, module):
        cut = unended(host)
        assert 0 < sum(cut) < 12
        assert_bootstrapped(host, cut, 0.9)


def per_odd_token(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    """One for every odd token."""
    return [[float(token % 2) for token in ids] for ids in completion_ids]


def number_odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(row) for row in per_odd_token(completion_ids)]


@pytest.mark.slow
@pytest.mark.parametrize("bootstraps", [None, False])
@pytest.mark.parametrize("name", ["critic", "ppo"])
def test_by_default_a_completion_that_is_cut_ends(
    make: Make, dataset: Dataset, name: str, bootstraps: bool | None
) -> None:
    trainer, module = make(
        name, prompts=12, reward_funcs=per_odd_token, beta=0.0, bootstrap_truncated=bootstraps, **MC,
        trl={"policy_loss": "dapo"},
    )  # fmt: skip
    rollouts(trainer, module, dataset, 12)
    for host in (trainer, module):
        assert any(unended(host))
        assert_bootstrapped(host, [False] * 12, 0.9)


@pytest.mark.parametrize("bootstraps", [None, True, False])
@pytest.mark.parametrize("name", ["critic", "ppo"])
def test_episodes_that_a_rollout_says_were_truncated(
    make: Make, dataset: Dataset, name: str, bootstraps: bool | None
) -> None:
    """The first and the third; the second has no end."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return played(prompts, trainer, truncated=[True, False, True, False])

    trainer, module = pair(
        make, name, per_turn, rollout_func=rollout, truncated=[True, False, True, False],
        bootstrap_truncated=bootstraps, trl={"policy_loss": "dapo"}, **{"beta": 0.0, **MC},
    )  # fmt: skip
    theirs, ours, _ = rollouts(trainer, module, dataset, 4)
    for host in (trainer, module):
        assert_bootstrapped(host, [bootstraps is not False, bool(bootstraps), bootstraps is not False, False], 0.9)
    torch.testing.assert_close(ours["returns"], theirs["returns"], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["critic", "ppo"])
def test_adapters_are_in_the_value_of_the_state_after_a_cut(
    start: str, tokenizer: Any, dataset: Dataset, tmp_path: Path, name: str
) -> None:
    """The reference's pass comes without them, and is not the one that values are from."""
    config, trainer_class, module_class = HOSTS[name]
    shared = {"beta": 0.1, "max_completion_length": 6, "bootstrap_truncated": True, "advantage_scaling": "none", **MC}
    args = config(str(tmp_path), per_device_train_batch_size=8, **{**QUIET, **shared}, kl_in_reward=False)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(start), per_odd_token, args, dataset, processing_class=tokenizer,
        peft_config=LORA,
    )  # fmt: skip
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(start), LORA)
    network = {"value_model": AutoModelForCausalLM.from_pretrained(start)} if name == "ppo" else {}
    module = module_class(policy, tokenizer, per_odd_token, kl_in_reward=False, **shared, **network)
    attach_trainer(module)
    for host in (trainer, module):
        host.model.train()
        perturb(host.model, 0.05)
        if name == "critic":
            perturb(host.critic.target, 0.05, seed=5)
    rollouts(trainer, module, dataset, 8)
    for host in (trainer, module):
        gap = host.last_rollout["ref_per_token_logps"] - host.log_probs(host.last_rollout)
        assert gap.abs().max() > 1e-3
        assert_bootstrapped(host, unended(host), 0.9)


# Environments


class Digits:
    """Pays for odd digits, answers with a number of its own, and ends or is cut by what was said."""

    def reset(self, prompt: str, **_: Any) -> str:
        self.turn, self.seed = 0, sum(map(ord, prompt))
        return " "

    def step(self, action: str) -> tuple[str, float | None, bool, bool, dict[str, Any]]:
        self.turn += 1
        said = sum(map(ord, action)) + self.seed
        reward = None if said % 7 == 0 else float(sum(c in "13579" for c in action))
        return f" {said % 10}" * (1 + said % 2), reward, said % 5 == 0, said % 5 == 1 or self.turn == 4, {}


@pytest.mark.slow
@pytest.mark.parametrize("bootstraps", [None, True])
@pytest.mark.parametrize("name", ["critic", "ppo", "grpo"])
def test_hosts_agree_on_episodes(make: Make, dataset: Dataset, name: str, bootstraps: bool | None) -> None:
    episodes = EpisodeRollouts(Digits, max_turns=3, max_turn_length=3)
    own: dict[str, Any] = {"environment": Digits, "max_turns": 3, "max_turn_length": 3, "reward_funcs": None}
    options = {"max_completion_length": 14, "beta": 0.0, "policy_loss": "dapo"}
    options |= {"advantage": "turn_normalized"} if name == "grpo" else {**MC, "bootstrap_truncated": bootstraps}
    options |= {"num_generations": 2} if name == "grpo" else {}
    if name == "ppo":
        options["policy_loss"] = "ppo_clip"
    prompts = 12 // options.get("num_generations", 1)
    trainer, module = make(
        name, prompts=prompts, reward_funcs=episodes.earned, given={"rollout_func": episodes}, lightning=own, **options
    )  # fmt: skip
    theirs, ours, metrics = rollouts(trainer, module, dataset, prompts)
    assert_batches_agree(theirs, ours)
    assert ours["tool_mask"].min() == 0
    for key in ("rewards", "paid", "truncated") if name != "grpo" else ("rewards", "paid"):
        assert torch.equal(module.last_rollout[key], trainer.last_rollout[key]), key
    logged = {key: x[-1] for key, x in trainer._metrics["train"].items()}
    assert float(metrics["rewards/environment/mean"]) == pytest.approx(logged["rewards/earned/mean"])
    assert float(metrics["step_rewards/before_end"]) == pytest.approx(logged["step_rewards/before_end"])
    assert 0 < logged["step_rewards/before_end"] < 1
    if name != "grpo":
        for host in (trainer, module):
            assert_bootstrapped(host, host.last_rollout["truncated"].tolist(), 0.9)
    expected = trainer._compute_loss(trainer.model, theirs)
    loss, _ = module.loss(ours)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=2e-6, atol=1e-6)


# Batches that are joined, kept and resumed


@rewards_per("token")
def odd_from_ten(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[list[float]]:
    """One for every odd token; nothing at all for numbers below ten."""
    return [
        [float(token % 2 and len(prompt) > 4) for token in ids]
        for ids, prompt in zip(completion_ids, prompts, strict=True)
    ]


def ragged(prompt: str, number: int) -> list[int]:
    """Completions whose length goes with the prompt, so that batches are of different widths."""
    dice = torch.Generator().manual_seed(hash_of(prompt) + number)
    ids = torch.randint(2, 16, (hash_of(prompt) % 9 + number % 3,), generator=dice).tolist()
    return [*ids, 1]


class Rollouts(Callback):
    """The last rollout after each training step, of either host."""

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.seen.append(module.last_rollout)


class TRLRollouts(TrainerCallback):
    """The same of a trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.seen = trainer, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.trainer.last_rollout)


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["process_normalized", "reward_to_go"])
def test_groups_that_are_drawn_replayed_and_rejected_keep_their_steps(
    make: Make, dataset: Dataset, advantage: str
) -> None:
    data = dataset.select([1, 2, 3, 11, 12, 13, 4, 5, 14, 6, 7, 15])
    trainer, module = make(
        "grpo", prompts=3, data=data, reward_funcs=odd_from_ten, advantage=advantage, policy_loss="dapo",
        dynamic_sampling=True, max_draws=1, replay_buffer_size=4, reject_uniform=True, attached=False,
        max_completion_length=16, trl={"max_steps": 6}, given={"rollout_func": partial(rollout_func, complete=ragged)},
        cls=scripted(HOSTS["grpo"][2], ragged),
    )  # fmt: skip
    theirs, ours, numbers = TRLRollouts(trainer), Rollouts(), Numbers()
    trainer.add_callback(theirs)
    trainer.train()
    torch.manual_seed(0)
    fit(module, PromptDataModule(data, batch_size=3, shuffle=False), numbers, ours, max_steps=6)
    history = [row for row in trainer.state.log_history if "sampling/draws" in row]
    rejected = 0
    for key in ("sampling/draws", "sampling/replayed_groups"):
        assert all(sum(row[key] for row in host) > 0 for host in (history, numbers.rows)), key
    for batch in (*theirs.seen, *ours.seen):
        mask, usable = loss_mask(batch), batch["scores"].isfinite()
        rejected += int((~usable).sum())
        assert not mask[~usable].any()
        # Every reward is still at its token, and its sum is the score.
        assert torch.equal(batch["rewards"][usable].sum(1), batch["scores"][usable])
        by_hand = batch["completion_ids"] % 2 * mask * (batch["prompt_mask"].sum(1) > 4)[:, None]
        assert torch.equal(batch["rewards"][usable], by_hand[usable].float())
        real = mask.bool()
        assert torch.equal(batch["paid"][usable], real[usable])
        expected = (
            process_normalized(batch["rewards"], batch["paid"], real, 4)
            if advantage == "process_normalized"
            else batch_normalized(discounted_returns(batch["rewards"], real), mask=real)
        )
        torch.testing.assert_close(batch["advantages"], expected, rtol=1e-5, atol=1e-5)
    assert rejected > 0
    assert len({batch["rewards"].shape[1] for batch in (*theirs.seen, *ours.seen)}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["critic", "ppo"])
def test_runs_with_steps_resume_in_the_middle_of_a_batch(
    make: Make, dataset: Dataset, tmp_path: Path, name: str
) -> None:
    episodes = EpisodeRollouts(Digits, max_turns=3, max_turn_length=3)

    def hosts() -> tuple[Any, Any]:
        return make(
            name, prompts=8, reward_funcs=[episodes.earned, per_odd_token], given={"rollout_func": episodes},
            attached=False, steps_per_generation=2, num_iterations=2, max_completion_length=12,
            bootstrap_truncated=True, beta=0.1, kl_in_reward=True,
            trl={"max_steps": 6, "save_strategy": "steps", "save_steps": 1},
            lightning={
                "environment": Digits, "max_turns": 3, "max_turn_length": 3, "reward_funcs": per_odd_token,
            },
        )  # fmt: skip

    def data() -> PromptDataModule:
        return PromptDataModule(dataset, batch_size=8, shuffle=False)

    whole, module = hosts()
    whole.train()
    torch.manual_seed(0)
    fit(module, data(), every_step(tmp_path / "steps"), max_steps=6)
    assert whole.last_rollout["truncated"].any() and module.last_rollout["truncated"].any()
    for step in (1, 3):
        trainer, again = hosts()
        trainer.train(resume_from_checkpoint=str(tmp_path / "trl" / f"checkpoint-{step}"))
        fit(again, data(), max_steps=6, ckpt_path=tmp_path / "steps" / f"step={step}.ckpt")
        for resumed, finished in ((trainer, whole), (again, module)):
            for key, p in resumed.model.named_parameters():
                assert torch.equal(p, finished.model.get_parameter(key)), key
