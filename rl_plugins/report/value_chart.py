"""The chart of a completion's values, as SVG inside the token-value page.

The time axis counts the policy's own tokens: `V(s_t)` is drawn at `t`, and the reward that it predicts at the end,
`T`. The picture is `T` wide and 100 high in its own coordinates. The style sheet stretches it, so that it is small
beside a short completion and as wide as the page above a long one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from rl_plugins.report.traces import TokenTrace

Y_TICKS, X_TICKS = 4, 10


def nice_ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Return round numbers for an axis from `low` to `high`, at most `most` of them, each with its label.

    They are multiples of 1, 2 or 5 times a power of ten: -0.15 to 1.21 with at most 4 gives 0, 0.5 and 1.
    """
    exponent = math.floor(math.log10((high - low) / most))
    for unit in (10.0**exponent * step for step in (1, 2, 5, 10, 20, 50)):
        first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
        if last - first < most:
            digits = max(0, -math.floor(math.log10(unit) + 1e-9))
            return [(k * unit, f"{k * unit:.{digits}f}".replace("-", "−")) for k in range(first, last + 1)]
    return []  # not reached: the last unit is larger than the range


def value_chart(trace: TokenTrace, low: float, high: float, wide: bool, description: str) -> str:
    """Draw the figure of one completion.

    Args:
        trace: Completion to draw.
        low: Value at the bottom of the picture.
        high: Value at the top.
        wide: Whether the picture is above the text, and has the numbers of tokens on its axis.
        description: Text for readers who do not see the picture.
    """

    def y(value: float) -> float:
        return round(100 * (high - value) / (high - low), 1)

    values = [value for value, own in zip(trace.values, trace.chosen(), strict=True) if own]
    length = max(len(values), 1)
    rows, labels = [], []
    for value, label in nice_ticks(low, high, Y_TICKS if wide else 3):
        rows.append(f"M0 {y(value)}H{length}")
        labels.append(f'<span class=y style="top:{y(value)}%">{label}</span>')
    if wide:
        labels += [
            f'<span class=x style="left:{100 * place / length:.2f}%">{label}</span>'
            for place, label in nice_ticks(0, length, X_TICKS)
        ]
    stairs = ""
    if trace.rewards is not None:
        stairs = f'<path class=stairs d="{_stairs(still_to_come(trace), y)}"/>'
    elif math.isfinite(trace.reward):
        labels.append(f'<span class=aim style="top:{y(trace.reward)}%"></span>')
    aim = "the dot is the reward" if trace.rewards is None else "the stairs are the rewards still to come"
    return (
        f'<figure class="chart{" wide" if wide else ""}" title="V(s_t) before each token; {aim}">'
        f'<svg viewBox="0 0 {length} 100" preserveAspectRatio=none role=img aria-label="{escape(description)}">'
        f'<path class=grid d="{"".join(rows)}"/>{stairs}<path class=curve d="{_curve(values, y)}"/>'
        f'<path class=cursor d="M0 0V100" visibility=hidden /></svg>{"".join(labels)}</figure>'
    )


def _curve(values: Sequence[float], y: Callable[[float], float]) -> str:
    """Write the SVG path through the finite values; a missing value interrupts the line."""
    parts, pen_down = [], False
    for place, value in enumerate(values):
        if math.isfinite(value):
            # `h0`: a point between two gaps has no neighbour to draw a line to; round caps make it a dot.
            parts.append(f"{'L' if pen_down else 'M'}{place} {y(value)}{'' if pen_down else 'h0'}")
        pen_down = math.isfinite(value)
    return "".join(parts)


def still_to_come(trace: TokenTrace) -> list[float]:
    """Add up the rewards from each token of the policy to the end, and 0 after the last; none without `rewards`."""
    if trace.rewards is None:
        return []
    heights = [0.0]
    for reward, own in zip(reversed(trace.rewards), reversed(trace.chosen()), strict=True):
        if own:
            heights.append(heights[-1] + (reward if math.isfinite(reward) else 0.0))
    return heights[::-1]


def _stairs(heights: Sequence[float], y: Callable[[float], float]) -> str:
    """Write the SVG path of the rewards still to come, with a step between a paid token and the next one."""
    parts = [f"M0 {y(heights[0])}"]
    for place, (height, then) in enumerate(zip(heights, heights[1:], strict=False)):
        if height != then:
            parts.append(f"H{place + 0.5:g}V{y(then)}")
    return "".join(parts) + f"H{len(heights) - 1}"
