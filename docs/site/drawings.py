"""Draw the figures of the page of concepts: `python docs/site/drawings.py` writes docs/images/drawings/*.svg.

The drawings take their colours from the page that they stand in, and from the reader's system where they stand alone.
"""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "images" / "drawings"
STYLE = """
svg { --own-ink: #1f2328; --own-faint: #6a737d; --own-box: #eef1f8; --own-blue: #26418f; --own-warm: #b4430b;
      --own-green: #1c7a43; }
@media (prefers-color-scheme: dark) {
  svg { --own-ink: #e4e7ee; --own-faint: #9aa3b2; --own-box: #2a2f3d; --own-blue: #9db2f5; --own-warm: #fb9a5c;
        --own-green: #6fcf97; }
}
.d-text { fill: var(--drawing-ink, var(--own-ink)); font: 15px system-ui, sans-serif; }
.d-math { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 14px; }
.d-small { font-size: 13px; }
.d-faint { fill: var(--drawing-faint, var(--own-faint)); }
.d-blue { fill: var(--drawing-blue, var(--own-blue)); }
.d-warm { fill: var(--drawing-warm, var(--own-warm)); }
.d-green { fill: var(--drawing-green, var(--own-green)); }
.d-box { fill: var(--drawing-box, var(--own-box)); stroke: var(--drawing-faint, var(--own-faint)); stroke-width: 1.2; }
.d-box.d-blue { stroke: var(--drawing-blue, var(--own-blue)); }
.d-box.d-warm { stroke: var(--drawing-warm, var(--own-warm)); }
.d-box.d-green { stroke: var(--drawing-green, var(--own-green)); }
.d-box.d-blue, .d-box.d-warm, .d-box.d-green { fill: var(--drawing-box, var(--own-box)); stroke-width: 2; }
.d-line { stroke: var(--drawing-ink, var(--own-ink)); stroke-width: 1.4; fill: none; }
.d-line.d-blue { stroke: var(--drawing-blue, var(--own-blue)); }
.d-line.d-warm { stroke: var(--drawing-warm, var(--own-warm)); }
.d-line.d-faint { stroke: var(--drawing-faint, var(--own-faint)); stroke-dasharray: 5 4; }
.d-tip { fill: context-stroke; }
"""


class Drawing:
    """Shapes of one figure."""

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.name, self.title, self.size = name, title, (width, height)
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        """Write a line of text."""
        self.parts.append(
            f'<text class="d-text {kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, words: str = "", kind: str = "", style: str = "") -> None:
        """Draw a box with lines of text in its middle, separated by `/`."""
        self.parts.append(f'<rect class="d-box {kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6"/>')
        lines = words.split(" / ") if words else []
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 5 + 19 * (i - (len(lines) - 1) / 2), line, style)

    def arrow(self, *points: tuple[float, float], kind: str = "", tip: bool = True) -> None:
        """Draw a line through points, with a tip at the last one."""
        path = " ".join(f"{'ML'[i > 0]}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        end = f' marker-end="url(#tip-{self.name})"' if tip else ""
        self.parts.append(f'<path class="d-line {kind}" d="{path}"{end}/>')

    def bar(self, x: float, bottom: float, w: float, h: float, kind: str) -> None:
        """Draw a filled bar that stands on a line."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{bottom - h:g}" width="{w:g}" height="{h:g}" rx="2"/>')

    def write(self) -> None:
        """Write the file."""
        w, h = self.size
        tip = (
            f'<marker id="tip-{self.name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="d-tip" d="M0 0L8 4L0 8z"/></marker>'
        )
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{self.name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" role="img">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style><defs>{tip}</defs>"
            + "\n".join(self.parts)
            + "</svg>\n"
        )


def time_index() -> Drawing:
    """A completion of three tokens with its states, values and rewards."""
    d = Drawing("time_index", "States, actions, rewards and values of a completion of three tokens", 800, 290)
    left, width = 190, 130
    d.box(30, 110, 160, 50, "prompt")
    for t in range(3):
        x = left + width * t
        d.box(x, 110, width, 50, f"y_{t}", "d-blue", "d-math")
        d.arrow((x, 92), (x, 174), kind="d-faint", tip=False)
        d.text(x, 60, f"V(s_{t})", "d-math d-green")
        d.text(x, 84, f"s_{t}", "d-math")
        d.arrow((x + width, 164), (x + width, 205), kind="d-warm")
        d.text(x + width, 226, f"r_{t}", "d-math d-warm")
    end = left + 3 * width
    d.arrow((end, 92), (end, 164), kind="d-faint", tip=False)
    d.text(end, 60, "V = 0", "d-math d-green")
    d.text(end, 84, "s_3", "d-math")
    d.text(630, 60, "value of a state", "d-small d-green", "start")
    d.text(630, 84, "state: all before it", "d-small", "start")
    d.text(630, 140, "action: a token", "d-small d-blue", "start")
    d.text(630, 226, "reward for a token", "d-small d-warm", "start")
    d.text(380, 268, "V(s_t) = E[ r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ... ]", "d-math")
    return d


def critic() -> Drawing:
    """One network with two outputs at every token."""
    d = Drawing("critic", "The critic is a head on the policy's own hidden state", 800, 330)
    d.box(30, 130, 120, 70, "prompt and / tokens so far")
    d.box(200, 110, 130, 110, "trunk of / the policy")
    d.arrow((150, 165), (200, 165))
    d.arrow((330, 150), (430, 90))
    d.text(362, 106, "h_t", "d-math", "end")
    d.box(430, 60, 130, 50, "LM head", "d-blue")
    d.arrow((560, 85), (610, 85))
    d.text(618, 80, "next token y_t", "d-small", "start")
    d.text(618, 99, "policy loss", "d-small d-blue", "start")
    d.arrow((330, 178), (430, 200))
    d.box(430, 170, 130, 60, "MTP head 1 / the critic", "d-green")
    d.arrow((560, 192), (610, 172))
    d.text(618, 170, "value V(s_t)", "d-small d-green", "start")
    d.text(618, 189, "value loss", "d-small d-green", "start")
    d.arrow((560, 212), (610, 226))
    d.text(618, 226, "a later token", "d-small", "start")
    d.text(618, 245, "token loss", "d-small", "start")
    d.arrow((430, 218), (342, 200), kind="d-warm")
    d.text(386, 240, "gradient of the values,", "d-small d-warm")
    d.text(386, 257, "clamped for every token", "d-small d-warm")
    d.arrow((495, 230), (495, 270), kind="d-faint")
    d.box(400, 270, 190, 46, "slow copy of the head")
    d.arrow((590, 293), (612, 293), kind="d-faint")
    d.text(618, 290, "V'(s_{t+1}), from", "d-small", "start")
    d.text(618, 308, "which targets bootstrap", "d-small", "start")
    return d


def mtp_modules() -> Drawing:
    """Parallel and sequential heads side by side."""
    d = Drawing("mtp_modules", "Parallel heads read one hidden state, sequential heads also read tokens", 760, 330)
    d.text(180, 30, "parallel heads")
    d.box(40, 245, 280, 50, "trunk")
    d.arrow((180, 245), (180, 215), tip=False)
    d.text(196, 236, "h_t", "d-math", "start")
    d.arrow((80, 215), (280, 215), tip=False)
    for i, (x, name, what) in enumerate(
        [(80, "LM head", "y_t"), (180, "head 1", "y_{t+1}"), (280, "head 2", "y_{t+2}")]
    ):
        d.arrow((x, 215), (x, 180))
        d.box(x - 42, 130, 84, 50, name, "d-blue" if i == 0 else "d-green")
        d.arrow((x, 130), (x, 98))
        d.text(x, 88, what, "d-math")
        if i:
            d.text(x, 66, ("V(s_t)", "V(s_{t+1})")[i - 1], "d-math d-green")
    d.text(180, 318, "all guess from one state, side by side", "d-small d-faint")
    d.text(570, 30, "sequential heads")
    d.box(410, 245, 90, 50, "trunk")
    for i, x in enumerate((560, 680)):
        d.box(x - 45, 130, 90, 50, f"depth {i + 1}", "d-green")
        d.arrow((x, 270), (x, 180))
        d.box(x - 45, 245, 90, 50, ("token / y_{t-1}", "token / y_t")[i], "", "d-math d-small")
        d.arrow((x, 130), (x, 98))
        d.text(x, 88, ("y_t", "y_{t+1}")[i], "d-math")
        d.text(x, 66, ("V(s_t)", "V(s_{t+1})")[i], "d-math d-green")
    d.arrow((455, 245), (455, 155), (515, 155))
    d.text(448, 200, "h_{t-1}", "d-math", "end")
    d.arrow((605, 155), (635, 155))
    d.text(570, 318, "each reads one token more, as decoder layers do", "d-small d-faint")
    return d


def balancing() -> Drawing:
    """Loss-free balancing in two steps."""
    d = Drawing("balancing", "A bias for each expert steers the choice, and follows the load", 760, 320)
    loads, moved = (90, 40, 64, 22), (62, 50, 56, 48)
    d.box(30, 120, 110, 60, "router / scores")
    d.arrow((140, 150), (180, 150))
    d.box(180, 120, 110, 60, "+ bias of / each expert", "d-warm")
    d.arrow((290, 150), (330, 150))
    d.box(330, 120, 90, 60, "choose / the top k")
    d.arrow((420, 150), (460, 150))
    for start, heights, words in ((470, loads, "load of this step"), (630, moved, "load after some steps")):
        d.arrow((start, 190), (start + 116, 190), tip=False)
        for i, height in enumerate(heights):
            d.bar(start + 8 + 27 * i, 190, 20, height, "d-blue")
        mean = sum(heights) / 4
        d.arrow((start, 190 - mean), (start + 116, 190 - mean), kind="d-faint", tip=False)
        d.text(start + 58, 212, words, "d-small d-faint")
    d.arrow((594, 150), (624, 150))
    d.arrow((528, 222), (528, 262), (235, 262), (235, 184), kind="d-warm")
    d.text(380, 282, "after the optimizer step: too busy, bias down; too idle, bias up", "d-small d-warm")
    d.arrow((85, 120), (85, 70), (380, 70), tip=False)
    d.arrow((380, 70), (528, 70), (528, 92))
    d.text(290, 60, "weights of the chosen experts: the scores without the bias", "d-small")
    d.text(380, 306, "dashed: the mean, which is perfect balance", "d-small d-faint")
    return d


def speculative() -> Drawing:
    """One step of speculative decoding."""
    d = Drawing("speculative", "Heads draft three tokens, the model checks them in one pass", 760, 300)
    names = ("settled", "draft 1", "draft 2", "draft 3")
    d.text(20, 58, "1. The heads draft", "d-small", "start")
    d.text(20, 148, "2. One forward pass", "d-small", "start")
    d.text(20, 166, "checks all drafts", "d-small", "start")
    d.text(20, 248, "3. The row goes on", "d-small", "start")
    for i, name in enumerate(names):
        x = 190 + 140 * i
        d.box(x, 30, 120, 46, name, "" if i == 0 else "d-green")
        d.arrow((x + 60, 76), (x + 60, 124))
        verdict = ("", "stays", "stays", "rejected")[i]
        d.box(x, 124, 120, 46, verdict or "pass", "d-warm" if i == 3 else "d-blue")
        d.arrow((x + 60, 170), (x + 60, 220), kind="d-faint" if i == 3 else "")
        d.box(
            x,
            220,
            120,
            46,
            ("settled", "draft 1", "draft 2", "drawn anew")[i],
            ("", "d-green", "d-green", "d-blue")[i],
        )
    d.text(
        470, 288, "three new tokens for one pass of the model, with the model's own distribution", "d-small d-faint"
    )
    return d


if __name__ == "__main__":
    for draw in (time_index, critic, mtp_modules, balancing, speculative):
        draw().write()
