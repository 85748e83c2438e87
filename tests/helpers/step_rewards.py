"""Rewards of steps: a function that pays tokens, and an environment of several turns."""

from typing import Any, ClassVar

from rl_plugins.rollouts import rewards_per

LIMITS: dict[str, int] = {"max_turns": 4, "max_turn_length": 3}
"""How episodes are played."""
LENGTH = 20
"""Longest episode in tokens; every one ends before."""


@rewards_per("token")
def per_token(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float | None]]:
    """In [-0.5, 0.5], at some tokens, the first among them."""
    return [
        [None if k and i % 3 == 0 else (k + 1) * (i + 3) ** 2 % 11 / 10 - 0.5 for k, i in enumerate(ids)]
        for ids in completion_ids
    ]


class Sums:
    """Episodes of one to three turns that depend on the prompt, the turns and a number of the environment alone.

    For every sixth prompt the first of several turns is not paid, for every seventh the episode is truncated.

    Args:
        place: Number of the environment, so that the episodes of a prompt differ.
    """

    played: ClassVar[list[tuple[int, int, bool]]] = []
    """Number of the prompt, turns, and whether it was truncated, of every episode that has ended."""

    def __init__(self, place: int = 0) -> None:
        self.place = place

    def reset(self, prompt: str, **row: Any) -> str:
        self.number, self.turns = int(prompt.split("+")[0]), 0
        own = self.number + self.place
        self.length = 3 if own % 5 == 0 else 1 + own % 2
        return f"{self.place}="

    def step(self, action: str) -> tuple[str, float | None, bool, bool, dict[str, Any]]:
        self.turns += 1
        last, truncates = self.turns == self.length, self.number % 7 == 3
        if last:
            self.played.append((self.number, self.turns, truncates))
        share = sum((k + 1) * (ord(char) + self.place) ** 2 for k, char in enumerate(action)) % 97 / 97
        unpaid = not last and self.turns == 1 and self.number % 6 == 0
        answer = f"{(self.number * self.turns + self.place) % 10}="
        return answer, None if unpaid else share, last and not truncates, last and truncates, {}
