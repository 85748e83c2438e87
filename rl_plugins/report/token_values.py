"""A page that shows the value and the TD error of each token: one HTML file that opens anywhere, without a network.

`values[t] = V(s_t)` of head 1, before token `t` is chosen; `td_errors[t] = delta_t`, after it. Where rewards are paid
on the way, or an environment answers, the page also marks the rewards and the turns. Legend: `T` completion tokens.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.alignment import last_real
from rl_plugins.functional.turns import turn_ends
from rl_plugins.report.colors import BINS, color_rules
from rl_plugins.report.page import CARD, CSS, JS, PAGE

BLANKS = {"\n": "↵", "\t": "⇥", " ": "␣"}
SPECIAL_TOKEN = re.compile(r"<\|.+\|>|</?(s|pad|unk|bos|eos|mask)>|\[(PAD|CLS|SEP|UNK|MASK|EOS|BOS)\]", re.DOTALL)


@dataclass(frozen=True)
class TokenTrace:
    """One completion with the critic's estimates.

    Args:
        prompt: Text of the prompt.
        tokens: (T,) text of each completion token, as decoded one by one.
        values: (T,) `V(s_t)` of head 1; NaN where missing.
        td_errors: (T,) `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)`; NaN where missing.
        reward: Return of the completion.
        extra: Short facts to show beside the reward, such as the expected answer.
        rewards: (T,) reward paid after each token; NaN where nothing is paid. `None` shows the return alone.
        tool_mask: (T,) false for tokens of an environment, whose values and TD errors are not shown. `None` where the
            policy chose all tokens.
    """

    prompt: str
    tokens: list[str]
    values: list[float]
    td_errors: list[float]
    reward: float
    extra: dict[str, str] = field(default_factory=dict)
    rewards: list[float] | None = None
    tool_mask: list[bool] | None = None

    def chosen(self) -> list[bool]:
        """Whether the policy chose each token (T,)."""
        return [True] * len(self.tokens) if self.tool_mask is None else [bool(own) for own in self.tool_mask]

    def turns(self) -> list[range]:
        """Places of the tokens of each turn: what the environment said before it, and the policy's own.

        What follows the last turn is a range of its own.
        """
        ends = turn_ends(torch.tensor([self.chosen()], dtype=torch.bool))[0].nonzero().flatten().tolist()
        edges = sorted({0, *(end + 1 for end in ends), len(self.tokens)})
        return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def write_token_values_html(
    traces: Sequence[TokenTrace],
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    value_range: tuple[float, float] | None = None,
    right_above: float = 0.0,
) -> Path:
    """Write one self-contained page that colours every token by value or by TD error; return its path.

    A reward that is paid on the way stands behind its token. Tokens of an environment have no colour, and every turn
    has its number.

    Args:
        traces: Completions, in the order of the page.
        path: File to write; missing folders are made.
        title: Heading of the page.
        subtitle: A line below it, such as model, step and sampling temperature.
        value_range: Values at the two ends of the colour scale; by default the smallest and largest shown.
            Values outside take the colour of the nearer end.
        right_above: A completion counts as right if its reward is above this.

    Raises:
        ValueError: No traces, lists of unequal lengths, or an empty `value_range`.
    """
    _check(traces)
    scales = _Scales.of(traces, value_range)
    cards = "\n".join(_card(i, trace, scales, right_above) for i, trace in enumerate(traces))
    n_right = sum(trace.reward > right_above for trace in traces)
    page = Template(PAGE).substitute(
        title=escape(visible(title)),
        subtitle=f"<p>{escape(visible(subtitle))}</p>" if subtitle else "",
        css=CSS + color_rules(),
        js=JS,
        digits=scales.digits,
        legend=_legend(scales) + _key(traces),
        n_all=len(traces),
        n_right=n_right,
        n_wrong=len(traces) - n_right,
        cards=cards,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _check(traces: Sequence[TokenTrace]) -> None:
    if not traces:
        raise ValueError("traces is empty: there is nothing to show")
    for index, trace in enumerate(traces):
        lengths = len(trace.tokens), len(trace.values), len(trace.td_errors)
        if len(set(lengths)) > 1:
            raise ValueError(
                f"trace {index} (prompt {trace.prompt[:40]!r}) has {lengths[0]} tokens, {lengths[1]} values "
                f"and {lengths[2]} td_errors; cut all three at the completion's length"
            )
        for name, given in (("rewards", trace.rewards), ("tool_mask", trace.tool_mask)):
            if given is not None and len(given) != lengths[0]:
                raise ValueError(
                    f"trace {index} (prompt {trace.prompt[:40]!r}) has {lengths[0]} tokens and {len(given)} entries "
                    f"in {name}; give one for each token"
                )


# ---------------------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class _Scales:
    """Ranges that all completions of a page share, so that one colour means one number."""

    low: float
    high: float
    delta: float  # the diverging scale runs from -delta to delta
    clipped: tuple[bool, bool]
    spark: tuple[float, float]

    @classmethod
    def of(cls, traces: Sequence[TokenTrace], value_range: tuple[float, float] | None) -> _Scales:
        values = _finite(value for trace in traces for value in trace.values)
        deltas = _finite(delta for trace in traces for delta in trace.td_errors)
        rewards = _finite(trace.reward for trace in traces)
        rewards += [height for trace in traces for height in _still_to_come(trace)]
        low, high = _range_of(values) if value_range is None else value_range
        if not low < high:
            raise ValueError(f"value_range must be (low, high) with low < high, not {value_range}")
        return cls(
            low=low,
            high=high,
            delta=max((abs(delta) for delta in deltas), default=0.0) or 1.0,
            clipped=(min(values, default=low) < low, max(values, default=high) > high),
            # The curve is read against the reward that it predicts, so that must be in the picture.
            spark=_range_of([*values, *rewards]),
        )

    @property
    def digits(self) -> int:
        """Decimals that tell apart a hundredth of the smaller scale."""
        return min(max(1 - math.floor(math.log10(min(self.high - self.low, self.delta))), 2), 8)

    def value_bin(self, value: float) -> str:
        return _bin("v", (value - self.low) / (self.high - self.low))

    def delta_bin(self, delta: float) -> str:
        return _bin("d", (delta / self.delta + 1) / 2)


def _finite(numbers: Iterable[float]) -> list[float]:
    return [float(number) for number in numbers if math.isfinite(number)]


def _range_of(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _bin(prefix: str, position: float) -> str:
    if not math.isfinite(position):
        return f"{prefix}na"
    return f"{prefix}{round(min(max(position, 0.0), 1.0) * (BINS - 1))}"


# ------------------------------------------------------------------------------------------------ text


def visible(text: str, keep: str = " ") -> str:
    """The text with every character that leaves no mark replaced by a sign, except those in `keep`.

    Besides blanks these are control characters, and the invisible ones that reorder or join their neighbours
    (a right-to-left override in a token would scramble the rest of the line).
    """
    return "".join(char if char in keep else _visible_char(char) for char in text)


def _visible_char(char: str) -> str:
    if char in BLANKS:
        return BLANKS[char]
    category = unicodedata.category(char)
    return f"⟨U+{ord(char):04X}⟩" if category[0] in "CZ" else char


def format_number(number: float, digits: int) -> str:
    """Fixed decimals with a real minus sign; "–" where the number is missing."""
    return f"{number:.{digits}f}".replace("-", "−") if math.isfinite(number) else "–"


def _signed(number: float) -> str:
    """A reward with its sign, which a zero does not have."""
    return ("+" if 0 < number < math.inf else "") + _short(number)


def _reward_html(reward: float) -> str:
    kind = "plus" if reward > 0 else "minus" if reward < 0 else "zero"
    return f'<b class="pay {kind}" title="paid after this token">{_signed(reward)}</b>'


def _token_html(trace: TokenTrace, index: int, own: bool, place: int, shown: bool, scales: _Scales) -> str:
    """One token, with the reward behind it where that is shown."""
    token, value, delta = trace.tokens[index], float(trace.values[index]), float(trace.td_errors[index])
    classes = ["t", scales.value_bin(value), scales.delta_bin(delta)] if own else ["t", "env"]
    if SPECIAL_TOKEN.fullmatch(token):
        classes.append("special")
    text = re.sub("[␣↵⇥]+", r"<i>\g<0></i>", escape(visible(token, keep=""))) or "<i>∅</i>"
    # One tab stop per completion; the arrow keys move on from it.
    focus = 0 if index == 0 else -1
    data = f' data-value="{value!r}" data-delta="{delta!r}"' if own else ""
    if trace.tool_mask is not None:
        data += f' data-x="{place}"'
    reward = math.nan if trace.rewards is None else trace.rewards[index]
    if not math.isnan(reward):
        data += f' data-paid="{_signed(reward)}"'
    span = f'<span class="{" ".join(classes)}" data-i="{index}"{data} tabindex="{focus}">{text}</span>'
    span += _reward_html(reward) if shown else ""
    # The reward stays in the line of its token.
    return span + "<br>" if "\n" in token else span + "<wbr>"


# ------------------------------------------------------------------------------------------------ page


def _card(index: int, trace: TokenTrace, scales: _Scales, right_above: float) -> str:
    right = trace.reward > right_above
    deltas = _finite(trace.td_errors)
    facts = "".join(
        f"<span class=fact><b>{escape(visible(key))}</b> {escape(visible(text))}</span>"
        for key, text in trace.extra.items()
    )
    return Template(CARD).substitute(
        order=index,
        number=index + 1,
        reward=repr(float(trace.reward)),
        surprise=repr(max(map(abs, deltas), default=0.0)),
        verdict="right" if right else "wrong",
        badge=f"{'✓' if right else '✗'} reward {_short(trace.reward)}",
        count=_count(trace),
        aim="the dot is the reward" if trace.rewards is None else "the stairs are the rewards still to come",
        facts=facts,
        spark=_sparkline(trace, scales),
        prompt=escape(visible(trace.prompt, keep=" \n")),
        open=" open" if len(trace.prompt) <= 400 else "",
        tokens=_tokens_html(trace, scales) or "<em>empty completion</em>",
    )


def _count(trace: TokenTrace) -> str:
    own = sum(trace.chosen())
    text = f"{own} token{'' if own == 1 else 's'}"
    if own == len(trace.tokens):
        return text
    turns = sum(any(trace.chosen()[i] for i in turn) for turn in trace.turns())
    return f"{text} in {turns} turn{'' if turns == 1 else 's'}, {len(trace.tokens) - own} of the environment"


def _tokens_html(trace: TokenTrace, scales: _Scales) -> str:
    """All tokens; where an environment answers, in one block for each turn."""
    chosen, shown = trace.chosen(), _shown_rewards(trace)
    places = _places(chosen)
    html = [
        _token_html(trace, i, own, place, i in shown, scales)
        for i, (own, place) in enumerate(zip(chosen, places, strict=True))
    ]
    if all(chosen):
        return "".join(html)
    blocks = []
    for number, turn in enumerate(trace.turns(), 1):
        tokens = "".join(html[i] for i in turn)
        played = any(chosen[i] for i in turn)
        label = f"Turn {number}" if played else "After the last turn"
        sign = f"<span class=no aria-hidden=true>{number}</span>" if played else ""
        # A turn of several lines has its row to itself; short ones stand side by side.
        kind = "turn tall" if "<br>" in tokens[:-4] else "turn"
        blocks.append(f'<div class="{kind}" role=group aria-label="{label}">{sign}{tokens}</div>')
    return f"<div class=turns>{''.join(blocks)}</div>"


def _places(chosen: Sequence[bool]) -> list[int]:
    """Where each token stands on the time axis, on which only the policy's tokens take time."""
    last, places, passed = max(sum(chosen) - 1, 0), [], 0
    for own in chosen:
        places.append(min(passed, last))
        passed += own
    return places


def _shown_rewards(trace: TokenTrace) -> set[int]:
    """Tokens behind which a reward is written: all that are paid, but not the zeros between rewards of tokens."""
    if trace.rewards is None:
        return set()
    paid = {i for i, reward in enumerate(trace.rewards) if not math.isnan(reward)}
    if 2 * len(paid) <= sum(trace.chosen()):
        return paid
    ends = {turn[-1] for turn in trace.turns()}
    return {i for i in paid if trace.rewards[i] != 0 or i in ends}


def _short(number: float) -> str:
    return f"{number:.4g}".replace("-", "−") if math.isfinite(number) else "–"


SPARK_WIDTH, SPARK_HEIGHT = 240, 44


def _sparkline(trace: TokenTrace, scales: _Scales) -> str:
    low, high = scales.spark

    def y(value: float) -> float:
        return round((SPARK_HEIGHT - 6) * (high - value) / (high - low) + 3, 1)

    chosen = trace.chosen()
    values = [value for value, own in zip(trace.values, chosen, strict=True) if own]
    zero = f'<path class=zero d="M0 {y(0)}H{SPARK_WIDTH}"/>' if low <= 0 <= high else ""
    aim = f"<circle cx={SPARK_WIDTH + 7} cy={y(trace.reward)} r=4 />" if math.isfinite(trace.reward) else ""
    if trace.rewards is not None:
        aim = f'<path class=stairs d="{_stairs(_still_to_come(trace), y)}"/>'
    ends = "".join(f"<text x=-5 y={y(end) + 3}>{_short(end)}</text>" for end in (low, high))
    return (
        f'<svg viewBox="-44 0 {SPARK_WIDTH + 58} {SPARK_HEIGHT}" data-n={len(values)} role=img '
        f'aria-label="{_describe(trace, scales)}">{ends}{zero}'
        f'<path class=curve d="{_curve(values, y)}"/>'
        f'{aim}<path class=cursor d="M0 0V{SPARK_HEIGHT}" visibility=hidden /></svg>'
    )


def _curve(values: Sequence[float], y: Callable[[float], float]) -> str:
    """SVG path through the finite values; a missing one interrupts the line."""
    step = SPARK_WIDTH / max(len(values) - 1, 1)
    parts, pen_down = [], False
    for i, value in enumerate(values):
        if math.isfinite(value):
            # `h0`: a point between two gaps has no neighbour to draw a line to; round caps make it a dot.
            parts.append(f"{'L' if pen_down else 'M'}{i * step:.1f} {y(value)}{'' if pen_down else 'h0'}")
        pen_down = math.isfinite(value)
    return "".join(parts)


def _still_to_come(trace: TokenTrace) -> list[float]:
    """Sums of the rewards from each token of the policy on, and 0 at the end; none without rewards of steps."""
    if trace.rewards is None:
        return []
    heights = [0.0]
    for reward, own in zip(reversed(trace.rewards), reversed(trace.chosen()), strict=True):
        if own:
            heights.append(heights[-1] + (reward if math.isfinite(reward) else 0.0))
    return heights[::-1]


def _stairs(heights: Sequence[float], y: Callable[[float], float]) -> str:
    """SVG path of what is still to come, with a step right after every token that is paid."""
    step = SPARK_WIDTH / max(len(heights) - 2, 1)
    parts = [f"M0 {y(heights[0])}"]
    for i, (height, then) in enumerate(zip(heights, heights[1:], strict=False)):
        if height != then:
            parts.append(f"H{i * step + min(step / 2, 7):.1f}V{y(then)}")
    return "".join(parts) + f"H{SPARK_WIDTH + 7}"


def _describe(trace: TokenTrace, scales: _Scales) -> str:
    values = _finite(trace.values)
    if not values:
        return "no values"
    first, last = (format_number(value, scales.digits) for value in (values[0], values[-1]))
    text = f"V(s_t) goes from {first} to {last}; the reward was {_short(trace.reward)}"
    if trace.rewards is None:
        return text
    paid = sum(not math.isnan(reward) for reward in trace.rewards)
    return f"{text}, paid after {paid} token{'' if paid == 1 else 's'}"


def _legend(scales: _Scales) -> str:
    def bar(kind: str, label: str, ticks: Sequence[str]) -> str:
        numbers = "".join(f"<span>{tick}</span>" for tick in ticks)
        return (
            f'<div class="scale {kind}"><b>{label}</b>'
            f'<div><div class="bar {kind}"></div><div class=ticks>{numbers}</div></div></div>'
        )

    middle = (scales.low + scales.high) / 2
    low, mid, high = (format_number(number, scales.digits) for number in (scales.low, middle, scales.high))
    edge = format_number(scales.delta, scales.digits)
    values = ("≤ " * scales.clipped[0] + low, mid, "≥ " * scales.clipped[1] + high)
    return bar("value", "V(s<sub>t</sub>)", values) + bar(
        "delta",
        "TD error δ<sub>t</sub> (dopamine signal)",
        (f"−{edge} worse", "0 as expected", f"better +{edge}"),
    )


def _key(traces: Sequence[TokenTrace]) -> str:
    """Explains the signs for rewards and turns, where there are any."""
    parts = []
    if any(trace.rewards is not None for trace in traces):
        line = '<svg class=line viewBox="0 0 24 12" aria-hidden=true><path class={} d="{}"/></svg>'
        parts += [
            "<b class=pay>+1</b> reward paid after the token",
            line.format("curve", "M1 9C9 1 14 11 23 3") + " V(s<sub>t</sub>)",
            line.format("stairs", "M1 2H9V6H16V10H23") + " rewards still to come",
        ]
    if not all(all(trace.chosen()) for trace in traces):
        parts.append("<span class=env>text</span> written by the environment")
        parts.append("<span class=no>2</span> number of the turn")
    return f"<div class=key>{''.join(f'<span>{part}</span>' for part in parts)}</div>" if parts else ""


def traces_from_rollout(tokenizer: Any, rollout: Mapping[str, Tensor], limit: int | None = None) -> list[TokenTrace]:
    """Traces of a batch of completions, as a critic trainer keeps in `last_rollout`.

    They have rewards where any completion is paid before its last token, or has tokens of an environment.

    Args:
        tokenizer: Has `decode`.
        rollout: `prompt_ids`, `prompt_mask (B, P)`, `completion_ids`, `critic_mask`, `td_errors (B, T)`,
            `old_values (B, T, K)` and `scores (B,)`. `completion_mask` (B, T) brings tokens of an environment, and
            `rewards` with `paid` (B, T) the rewards.
        limit: Take at most this many rows.

    Returns:
        One trace per row that the critic learns from.
    """
    own = rollout["critic_mask"].bool()
    # A row that the critic does not learn from has no values: its score is missing, or it was cut.
    shown = (rollout.get("completion_mask", own).bool() | own) & own.any(1, keepdim=True)
    answered = bool((shown & ~own).any())
    rewards = _step_rewards(rollout, own, answered)
    traces = []
    for row in range(min(len(rollout["scores"]), limit or len(rollout["scores"]))):
        real = shown[row]
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
        if real.any():
            traces.append(
                TokenTrace(
                    prompt=tokenizer.decode(prompt, skip_special_tokens=True),
                    tokens=[tokenizer.decode([token]) for token in rollout["completion_ids"][row][real].tolist()],
                    values=_of_policy(rollout["old_values"][row, :, 0], own[row])[real].tolist(),
                    td_errors=_of_policy(rollout["td_errors"][row], own[row])[real].tolist(),
                    reward=float(rollout["scores"][row]),
                    rewards=None if rewards is None else rewards[row][real].tolist(),
                    tool_mask=own[row][real].tolist() if answered else None,
                )
            )
    return traces


def _of_policy(x: Tensor, own: Tensor) -> Tensor:
    return x.masked_fill(~own, math.nan)


def _step_rewards(rollout: Mapping[str, Tensor], own: Tensor, answered: bool) -> Tensor | None:
    """Rewards (B, T), NaN where nothing is paid; `None` where the return says all there is to say."""
    if "rewards" not in rollout or "paid" not in rollout:
        return None
    paid = rollout["paid"].bool() & own
    if not answered and not (paid & ~last_real(own)).any():
        return None
    return rollout["rewards"].masked_fill(~paid, math.nan)
