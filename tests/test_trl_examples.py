"""TRL's examples with tools and environments, with two names changed, on a model that is told what to say.

The code of the environments, tools and rewards is that of TRL's documentation (`grpo_trainer.md`, `openenv.md`) and
example scripts (`grpo_agent.py`, `openenv/*.py`), under the Apache License 2.0. OpenEnv's clients talk to a server; in
their place are classes of their interface.
"""

import random
import re
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer, MTPCriticConfig, MTPCriticTrainer

from .helpers.tiny import ON_CPU
from .helpers.tool_calls import Script, call, chat_model, chat_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You are using 'environment_factory'"),
    pytest.mark.filterwarnings("ignore:The dataset has"),
]


@pytest.fixture(params=["critic", "variant"])
def names(request: Any, tmp_path: Path) -> SimpleNamespace:
    """The names that a script imports, for a tiny model and a step of two completions on a CPU."""
    config, trainer = {
        "critic": (MTPCriticConfig, MTPCriticTrainer),
        "variant": (GRPOVariantConfig, GRPOVariantTrainer),
    }[request.param]
    small = {
        **ON_CPU,
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 1000,
        "max_steps": 1,
        "logging_steps": 1,
        "use_vllm": False,
        "log_completions": False,
    }

    def make(model: str, args: Any, **arguments: Any) -> Any:
        return trainer(chat_model(), args=args, processing_class=chat_tokenizer(), **arguments)

    return SimpleNamespace(Config=lambda **given: config(**{**given, **small}), Trainer=make)


def trained(trainer: Any) -> dict[str, float]:
    """What a step logs."""
    trainer.train()
    log: dict[str, float] = trainer.state.log_history[0]
    return log


def test_tools(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """grpo_trainer.md, Tools."""

    def multiply(a: int, b: int) -> int:
        """
        Multiplies two integers.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            The product of the two integers.
        """
        return a * b

    async def async_add(a: int, b: int) -> int:
        """
        Asynchronously adds two integers.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            The sum of the two integers.
        """
        return a + b

    def has_12(completions: Any, **kwargs: Any) -> list[float]:
        return [float(any(m["role"] == "tool" and m["content"] == "12" for m in row)) for row in completions]

    Script(
        [call("multiply", a=3, b=4), "It is 12."], [call("async_add", a=3, b=4), call("async_add", a=5, b=7)]
    ).install(monkeypatch)
    trainer = names.Trainer(
        model="Qwen/Qwen3-0.6B",
        tools=[multiply, async_add],
        reward_funcs=has_12,
        args=names.Config(chat_template_kwargs={"enable_thinking": False}),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "What is 3 times 4?"}]] * 4}),
    )
    log = trained(trainer)
    assert log["rewards/has_12/mean"] == 1.0 and log["tools/call_frequency"] == 1.5
    assert log["tools/failure_frequency"] == 0.0


class IncrementEnv:
    # Reserved methods
    def reset(self, **kwargs: Any) -> str | None:  # required; called at the start of each rollout
        self.counter = 0
        self.target = random.randint(1, 6)  # self-sample the task
        return f"Increment the counter by {self.target}."  # returned string becomes the prompt

    def get_reward(self) -> float:  # optional: the environment scores itself from its own state
        return float(self.counter == self.target)

    # Public methods (exposed as tools)
    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        return self.counter


def increments() -> Script:
    return Script([call("increment", step=2), call("increment", step=2)], [call("increment", step=4)])


def test_an_environment_that_owns_the_data(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """grpo_trainer.md, Environments."""
    increments().install(monkeypatch)
    monkeypatch.setattr(random, "randint", lambda low, high: 4)
    trainer = names.Trainer(
        model="Qwen/Qwen3-0.6B",
        args=names.Config(max_steps=1000, chat_template_kwargs={"enable_thinking": False}),
        environment_factory=IncrementEnv,
    )
    log = trained(trainer)
    assert log["rewards/IncrementEnv/mean"] == 1.0 and log["tools/call_frequency"] == 1.5
    assert trainer.reward_func_names == ["IncrementEnv"]
    prompt = trainer.processing_class.decode(trainer.last_rollout["prompt_ids"][0])
    assert "<|im_start|>user\nIncrement the counter by 4.<|im_end|>" in prompt


def test_an_external_dataset_and_a_reward_of_the_trainer(
    names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpo_trainer.md, Providing an external dataset, and Rewards."""

    class Targeted(IncrementEnv):
        def reset(self, target: int, **kwargs: Any) -> None:  # type: ignore[override]
            self.counter = 0
            self.target = target

    def format_reward(completions: Any, **kwargs: Any) -> list[float]:
        return [0.25 for _ in completions]

    dataset = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"Increment the counter to {i}."}] for i in [4, 4, 4]],
            "target": [4, 4, 4],
        }
    )
    increments().install(monkeypatch)
    trainer = names.Trainer(
        model="Qwen/Qwen3-0.6B",
        args=names.Config(max_steps=1000),
        reward_funcs=format_reward,
        train_dataset=dataset,
        environment_factory=Targeted,
    )
    log = trained(trainer)
    assert log["reward"] == 1.25 and trainer.reward_func_names == ["format_reward", "Targeted"]


class CodingEnv:
    def reset(self, **kwargs: Any) -> str:
        return "Compute the 7th Fibonacci number."

    def run_code(self, code: str) -> str:  # exposed as a tool only for "coding" examples
        """Run the given Python code and return its stdout.

        Args:
            code: The Python source to execute.

        Returns:
            The captured standard output.
        """
        return "13"


class GameEnv:
    def reset(self, **kwargs: Any) -> str:
        return "Reach the goal tile."

    def move(self, action: str) -> str:  # exposed as a tool only for "game" examples
        """Apply an action to the game and return the new observation.

        Args:
            action: One of "up", "down", "left", "right".

        Returns:
            The observation after the move.
        """
        return f"You went {action}."


def test_a_dataset_that_only_routes(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """grpo_trainer.md, Multiple environments."""

    def reward(completions: Any, environments: Any, **kwargs: Any) -> list[float]:
        return [
            float(isinstance(environment, GameEnv) and any("You went" in m["content"] for m in row))
            for row, environment in zip(completions, environments, strict=True)
        ]

    Script([call("move", action="up")]).install(monkeypatch)
    trainer = names.Trainer(
        model="Qwen/Qwen3-0.6B",
        args=names.Config(chat_template_kwargs={"enable_thinking": False}, shuffle_dataset=False),
        train_dataset=Dataset.from_dict({"environment": ["game", "coding"] * 4}),
        environment_factory={"coding": CodingEnv, "game": GameEnv},
        reward_funcs=reward,
    )
    log = trained(trainer)
    assert log["rewards/reward/mean"] == 1.0 and log["tools/failure_frequency"] == 0.0
    prompt = trainer.processing_class.decode(trainer.last_rollout["prompt_ids"][0])
    assert "Reach the goal tile." in prompt and '"move"' in prompt and "run_code" not in prompt


# OpenEnv: clients of a server, by classes of their interface


class EchoEnv:
    """Pays a tenth of the message's length, as the server does."""

    def __init__(self, base_url: str) -> None: ...

    def step(self, action: SimpleNamespace) -> SimpleNamespace:
        message = action.message
        return SimpleNamespace(observation=SimpleNamespace(echoed_message=message, reward=0.1 * len(message)))


def reward_from_env(environments: Any, **kwargs: Any) -> list[float]:
    return [env.reward for env in environments]


def test_openenv_echo(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """openenv.md, Quick start, and openenv/echo.py."""

    class EchoToolEnv:
        def __init__(self) -> None:
            self.env = EchoEnv(base_url="https://openenv-echo-env.hf.space")
            self.reward = 0.0

        def reset(self, **kwargs: Any) -> str | None:
            self.reward = 0.0
            return None

        def echo(self, message: str) -> str:
            """
            Echo the message back from the environment.

            Args:
                message: The message to echo

            Returns:
                The echoed message.
            """
            observation = self.env.step(SimpleNamespace(message=message))
            self.reward = observation.observation.reward
            return observation.observation.echoed_message  # type: ignore[no-any-return]

    Script([call("echo", message="Hello World!")], ["no"]).install(monkeypatch)
    trainer = names.Trainer(
        model="Qwen/Qwen3-0.6B",
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": "Try to echo 'Hello World!'."}]] * 8}
        ),
        reward_funcs=reward_from_env,
        args=names.Config(chat_template_kwargs={"enable_thinking": False}, log_completions=True),
        environment_factory=EchoToolEnv,
    )
    assert trained(trainer)["rewards/reward_from_env/mean"] == pytest.approx(0.6)


class TextArenaEnv:
    """Wordle: gives back all that was said so far, and 1 for the word."""

    def __init__(self, base_url: str) -> None: ...

    def _result(self, reward: float, done: bool) -> SimpleNamespace:
        message = SimpleNamespace(content=self.feedback)
        return SimpleNamespace(observation=SimpleNamespace(messages=[message]), reward=reward, done=done)

    def reset(self) -> SimpleNamespace:
        self.feedback, self.turn = "You are playing Wordle.", 0
        return self._result(0.0, False)

    def step(self, action: SimpleNamespace) -> SimpleNamespace:
        self.turn += 1
        right = action.message == "[crane]"
        colours = "".join("G" if a == b else "X" for a, b in zip(action.message[1:-1], "crane", strict=False))
        self.feedback += f"\n{colours}"
        return self._result(float(right), right or self.turn == 6)


class WordleEnv:
    def __init__(self) -> None:
        self.client = TextArenaEnv(base_url="https://openenv-wordle.hf.space")

    def reset(self, **kwargs: Any) -> str | None:
        result = self.client.reset()
        self._last_full_feedback = result.observation.messages[0].content
        self.reward = 0.0
        self.done = False
        return self._last_full_feedback

    def guess(self, guess: str) -> str:
        """
        Make a guess in the Wordle environment.

        Args:
            guess: The guessed word, formatted as '[abcde]'

        Returns:
            The feedback message from the environment.
        """
        if self.done:
            raise ValueError("Game over.")
        result = self.client.step(SimpleNamespace(message=guess))
        full = result.observation.messages[0].content
        feedback = full[len(self._last_full_feedback) :]
        self._last_full_feedback = full
        if "You attempted an invalid move" in feedback:
            self.reward = 0.0
        else:
            self.reward = result.reward
        self.done = result.done
        return feedback


def wordle(names: SimpleNamespace, environment: Any) -> Any:
    return names.Trainer(
        model="Qwen/Qwen3-1.7B",
        reward_funcs=reward_from_env,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "You are an expert. "}]] * 1000}),
        args=names.Config(
            use_vllm=True,
            vllm_mode="colocate",
            chat_template_kwargs={"enable_thinking": False},
            max_completion_length=1024,
            num_generations=4,
            gradient_accumulation_steps=64,
        ),
        environment_factory=environment,
    )


GUESSES = [[call("guess", guess="[crate]"), call("guess", guess="[crane]"), call("guess", guess="[crane]")], ["no"]]


def test_openenv_wordle(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """openenv.md, Wordle, and openenv/wordle.py: the end is an exception, after which the model stops by itself."""
    script = Script(*GUESSES).install(monkeypatch)
    trainer = wordle(names, WordleEnv)
    log = trained(trainer)
    assert script.asked == [[0, 1], [0], [0], [0]]
    assert log["rewards/reward_from_env/mean"] == 0.5 and log["tools/failure_frequency"] == pytest.approx(1 / 3)
    assert "GGGXG" in trainer.processing_class.decode(trainer.last_rollout["completion_ids"][0])


def test_openenv_wordle_that_pays_for_turns(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with two lines more: a reward for each guess, and an end."""

    class Paying(WordleEnv):
        turn_reward: float | None = None
        terminated = False

        def guess(self, guess: str) -> str:
            """
            Make a guess in the Wordle environment.

            Args:
                guess: The guessed word, formatted as '[abcde]'
            """
            feedback = super().guess(guess)
            self.turn_reward, self.terminated = feedback.count("G") / 5, self.done
            return feedback

    script = Script(*GUESSES).install(monkeypatch)
    log = trained(wordle(names, Paying))
    assert script.asked == [[0, 1], [0]]
    assert log["rewards/turn_reward/mean"] == pytest.approx(0.8 + 1.0) and log["tools/failure_frequency"] == 0.0


class OpenSpielEnv:
    """Catch: a ball falls nine rows above a paddle."""

    def __init__(self, base_url: str) -> None: ...

    def _result(self) -> SimpleNamespace:
        state = [0.0] * 50
        state[5 * self.row + 1] = state[45 + self.paddle] = 1.0
        done = self.row == 9
        reward = None if not done else 1.0 if self.paddle == 1 else -1.0
        return SimpleNamespace(observation=SimpleNamespace(info_state=state, done=done), reward=reward)

    def reset(self) -> SimpleNamespace:
        self.row, self.paddle = 6, 2
        return self._result()

    def step(self, action: SimpleNamespace) -> SimpleNamespace:
        self.row, self.paddle = self.row + 1, min(4, max(0, self.paddle + action.action_id - 1))
        return self._result()


class MultiEnv:
    def __init__(self) -> None:
        self.active: str | None = None
        self.reward = 0.0
        self.done = False

    def reset(self, **kwargs: Any) -> str | None:
        self.active = kwargs.get("env", "wordle")
        self.reward = 0.0
        self.done = False
        self._client: Any = (TextArenaEnv if self.active == "wordle" else OpenSpielEnv)(base_url="")
        result = self._client.reset()
        return "Guess." if self.active == "wordle" else self._format(result.observation.info_state)

    @staticmethod
    def _format(info_state: list[float]) -> str:
        ball, *_, paddle = [i for i, value in enumerate(info_state) if value == 1.0] * 2
        return f"Ball: row {ball // 5 + 1}/10, column {ball % 5 + 1}/5\nPaddle: column {paddle % 5 + 1}/5"

    def guess(self, guess: str) -> str:
        """
        Make a guess in the Wordle environment.

        Args:
            guess: The guessed word, formatted as '[abcde]'

        Returns:
            The feedback message from the environment.
        """
        if self.active != "wordle":
            raise ValueError("guess is only available in Wordle")
        result = self._client.step(SimpleNamespace(message=guess))
        self.reward, self.done = result.reward, result.done
        return result.observation.messages[0].content  # type: ignore[no-any-return]

    def move(self, direction: str) -> str:
        """Move the paddle left or right.

        Args:
            direction: Direction to move, either "left" or "right".

        Returns:
            The observation after moving.
        """
        if self.active != "catch":
            raise ValueError("move is only available in Catch")
        if self.done:
            raise ValueError("Episode is done.")
        result = self._client.step(SimpleNamespace(action_id={"left": 0, "right": 2}[direction], game_name="catch"))
        self.reward = result.reward or 0.0
        self.done = result.observation.done
        return self._format(result.observation.info_state)


def test_openenv_catch_and_several(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """openenv/catch.py and openenv/multi_env.py: a reward function for each environment, `None` for the other's."""

    def wordle_reward(environments: Any, **kwargs: Any) -> list[float | None]:
        return [env.reward if env.active == "wordle" else None for env in environments]

    def catch_reward(environments: Any, **kwargs: Any) -> list[float | None]:
        return [None if env.active != "catch" else max(env.reward, 0.0) if env.done else 0.0 for env in environments]

    left, right = call("move", direction="left"), call("move", direction="right")
    Script([left, left, right, left], [call("guess", guess="[crane]"), left]).install(monkeypatch)
    trainer = names.Trainer(
        model="Qwen/Qwen3-1.7B",
        args=names.Config(chat_template_kwargs={"enable_thinking": False}, shuffle_dataset=False),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": "Play. "}]] * 4, "env": ["catch"] * 4}
        ),
        reward_funcs=[wordle_reward, catch_reward],
        environment_factory=MultiEnv,
    )
    log = trained(trainer)
    # Left, left, right ends below the ball; the fourth move is refused, and so is a guess.
    assert log["rewards/catch_reward/mean"] == 0.5 and log["reward"] == 0.5
    assert log["tools/failure_frequency"] == pytest.approx(2 / 6)


def test_an_agent_with_a_database(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """grpo_agent.py, with a table of two rows in place of BioGRID."""
    path = tmp_path / "biogrid.db"
    with sqlite3.connect(path) as made:
        made.execute("create table interactions (a text, b text)")
        made.executemany("insert into interactions values (?, ?)", [("JNKK", "MAPK8"), ("TP53", "MDM2")])

    def query_biogrid(sql_command: str) -> list[tuple]:
        """
        Execute a read-only SQL command on the BioGRID database.

        Args:
            sql_command: The SQL command to execute.

        Returns:
            A list of tuples containing the query results.
        """
        conn = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        cursor = conn.cursor()
        try:
            cursor.execute(sql_command)
            results = cursor.fetchall()
        finally:
            conn.close()
        return results

    def correctness_reward(completions: Any, answer: Any, **kwargs: Any) -> list[float]:
        rewards = []
        for completion, ans in zip(completions, answer, strict=False):
            match = re.search(r"\*(yes|no)\*", completion[-1]["content"].lower())
            guess = match.group(1) if match else None
            rewards.append(-0.5 if guess is None else 0.6 if guess == ans.lower() else -1.0)
        return rewards

    def structure_reward(completions: Any, **kwargs: Any) -> list[float]:
        rewards = []
        for completion in completions:
            has_call = any(turn.get("tool_calls") for turn in completion)
            has_response = any(turn["role"] == "tool" for turn in completion)
            has_other = any(turn["role"] == "assistant" and turn["content"].strip() for turn in completion)
            rewards.append((0.1 if has_other else 0.05) if has_call and has_response else -0.15 if has_call else 0.0)
        return rewards

    query = call("query_biogrid", sql_command="SELECT b FROM interactions WHERE a = 'JNKK'")
    wrong = call("query_biogrid", sql_command="DROP TABLE interactions")
    Script([query, "*Yes*"], [wrong, "I cannot say."]).install(monkeypatch)
    trainer = names.Trainer(
        model="Qwen/Qwen3-1.7B",
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": "Does JNKK interact?"}]] * 4, "answer": ["Yes"] * 4}
        ),
        tools=[query_biogrid],
        reward_funcs=[correctness_reward, structure_reward],
        args=names.Config(max_completion_length=1024, chat_template_kwargs={"enable_thinking": False}),
    )
    log = trained(trainer)
    assert log["rewards/correctness_reward/mean"] == pytest.approx((0.6 - 0.5) / 2)
    assert log["rewards/structure_reward/mean"] == pytest.approx(0.1)
    assert log["tools/failure_frequency"] == 0.5
    said = trainer.processing_class.batch_decode(trainer.last_rollout["completion_ids"])
    assert any("readonly database" in text for text in said)  # TRL takes a list for content of several kinds
