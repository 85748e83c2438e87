"""What the critic thought of each token: one HTML file that opens anywhere, without a network.

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

Color = tuple[int, int, int]
Stops = tuple[Color, Color, Color]

# Odd, so that the middle colour (delta = 0) is one of them. Tokens name a bin and the style sheet holds the
# colours: a dark page then needs no second colour on every token.
BINS = 65

# In both themes the low end sits near the page and the high end stands out. Red against blue, and light
# against dark within one hue family, survive the common colour-vision deficiencies.
SEQUENTIAL_LIGHT: Stops = ((253, 246, 220), (108, 192, 180), (11, 74, 128))
SEQUENTIAL_DARK: Stops = ((38, 48, 66), (42, 127, 134), (242, 229, 138))
DIVERGING_LIGHT: Stops = ((178, 24, 43), (246, 246, 246), (33, 102, 172))
DIVERGING_DARK: Stops = ((240, 106, 84), (44, 49, 58), (96, 174, 245))

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
        css=CSS + _color_rules(),
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


# ---------------------------------------------------------------------------------------------- colours


def sequential_color(position: float, dark: bool = False) -> str:
    """`#rrggbb` of a value at `position` in [0, 1] of the range; positions outside are clamped."""
    return _hex(_interpolate(SEQUENTIAL_DARK if dark else SEQUENTIAL_LIGHT, position))


def diverging_color(position: float, dark: bool = False) -> str:
    """`#rrggbb` of a TD error at `position` in [-1, 1]: red, neutral, blue; positions outside are clamped."""
    return _hex(_interpolate(DIVERGING_DARK if dark else DIVERGING_LIGHT, (position + 1) / 2))


def text_color(background: str) -> str:
    """Black or white, whichever has the larger WCAG contrast; at least 4.58 on every background."""
    return max(("#000000", "#ffffff"), key=lambda color: contrast(color, background))


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio `(L1 + 0.05) / (L2 + 0.05)` of two `#rrggbb` colours, from 1 to 21."""
    dim, bright = sorted((_luminance(first), _luminance(second)))
    return (bright + 0.05) / (dim + 0.05)


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _interpolate(stops: Stops, position: float) -> Color:
    position = min(max(position, 0.0), 1.0) * 2
    low, high = (stops[0], stops[1]) if position < 1 else (stops[1], stops[2])
    weight = position if position < 1 else position - 1
    red, green, blue = (round(a + weight * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _color_rules() -> str:
    light, dark = _theme_rules(dark=False), _theme_rules(dark=True)
    # `screen`: paper is white, whatever the reader's theme.
    return f"{light}@media screen and (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _theme_rules(dark: bool) -> str:
    positions = [k / (BINS - 1) for k in range(BINS)]
    values = (sequential_color(x, dark) for x in positions)
    deltas = (diverging_color(2 * x - 1, dark) for x in positions)
    return _bin_rules("value", "v", values) + _bin_rules("delta", "d", deltas) + _bar_rule(dark)


def _bin_rules(mode: str, prefix: str, colors: Iterable[str]) -> str:
    return "".join(
        f"[data-mode={mode}] .{prefix}{k}{{background:{color};color:{text_color(color)}}}\n"
        for k, color in enumerate(colors)
    )


def _bar_rule(dark: bool) -> str:
    def gradient(color: Callable[[float, bool], str], ends: tuple[float, float, float]) -> str:
        return f"linear-gradient(to right,{','.join(color(x, dark) for x in ends)})"

    value = gradient(sequential_color, (0.0, 0.5, 1.0))
    delta = gradient(diverging_color, (-1.0, 0.0, 1.0))
    return f".bar.value{{background:{value}}}\n.bar.delta{{background:{delta}}}\n"


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


CARD = """<article data-order="$order" data-reward="$reward" data-surprise="$surprise"
 data-verdict="$verdict">
<header><h2>#$number</h2><span class="badge $verdict">$badge</span><span class=fact>$count</span>$facts
<figure title="V(s_t) over the completion; the dot is the reward">$spark</figure></header>
<details$open><summary>Prompt</summary><div class=prompt>$prompt</div></details>
<div class=tokens role=group aria-label="Completion $number; arrow keys move between tokens">$tokens</div>
</article>"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
$css</style></head>
<body data-mode="value" data-digits="$digits">
<div class=head><h1>$title</h1>$subtitle</div>
<div class=tools>
<div role=group aria-label="Colour by" data-group=mode><span>Colour</span>
<button aria-pressed=true data-pick=value>value</button
><button aria-pressed=false data-pick=delta>TD error</button>
</div>
<div role=group aria-label="Show" data-group=show><span>Show</span>
<button aria-pressed=true data-pick=all>all $n_all</button
><button aria-pressed=false data-pick=right>✓ right $n_right</button
><button aria-pressed=false data-pick=wrong>✗ wrong $n_wrong</button></div>
<div role=group aria-label="Sort by" data-group=sort><span>Sort</span>
<button aria-pressed=true data-pick=order>as given</button
><button aria-pressed=false data-pick=reward>reward</button
><button aria-pressed=false data-pick=surprise>largest |δ|</button></div>
<div><button id=numbers aria-pressed=false>numbers</button></div>
$legend
</div>
<main>
$cards
</main>
<p id=none hidden>No completion matches.</p>
<div id=tip role=status hidden></div>
<script>
$js</script>
</body></html>
"""

CSS = """:root{--page:#fff;--ink:#1c2128;--soft:#59636e;--line:#d5dae0;--card:#fff;--well:#f4f6f8;
--accent:#0b4a80;
--on-accent:#fff;--good:#0b4a80;--bad:#a3121f;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171c;--ink:#e4e8ee;--soft:#a3adb9;
--line:#363d47;
--card:#1b1f26;--well:#242a33;--accent:#8cc4f5;--on-accent:#10151b;--good:#8cc4f5;--bad:#ff9c8c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:0 20px 60px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{font-size:24px;line-height:1.25;margin:26px 0 4px}h2{font-size:15px;margin:0}
.head p{margin:0 0 6px;color:var(--soft)}
.tools{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center;
padding:10px 0;margin-bottom:14px;background:var(--page);border-bottom:1px solid var(--line)}
[data-group]{display:flex;align-items:center}[data-group] span{color:var(--soft);font-size:13px;
margin-right:7px}
button{font:inherit;font-size:13px;padding:3px 11px;border:1px solid var(--line);background:var(--card);
color:var(--ink);cursor:pointer;border-radius:6px}
[data-group] button{border-radius:0;margin-left:-1px}
[data-group] button:first-of-type{border-radius:6px 0 0 6px}
[data-group] button:last-of-type{border-radius:0 6px 6px 0}
button:hover{background:var(--well)}
button[aria-pressed=true]{background:var(--accent);border-color:var(--accent);color:var(--on-accent);
font-weight:600}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px;z-index:1}
.scale{display:none;align-items:flex-start;gap:10px;font-size:13px;flex-basis:100%}
[data-mode=value] .scale.value,[data-mode=delta] .scale.delta{display:flex}
.scale b{font-weight:600;line-height:14px;white-space:nowrap}.scale>div{width:380px;max-width:70vw}
sub{line-height:0}
.bar{height:14px;border:1px solid var(--line);border-radius:3px}
.ticks{position:relative;height:18px;color:var(--soft);font-variant-numeric:tabular-nums}
.ticks span{position:absolute}.ticks span:nth-child(2){left:50%;transform:translateX(-50%)}
.ticks span:nth-child(3){right:0}
article{border:1px solid var(--line);border-radius:10px;background:var(--card);padding:12px 16px 16px;
margin:0 0 16px}
header{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center;min-height:48px}
.badge{font-size:13px;font-weight:600;padding:1px 10px;border-radius:99px;border:1.5px solid;
white-space:nowrap}
.badge.right{color:var(--good)}.badge.wrong{color:var(--bad);border-style:dashed}
.fact{font-size:13px;color:var(--soft);overflow-wrap:anywhere}.fact b{font-weight:600}
figure{margin:0 0 0 auto}svg{display:block;width:298px;height:44px;overflow:visible}
svg text{font-size:10px;text-anchor:end;fill:var(--soft)}
.curve{fill:none;stroke:var(--accent);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.zero{stroke:var(--line);fill:none}.cursor{stroke:var(--ink);stroke-width:1}
svg circle{fill:var(--card);stroke:var(--ink);stroke-width:1.6}
details{margin:2px 0 10px}summary{cursor:pointer;font-size:13px;color:var(--soft)}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--well);border-radius:6px;padding:8px 12px;
margin-top:4px;font-size:14px}
.tokens{line-height:2;overflow-wrap:anywhere;
font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",
"DejaVu Sans Mono",monospace;font-size:14px}
.t{unicode-bidi:isolate;padding:3px 1px;margin-right:1px;border-radius:3px;cursor:default;position:relative;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
.t i{font-style:normal}.special{font-size:12px;border:1px dotted currentColor}
.t:hover,.t:focus{outline:2px solid var(--ink);outline-offset:0;z-index:1}
[data-mode=value] .vna,[data-mode=delta] .dna{color:var(--ink);border-bottom:2px dashed var(--soft)}
.numbers .tokens{line-height:1.3}.numbers .t{display:inline-block;text-align:center;margin:0 2px 5px 0;
padding:1px 3px}
.numbers .t::after{content:attr(data-n);display:block;font-size:11px;font-variant-numeric:tabular-nums}
#tip{position:absolute;z-index:3;pointer-events:none;background:var(--ink);color:var(--page);padding:6px 10px;
border-radius:6px;font-size:13px;line-height:1.45;white-space:pre;font-variant-numeric:tabular-nums;
max-width:90vw;
overflow:hidden}
[hidden]{display:none!important}
.bar{-webkit-print-color-adjust:exact;print-color-adjust:exact}
@media (max-width:700px){.tools{position:static}}
@media print{.tools{position:static}[data-group],#numbers,#tip{display:none!important}
body{max-width:none;padding:0;font-size:11pt}header{break-after:avoid}}
"""

JS = r"""const body = document.body, main = document.querySelector("main");
const tip = document.getElementById("tip");
const digits = Number(body.dataset.digits);
const cards = [...main.querySelectorAll("article")];
const state = { mode: "value", show: "all", sort: "order" };

function format(text, places, signed) {
  const number = Number(text);  // "nan" and "inf" are not numbers in JavaScript either
  if (!Number.isFinite(number)) return "–";
  const shown = Math.abs(number).toFixed(places);
  const sign = Number(shown) === 0 ? "" : number < 0 ? "−" : signed ? "+" : "";
  return sign + shown;
}

function showNumbers() {
  if (!body.classList.contains("numbers")) return;
  const delta = state.mode === "delta";
  for (const el of main.querySelectorAll(".t"))
    el.dataset.n = format(delta ? el.dataset.delta : el.dataset.value, digits, delta);
}

function apply() {
  body.dataset.mode = state.mode;
  const key = (card) => Number(card.dataset[state.sort]) || 0;
  const order = (a, b) => Number(a.dataset.order) - Number(b.dataset.order);
  const sorted = [...cards].sort((a, b) => (state.sort === "order" ? 0 : key(b) - key(a)) || order(a, b));
  main.append(...sorted);
  for (const card of cards) card.hidden = state.show !== "all" && card.dataset.verdict !== state.show;
  document.getElementById("none").hidden = cards.some((card) => !card.hidden);
  showNumbers();
}

for (const group of document.querySelectorAll("[data-group]"))
  group.addEventListener("click", (event) => {
    const picked = event.target.closest("button");
    if (!picked) return;
    for (const button of group.querySelectorAll("button"))
      button.setAttribute("aria-pressed", button === picked);
    state[group.dataset.group] = picked.dataset.pick;
    apply();
  });

document.getElementById("numbers").addEventListener("click", (event) => {
  event.target.setAttribute("aria-pressed", body.classList.toggle("numbers"));
  showNumbers();
});

function cursor(token, on) {
  const svg = token.closest("article").querySelector("svg"), line = svg.querySelector(".cursor");
  const steps = Math.max(Number(svg.dataset.n) - 1, 1);
  line.setAttribute("transform", `translate(${240 * Number(token.dataset.i) / steps} 0)`);
  line.setAttribute("visibility", on ? "visible" : "hidden");
}

function showTip(token) {
  const delta = Number(token.dataset.delta);
  const verdict = delta > 0 ? "  better than expected" : delta < 0 ? "  worse than expected" : "";
  tip.textContent = `token ${token.dataset.i}   ${token.textContent}\n` +
    `V(s_t)  ${format(token.dataset.value, digits + 1)}\n` +
    `δ_t     ${format(token.dataset.delta, digits + 1, true)}${verdict}`;
  tip.hidden = false;
  const box = token.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + tip.offsetHeight + 8 < innerHeight;
  tip.style.left = Math.max(left, 8) + scrollX + "px";
  tip.style.top = (below ? box.bottom + 5 : box.top - tip.offsetHeight - 5) + scrollY + "px";
  cursor(token, true);
}

function hideTip(token) {
  tip.hidden = true;
  cursor(token, false);
}

for (const [enter, leave] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  main.addEventListener(enter, (event) => { const t = event.target.closest(".t"); if (t) showTip(t); });
  main.addEventListener(leave, (event) => { const t = event.target.closest(".t"); if (t) hideTip(t); });
}

main.addEventListener("keydown", (event) => {
  const token = event.target.closest(".t");
  if (!token) return;
  if (event.key === "Escape") return hideTip(token);
  const all = [...token.parentNode.querySelectorAll(".t")], at = all.indexOf(token);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined || !all[next]) return;
  event.preventDefault();
  token.tabIndex = -1;
  all[next].tabIndex = 0;
  all[next].focus();
});
"""


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
