"""Rewards for steps: what a reward function may return instead of one number per completion, and where it is paid.

[`rewards_per`] declares the unit of a function, which then returns one reward for each such unit:

    unit    list for each completion              a reward is paid at
    token   as long as its `completion_ids`       that token
    turn    one for each turn of the policy       the turn's last token
    step    one for each piece of its text        the piece's last token, the separator included
    span    (start, end, reward) each             the token with the last character of `text[start:end]`

Tokens of an environment are no actions: a reward at one of them is paid at the policy's last token before it.
"""

import functools
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from rl_plugins.functional.alignment import last_real

UNITS = ("token", "turn", "step", "span")


class RewardUnit(NamedTuple):
    """Unit of a reward function, which returns one reward for each such unit.

    Attributes:
        kind: One of `UNITS`; `None` where the function declares none.
        separator: Text that ends a step.
    """

    kind: str | None = None
    separator: str = "\n\n"


F = TypeVar("F", bound=Callable[..., Any])


def rewards_per(kind: str, *, separator: str = "\n\n") -> Callable[[F], F]:
    r"""Declare the unit of a reward function: a token, a turn, a step or a span of the completion.

    The function then returns a list for each completion, with a reward for each unit in it. `None` in place of a list
    or of a reward stands for no reward.

    Args:
        kind: `token`, `turn`, `step` or `span`.
        separator: Text that ends a step, for `step`. [`text_steps`] cuts a text as the trainers do.

    Example:

    ```python
    @rewards_per("step", separator="\n")
    def equations_hold(completions, **kwargs):
        return [[float(holds(step)) for step in text_steps(text, "\n")] for text in completions]
    ```

    Raises:
        ValueError: If the kind is unknown, or the separator is empty.
        TypeError: If the function takes no attributes; wrap it in a function of your own.
    """
    if kind not in UNITS:
        raise ValueError(f"rewards_per({kind!r}): choose one of {', '.join(UNITS)}.")
    if not separator:
        raise ValueError("rewards_per: the separator is empty, so that no step would ever end. Give a text.")

    def declare(func: F) -> F:
        try:
            func.reward_unit = RewardUnit(kind, separator)  # type: ignore[attr-defined]
        except AttributeError:
            raise TypeError(f"{func!r} takes no attributes. Wrap it in a function of your own.") from None
        return func

    return declare


def reward_unit(func: Any) -> RewardUnit:
    """Read the unit of a reward function, through any `functools.partial` around it."""
    while isinstance(func, functools.partial) and not hasattr(func, "reward_unit"):
        func = func.func
    return getattr(func, "reward_unit", RewardUnit())


def text_steps(text: str, separator: str = "\n\n") -> list[str]:
    r"""Cut a text into its steps, without their separators; blank ones are left out.

    `"a = 1\n\nb = 2\n\n"` has the steps `"a = 1"` and `"b = 2"`.
    """
    return [text[start:end] for start, end, _ in _pieces(text, separator)]


def _pieces(text: str, separator: str) -> Iterator[tuple[int, int, int]]:
    """Start and end of each step, and the end of its separator: (0, 5, 7) for the first one above."""
    start = 0
    while start < len(text):
        found = text.find(separator, start)
        end, after = (len(text), len(text)) if found < 0 else (found, found + len(separator))
        if text[start:end].strip():
            yield start, end, after
        start = after


def token_ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Count the characters of a text that are complete after each of its tokens.

    Several tokens may share a character (bytes of an emoji); the last of them completes it. The tokens are those that
    were generated; encoding the text anew might give others.

    Args:
        tokenizer: Tokenizer of the text.
        ids: Its T tokens.

    Returns:
        T numbers, rising to `len(tokenizer.decode(ids, skip_special_tokens=True))`.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    text = tokenizer.decode(ids, skip_special_tokens=True)
    backend, ends, decoded = getattr(tokenizer, "backend_tokenizer", None), [], ""
    if backend is not None:
        stream = DecodeStream(skip_special_tokens=True)
        for token in ids:
            decoded += stream.step(backend, int(token)) or ""
            ends.append(len(decoded))
    if decoded == text and len(ends) == len(ids):
        return ends
    # Some tokenizers do more than their backend: decode each beginning, and see how far it agrees with the text.
    ends = []
    for count in range(1, len(ids) + 1):
        begun = tokenizer.decode(ids[:count], skip_special_tokens=True)
        ends.append(max(len(os.path.commonprefix([begun, text])), ends[-1] if ends else 0))
    if ends:
        ends[-1] = len(text)
    return ends


@dataclass
class Completed:
    """Completions that reward functions are called on, as tokens.

    Attributes:
        ids: Tokens of each completion, those of an environment included.
        chosen: For each completion 1 where the policy chose the token, 0 where it comes from an environment; `None`
            where all are the policy's.
        tokenizer: Decodes them.
    """

    ids: Sequence[Sequence[int]]
    chosen: Sequence[Sequence[int]] | None = None
    tokenizer: Any = None

    def policy_mask(self, row: int) -> Sequence[int]:
        """Mask the policy's tokens of a completion."""
        return [1] * len(self.ids[row]) if self.chosen is None else self.chosen[row]

    def turns(self, row: int) -> list[tuple[int, int]]:
        """Find the first and last token of each turn."""
        mask = [0, *self.policy_mask(row), 0]
        starts = [t for t in range(1, len(mask)) if mask[t] and not mask[t - 1]]
        ends = [t for t in range(1, len(mask)) if mask[t - 1] and not mask[t]]
        return [(start - 1, end - 2) for start, end in zip(starts, ends, strict=True)]

    def text(self, row: int) -> str:
        """Decode a completion."""
        decoder = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        return decoder.decode(self.ids[row], skip_special_tokens=True)

    def step_ends(self, row: int, separator: str) -> tuple[list[int], bool]:
        """Find the last token of each step, and whether the separator occurs at all."""
        ends, text, found, occurs = token_ends(self.tokenizer, self.ids[row]), self.text(row), [], False
        for first, last in self.turns(row):
            start, stop = ends[first - 1] if first else 0, ends[last]
            turn = text[start:stop]
            occurs |= separator in turn
            pieces = list(_pieces(turn, separator))
            for _, _, after in pieces:
                found.append(_token_of(ends, start + after, last))
            if pieces:  # the end-of-text token is part of the last step
                found[-1] = last
        return found, occurs


def _token_of(ends: Sequence[int], characters: int, last: int) -> int:
    """Find the first token after which so many characters are complete."""
    token = bisect_left(ends, characters)
    return token if token < len(ends) else last


class TokenRewards(NamedTuple):
    """Rewards of completions that are given for each token already.

    Attributes:
        rewards: (B, T), NaN where nothing is paid.
    """

    rewards: Tensor


class StepRewards:
    """Rewards that step functions paid for a set of completions, and the tokens after which they did.

    Args:
        completed: The completions.
    """

    def __init__(self, completed: Completed) -> None:
        self.completed = completed
        self.paid: dict[int, list[dict[int, float]]] = {}
        """For each step function by its number: reward by token, for each completion."""
        self.at_tokens: dict[int, Tensor] = {}
        """For each other source by its number: rewards (B, T), NaN where nothing is paid."""
        self._steps: dict[tuple[int, str], tuple[list[int], bool]] = {}
        self.unseparated: dict[int, int] = {}
        """For each function with a separator by its number: completions that lack the separator."""

    @staticmethod
    def are_steps(func: Any, rewards: list[Any]) -> bool:
        """Tell whether a function returned rewards of steps: it has a unit, or one of its lists has not exactly one
        number. Lists of one number each are a column of a tensor."""
        listed = [row for row in map(as_list, rewards) if row is not None]
        return reward_unit(func).kind is not None or any(len(row) != 1 for row in listed)

    def take(self, number: int, func: Any, returned: str, moment: str, rewards: list[Any]) -> list[float]:
        """Take in what a function returned.

        Args:
            number: Number of the function among the reward functions.
            func: The function.
            returned: Beginning of an error message, such as `"The reward function 'f' returned"`.
            moment: When it was called, such as `" in step 3"`.
            rewards: An entry for each completion.

        Returns:
            A number for each completion, the sum of its steps' rewards; NaN for none.

        Raises:
            TypeError: If numbers and lists are mixed, or a list holds something else than numbers.
            ValueError: If a list has another length than there are tokens, turns or steps, or a span is outside of
                the text.
        """
        kind, separator = reward_unit(func)
        listed = [as_list(entry) for entry in rewards]
        for row, entry in enumerate(listed):
            if entry is None and rewards[row] is not None:
                raise TypeError(
                    f"{returned} {rewards[row]!r} for completion {row}{moment}, but its other rewards are lists, or "
                    "rewards_per declares lists. Return a list for each completion, or None for a completion without "
                    "rewards."
                )
        places, sums = [], []
        for row, entry in enumerate(listed):
            at: dict[int, float] = {}
            if entry is not None:
                for token, reward in self._placed(kind or "token", separator, row, entry, returned, moment):
                    if not math.isnan(reward):
                        at[token] = at.get(token, 0.0) + reward
            places.append(at)
            total = sum(at.values()) if at else None
            # Infinities of both signs make the completion as unusable as one of them does; they are not "no reward".
            sums.append(math.nan if total is None else math.inf if math.isnan(total) else total)
        self.paid[number] = places
        if kind == "step":
            occurs = (self._step_ends(row, separator)[1] for row in range(len(listed)))
            self.unseparated[number] = sum(not found for found in occurs)
        return sums

    def _step_ends(self, row: int, separator: str) -> tuple[list[int], bool]:
        """Call `Completed.step_ends`, which decodes a completion token by token, only once for all functions."""
        key = row, separator
        if key not in self._steps:
            self._steps[key] = self.completed.step_ends(row, separator)
        return self._steps[key]

    def take_tokens(self, number: int, rewards: Tensor, mask: Tensor) -> Tensor:
        """Take in rewards that are given for each token already.

        Args:
            number: Number of their source among the reward functions.
            rewards: (B, T), NaN where nothing is paid.
            mask: The policy's tokens (B, T).

        Returns:
            Sums (B,), NaN where a completion is paid nothing.

        Raises:
            ValueError: If the shape is another one, or a token is paid that is not the policy's.
        """
        if rewards.shape != mask.shape:
            raise ValueError(
                f"rewards {tuple(rewards.shape)} are not one for each token of the completions {tuple(mask.shape)}."
            )
        paid = ~rewards.isnan()
        if bool((paid & ~mask.bool() & (rewards != 0)).any()):
            raise ValueError(
                "rewards are paid at tokens that the policy did not choose: those of an environment, or padding. Pay "
                "them at the policy's last token before."
            )
        self.at_tokens[number] = rewards
        sums = rewards.nansum(1)
        sums = sums.masked_fill(sums.isnan(), torch.inf)  # infinities of both signs
        return sums.masked_fill(~(paid & mask.bool()).any(1), torch.nan)

    def _placed(
        self, kind: str, separator: str, row: int, entry: list[Any], returned: str, moment: str
    ) -> Iterator[tuple[int, float]]:
        """Token and reward of each step of a completion; NaN for none."""
        completed, where = self.completed, f"for completion {row}{moment}"
        places = _at_policy(completed.policy_mask(row))
        if kind == "span":
            text, ends = completed.text(row), token_ends(completed.tokenizer, completed.ids[row])
            for span in entry:
                if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 3:
                    raise TypeError(f"{returned} {span!r} {where}. Return (start, end, reward) for each span.")
                start, end, reward = span
                if not 0 <= start < end <= len(text):
                    raise ValueError(
                        f"{returned} the span {start}:{end} {where}, whose text has {len(text)} characters. Return "
                        "spans with 0 <= start < end <= len(text)."
                    )
                yield places[_token_of(ends, end, len(ends) - 1)], _number(reward, returned, where)
            return
        if kind == "token":
            tokens = list(range(len(completed.ids[row])))
        elif kind == "turn":
            tokens = [last for _, last in completed.turns(row)]
        else:
            tokens, _ = self._step_ends(row, separator)
        if len(entry) != len(tokens):
            things = {"token": "tokens", "turn": "turns of the policy", "step": f"steps that end with {separator!r}"}
            raise ValueError(
                f"{returned} {len(entry)} rewards {where}, which has {len(tokens)} {things[kind]}. Return one for "
                "each (None for no reward), or declare another unit with rewards_per."
            )
        for token, reward in zip(tokens, entry, strict=True):
            yield places[token], _number(reward, returned, where)

    def token_rewards(self, rewards: Tensor, mask: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Put the rewards of all functions at the tokens after which they are paid.

        Args:
            rewards: Rewards of F functions, a number or a sum for each completion (B, F); NaN for none.
            mask: The policy's tokens (B, T); a number for a completion is paid at the last of them.
            weights: (F,); ones by default.

        Returns:
            The weighted sum (B, T), 0 where nothing is paid, and a mask (B, T) of where something is paid, even if 0.
        """
        end = last_real(mask)
        at = torch.where(end[..., None], rewards[:, None], torch.nan)  # (B, T, F)
        for number, places in self.paid.items():
            column = torch.full(mask.shape, torch.nan)
            for row, place in enumerate(places):
                column[row, list(place)] = torch.tensor(list(place.values()))
            at[..., number] = column.to(at)
        for number, given in self.at_tokens.items():
            at[..., number] = given.to(at)
        at = at.masked_fill(~mask.bool()[..., None], torch.nan)
        weighted = at if weights is None else at * weights.to(at)
        return weighted.nansum(-1), ~at.isnan().all(-1)


def _at_policy(chosen: Sequence[int]) -> list[int]:
    """Find for each token the policy's last token up to it; the policy's first token where there is none."""
    last = next((t for t, own in enumerate(chosen) if own), None)
    if last is None:
        return list(range(len(chosen)))
    places = []
    for t, own in enumerate(chosen):
        last = t if own else last
        places.append(last)
    return places


def as_list(entry: Any) -> list[Any] | None:
    """Return an entry of several rewards as a list; `None` for a single one."""
    if isinstance(entry, Tensor) or type(entry).__module__ == "numpy":
        entry = entry.tolist()
    return list(entry) if isinstance(entry, list | tuple) else None


def as_float(reward: Any) -> float:
    """Return a single reward as a number, NaN for None.

    Raises:
        TypeError: If it is no number.
    """
    if isinstance(reward, str | bytes):
        raise TypeError(f"{reward!r} is no number")
    while isinstance(reward, list) and len(reward) == 1:  # a column of a tensor
        (reward,) = reward
    return math.nan if reward is None else float(reward)


def _number(reward: Any, returned: str, where: str) -> float:
    try:
        return as_float(reward)
    except (TypeError, ValueError):
        raise TypeError(
            f"{returned} {reward!r} {where} instead of a number. Return a number, or None for no reward."
        ) from None
