"""Environments of TRL that pay after every turn, and that end or truncate their episode.

TRL plays an `environment_factory`'s environments by calling their public methods as tools, and asks `get_reward()` for
one number at the end. Here an environment may have three more attributes, which are read after each call of one of its
methods:

    turn_reward   reward of the turn that made the call; a number, or None. It is set to None before the call.
    terminated    whether the episode is over: the model is not asked for another turn.
    truncated     whether the episode was cut although it goes on: the critic takes V(s_T) for what would follow.

The two flags are set to False before `reset`, unless they are properties. Their names and meaning are Gymnasium's.
If an environment has any of the three, the asynchronous calls of a turn run one after the other.
"""

import asyncio
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from rl_plugins.rollouts.step_rewards import rewards_per

# The reward function of turns has the attribute's name.
TURN_REWARD, TERMINATED, TRUNCATED = "turn_reward", "terminated", "truncated"


def pays_turns(environments: Iterable[Any]) -> bool:
    """Return whether any environment pays for turns.

    Raises:
        TypeError: If `turn_reward` cannot be set to None before a call.
    """
    found = [environment for environment in environments if hasattr(environment, TURN_REWARD)]
    for environment in found:
        if _is_fixed(environment, TURN_REWARD):
            raise TypeError(
                f"{type(environment).__name__}.{TURN_REWARD} is a property that cannot be set, and it has to be None "
                "before each call. Make it an attribute, or give the property a setter."
            )
    return bool(found)


def _is_fixed(environment: Any, name: str) -> bool:
    """Return whether an attribute is a property without a setter."""
    found = inspect.getattr_static(type(environment), name, None)
    return isinstance(found, property) and found.fset is None


class Episodes:
    """Rewards and ends of the episodes of one batch, read from the environments after each call of their tools."""

    def __init__(self) -> None:
        self.environments: Sequence[Any] = []
        self.rewards: list[dict[int, float]] = []
        """Reward by number of the turn, for each row."""
        self._unreadable: tuple[Any, Any] | None = None
        self._completions: Sequence[list[dict[str, Any]]] = []
        self._messages: list[int] = []
        self.playing = False
        """Whether tools are being called."""

    def reset(self, pool: Iterable[Any]) -> None:
        """Set the flags of the environments of earlier batches to False, before their `reset`."""
        for environment in pool:
            for flag in (TERMINATED, TRUNCATED):
                if not _is_fixed(environment, flag) and hasattr(environment, flag):
                    setattr(environment, flag, False)

    def begin(
        self, environments: Sequence[Any] | None, completions: Sequence[list[dict[str, Any]]], *tools: Sequence[Any]
    ) -> None:
        """Begin to observe the tools of a batch.

        Args:
            environments: Environments of the rows; `None` if there are none.
            completions: Messages of each row, which grow as turns are made.
            tools: Dictionaries of tools by name, one for each row; methods of environments in them are replaced.
        """
        self.environments, self._completions = environments or [], completions
        self.rewards = [{} for _ in completions]
        self._messages = [len(messages) for messages in completions]
        self.playing, self._unreadable = True, None
        self._alone: dict[int, asyncio.Lock] = {}
        for row, environment in enumerate(self.environments):
            for by_name in (of_rows[row] for of_rows in tools):
                for name, tool in by_name.items():
                    if getattr(tool, "__self__", None) is environment:
                        by_name[name] = self._heard(tool, row)

    def end(self) -> None:
        """Stop observing the tools.

        Raises:
            TypeError: If an environment paid something else than a number. The error comes only here, since the host
                takes an error during a call for an answer of the tool.
        """
        self.playing = False
        if self._unreadable is not None:
            environment, reward = self._unreadable
            raise TypeError(
                f"{type(environment).__name__}.{TURN_REWARD} is {reward!r} after a call. Set it to a number, or to "
                "None for no reward."
            )

    def _heard(self, tool: Callable[..., Any], row: int) -> Callable[..., Any]:
        """Wrap a tool of an environment, to record its effect on the episode."""
        # The host awaits all calls of a turn at once. With a lock they run one by one, so the effect of each is known.
        speaks = any(hasattr(self.environments[row], name) for name in (TURN_REWARD, TERMINATED, TRUNCATED))
        alone = self._alone.setdefault(row, asyncio.Lock()) if speaks else nullcontext()

        async def call_async(**arguments: Any) -> Any:
            async with alone:
                self._before(row)
                try:
                    return await tool(**arguments)
                finally:  # a tool that refuses a move by an error may also have ended the episode
                    self._after(row)

        def call(**arguments: Any) -> Any:
            self._before(row)
            try:
                return tool(**arguments)
            finally:
                self._after(row)

        return call_async if inspect.iscoroutinefunction(tool) else call

    def _before(self, row: int) -> None:
        if self.is_over(row):
            raise ValueError("The episode is over.")
        if hasattr(self.environments[row], TURN_REWARD):
            setattr(self.environments[row], TURN_REWARD, None)

    def _after(self, row: int) -> None:
        reward = getattr(self.environments[row], TURN_REWARD, None)
        if reward is not None:
            try:
                number = float(reward)
            except (TypeError, ValueError):
                self._unreadable = self.environments[row], reward
                return
            turn = sum(message["role"] == "assistant" for message in self._completions[row]) - 1
            self.rewards[row][turn] = self.rewards[row].get(turn, 0.0) + number

    def _says(self, row: int, flag: str) -> bool:
        return bool(getattr(self.environments[row], flag, False)) if self.environments else False

    def is_over(self, row: int) -> bool:
        """Return whether the row's episode has ended or was truncated."""
        return self._says(row, TERMINATED) or self._says(row, TRUNCATED)

    def is_truncated(self, row: int) -> bool:
        """Return whether the row's episode was truncated, so that it goes on after its last turn."""
        return self._says(row, TRUNCATED) and not self._says(row, TERMINATED)

    def waiting(self) -> list[int]:
        """List the rows whose tools have answered since the last call of this method, and whose next turn is due."""
        rows = [
            row
            for row, messages in enumerate(self._completions)
            if messages and messages[-1]["role"] == "tool" and len(messages) != self._messages[row]
        ]
        self._messages = [len(messages) for messages in self._completions]
        return rows

    def drop_last_observation(self, *of_rows: list[list[Any]] | None, chosen: list[list[int]]) -> None:
        """Remove the environment's last answer from rows whose episode has ended: the policy does not act after it.

        Args:
            of_rows: Lists with an entry for each token of each row, such as its id.
            chosen: 1 for the policy's tokens, 0 for the environment's; cut like the others.
        """
        for row, mask in enumerate(chosen):
            if self._says(row, TERMINATED):
                kept = len(mask) - next((i for i, own in enumerate(reversed(mask)) if own), len(mask))
                for rows in (*of_rows, chosen):
                    if rows is not None:
                        del rows[row][kept:]

    def turn_rewards(self) -> Callable[..., Any]:
        """Make the reward function of the turns."""

        @rewards_per("turn")
        def turn_reward(completions: list[Any], **_: Any) -> list[list[float | None] | None]:
            rows = range(len(completions))
            return [self._of_turns(row) if pays_turns(self.environments[row : row + 1]) else None for row in rows]

        return turn_reward

    def _of_turns(self, row: int) -> list[float | None]:
        turns = sum(message["role"] == "assistant" for message in self._completions[row])
        return [self.rewards[row].get(turn) for turn in range(turns)]
