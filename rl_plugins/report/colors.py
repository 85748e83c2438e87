"""Colours of the token-value page: two scales, each for a light and a dark page."""

Color = tuple[int, int, int]
Stops = tuple[Color, Color, Color]

# The number is odd, so that the middle colour (delta = 0) has a bin. A token names its bin, and the style sheet holds
# the colours of all bins. So a token needs no second colour for a dark page.
BINS = 65

# In both themes the colour of low values is close to that of the page, and high values stand out. Red and blue, or
# light and dark of similar hues, can be told apart with the common colour-vision deficiencies.
SEQUENTIAL_LIGHT: Stops = ((253, 246, 220), (108, 192, 180), (11, 74, 128))
SEQUENTIAL_DARK: Stops = ((38, 48, 66), (42, 127, 134), (242, 229, 138))
DIVERGING_LIGHT: Stops = ((178, 24, 43), (246, 246, 246), (33, 102, 172))
DIVERGING_DARK: Stops = ((240, 106, 84), (44, 49, 58), (96, 174, 245))


def sequential_color(position: float, dark: bool = False) -> str:
    """Return the colour `#rrggbb` of a value at `position` in [0, 1] of the range; positions outside are clamped."""
    return _hex(_interpolate(SEQUENTIAL_DARK if dark else SEQUENTIAL_LIGHT, position))


def diverging_color(position: float, dark: bool = False) -> str:
    """Return the colour `#rrggbb` of a TD error at `position` in [-1, 1], from red to blue; others are clamped."""
    return _hex(_interpolate(DIVERGING_DARK if dark else DIVERGING_LIGHT, (position + 1) / 2))


def text_color(background: str) -> str:
    """Return black or white, whichever has the larger WCAG contrast, which is at least 4.58 on every background."""
    return max(("#000000", "#ffffff"), key=lambda color: contrast(color, background))


def contrast(first: str, second: str) -> float:
    """Compute the WCAG 2 contrast ratio `(L1 + 0.05) / (L2 + 0.05)` of two `#rrggbb` colours, from 1 to 21."""
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


def color_rules() -> str:
    """Write the style rules of the two scales. `light-dark()` takes the colour of the theme that the page is in."""
    positions = [k / (BINS - 1) for k in range(BINS)]
    values = [(sequential_color(x), sequential_color(x, dark=True)) for x in positions]
    deltas = [(diverging_color(2 * x - 1), diverging_color(2 * x - 1, dark=True)) for x in positions]
    return _bin_rules("value", "v", values) + _bin_rules("delta", "d", deltas)


def _bin_rules(mode: str, prefix: str, colors: list[tuple[str, str]]) -> str:
    rules = [
        f"[data-mode={mode}] .{prefix}{k}{{background:light-dark({light},{dark});"
        f"color:light-dark({text_color(light)},{text_color(dark)})}}\n"
        for k, (light, dark) in enumerate(colors)
    ]
    ends = ",".join(f"light-dark({light},{dark})" for light, dark in (colors[0], colors[BINS // 2], colors[-1]))
    return "".join(rules) + f".bar.{mode}{{background:linear-gradient(to right,{ends})}}\n"
