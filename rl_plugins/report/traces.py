"""Completions with the critic's value and TD error of each token, read from a trainer's newest batch.

`values[t] = V(s_t)` of head 1, before token `t` is chosen; `td_errors[t] = delta_t`, after it.
Legend: `B` completions, `T` completion tokens, `P` prompt tokens, `K` value heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.alignment import last_real
from rl_plugins.functional.turns import turn_ends
from rl_plugins.report.token_text import token_texts

ANSWER_COLUMNS = ("answer", "solution")


@dataclass(frozen=True)
class TokenTrace:
    """One completion with the critic's estimates.

    Args:
        prompt: Text of the prompt.
        tokens: (T,) text of each completion token, as `traces_from_rollout` decodes it: a character that is spread
            over several tokens is whole on the last of them, and its other bytes are lone surrogates, U+DC80 to
            U+DCFF.
        values: (T,) `V(s_t)` of head 1; NaN where missing.
        td_errors: (T,) `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)`; NaN where missing.
        reward: Return of the completion.
        extra: Short facts to show beside the reward, by name.
        rewards: (T,) reward paid after each token; NaN where nothing is paid. `None` shows the return alone.
        tool_mask: (T,) false for tokens of an environment, whose values and TD errors are not shown. `None` where the
            policy chose all tokens.
        answer: The answer that the data expects. `None` where the data has none.
    """

    prompt: str
    tokens: list[str]
    values: list[float]
    td_errors: list[float]
    reward: float
    extra: dict[str, str] = field(default_factory=dict)
    rewards: list[float] | None = None
    tool_mask: list[bool] | None = None
    answer: str | None = None

    def chosen(self) -> list[bool]:
        """Return for each token whether the policy chose it (T,)."""
        return [True] * len(self.tokens) if self.tool_mask is None else [bool(own) for own in self.tool_mask]

    def turns(self) -> list[range]:
        """Return the range of the tokens of each turn: the environment's text before it, and the policy's tokens.

        Tokens after the last turn are a range of their own.
        """
        ends = turn_ends(torch.tensor([self.chosen()], dtype=torch.bool))[0].nonzero().flatten().tolist()
        edges = sorted({0, *(end + 1 for end in ends), len(self.tokens)})
        return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def traces_from_rollout(
    tokenizer: Any,
    rollout: Mapping[str, Tensor],
    limit: int | None = None,
    *,
    dataset: Iterable[Mapping[str, Any]] | None = None,
    answer_column: str | None = None,
) -> list[TokenTrace]:
    """Make traces of a batch of completions, which a trainer with a critic keeps in `last_rollout`.

    The traces have rewards if any completion is paid before its last token, or has tokens of an environment. With the
    dataset that the prompts came from, the traces also have the expected answers.

    Args:
        tokenizer: Has `decode`; with a `dataset`, a tokenizer of transformers.
        rollout: `prompt_ids`, `prompt_mask (B, P)`, `completion_ids`, `critic_mask`, `td_errors (B, T)`,
            `old_values (B, T, K)` and `scores (B,)`. Tokens of an environment need `completion_mask` (B, T), and
            rewards need `rewards` and `paid` (B, T).
        limit: Take at most this many rows.
        dataset: Rows with a `prompt`, a text or messages, among which are those of the rollout: the `train_dataset`,
            or the `eval_dataset` after an evaluation. A prompt of several rows gets the answer of the first, and a
            prompt of none gets no answer.
        answer_column: Column of the dataset with the answer. By default `answer`, or else `solution`, if the dataset
            has such a column.

    Returns:
        One trace per row that the critic learns from.

    Raises:
        ValueError: If the rows have no `answer_column`.
    """
    own = rollout["critic_mask"].bool()
    # A row that the critic does not learn from has no values: its score is missing, or it was cut.
    shown = (rollout.get("completion_mask", own).bool() | own) & own.any(1, keepdim=True)
    answered = bool((shown & ~own).any())
    rewards = _step_rewards(rollout, own, answered)
    size = min(len(rollout["scores"]), limit or len(rollout["scores"]))
    rows = [row for row in range(size) if shown[row].any()]
    prompts = {row: _prompt_text(tokenizer, rollout, row) for row in rows}
    answers = {} if dataset is None else _answers(tokenizer, set(prompts.values()), dataset, answer_column)
    return [
        TokenTrace(
            prompt=prompts[row],
            tokens=token_texts(tokenizer, rollout["completion_ids"][row][real].tolist()),
            values=_of_policy(rollout["old_values"][row, :, 0], own[row])[real].tolist(),
            td_errors=_of_policy(rollout["td_errors"][row], own[row])[real].tolist(),
            reward=float(rollout["scores"][row]),
            rewards=None if rewards is None else rewards[row][real].tolist(),
            tool_mask=own[row][real].tolist() if answered else None,
            answer=answers.get(prompts[row]),
        )
        for row in rows
        for real in [shown[row]]
    ]


def _prompt_text(tokenizer: Any, rollout: Mapping[str, Tensor], row: int) -> str:
    ids = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
    return tokenizer.decode(ids, skip_special_tokens=True)


def _answers(
    tokenizer: Any, prompts: set[str], dataset: Iterable[Mapping[str, Any]], column: str | None
) -> dict[str, str]:
    """Find the expected answers of the prompts that the dataset has, by the text of the prompt."""
    found: dict[str, str] = {}
    reader = getattr(tokenizer, "tokenizer", tokenizer)  # the one inside a processor, which takes a text for an image
    for row in dataset:
        if len(found) == len(prompts):
            break
        name = next((name for name in ANSWER_COLUMNS if name in row), None) if column is None else column
        if name is None:
            continue
        if name not in row:
            raise ValueError(f"the dataset has no column {name!r} for answer_column; it has {', '.join(row)}")
        prompt = row["prompt"]
        if isinstance(prompt, str):
            ids = reader(prompt)["input_ids"]
        else:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = reader(text, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text in prompts and row[name] is not None:
            found.setdefault(text, str(row[name]))
    return found


def _of_policy(x: Tensor, own: Tensor) -> Tensor:
    return x.masked_fill(~own, math.nan)


def _step_rewards(rollout: Mapping[str, Tensor], own: Tensor, answered: bool) -> Tensor | None:
    """Return rewards (B, T), NaN where nothing is paid; `None` if the return of a completion says as much."""
    if "rewards" not in rollout or "paid" not in rollout:
        return None
    paid = rollout["paid"].bool() & own
    if not answered and not (paid & ~last_real(own)).any():
        return None
    return rollout["rewards"].masked_fill(~paid, math.nan)
