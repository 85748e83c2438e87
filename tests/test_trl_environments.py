"""TRL's tool loop with environments that pay for turns and end their episodes; only the decoding is scripted."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import trl

from rl_plugins.rollouts import rewards_per
from rl_plugins.trl import GRPOVariantTrainer, MTPCriticTrainer, PPOTrainer
from rl_plugins.trl.environments import Episodes

from .helpers.tool_calls import Script, call, make_trainer, paid, play, prompts, turn_ends

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")

TRAINERS = [MTPCriticTrainer, GRPOVariantTrainer]


class Counter:
    """Adds up; pays each step, ends at 5, is cut at 100 and refuses negative steps."""

    turn_reward: float | None = None
    terminated = False
    truncated = False
    made: ClassVar[list["Counter"]] = []

    def __init__(self) -> None:
        Counter.made.append(self)

    def reset(self, **row: Any) -> None:
        self.count, self.row = 0, row

    def add(self, step: int) -> str:
        """Add to the counter.

        Args:
            step: Value to add.
        """
        if step < 0:
            raise ValueError("no")
        self.count += step
        self.turn_reward = step
        self.terminated, self.truncated = 5 <= self.count < 100, self.count >= 100
        return f"count {self.count}"

    def look(self) -> str:
        """Say the count, which pays nothing."""
        return f"count {self.count}"


class Owner(Counter):
    """Also pays for the end."""

    def get_reward(self) -> float:
        return 10.0 * self.count


class Plain:
    """An environment as TRL knows it."""

    def reset(self, **row: Any) -> str:
        self.count = 0
        return "!"

    def get_reward(self) -> float:
        return float(self.count)

    def add(self, step: int) -> int:
        """Add to the counter.

        Args:
            step: Value to add.
        """
        self.count += step
        return self.count


def add(step: int) -> str:
    return call("add", step=step)


@pytest.fixture(autouse=True)
def forget() -> None:
    Counter.made.clear()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Any, Any, Script]]:
    """Factory: the trainer, `last_rollout` and the script of one batch."""

    def make(*rows: list[str], trainer_class: Any = MTPCriticTrainer, **arguments: Any) -> tuple[Any, Any, Script]:
        script = Script(*rows).install(monkeypatch)
        arguments.setdefault("environment_factory", Counter)
        trainer = make_trainer(trainer_class, tmp_path, arguments.pop("batch", len(rows)), **arguments)
        play(trainer)
        return trainer, trainer.last_rollout, script

    return make


def texts(trainer: Any, rows: slice = slice(None)) -> list[str]:
    """What the policy and its environments said, without padding."""
    batch = trainer.last_rollout
    return [
        trainer.processing_class.decode(ids[mask.bool()])
        for ids, mask in zip(batch["completion_ids"][rows], batch["completion_mask"][rows], strict=True)
    ]


# Rewards


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_turns_are_paid_at_their_last_token(played: Any, trainer_class: Any) -> None:
    trainer, batch, _ = played([add(1), call("look"), add(3)], [add(2)], trainer_class=trainer_class)
    ends = turn_ends(batch)
    assert [len(row) for row in ends] == [4, 2]  # each ends with "done"
    assert paid(batch) == [{ends[0][0]: 1.0, ends[0][2]: 3.0}, {ends[1][0]: 2.0}]
    assert batch["scores"].tolist() == [4.0, 2.0]
    eos = trainer.processing_class.eos_token_id
    assert all(batch["completion_ids"][row, t] == eos for row in range(2) for t in ends[row])
    logged = trainer._metrics["train"]
    assert logged["rewards/turn_reward/mean"] == [3.0]
    assert logged["step_rewards/per_completion"] == [1.5] and logged["step_rewards/before_end"] == [1.0]


def test_two_calls_in_one_turn_add_up(played: Any) -> None:
    _, batch, _ = played([add(1) + "\n" + add(2), add(1)], [call("look") + "\n" + add(2)])
    ends = turn_ends(batch)
    assert paid(batch) == [{ends[0][0]: 3.0, ends[0][1]: 1.0}, {ends[1][0]: 2.0}]


def test_a_tool_that_raises_pays_nothing_stale(played: Any) -> None:
    trainer, batch, _ = played([add(2), add(-1), "done"], [add(1) + "\n" + add(-1), add(1)])
    ends = turn_ends(batch)
    assert [len(row) for row in ends] == [3, 3]
    assert paid(batch) == [{ends[0][0]: 2.0}, {ends[1][0]: 1.0, ends[1][1]: 1.0}]
    assert "{'error': 'no'}" in texts(trainer)[0]
    assert trainer._metrics["train"]["tools/failure_frequency"] == pytest.approx([2 / 5])


def test_a_tool_that_raises_may_pay_and_end_the_episode(played: Any) -> None:
    class Strict(Counter):
        def forbidden(self) -> str:
            """Lose the game."""
            self.turn_reward, self.terminated = -1.0, True
            raise ValueError("lost")

    trainer, batch, script = played([call("forbidden"), "more"], [add(1)], environment_factory=Strict)
    assert script.asked == [[0, 1], [1]]
    assert paid(batch)[0] == {turn_ends(batch)[0][0]: -1.0}
    assert texts(trainer)[0] == call("forbidden") + "<|im_end|>"


def test_an_unknown_tool_pays_nothing(played: Any) -> None:
    _, batch, _ = played([call("nothing"), add(1)], [add(2)])
    assert paid(batch)[0] == {turn_ends(batch)[0][1]: 1.0}


def test_a_turn_without_a_call_is_no_turn_of_the_environment(played: Any) -> None:
    trainer, batch, script = played(["hello"], ["hello"])
    assert paid(batch) == [{}, {}] and batch["scores"].isnan().all()
    assert script.asked == [[0, 1]] and trainer.last_rollout["rewards"].eq(0).all()


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_get_reward_and_turn_reward_add_up(played: Any, trainer_class: Any) -> None:
    trainer, batch, _ = played([add(1), add(2)], [add(2)], environment_factory=Owner, trainer_class=trainer_class)
    ends = turn_ends(batch)
    assert paid(batch) == [{ends[0][0]: 1.0, ends[0][1]: 2.0, ends[0][2]: 30.0}, {ends[1][0]: 2.0, ends[1][1]: 20.0}]
    assert trainer.reward_func_names == ["turn_reward", "Owner"]
    assert batch["scores"].tolist() == [33.0, 22.0]


def test_reward_weights_are_those_of_the_functions(played: Any) -> None:
    @rewards_per("turn")
    def politeness(completions: Any, **_: Any) -> list[list[float]]:
        return [[1.0 for message in row if message["role"] == "assistant"] for row in completions]

    def late(completions: Any, **_: Any) -> list[float]:
        return [1.0 for _ in completions]

    options = {"reward_weights": [0.5, 3.0]}
    arguments = {"reward_funcs": [politeness, late], "options": options, "environment_factory": Owner}
    trainer, batch, _ = played([add(1)], [add(2)], **arguments, reward_processing_classes=[None, None])
    ends = turn_ends(batch)
    assert trainer.reward_func_names == ["politeness", "late", "turn_reward", "Owner"]
    assert trainer.reward_weights.tolist() == [0.5, 3.0, 1.0, 1.0]
    assert paid(batch) == [
        {ends[0][0]: 0.5 + 1.0, ends[0][1]: 0.5 + 3.0 + 10.0},
        {ends[1][0]: 0.5 + 2.0, ends[1][1]: 0.5 + 3.0 + 20.0},
    ]
    assert trainer.args.reward_weights == [0.5, 3.0]  # for another trainer with the config


def test_a_function_of_the_same_name_is_kept(played: Any) -> None:
    @rewards_per("turn")
    def turn_reward(completions: Any, **_: Any) -> list[list[float]]:
        return [[7.0 for message in row if message["role"] == "assistant"] for row in completions]

    def double(a: int) -> int:
        """Double a number.

        Args:
            a: The number.
        """
        return 2 * a

    _, batch, _ = played(["a"], ["b"], reward_funcs=turn_reward, environment_factory=Plain)
    assert batch["scores"].tolist() == [7.0, 7.0]
    _, batch, _ = played(
        [call("double", a=2)], ["b"], reward_funcs=turn_reward, environment_factory=None, tools=[double]
    )
    assert batch["scores"].tolist() == [14.0, 7.0]


def test_overlong_shaping_beside_an_environment(played: Any) -> None:
    trainer, batch, _ = played(
        [add(1)], [add(2)], options={"overlong_shaping": True, "overlong_cache": 510, "max_completion_length": 512}
    )
    length = [int(mask.sum()) for mask in batch["completion_mask"]]
    penalty = [-(n - 2) / 510 for n in length]
    assert batch["scores"].tolist() == pytest.approx([1 + penalty[0], 2 + penalty[1]])
    assert trainer.reward_func_names == ["overlong_penalty", "turn_reward"]


# Ends


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize("logprobs", [False, True])
def test_who_has_ended_is_not_asked_again(
    monkeypatch: Any, tmp_path: Path, trainer_class: Any, logprobs: bool
) -> None:
    # The rows in the middle end at different turns; the others go on in their order.
    script = Script([add(1), add(1)], [add(5)], [add(2), add(3)], [add(3)], [add(6)], [add(4), "bye"])
    script.install(monkeypatch).logprobs = logprobs
    trainer = make_trainer(trainer_class, tmp_path, 6, environment_factory=Counter)
    if logprobs:  # as vLLM gives them
        monkeypatch.setattr(trainer, "vllm_importance_sampling_correction", False)
    play(trainer)
    batch = trainer.last_rollout
    assert script.asked == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [0]]
    ends = turn_ends(batch)
    assert [len(row) for row in ends] == [3, 1, 2, 2, 1, 2]
    assert [list(row.values()) for row in paid(batch)] == [[1, 1], [5], [2, 3], [3], [6], [4]]
    said = texts(trainer)
    assert said[1] == add(5) + "<|im_end|>" and said[4] == add(6) + "<|im_end|>"
    assert said[2].endswith(add(3) + "<|im_end|>") and "count 2" in said[2] and "count 5" not in said[2]
    assert said[5].endswith("bye<|im_end|>") and said[3].endswith("done<|im_end|>")
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.0]
    # The last token of a row that ended is paid, and is its last.
    for row in (1, 2, 4):
        assert ends[row][-1] == batch["completion_mask"][row].sum() - 1
    if logprobs:
        sampler, own = batch["sampling_per_token_logps"], batch["completion_mask"] * batch["tool_mask"]
        assert torch.equal(sampler, -own.float())


def test_no_row_is_left(played: Any) -> None:
    trainer, batch, script = played([add(5)], [add(7)])
    assert script.asked == [[0, 1]]
    assert texts(trainer) == [add(5) + "<|im_end|>", add(7) + "<|im_end|>"]
    assert paid(batch) == [{row[-1]: reward} for row, reward in zip(turn_ends(batch), (5.0, 7.0), strict=True)]


def test_a_call_after_the_end_is_refused(played: Any) -> None:
    trainer, batch, _ = played([add(5) + "\n" + add(50)], [add(1)])
    assert paid(batch)[0] == {turn_ends(batch)[0][0]: 5.0}
    assert Counter.made[0].count == 5
    assert trainer._metrics["train"]["tools/failure_frequency"] == pytest.approx([1 / 3])


def test_the_flags_are_reset_between_batches(played: Any) -> None:
    trainer, batch, script = played([add(5)], [add(100)])
    first = paid(batch)
    script.asked.clear()
    play(trainer)
    assert script.asked == [[0, 1]] and paid(trainer.last_rollout) == first
    assert len(Counter.made) == 2  # made once, reset often


def test_dynamic_sampling_resets_the_flags_between_its_draws(monkeypatch: Any, tmp_path: Path) -> None:
    script = Script([add(5)], [add(5)], [add(5)], [add(6)]).install(monkeypatch)
    options = {"dynamic_sampling": True, "num_generations": 2}
    trainer = make_trainer(GRPOVariantTrainer, tmp_path, 4, environment_factory=Counter, options=options)
    play(trainer)  # the first group is uniform, so that another batch of prompts is drawn
    assert len(script.asked) > 1
    assert set(trainer._metrics["train"]["tools/failure_frequency"]) == {0.0}
    assert all(list(row.values()) in ([5.0], [6.0]) for row in paid(trainer.last_rollout))


def test_properties_are_left_to_the_environment(played: Any) -> None:
    class Bound:
        def reset(self, **row: Any) -> None:
            self.count = 0

        @property
        def terminated(self) -> bool:
            return self.count >= 5

        def add(self, step: int) -> None:
            """Add to the counter.

            Args:
                step: Value to add.
            """
            self.count += step

    _, _, script = played(
        [add(5)], [add(1)], environment_factory=Bound, reward_funcs=lambda completions, **_: [0.0 for _ in completions]
    )
    assert script.asked == [[0, 1], [1]]


# Time limits


def values_of(trainer: Any) -> None:
    """Heads whose values are not 0."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for parameter in trainer.critic.module.parameters():
            parameter.normal_(0, 0.3)
    trainer.critic.copy()
    trainer.critic.place(trainer.device)


@pytest.mark.parametrize("bootstrap", [None, True, False])
def test_a_truncated_episode_is_worth_the_value_of_its_last_state(
    monkeypatch: Any, tmp_path: Path, bootstrap: bool | None
) -> None:
    Script([add(100)], [add(5)], [add(1)], [add(1), "cut~"]).install(monkeypatch)
    options = {"bootstrap_truncated": bootstrap}
    trainer = make_trainer(MTPCriticTrainer, tmp_path, 4, environment_factory=Counter, options=options)
    values_of(trainer)
    play(trainer)
    cut = trainer.last_rollout
    expected = {None: [True, False, False, False], True: [True, False, False, True], False: None}[bootstrap]
    assert (cut["truncated"].tolist() if "truncated" in cut else None) == expected
    said = texts(trainer)[0]
    assert said.endswith("count 100\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert [len(row) for row in turn_ends(cut)] == [1, 1, 2, 2]
    first = cut["returns"][:, 0].tolist()  # lambda 1, gamma 1: the reward and what follows
    assert first[1:3] == pytest.approx([5.0, 1.0])
    if bootstrap is False:
        assert first[0] == pytest.approx(100.0) and first[3] == pytest.approx(1.0)
        return
    # The state after the last token is the one in which an episode that goes on makes its next turn.
    monkeypatch.setattr(Counter, "truncated", property(lambda self: False, lambda self, value: None))
    play(trainer)
    goes_on = trainer.last_rollout
    start = int(cut["completion_mask"][0].sum())
    assert goes_on["tool_mask"][0, start - 1 : start + 1].tolist() == [0, 1]
    value = float(goes_on["old_values"][0, start, 0])
    assert abs(value) > 0.01
    assert first[0] == pytest.approx(100.0 + value, abs=1e-4)
    assert (abs(first[3] - 1.0) > 1e-3) == (bootstrap is True)


def test_a_cut_episode_counts_as_clipped_and_an_ended_one_does_not(played: Any) -> None:
    trainer, _, script = played([add(100)], [add(5)])
    assert script.asked == [[0, 1]]
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.5]


def test_ended_and_truncated_at_once_is_ended(played: Any) -> None:
    class Both(Counter):
        def stop(self) -> str:
            """Stop."""
            self.terminated = self.truncated = True
            self.turn_reward = 2.0
            return "over"

    trainer, batch, _ = played([call("stop")], [add(1)], environment_factory=Both)
    assert "truncated" not in batch
    assert texts(trainer)[0] == call("stop") + "<|im_end|>"


# Limits of TRL


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_an_overlong_answer_is_rolled_back_and_its_turn_is_paid(played: Any, trainer_class: Any) -> None:
    class Verbose(Counter):
        def add(self, step: int) -> str:
            """Add to the counter.

            Args:
                step: Value to add.
            """
            return super().add(step) + " " * (600 if step == 4 else 0)

    trainer, batch, script = played(
        [add(4), "x"], [add(1), add(4), "x"], [add(2)], environment_factory=Verbose, trainer_class=trainer_class
    )
    ends = turn_ends(batch)
    assert script.asked == [[0, 1, 2], [1, 2]]
    assert paid(batch) == [{ends[0][0]: 4.0}, {ends[1][0]: 1.0, ends[1][1]: 4.0}, {ends[2][0]: 2.0}]
    assert texts(trainer)[0] == add(4) + "<|im_end|>"
    assert [len(row) for row in ends] == [1, 2, 2]


def test_a_cut_episode_whose_last_answer_is_overlong(played: Any) -> None:
    class Verbose(Counter):
        def add(self, step: int) -> str:
            """Add to the counter.

            Args:
                step: Value to add.
            """
            return super().add(step) + " " * 600

    trainer, batch, script = played([add(100)], [add(1)], environment_factory=Verbose)
    assert script.asked == [[0, 1]] and batch["truncated"].tolist() == [True, False]
    assert texts(trainer) == [add(100) + "<|im_end|>", add(1) + "<|im_end|>"]


def test_a_turn_cut_by_the_longest_completion_is_parsed_no_more(played: Any) -> None:
    first = len(Script().ids(add(1) + "<|im_end|>"))
    trainer, batch, _ = played([add(1), add(2)], [add(1)], options={"max_completion_length": first + 100})
    ends = turn_ends(batch)
    assert int(batch["completion_mask"][0].sum()) == first + 100
    assert paid(batch) == [{ends[0][0]: 1.0}, {ends[1][0]: 1.0}]
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.5]


def test_max_tool_calling_iterations(played: Any) -> None:
    trainer, batch, script = played([add(1), add(1), add(1)], [add(2)], options={"max_tool_calling_iterations": 1})
    ends = turn_ends(batch)
    assert script.asked == [[0, 1], [0, 1]] and trainer.max_tool_calling_iterations == 1
    assert paid(batch) == [{ends[0][0]: 1.0}, {ends[1][0]: 2.0}]  # the second call was never made
    assert Counter.made[0].count == 1


# Asynchronous tools


class Slow(Counter):
    """Steps that wait, the larger the longer."""

    async def wait(self, step: int) -> str:
        """Add to the counter after a while.

        Args:
            step: Value to add.
        """
        count = self.count
        await asyncio.sleep(0.01 / (1 + step))
        self.count = count + step
        self.turn_reward = step
        await asyncio.sleep(0.01)
        self.terminated = self.count >= 5
        return f"count {self.count}"


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_asynchronous_tools(played: Any, trainer_class: Any) -> None:
    def wait(step: int) -> str:
        return call("wait", step=step)

    trainer, batch, script = played(
        [wait(1) + "\n" + wait(2) + "\n" + add(1), wait(0)],
        [wait(5) + "\n" + wait(1)],
        [wait(2)],
        environment_factory=Slow,
        trainer_class=trainer_class,
    )
    ends = turn_ends(batch)
    assert script.asked == [[0, 1, 2], [0, 2], [0]]
    # The calls of a turn are awaited one after the other: none is lost, and none is counted twice.
    assert paid(batch) == [{ends[0][0]: 4.0, ends[0][1]: 0.0}, {ends[1][0]: 5.0}, {ends[2][0]: 2.0}]
    answers = re.findall(r"count \d+", texts(trainer)[0])
    assert answers == ["count 1", "count 2", "count 4", "count 4"]  # TRL calls what does not wait at once
    assert Counter.made[1].count == 5


# Several environments by name


class Silent(Plain):
    """Has no reward of its own."""

    get_reward = None  # type: ignore[assignment]

    def shout(self, word: str) -> str:
        """Say a word.

        Args:
            word: The word.
        """
        return word.upper()


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_environments_by_name(monkeypatch: Any, tmp_path: Path, trainer_class: Any) -> None:
    script = Script([add(5)], [add(2)], [call("shout", word="hm")], [add(4)]).install(monkeypatch)
    trainer = make_trainer(
        trainer_class,
        tmp_path,
        4,
        environment_factory={"count": Counter, "own": Owner, "none": Silent, "plain": Plain},
        train_dataset=prompts(4, environment=["count", "own", "none", "plain"]),
        reward_funcs=lambda completions, **_: [0.5 for _ in completions],
    )
    play(trainer)
    batch = trainer.last_rollout
    ends = turn_ends(batch)
    assert script.asked == [[0, 1, 2, 3], [1, 2, 3]]
    assert paid(batch) == [
        {ends[0][0]: 5.5},
        {ends[1][0]: 2.0, ends[1][1]: 20.5},
        {ends[2][1]: 0.5},
        {ends[3][1]: 4.5},
    ]
    assert trainer.reward_func_names == ["<lambda>", "turn_reward", "Owner", "Plain"]


# TRL's scripts as they are


def same(ours: Any, hosts: Any) -> None:
    for name, expected in hosts.items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(ours[name], expected, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("arguments", ["environment", "tools", "both"])
def test_plain_scripts_give_the_hosts_batch(monkeypatch: Any, tmp_path: Path, arguments: str) -> None:
    def multiply(a: int, b: int) -> int:
        """Multiply two integers.

        Args:
            a: The first.
            b: The second.
        """
        return a * b

    def length(completions: Any, **_: Any) -> list[float]:
        return [float(len(row)) for row in completions]

    given: dict[str, Any] = {
        "environment": {"environment_factory": Plain},
        "tools": {"tools": [multiply], "reward_funcs": length},
        "both": {"tools": [multiply], "environment_factory": Plain, "reward_funcs": length},
    }[arguments]
    if arguments == "both":
        given["options"] = {"reward_weights": [0.25]}
    script = Script(
        [add(5), call("multiply", a=2, b=3)], [call("multiply", a=1, b=3), add(1)], [add(2) + "\n" + add(1)], ["no"]
    ).install(monkeypatch)
    results = []
    for trainer_class in (trl.GRPOTrainer, GRPOVariantTrainer, MTPCriticTrainer):
        trainer = make_trainer(trainer_class, tmp_path, 4, **{**given, "options": dict(given.get("options", {}))})
        script.asked.clear()
        batch = play(trainer)
        results.append((trainer, batch, list(script.asked), dict(trainer._metrics["train"])))
    (host, batch, asked, metrics), *ours = results
    for trainer, own, own_asked, own_metrics in ours:
        assert trainer.reward_func_names == host.reward_func_names
        assert torch.equal(trainer.reward_weights, host.reward_weights)
        assert own_asked == asked
        skipped = () if trainer.critic is None else ("advantages",)
        same(own, {name: x for name, x in batch.items() if name not in skipped})
        for name, values in metrics.items():
            assert own_metrics[name] == pytest.approx(values, nan_ok=True), name
        assert not any(name.startswith("step_rewards") for name in own_metrics)


@pytest.mark.parametrize("trainer_class", [*TRAINERS, PPOTrainer])
def test_the_environment_may_own_the_data(monkeypatch: Any, tmp_path: Path, trainer_class: Any) -> None:
    """Without a dataset, and with one that only says which environment."""
    script = Script([add(5)], [add(1)]).install(monkeypatch)
    trainer = make_trainer(trainer_class, tmp_path, 2, environment_factory=Counter, train_dataset=None)
    play(trainer)
    assert [list(row.values()) for row in paid(trainer.last_rollout)] == [[5.0], [1.0]]
    rows = prompts(2, environment=["count", "count"]).remove_columns("prompt")
    trainer = make_trainer(trainer_class, tmp_path, 2, environment_factory={"count": Counter}, train_dataset=rows)
    play(trainer)
    assert [list(row.values()) for row in paid(trainer.last_rollout)] == [[5.0], [1.0]]
    assert script.asked == [[0, 1], [1]] * 2


# Training and evaluation


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [*TRAINERS, PPOTrainer])
def test_training_and_evaluation(monkeypatch: Any, tmp_path: Path, trainer_class: Any) -> None:
    script = Script([add(1), add(4)], [add(100)]).install(monkeypatch)
    trainer = make_trainer(
        trainer_class,
        tmp_path,
        2,
        environment_factory=Counter,
        eval_dataset=prompts(2),
        options={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2},
    )
    trainer.train()
    assert script.asked == [[0, 1], [0]] * (len(script.asked) // 2)
    logs = trainer.state.log_history
    train = [row["rewards/turn_reward/mean"] for row in logs if "rewards/turn_reward/mean" in row]
    assert set(train) == {52.5}
    evaluated = [row["eval_rewards/turn_reward/mean"] for row in logs if "eval_rewards/turn_reward/mean" in row]
    assert evaluated == [52.5, 52.5]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in logs if "loss" in row)


# Bad input


class Nothing:
    """Pays nothing at all."""

    def reset(self, **row: Any) -> None: ...

    def look(self) -> str:
        """Look."""
        return "dark"


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_an_environment_without_a_reward_is_refused(tmp_path: Path, trainer_class: Any) -> None:
    with pytest.raises(ValueError, match="There is no reward.*Nothing has neither a get_reward method nor a turn_rew"):
        make_trainer(trainer_class, tmp_path, 2, environment_factory=Nothing)


def test_a_reward_that_appears_too_late_is_not_lost_silently(monkeypatch: Any, tmp_path: Path) -> None:
    class Late(Nothing):
        def reset(self, **row: Any) -> None:
            self.turn_reward = None

        def get_reward(self) -> float:
            return 1.0

    Script([call("look")], ["no"]).install(monkeypatch)
    trainer = make_trainer(MTPCriticTrainer, tmp_path, 2, environment_factory=Late)
    with pytest.raises(ValueError, match="Late had no turn_reward when it was made.*Set turn_reward = None in the cl"):
        play(trainer)


def test_a_reward_that_is_no_number(monkeypatch: Any, tmp_path: Path) -> None:
    class Wordy(Counter):
        def look(self) -> str:
            """Look."""
            self.turn_reward = "much"  # type: ignore[assignment]
            return "dark"

    Script([call("look")], ["no"]).install(monkeypatch)
    trainer = make_trainer(MTPCriticTrainer, tmp_path, 2, environment_factory=Wordy)
    with pytest.raises(TypeError, match=re.escape("Wordy.turn_reward is 'much' after a call. Set it to a number")):
        play(trainer)


def test_a_reward_that_cannot_be_taken_back(tmp_path: Path) -> None:
    class Fixed(Nothing):
        @property
        def turn_reward(self) -> float:
            return 1.0

    with pytest.raises(TypeError, match="Fixed.turn_reward is a property that cannot be set"):
        make_trainer(MTPCriticTrainer, tmp_path, 2, environment_factory=Fixed)


def test_the_last_observation_alone_is_dropped() -> None:
    episodes = Episodes()
    ended, goes_on = Counter(), Counter()
    ended.terminated = True
    episodes.environments = [ended, goes_on]
    ids, chosen = [[1, 2, 3, 4, 5], [1, 2, 3]], [[1, 0, 1, 0, 0], [1, 0, 0]]
    episodes.drop_last_observation(ids, None, chosen=chosen)
    assert ids == [[1, 2, 3], [1, 2, 3]] and chosen == [[1, 0, 1], [1, 0, 0]]
