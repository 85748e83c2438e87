"""Episodes of several turns: a model and a text environment answer each other."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rl_plugins.rollouts.completions import Completions, pad_left
from rl_plugins.rollouts.reward_models import is_conversational


class TextEnvironment(Protocol):
    """A game, a tool or a user, as text: Gymnasium's `reset` and `step` with strings."""

    def reset(self, **row: Any) -> Any:
        """Begin an episode.

        Args:
            row: Columns of the data, the prompt among them.

        Returns:
            The first observation, which is added to the prompt; `None` or `""` for none. A pair of observation and
            info works, too.
        """

    def step(self, action: str) -> tuple[str, float | None, bool, bool, dict[str, Any]]:
        """Answer a turn of the policy.

        Returns:
            The next observation; the reward of the turn, `None` for none; whether the episode has ended (terminated);
            whether it was cut although it would go on (truncated); and an info, which nothing reads. Outside a chat
            the observation needs some text, at least a line break: else two turns would count as one.
        """


class Turns(NamedTuple):
    """Tokenizer and limits with which episodes are written down as tokens.

    Attributes:
        tokenizer: Tokenizer of the model.
        eos: Tokens that end a turn.
        max_completion_length: T, longest episode in tokens after the prompt, those of the environment included.
        max_turns: Most turns of the policy.
        max_turn_length: Longest turn in tokens; a longer one is cut there, and still is an action.
    """

    tokenizer: Any
    eos: Sequence[int]
    max_completion_length: int
    max_turns: int | None = None
    max_turn_length: int | None = None


Generate = Callable[[Sequence[Sequence[int]], int], Completions]
"""`(prompts, max_length) -> completions` of token lists."""


class _Episode:
    """An episode so far: its tokens after the prompt, and what each of them earned."""

    def __init__(self, prompt_ids: list[int], environment: TextEnvironment, chat: bool) -> None:
        self.prompt_ids, self.environment, self.chat = prompt_ids, environment, chat
        self.ids: list[int] = []
        self.chosen: list[int] = []
        self.rewards: list[float] = []
        self.turns = self.answers = 0
        self.goes_on, self.terminated, self.truncated, self.pays = True, False, False, False

    def add(self, ids: Sequence[int], *, own: bool) -> None:
        """Append tokens of the policy or of the environment."""
        self.ids += ids
        self.chosen += [int(own)] * len(ids)
        self.rewards += [math.nan] * len(ids)

    def act(self, ids: Sequence[int], turns: Turns) -> None:
        """Take a turn of the policy, and what the environment answers."""
        left = turns.max_completion_length - len(self.ids)
        limit = left if turns.max_turn_length is None else min(left, turns.max_turn_length)
        whole = len(ids) < limit or ids[-1] in turns.eos or limit == turns.max_turn_length
        self.add(ids, own=True)
        self.turns += 1
        if not whole:  # cut by the length of the episode in the middle of an action, which earns nothing
            self.rewards[-1] = 0.0
            self.goes_on = False
            return
        action = turns.tokenizer.decode(ids, skip_special_tokens=True)
        observation, reward, self.terminated, self.truncated, _ = self.environment.step(action)
        self.answers += 1
        if reward is not None:
            self.rewards[-1], self.pays = float(reward), True
        over = self.terminated or self.truncated or self.turns == turns.max_turns
        self.goes_on = not over
        if self.terminated:
            return  # nobody acts on what was observed last
        answer = _observed(turns.tokenizer, observation or "", self.chat)
        # An episode that goes on needs room for the observation and one more token.
        if len(self.ids) + len(answer) < turns.max_completion_length:
            self.add(answer, own=False)
        else:
            self.goes_on = False


@torch.no_grad()
def play_episodes(
    generate: Generate,
    prompts: Sequence[Any],
    environments: Sequence[TextEnvironment],
    turns: Turns,
    *,
    rows: Sequence[dict[str, Any]] | None = None,
    pad_token_id: int,
    device: torch.device | str = "cpu",
    any_rank: Callable[[bool], bool] = bool,
    must_pay: Callable[[bool], bool] | None = None,
) -> Completions:
    r"""Play an episode with each environment, all side by side: in every round each unfinished episode has one turn.

    A completion holds the turns of the policy and, masked in `tool_mask`, what the environment answered. The reward of
    a turn is paid at the turn's last token; a turn that `max_completion_length` cuts is no action and earns 0. If
    prompts are conversations, observations become user messages in the tokenizer's chat template. Otherwise their text
    is appended as it is, so put separators into it.

    Args:
        generate: Makes turns; [`~rl_plugins.rollouts.generate_completions`] with all other arguments filled in.
        prompts: B prompts, text or messages.
        environments: One for each prompt.
        turns: Tokenizer and limits of the episodes.
        rows: Columns of the data for the environments' `reset`; the prompts alone by default.
        pad_token_id: Token of the padding.
        device: Device of the results.
        any_rank: Tells whether something holds on any rank, where all ranks must call `generate` equally often.
        must_pay: Given if only the environments give rewards, so that one of them has to; tells whether something
            holds on any rank.

    Returns:
        Completions with `tool_mask`, `rewards` (B, T), NaN where nothing was paid, and `truncated` (B,).

    Raises:
        ValueError: If there are not as many environments as prompts, an environment returns no five-tuple, or no
            environment pays where `must_pay` is given.
    """
    if len(environments) != len(prompts):
        raise ValueError(f"There are {len(environments)} environments for {len(prompts)} prompts. Give one for each.")
    rows = [{"prompt": prompt} for prompt in prompts] if rows is None else rows
    episodes = []
    for prompt, environment, row in zip(prompts, environments, rows, strict=True):
        started = environment.reset(**row)
        observation = started[0] if isinstance(started, tuple) else started
        ids = _first_ids(turns.tokenizer, prompt, observation or "")
        episodes.append(_Episode(ids, environment, is_conversational(prompt)))
    while any_rank(any(episode.goes_on for episode in episodes)):
        going = [episode for episode in episodes if episode.goes_on]
        # A rank without unfinished episodes generates along with the others, and drops the result.
        asked = going or episodes[:1]
        left = max(turns.max_completion_length - len(episode.ids) for episode in going) if going else 1
        limit = left if turns.max_turn_length is None else min(left, turns.max_turn_length)
        made = generate([episode.prompt_ids + episode.ids for episode in asked], limit).token_lists()
        for episode, ids in zip(going, made, strict=False):
            room = turns.max_completion_length - len(episode.ids)
            _act(episode, ids[:room], turns)
    if must_pay is not None:
        _check_paid(episodes, must_pay)
    return _written(episodes, pad_token_id, device)


def _check_paid(episodes: Sequence[_Episode], any_rank: Callable[[bool], bool]) -> None:
    """Refuse environments that have answered turns, and paid none of them."""
    answered = any_rank(any(episode.answers for episode in episodes))
    paid = any_rank(any(episode.pays for episode in episodes))
    if answered and not paid:
        names = ", ".join(sorted({type(episode.environment).__name__ for episode in episodes}))
        raise ValueError(
            f"There is no reward: {names}.step returned None as reward for every turn of the first batch of episodes, "
            "and there are no reward functions besides. Return a number, 0 for a turn worth nothing, or give "
            "reward_funcs."
        )


def _act(episode: _Episode, ids: Sequence[int], turns: Turns) -> None:
    try:
        episode.act(ids, turns)
    except (TypeError, ValueError) as error:
        name = type(episode.environment).__name__
        error.add_note(
            f"In turn {episode.turns} of an episode with {name}. Its step(text) has to return (observation, reward, "
            "terminated, truncated, info), as in Gymnasium."
        )
        raise


def _first_ids(tokenizer: Any, prompt: Any, observation: str) -> list[int]:
    """Tokens of a prompt and the first observation."""
    if not is_conversational(prompt):
        return tokenizer(text=prompt + observation)["input_ids"]
    last = prompt[-1]
    messages = [*prompt[:-1], {**last, "content": last["content"] + observation}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def _observed(tokenizer: Any, observation: str, chat: bool) -> list[int]:
    """Tokens of an observation and of what the chat template puts around it."""
    if not chat:
        return tokenizer(text=observation, add_special_tokens=False)["input_ids"]
    before: list[dict[str, str]] = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    short = tokenizer.apply_chat_template(before, tokenize=True, return_dict=False)
    after = [*before, {"role": "user", "content": observation}]
    long = tokenizer.apply_chat_template(after, add_generation_prompt=True, tokenize=True, return_dict=False)
    # The policy's turn ends with its end-of-text token; some templates write more after it, which is not there yet.
    if tokenizer.eos_token_id in short:
        short = short[: len(short) - short[::-1].index(tokenizer.eos_token_id)]
    if long[: len(short)] != short:
        raise ValueError(
            "The chat template writes earlier turns differently once another follows, so an observation cannot be "
            "appended. Give a template that only ever appends, such as TRL's training templates."
        )
    return long[len(short) :]


def _written(episodes: Sequence[_Episode], pad_token_id: int, device: torch.device | str) -> Completions:
    """Write episodes as padded tensors."""
    width = max(1, *(len(episode.ids) for episode in episodes))

    def padded(rows: list[list[Any]], fill: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype, device=device)

    return Completions(
        *pad_left([episode.prompt_ids for episode in episodes], pad_token_id, device),
        padded([episode.ids for episode in episodes], pad_token_id, torch.long),
        padded([[1] * len(episode.ids) for episode in episodes], 0, torch.long),
        torch.tensor([episode.terminated for episode in episodes], device=device),
        tool_mask=padded([episode.chosen for episode in episodes], 1, torch.long),
        rewards=padded([episode.rewards for episode in episodes], math.nan, torch.float32),
        truncated=torch.tensor([episode.truncated for episode in episodes], device=device),
    )
