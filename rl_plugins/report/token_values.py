"""A page that shows the value and the TD error of each token: one HTML file that opens anywhere, without a network.

`values[t] = V(s_t)` of head 1, before token `t` is chosen; `td_errors[t] = delta_t`, after it. Legend: `T`
completion tokens.
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

from torch import Tensor

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
    """

    prompt: str
    tokens: list[str]
    values: list[float]
    td_errors: list[float]
    reward: float
    extra: dict[str, str] = field(default_factory=dict)


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
        legend=_legend(scales),
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


def _token_html(index: int, token: str, value: float, delta: float, scales: _Scales) -> str:
    classes = ["t", scales.value_bin(value), scales.delta_bin(delta)]
    if SPECIAL_TOKEN.fullmatch(token):
        classes.append("special")
    text = re.sub("[␣↵⇥]+", r"<i>\g<0></i>", escape(visible(token, keep=""))) or "<i>∅</i>"
    # One tab stop per completion; the arrow keys move on from it.
    focus = 0 if index == 0 else -1
    span = (
        f'<span class="{" ".join(classes)}" data-i="{index}" data-value="{float(value)!r}" '
        f'data-delta="{float(delta)!r}" tabindex="{focus}">{text}</span>'
    )
    return span + "<br>" if "\n" in token else span + "<wbr>"


# ------------------------------------------------------------------------------------------------ page


def _card(index: int, trace: TokenTrace, scales: _Scales, right_above: float) -> str:
    right = trace.reward > right_above
    deltas = _finite(trace.td_errors)
    tokens = "".join(
        _token_html(i, token, value, delta, scales)
        for i, (token, value, delta) in enumerate(zip(trace.tokens, trace.values, trace.td_errors, strict=True))
    )
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
        count=f"{len(trace.tokens)} token{'' if len(trace.tokens) == 1 else 's'}",
        facts=facts,
        spark=_sparkline(trace, scales),
        prompt=escape(visible(trace.prompt, keep=" \n")),
        open=" open" if len(trace.prompt) <= 400 else "",
        tokens=tokens or "<em>empty completion</em>",
    )


def _short(number: float) -> str:
    return f"{number:.4g}".replace("-", "−") if math.isfinite(number) else "–"


SPARK_WIDTH, SPARK_HEIGHT = 240, 44


def _sparkline(trace: TokenTrace, scales: _Scales) -> str:
    low, high = scales.spark

    def y(value: float) -> float:
        return round((SPARK_HEIGHT - 6) * (high - value) / (high - low) + 3, 1)

    zero = f'<path class=zero d="M0 {y(0)}H{SPARK_WIDTH}"/>' if low <= 0 <= high else ""
    aim = f"<circle cx={SPARK_WIDTH + 7} cy={y(trace.reward)} r=4 />" if math.isfinite(trace.reward) else ""
    ends = "".join(f"<text x=-5 y={y(end) + 3}>{_short(end)}</text>" for end in (low, high))
    return (
        f'<svg viewBox="-44 0 {SPARK_WIDTH + 58} {SPARK_HEIGHT}" data-n={len(trace.tokens)} role=img '
        f'aria-label="{_describe(trace, scales)}">{ends}{zero}'
        f'<path class=curve d="{_curve(trace.values, y)}"/>'
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


def _describe(trace: TokenTrace, scales: _Scales) -> str:
    values = _finite(trace.values)
    if not values:
        return "no values"
    first, last = (format_number(value, scales.digits) for value in (values[0], values[-1]))
    return f"V(s_t) goes from {first} to {last}; the reward was {_short(trace.reward)}"


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


def traces_from_rollout(tokenizer: Any, rollout: Mapping[str, Tensor], limit: int | None = None) -> list[TokenTrace]:
    """Traces of a batch of completions, as a critic trainer keeps in `last_rollout`.

    Args:
        tokenizer: Has `decode`.
        rollout: `prompt_ids`, `prompt_mask (B, P)`, `completion_ids`, `critic_mask`, `td_errors (B, T)`,
            `old_values (B, T, K)` and `scores (B,)`.
        limit: Take at most this many rows.

    Returns:
        One trace per row that has tokens.
    """
    traces = []
    for row in range(min(len(rollout["scores"]), limit or len(rollout["scores"]))):
        real = rollout["critic_mask"][row].bool()
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
        if real.any():
            traces.append(
                TokenTrace(
                    prompt=tokenizer.decode(prompt, skip_special_tokens=True),
                    tokens=[tokenizer.decode([token]) for token in rollout["completion_ids"][row][real].tolist()],
                    values=rollout["old_values"][row, :, 0][real].tolist(),
                    td_errors=rollout["td_errors"][row][real].tolist(),
                    reward=float(rollout["scores"][row]),
                )
            )
    return traces
