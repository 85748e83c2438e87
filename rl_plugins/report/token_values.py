"""A page that shows the value and the TD error of each token: one HTML file that needs no network.

If rewards are paid before the last token, or an environment answers, the page also marks the rewards and the turns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from rl_plugins.report.colors import BINS, color_rules
from rl_plugins.report.page import CARD, CSS, JS, PAGE
from rl_plugins.report.token_text import LOOSE_BYTES, visible, words
from rl_plugins.report.traces import TokenTrace
from rl_plugins.report.value_chart import still_to_come, value_chart

SPECIAL_TOKEN = re.compile(r"<\|.+\|>|</?(s|pad|unk|bos|eos|mask)>|\[(PAD|CLS|SEP|UNK|MASK|EOS|BOS)\]", re.DOTALL)
LONG = 40
"""Number of tokens. A longer completion has the chart of its values above the text, as wide as the page."""
LARGE = 5000
"""Number of tokens. In a page with more tokens, the browser draws only the completions that are on the screen."""
FLAT = 0.05
"""Share of the range of values and rewards. If the values span less, the page says that they do not vary yet."""


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

    A chart of the values is above a long completion, or beside a short one. A reward that is paid before the last
    token is shown behind its token. Tokens of an environment have no colour, and every turn has its number.

    The address of the page takes settings behind a `#`, joined by `&`: `mode=delta`, `show=right` or `wrong`,
    `sort=reward` or `surprise`, `theme=light` or `dark`, `find=TEXT`; and for a picture of one completion without the
    buttons, `only=NUMBER` and `tools=off`.

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
        hint=_hint(scales),
        css=CSS + color_rules(),
        js=JS,
        digits=scales.digits,
        # A browser leaves cards that it has not drawn out of a picture of the whole page, so a small page draws all.
        size="large" if sum(len(trace.tokens) for trace in traces) > LARGE else "small",
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
    """Ranges that all completions of a page share, so that a colour means the same number in all of them."""

    low: float
    high: float
    delta: float  # the diverging scale runs from -delta to delta
    clipped: tuple[bool, bool]
    seen: tuple[float, float] | None  # smallest and largest value of the page
    chart: tuple[float, float]

    @classmethod
    def of(cls, traces: Sequence[TokenTrace], value_range: tuple[float, float] | None) -> _Scales:
        values = _finite(value for trace in traces for value in trace.values)
        deltas = _finite(delta for trace in traces for delta in trace.td_errors)
        rewards = _finite(trace.reward for trace in traces)
        rewards += [height for trace in traces for height in still_to_come(trace)]
        low, high = _range_of(values) if value_range is None else value_range
        if not low < high:
            raise ValueError(f"value_range must be (low, high) with low < high, not {value_range}")
        return cls(
            low=low,
            high=high,
            delta=max((abs(delta) for delta in deltas), default=0.0) or 1.0,
            clipped=(min(values, default=low) < low, max(values, default=high) > high),
            seen=(min(values), max(values)) if values else None,
            # The reader compares the curve with the reward that it predicts, so the reward must be in the picture.
            chart=_range_of([*values, *rewards]),
        )

    @property
    def digits(self) -> int:
        """Number of decimals that show a hundredth of the smaller scale."""
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


def _hint(scales: _Scales) -> str:
    """Write a warning if all values are about equal, so that the colours show nothing but noise."""
    if scales.seen is None:
        return ""
    low, high = scales.seen
    if high - low >= FLAT * (scales.chart[1] - scales.chart[0]):
        return ""
    low_text, high_text = _short(low), _short(high)
    span = f"between {low_text} and {high_text}" if low_text != high_text else f"about {low_text}"
    return (
        f"<p class=hint><b>The values do not vary yet.</b> The values of all tokens are {span}, so the critic does "
        "not tell good tokens from bad ones. More rollouts, or a higher learning rate of the critic, should change "
        "this.</p>"
    )


# ------------------------------------------------------------------------------------------------ text


def format_number(number: float, digits: int) -> str:
    """Format a number with fixed decimals and a real minus sign; "–" where the number is missing."""
    return f"{number:.{digits}f}".replace("-", "−") if math.isfinite(number) else "–"


def _signed(number: float) -> str:
    """Format a reward with its sign, which a zero does not have."""
    return ("+" if 0 < number < math.inf else "") + _short(number)


def _reward_html(reward: float) -> str:
    kind = "plus" if reward > 0 else "minus" if reward < 0 else "zero"
    return f'<b class="pay {kind}" title="paid after this token">{_signed(reward)}</b>'


def _byte_html(match: re.Match[str]) -> str:
    """Write a mark for a byte of a character that another token completes, or that no token completes."""
    return f'<i class=byte title="byte {ord(match[0]) - 0xDC00:02X}, no character by itself"></i>'


def _text_html(token: str) -> str:
    # Text after a line break in the same token, such as the indentation of code, is shown in the next line.
    lines = token.rpartition("\n")
    shown = [_line_html(line) for line in (lines[0] + lines[1], lines[2]) if line]
    return "<br>".join(shown) or "<i>∅</i>"


def _line_html(text: str) -> str:
    parts = [re.sub("[␣↵⇥]+", r"<i>\g<0></i>", escape(visible(part, keep=""))) for part in LOOSE_BYTES.split(text)]
    marks = [_byte_html(match) for match in LOOSE_BYTES.finditer(text)]
    return parts[0] + "".join(mark + part for mark, part in zip(marks, parts[1:], strict=True))


def _token_html(trace: TokenTrace, index: int, own: bool, shown: bool, scales: _Scales) -> str:
    """Write one token, with the reward behind it where that is shown."""
    token, value, delta = trace.tokens[index], float(trace.values[index]), float(trace.td_errors[index])
    classes = ["t", scales.value_bin(value), scales.delta_bin(delta)] if own else ["t", "env"]
    if SPECIAL_TOKEN.fullmatch(token):
        classes.append("special")
    # Six digits: further ones are rounding noise of float32, and would make a page of long completions larger by half.
    data = f' data-value="{value:.6g}" data-delta="{delta:.6g}"' if own else ""
    reward = math.nan if trace.rewards is None else trace.rewards[index]
    if not math.isnan(reward):
        data += f' data-paid="{_signed(reward)}"'
    # There is one tab stop per completion; the arrow keys move on from there.
    focus = " tabindex=0" if index == 0 else ""
    span = f'<span class="{" ".join(classes)}"{data}{focus}>{_text_html(token)}</span>'
    return span + (_reward_html(reward) if shown else "")


# ------------------------------------------------------------------------------------------------ page


def _card(index: int, trace: TokenTrace, scales: _Scales, right_above: float) -> str:
    right = trace.reward > right_above
    deltas = _finite(trace.td_errors)
    answer = {} if trace.answer is None else {"expected answer": trace.answer}
    facts = "".join(
        f"<span class=fact><b>{escape(visible(key))}</b> {escape(visible(text))}</span>"
        for key, text in {**answer, **trace.extra}.items()
    )
    wide = len(trace.tokens) > LONG
    return Template(CARD).substitute(
        kind="long" if wide else "short",
        order=index,
        number=index + 1,
        reward=repr(float(trace.reward)),
        surprise=repr(max(map(abs, deltas), default=0.0)),
        verdict="right" if right else "wrong",
        badge=f"{'✓' if right else '✗'} reward {_short(trace.reward)}",
        count=_count(trace),
        facts=facts,
        chart=value_chart(trace, *scales.chart, wide, _describe(trace, scales)),
        prompt=_prompt_html(trace, wide),
        tokens=_tokens_html(trace, scales) or "<em>empty completion</em>",
    )


def _prompt_html(trace: TokenTrace, wide: bool) -> str:
    """Write the prompt, in the line of the completion if both are short."""
    text = escape(visible(trace.prompt, keep=" \n"))
    if not wide and len(trace.prompt) <= 80 and "\n" not in trace.prompt and trace.tool_mask is None:
        return f'<span class="prompt line" title="Prompt">{text}</span>'
    state = " open" if len(trace.prompt) <= 400 else ""
    return f"<details{state}><summary>Prompt</summary><div class=prompt>{text}</div></details>"


def _count(trace: TokenTrace) -> str:
    own = sum(trace.chosen())
    text = f"{own} token{'' if own == 1 else 's'}"
    if own == len(trace.tokens):
        return text
    turns = sum(any(trace.chosen()[i] for i in turn) for turn in trace.turns())
    return f"{text} in {turns} turn{'' if turns == 1 else 's'}, {len(trace.tokens) - own} of the environment"


def _tokens_html(trace: TokenTrace, scales: _Scales) -> str:
    """Write all tokens; if an environment answers, in one block for each turn."""
    chosen, shown = trace.chosen(), _shown_rewards(trace)
    html = [_token_html(trace, i, own, i in shown, scales) for i, own in enumerate(chosen)]
    if all(chosen):
        return _words_html(trace.tokens, html)
    blocks = []
    for number, turn in enumerate(trace.turns(), 1):
        tokens = _words_html(trace.tokens[turn.start : turn.stop], html[turn.start : turn.stop])
        played = any(chosen[i] for i in turn)
        label = f"Turn {number}" if played else "After the last turn"
        sign = f"<span class=no aria-hidden=true>{number}</span>" if played else ""
        # A turn of several lines has a row of its own; shorter turns are side by side.
        kind = "turn tall" if "<br>" in tokens.removesuffix("<br>") else "turn"
        blocks.append(f'<div class="{kind}" role=group aria-label="{label}">{sign}{tokens}</div>')
    return f"<div class=turns>{''.join(blocks)}</div>"


def _words_html(tokens: Sequence[str], html: Sequence[str]) -> str:
    """Join tokens into words, between which lines may break."""
    parts = []
    for word in words(tokens):
        inside = "".join(html[i] for i in word)
        # Most words are one token, which needs no element around it, unless a reward has to stay in the token's line.
        whole = inside if len(word) == 1 and "<b" not in inside else f"<span class=w>{inside}</span>"
        parts.append(whole + ("<br>" if tokens[word[-1]].endswith("\n") else "<wbr>"))
    return "".join(parts)


def _shown_rewards(trace: TokenTrace) -> set[int]:
    """Return the tokens behind which a reward is written.

    These are all tokens that are paid. If most tokens are paid, zeros are left out, except at the end of a turn.
    """
    if trace.rewards is None:
        return set()
    paid = {i for i, reward in enumerate(trace.rewards) if not math.isnan(reward)}
    if 2 * len(paid) <= sum(trace.chosen()):
        return paid
    ends = {turn[-1] for turn in trace.turns()}
    return {i for i in paid if trace.rewards[i] != 0 or i in ends}


def _short(number: float) -> str:
    return f"{number:.4g}".replace("-", "−") if math.isfinite(number) else "–"


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
    return bar("value", "value V(s<sub>t</sub>)", values) + bar(
        "delta", "TD error δ<sub>t</sub>", (f"−{edge} worse", "0 as expected", f"better +{edge}")
    )


def _key(traces: Sequence[TokenTrace]) -> str:
    """Explain the signs for rewards, turns and bytes, where there are any."""
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
    if any(LOOSE_BYTES.search(token) for trace in traces for token in trace.tokens):
        parts.append("<i class=byte></i> a byte that is no character by itself")
    return f"<div class=key>{''.join(f'<span>{part}</span>' for part in parts)}</div>" if parts else ""
