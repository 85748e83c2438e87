"""Pictures: the numbers in them, not only that they exist."""

import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from rl_plugins.report import (
    TokenTrace,
    plot_training_curves,
    select_panels,
    smooth,
    traces_from_rollout,
    write_token_values_html,
)
from rl_plugins.report.colors import BINS, contrast, diverging_color, sequential_color, text_color
from rl_plugins.report.curves import (
    DEFAULT_PANELS,
    EVALUATION_PANELS,
    OTHER_PANELS,
    Panel,
    default_window,
    grid_rows,
    merge_panels,
    panel_of,
)
from rl_plugins.report.page import CSS
from rl_plugins.report.token_text import visible
from rl_plugins.report.token_values import LONG, format_number
from rl_plugins.report.value_chart import nice_ticks

NAN = math.nan


# ---------------------------------------------------------------------------------------------- curves


def full_log(n_steps: int = 12) -> list[dict[str, float]]:
    keys = ["reward", "reward_std", "entropy", "kl", "completions/mean_length", "critic/td_error_abs"]
    keys += ["critic/grad_norm"]
    keys += [f"critic/{name}/head_{k}" for name in ("explained_variance", "value_loss") for k in (1, 2, 10)]
    rows = [{"step": step, **{key: 0.1 * step + i for i, key in enumerate(keys)}} for step in range(n_steps)]
    return [*rows, {"step": n_steps - 1, "train_runtime": 3.0}]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_smooth_by_hand() -> None:
    assert smooth([1.0, 2.0, 6.0, 3.0, 9.0], 3) == [1.5, 3.0, 11 / 3, 6.0, 6.0]
    assert smooth([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]
    assert smooth([], 3) == []


def test_smooth_leaves_missing_points_out() -> None:
    assert smooth([1.0, NAN, 5.0], 3) == [1.0, 3.0, 5.0]
    assert math.isnan(smooth([NAN, NAN, 1.0], 3)[0])


@pytest.mark.parametrize("window", [0, 2, -1])
def test_smooth_refuses_windows_without_a_centre(window: int) -> None:
    with pytest.raises(ValueError, match=f"odd number, not {window}"):
        smooth([1.0], window)


def test_default_window_is_odd_and_grows_with_the_run() -> None:
    assert [default_window(n) for n in (1, 9, 10, 39, 40, 200, 2000)] == [1, 1, 3, 3, 3, 11, 101]


def test_select_panels_reads_every_metric() -> None:
    data = select_panels(full_log())
    assert [item.panel.key for item in data] == [
        "reward",
        "critic/explained_variance/head_*",
        "critic/value_loss/head_*",
        "critic/td_error_abs",
        "critic/grad_norm",
        "entropy",
        "kl",
        "completions/mean_length",
    ]
    assert [line.label for line in data[1].lines] == [
        "head 1",
        "head 2",
        "head 10",
    ]  # by number, not by letter
    reward = data[0].lines[0]
    assert reward.steps == list(range(12))
    assert reward.values == [0.1 * step for step in range(12)]
    assert reward.band == [0.1 * step + 1 for step in range(12)]


def test_select_panels_leaves_absent_metrics_out() -> None:
    log = [{"step": 1, "reward": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "reward": 0.7, "kl_coef": 1.0}]
    (item,) = select_panels(log)
    assert item.panel.key == "reward"
    assert (item.lines[0].steps, item.lines[0].values, item.lines[0].band) == ([1, 3], [0.5, 0.7], None)


def test_no_known_metric_raises_with_the_expected_keys() -> None:
    with pytest.raises(ValueError, match=r"\(1 entries\).*reward, critic/explained_variance/head_\*"):
        select_panels([{"step": 1, "loss": 1.0}])


@pytest.mark.parametrize(
    ("n_panels", "rows"),
    [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2]), (8, [3, 3, 2]), (10, [3, 3, 2, 2])],
)
def test_no_cell_of_the_grid_is_empty(n_panels: int, rows: list[int]) -> None:
    assert grid_rows(n_panels) == rows and sum(rows) == n_panels


def test_titles_are_words() -> None:
    panels = [*EVALUATION_PANELS, *DEFAULT_PANELS, *OTHER_PANELS]
    assert [panel.title for panel in panels if re.search("[_/]", panel.title)] == []
    assert panel_of("critic/value_loss/head_*").title == "Error of the critic's values"
    assert panel_of("critic/value_loss/head_2").title == "Error of the critic's values: head 2"
    assert panel_of("rewards/accuracy/mean").title == "Mean of a reward: accuracy"
    unknown = panel_of("eval_completions/min_length")
    assert (unknown.title, unknown.key) == (
        "Completions min length on held-out data",
        "eval_completions/min_length",
    )


def test_names_become_lines_as_numbers_do() -> None:
    log = [{"step": 1, "rewards/format/mean": 1.0, "rewards/accuracy/mean": 0.5, "rewards/accuracy/std": 0.1}]
    (item,) = select_panels(log, [panel_of("rewards/*/mean")])
    assert [(line.label, line.values) for line in item.lines] == [("accuracy", [0.5]), ("format", [1.0])]


REWARD = [Panel("Reward", "mean reward", "reward", band="reward_std")]


def rewards(points: dict[int, float]) -> list[dict[str, float]]:
    return [{"step": step, "reward": reward, "reward_std": 0.5} for step, reward in points.items()]


def test_runs_of_one_setting_become_a_mean_with_a_band() -> None:
    # Between 0 and 20 the second run goes from 4 to 8. The first one was resumed at 10, and goes further than 20.
    runs = [[*rewards({0: 0.0, 10: 9.0}), *rewards({10: 1.0, 20: 2.0, 30: 3.0})], rewards({0: 4.0, 20: 8.0})]
    (item,) = merge_panels({"critic": runs}, REWARD, window=1)
    (line,) = item.lines
    assert (line.steps, line.values, line.band) == ([0, 10, 20], [2.0, 3.5, 5.0], None)
    assert line.spread == ([0.0, 1.0, 2.0], [4.0, 6.0, 8.0])
    (item,) = merge_panels({"critic": runs}, REWARD, window=1, spread="stderr")
    # Two values a and b: the deviation is |a - b| / sqrt 2, and the error |a - b| / 2.
    assert item.lines[0].spread is not None
    assert item.lines[0].spread[1] == pytest.approx([4.0, 6.0, 8.0])


def test_curves_are_smoothed_before_the_mean() -> None:
    runs = [rewards({0: 0.0, 1: 3.0, 2: 0.0}), rewards({0: 0.0, 1: 0.0, 2: NAN})]
    (item,) = merge_panels({"a": runs}, REWARD, window=3)
    # The first becomes 1.5, 1, 1.5; the second 0, 0, 0.
    assert item.lines[0].values == [0.75, 0.5, 0.75]


def test_every_setting_has_its_line() -> None:
    one, two = rewards({0: 1.0}), [{"step": 0, "kl": 1.0}]
    (item,) = merge_panels({"a": [one], "b": [two], "c": [one, one]}, REWARD)
    assert [(line.setting, line.band) for line in item.lines] == [(0, None), (2, None)]
    (item,) = merge_panels({"a": [one]}, REWARD)
    assert item.lines[0].band == [0.5]


def test_runs_without_a_common_step_have_no_mean() -> None:
    (item,) = merge_panels({"a": [rewards({0: 1.0}), rewards({5: 1.0})]}, REWARD)
    assert item.lines[0].steps == []


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match="spread must be one of range, stderr, not 'std'"):
        merge_panels({"a": [rewards({0: 1.0})]}, REWARD, spread="std")
    with pytest.raises(ValueError, match="every setting needs the log of at least one run"):
        merge_panels({"a": []}, REWARD)
    with pytest.raises(ValueError, match="none of these metrics: reward"):
        merge_panels({"a": [[{"step": 1, "loss": 1.0}]]}, REWARD)


@pytest.mark.slow
def test_the_picture_of_several_runs_has_room_for_its_legend(tmp_path: Path) -> None:
    settings = {"critic": [full_log(), full_log()], "grpo": [full_log()], "ppo": [full_log()]}
    path = plot_training_curves(settings, tmp_path / "a.png", panels=REWARD)
    # A panel of 3.6 x 2.8 inches, and 0.3 each for two rows of three names and the line about bands.
    assert png_size(path) == (540, 555)


@pytest.mark.slow
def test_png_of_all_panels_has_the_expected_size(tmp_path: Path) -> None:
    path = plot_training_curves(full_log(), tmp_path / "new" / "a.png", title="run", marks={3: "warm-up ends"})
    assert path == tmp_path / "new" / "a.png"
    # 3 x 3 panels of 3.6 x 2.8 inches, 0.4 for the title and 0.3 for the marks, at 150 dots per inch.
    assert png_size(path) == (1620, 1365)


def test_paid_steps_have_a_panel_where_they_are_logged() -> None:
    (item,) = select_panels([{"step": 1, "step_rewards/per_completion": 8.0, "step_rewards/before_end": 0.9}])
    assert (item.panel.title, item.lines[0].values) == ("Steps that are paid", [8.0])


def test_png_of_chosen_panels(tmp_path: Path) -> None:
    panels = [Panel("Loss", "nats", "loss"), Panel("KL", "nats", "kl")]
    path = plot_training_curves([{"step": 1, "loss": 2.0}], tmp_path / "a.png", panels=panels)
    assert png_size(path) == (540, 420)


def test_missing_and_extreme_values_can_be_drawn(tmp_path: Path) -> None:
    log = [{"step": i, "critic/explained_variance/head_1": v, "reward": NAN} for i, v in enumerate([NAN, -9.0, 0.5])]
    assert png_size(plot_training_curves(log, tmp_path / "a.png")) == (1080, 420)


@pytest.mark.slow
def test_plotting_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from rl_plugins.report import plot_training_curves\n"
        f"plot_training_curves([{{'step': 1, 'reward': 1.0}}], {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# -------------------------------------------------------------------------------------------- token values


class Page(HTMLParser):
    """Token spans (attributes and text), articles, buttons, and all tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self.articles: list[dict[str, str | None]] = []
        self.buttons: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self._in_token = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "article":
            self.articles.append(values)
        if tag == "button":
            self.buttons.append(values)
        if tag == "span" and "data-value" in values:
            self.spans.append((values, ""))
            self._in_token = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._in_token = False

    def handle_data(self, data: str) -> None:
        if self._in_token:
            attributes, text = self.spans[-1]
            self.spans[-1] = (attributes, text + data)


RIGHT = TokenTrace("2 + 2 =", [" 4", "\n", "<|end|>"], [0.0, 0.5, 1.0], [0.5, -1.0, 0.0], 1.0, {"answer": "<4>"})
WRONG = TokenTrace("1 + 1 =", ["<script>alert(1)</script>"], [0.1 + 0.2], [-0.25], 0.0)


def write(tmp_path: Path, *traces: TokenTrace, **kwargs: tuple[float, float] | float) -> str:
    path = write_token_values_html(traces, tmp_path / "a.html", title="T", **kwargs)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


def test_one_span_per_token_with_its_numbers(tmp_path: Path) -> None:
    page = Page(write(tmp_path, RIGHT, WRONG))
    numbers = [(float(a["data-value"] or ""), float(a["data-delta"] or "")) for a, _ in page.spans]
    assert numbers == [(0.0, 0.5), (0.5, -1.0), (1.0, 0.0), (0.3, -0.25)]  # six digits of 0.1 + 0.2
    assert [text for _, text in page.spans] == ["␣4", "↵", "<|end|>", "<script>alert(1)</script>"]


def test_bins_follow_the_shared_scales(tmp_path: Path) -> None:
    page = Page(write(tmp_path, RIGHT, WRONG))
    # Values span [0, 1], TD errors [-1, 1], in 64 steps.
    assert [(a["class"] or "").split()[1:3] for a, _ in page.spans] == [
        ["v0", "d48"],
        ["v32", "d0"],
        ["v64", "d32"],
        ["v19", "d24"],
    ]
    assert "special" in (page.spans[2][0]["class"] or "")


def test_value_range_clamps_and_the_legend_says_so(tmp_path: Path) -> None:
    text = write(tmp_path, RIGHT, value_range=(0.25, 0.75))
    assert [(a["class"] or "").split()[1] for a, _ in Page(text).spans] == ["v0", "v32", "v64"]
    assert "<span>≤ 0.25</span><span>0.50</span><span>≥ 0.75</span>" in text
    assert "≤" not in write(tmp_path, RIGHT, value_range=(0.0, 1.0))


def test_missing_values_have_no_colour_and_no_effect_on_the_scale(tmp_path: Path) -> None:
    trace = TokenTrace("p", list("abc"), [0.0, NAN, 1.0], [NAN, 2.0, math.inf], 1.0)
    page = Page(write(tmp_path, trace))
    bins = [(a["class"] or "").split()[1:3] for a, _ in page.spans]
    assert bins == [["v0", "dna"], ["vna", "d64"], ["v64", "dna"]]
    assert page.spans[1][0]["data-value"] == "nan"
    assert format_number(NAN, 2) == "–"
    assert format_number(-0.125, 3) == "−0.125"


def test_nothing_finite_and_nothing_generated_can_be_shown(tmp_path: Path) -> None:
    text = write(tmp_path, TokenTrace("p", ["a"], [NAN], [NAN], NAN), TokenTrace("p", [], [], [], 0.0))
    assert len(Page(text).spans) == 1
    assert "empty completion" in text


def test_markup_in_any_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    trace = TokenTrace(evil, [evil, "&amp;"], [0.0, 0.0], [0.0, 0.0], 0.0, {evil: evil})
    path = write_token_values_html([trace], tmp_path / "a.html", title=evil, subtitle=evil)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1  # our own
    assert [text for _, text in page.spans] == [evil, "&amp;"]


def test_articles_carry_the_keys_of_filter_and_sort(tmp_path: Path) -> None:
    keys = ("data-order", "data-reward", "data-surprise", "data-verdict")
    articles = Page(write(tmp_path, RIGHT, WRONG)).articles
    assert [tuple(a[key] for key in keys) for a in articles] == [
        ("0", "1.0", "1.0", "right"),
        ("1", "0.0", "0.25", "wrong"),
    ]
    assert Page(write(tmp_path, RIGHT, right_above=1.0)).articles[0]["data-verdict"] == "wrong"


def test_page_is_self_contained(tmp_path: Path) -> None:
    text = write(tmp_path, RIGHT, WRONG)
    assert "http://" not in text and "https://" not in text
    assert not {"link", "img", "iframe", "object"} & set(Page(text).tags)
    assert " src=" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_every_switch_says_whether_it_is_pressed(tmp_path: Path) -> None:
    buttons = Page(write(tmp_path, RIGHT)).buttons
    switches = {b["data-pick"] or "": b["aria-pressed"] for b in buttons if "data-pick" in b}
    assert [name for name, pressed in switches.items() if pressed == "true"] == ["value", "all", "order", "system"]
    assert [name for name, pressed in switches.items() if pressed == "false"] == (
        ["delta", "right", "wrong", "reward", "surprise", "light", "dark"]
    )
    others = [(b["id"], b.get("aria-pressed"), b.get("aria-label")) for b in buttons if "data-pick" not in b]
    assert others == [
        ("numbers", "false", None),
        ("previous", None, "Previous match"),
        ("next", None, "Next match"),
    ]


def test_one_tab_stop_per_completion(tmp_path: Path) -> None:
    assert [a.get("tabindex") for a, _ in Page(write(tmp_path, RIGHT, WRONG)).spans] == ["0", None, None, "0"]


def test_words_do_not_break_and_lines_end_where_they_do_in_the_text(tmp_path: Path) -> None:
    tokens = ["un", "believ", "ably", " good", ":", "\n   ", "x", " =", "漢", "字"]
    text = write(tmp_path, TokenTrace("p", tokens, [0.0] * 10, [0.0] * 10, 1.0))
    (inside,) = re.findall(r'arrow keys move between tokens">(.*?)</div></div>\n</article>', text)
    shown = re.sub(
        r"<(?!wbr|br|span class=w|/span)[^>]*>", "", re.sub(r'<span class="t.*?>(.*?)</span>', r"\1", inside)
    )
    assert shown == (
        "<span class=w>unbelievably</span><wbr><span class=w>␣good:↵<br>␣␣␣x</span><wbr>"
        "<span class=w>␣=漢</span><wbr>字<wbr>"
    )


def test_the_expected_answer_stands_beside_the_reward(tmp_path: Path) -> None:
    trace = TokenTrace("p", ["5"], [0.0], [0.0], 1.0, answer="<5>")
    assert "<span class=fact><b>expected answer</b> &lt;5&gt;</span>" in write(tmp_path, trace)
    assert "expected answer" not in write(tmp_path, RIGHT)


def test_long_completions_have_a_wide_line_with_round_numbers(tmp_path: Path) -> None:
    values = [-0.1525 + 1.3 * i / LONG for i in range(LONG + 1)]
    text = write(tmp_path, TokenTrace("p", ["a"] * (LONG + 1), values, [0.0] * (LONG + 1), 1.0), RIGHT)
    assert [a["class"] for a in Page(text).articles] == ["long", "short"]
    wide, small = re.findall(r"<figure.*?</figure>", text)
    assert wide.startswith('<figure class="chart wide"') and small.startswith('<figure class="chart"')
    assert re.findall(r"class=y [^>]*>([^<]*)", wide) == ["0.0", "0.5", "1.0"]
    assert re.findall(r'class=x style="left:([^%]*)%">([^<]*)', wide)[:3] == [
        ("0.00", "0"),
        ("12.20", "5"),
        ("24.39", "10"),
    ]
    assert re.findall(r"class=x ", small) == []


@pytest.mark.parametrize(
    ("low", "high", "most", "labels"),
    [
        (-0.1525, 1.209, 4, ["0.0", "0.5", "1.0"]),
        (0.0, 500.0, 10, ["0", "100", "200", "300", "400", "500"]),
        (-0.001, 0.0021, 3, ["0.000", "0.002"]),
        (-30.0, -10.0, 3, ["−30", "−20", "−10"]),
        (0.0, 1.0, 3, ["0.0", "0.5", "1.0"]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, labels: list[str]) -> None:
    ticks = nice_ticks(low, high, most)
    assert [label for _, label in ticks] == labels
    assert [value for value, _ in ticks] == pytest.approx([float(label.replace("−", "-")) for label in labels])


def test_values_that_do_not_vary_yet_are_said_to(tmp_path: Path) -> None:
    def values(*numbers: float) -> TokenTrace:
        return TokenTrace("p", ["a"] * len(numbers), list(numbers), [0.0] * len(numbers), 1.0)

    wrong = TokenTrace("p", ["a"], [0.5], [0.0], 0.0)
    assert "The values of all tokens are between 0.48 and 0.52, so" in write(tmp_path, values(0.48, 0.52), wrong)
    assert "The values of all tokens are about 0.5, so" in write(tmp_path, values(0.5, 0.5), wrong)
    for varied in (values(0.4, 0.52), values(NAN)):
        assert "do not vary" not in write(tmp_path, varied, TokenTrace("p", ["a"], [NAN], [0.0], 0.0))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a\tb\n", "␣a⇥b↵"),
        ("\x00\r\x7f", "⟨U+0000⟩⟨U+000D⟩⟨U+007F⟩"),
        ("\u202e\u200b\u00a0\ud800", "⟨U+202E⟩⟨U+200B⟩⟨U+00A0⟩⟨U+D800⟩"),
        ("日本 é�", "日本␣é�"),
    ],
)
def test_unseen_characters_are_made_visible(text: str, shown: str) -> None:
    assert visible(text, keep="") == shown


def test_color_scales_at_ends_and_middle() -> None:
    assert [sequential_color(x) for x in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [
        "#fdf6dc",
        "#fdf6dc",
        "#6cc0b4",
        "#0b4a80",
        "#0b4a80",
    ]
    assert [diverging_color(x) for x in (-2.0, -1.0, 0.0, 1.0)] == [
        "#b2182b",
        "#b2182b",
        "#f6f6f6",
        "#2166ac",
    ]
    assert [diverging_color(x, dark=True) for x in (-1.0, 0.0, 1.0)] == ["#f06a54", "#2c313a", "#60aef5"]
    assert sequential_color(0.25) == "#b4dbc8"  # halfway: (180.5, 219, 200)


def test_contrast_by_hand() -> None:
    assert contrast("#000000", "#ffffff") == 21.0
    assert contrast("#777777", "#777777") == 1.0
    assert (text_color("#ffffff"), text_color("#0b4a80")) == ("#000000", "#ffffff")


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_every_color(dark: bool) -> None:
    positions = [k / (BINS - 1) for k in range(BINS)]
    colors = [sequential_color(x, dark) for x in positions]
    colors += [diverging_color(2 * x - 1, dark) for x in positions]
    assert min(contrast(color, text_color(color)) for color in colors) >= 4.5  # WCAG 2 AA


@pytest.mark.parametrize(("values", "deltas"), [([0.0], [0.0, 0.0]), ([0.0, 0.0], [0.0])])
def test_unequal_lengths_name_the_trace(tmp_path: Path, values: list[float], deltas: list[float]) -> None:
    bad = TokenTrace("why?", ["a", "b"], values, deltas, 0.0)
    with pytest.raises(
        ValueError, match=rf"trace 1 \(prompt 'why\?'\) has 2 tokens, {len(values)} values and {len(deltas)}"
    ):
        write(tmp_path, RIGHT, bad)


def test_no_traces_and_empty_ranges_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="traces is empty"):
        write(tmp_path)
    with pytest.raises(ValueError, match=r"low < high, not \(1.0, 1.0\)"):
        write(tmp_path, RIGHT, value_range=(1.0, 1.0))


# ----------------------------------------------------------------------------------------- turns and rewards


class Bytes:
    """A tokenizer whose tokens are bytes, so that an emoji takes two of them."""

    tokens = (b"<pad>", b" 4", b"\xf0\x9f", b"\x91\x8b", b"\n", b"ok", b"5", b"<|end|>")

    def decode(self, ids: list[int] | torch.Tensor, skip_special_tokens: bool = False) -> str:
        return b"".join(self.tokens[int(i)] for i in ids).decode(errors="replace")


# Row 0 plays two turns: " 4👋" earns -0.5, the environment says "\nok", and "5<|end|>" earns 1.5. Row 1 could not be
# scored. Row 2 plays one turn, which is paid with 0, and the environment has the last word.
OWN = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0], [0] * 8, [1, 0, 0, 0, 0, 0, 0, 0]])
ROLLOUT = {
    "prompt_ids": torch.tensor([[0, 1], [0, 1], [5, 1]]),
    "prompt_mask": torch.tensor([[0, 1], [0, 1], [1, 1]]),
    "completion_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0], [6, 7, 0, 0, 0, 0, 0, 0], [6, 5, 0, 0, 0, 0, 0, 0]]),
    "completion_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]),
    "critic_mask": OWN,
    "old_values": torch.tensor([[0.0, 0.5, 1.0, 9.0, 9.0, 0.5, 0.0, 9.0], [9.0] * 8, [0.5] + [9.0] * 7])[..., None],
    "td_errors": torch.tensor([[0.5, 0.5, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 8, [-0.5] + [0.0] * 7]),
    "scores": torch.tensor([1.0, NAN, 0.0]),
    "rewards": torch.tensor([[0, 0, -0.5, 0, 0, 0, 1.5, 0], [0.0] * 8, [0.0] * 8]),
    "paid": torch.tensor([[0, 0, 1, 0, 0, 0, 1, 0], [0] * 8, [1, 0, 0, 0, 0, 0, 0, 0]]).bool(),
}


def same(given: list[float] | None, wanted: list[float]) -> bool:
    """Equality in which NaN equals NaN."""
    return given is not None and repr(given) == repr(wanted)


def test_traces_keep_the_environment_and_the_rewards_at_their_tokens() -> None:
    first, last = traces_from_rollout(Bytes(), ROLLOUT)  # nothing is known of the row without a score
    assert first.tokens == [" 4", "\ufffd", "\ufffd\ufffd", "\n", "ok", "5", "<|end|>"]
    assert same(first.values, [0.0, 0.5, 1.0, NAN, NAN, 0.5, 0.0])
    assert same(first.td_errors, [0.5, 0.5, -1.0, NAN, NAN, 0.0, 1.0])
    assert same(first.rewards, [NAN, NAN, -0.5, NAN, NAN, NAN, 1.5])
    assert first.tool_mask == [True, True, True, False, False, True, True]
    assert first.turns() == [range(0, 3), range(3, 7)]
    assert (last.prompt, last.tokens, last.tool_mask) == ("ok 4", ["5", "ok"], [True, False])
    assert same(last.rewards, [0.0, NAN])
    assert last.turns() == [range(0, 1), range(1, 2)]


def test_traces_of_whole_completions_have_no_rewards_of_steps() -> None:
    own = ROLLOUT["completion_mask"]
    end = torch.zeros(3, 8).bool()
    end[[0, 1, 2], [6, 1, 1]] = True
    single = {**ROLLOUT, "critic_mask": own, "paid": end}
    assert [(trace.rewards, trace.tool_mask) for trace in traces_from_rollout(Bytes(), single)] == [(None, None)] * 3
    # One step that is paid before the end is enough, for all rows.
    end[0, 2] = True
    first, second, _ = traces_from_rollout(Bytes(), single)
    assert same(first.rewards, [NAN, NAN, -0.5, NAN, NAN, NAN, 1.5])
    assert same(second.rewards, [NAN, 0.0])
    assert first.tool_mask is None
    # A rollout of one's own may lack what only episodes have.
    old = {name: x for name, x in ROLLOUT.items() if name not in ("completion_mask", "rewards", "paid")}
    assert traces_from_rollout(Bytes(), old)[0].tokens == [" 4", "\ufffd", "\ufffd\ufffd", "5", "<|end|>"]


def test_turns_and_rewards_by_hand(tmp_path: Path) -> None:
    text = write(tmp_path, *traces_from_rollout(Bytes(), ROLLOUT))
    # Values span [0, 1], TD errors [-1, 1]. The environment's tokens stand where the next turn begins.
    assert (
        "<div class=turns>"
        '<div class="turn" role=group aria-label="Turn 1"><span class=no aria-hidden=true>1</span>'
        '<span class=w><span class="t v0 d48" data-value="0" data-delta="0.5" tabindex=0><i>␣</i>4</span>'
        '<span class="t v32 d48" data-value="0.5" data-delta="0.5">\ufffd</span>'
        '<span class="t v64 d0" data-value="1" data-delta="-1" data-paid="−0.5">\ufffd\ufffd</span>'
        '<b class="pay minus" title="paid after this token">−0.5</b></span><wbr></div>'
        '<div class="turn tall" role=group aria-label="Turn 2"><span class=no aria-hidden=true>2</span>'
        '<span class="t env"><i>↵</i></span><br><span class=w><span class="t env">ok</span>'
        '<span class="t v32 d32" data-value="0.5" data-delta="0">5</span>'
        '<span class="t v0 d64 special" data-value="0" data-delta="1" data-paid="+1.5">&lt;|end|&gt;</span>'
        '<b class="pay plus" title="paid after this token">+1.5</b></span><wbr></div>'
        "</div>"
    ) in text
    assert (
        '<div class="turn" role=group aria-label="Turn 1"><span class=no aria-hidden=true>1</span>'
        '<span class=w><span class="t v32 d16" data-value="0.5" data-delta="-0.5" data-paid="0" tabindex=0>5</span>'
        '<b class="pay zero" title="paid after this token">0</b></span><wbr></div>'
        '<div class="turn" role=group aria-label="After the last turn">'
        '<span class="t env">ok</span><wbr></div>'
    ) in text
    assert "<span class=fact>5 tokens in 2 turns, 2 of the environment</span>" in text
    assert "<span class=fact>1 token in 1 turn, 1 of the environment</span>" in text


def test_the_curve_shows_rewards_still_to_come(tmp_path: Path) -> None:
    text = write(tmp_path, *traces_from_rollout(Bytes(), ROLLOUT))
    # Five tokens of the policy; 0 lies at 100 and 1.5 at 0. Before the tokens 1, 1, 1, 1.5 and 1.5 are to come, and
    # each step is half a token to the right of the token that is paid.
    assert '<path class=curve d="M0 100.0h0L1 66.7L2 33.3L3 66.7L4 100.0"/>' in text
    assert '<path class=stairs d="M0 33.3H2.5V0.0H4.5V100.0H5"/>' in text
    assert "V(s_t) goes from 0.00 to 0.00; the reward was 1, paid after 2 tokens" in text
    assert "class=aim" not in text


def test_zeros_between_rewards_of_tokens_are_not_written(tmp_path: Path) -> None:
    dense = TokenTrace("p", list("abcd"), [0.0] * 4, [0.0] * 4, 0.5, rewards=[0.0, 0.5, 0.0, 0.0])
    text = write(tmp_path, dense)
    assert re.findall(r'<b class="pay (\w+)"[^>]*>([^<]*)', text) == [("plus", "+0.5"), ("zero", "0")]  # and the end
    assert re.findall(r'data-paid="([^"]*)"', text) == ["0", "+0.5", "0", "0"]
    sparse = TokenTrace("p", list("abcd"), [0.0] * 4, [0.0] * 4, 0.5, rewards=[NAN, 0.0, NAN, 0.5])
    assert re.findall(r'<b class="pay (\w+)"', write(tmp_path, sparse)) == ["zero", "plus"]


def test_pages_without_rewards_of_steps_have_no_signs_for_them(tmp_path: Path) -> None:
    text = write(tmp_path, RIGHT)
    assert (
        '<span class=w><span class="t v0 d48" data-value="0" data-delta="0.5" tabindex=0><i>␣</i>4</span>'
        '<span class="t v32 d0" data-value="0.5" data-delta="-1"><i>↵</i></span></span><br>'
    ) in text
    assert "<span class=fact>3 tokens</span>" in text and '<span class=aim style="top:0.0%"></span>' in text
    assert not [sign for sign in ("class=key", "data-paid", 'class="turn', 'class="pay', "stairs d=") if sign in text]


@pytest.mark.parametrize("name", ["rewards", "tool_mask"])
def test_unequal_lengths_of_rewards_and_masks_are_named(tmp_path: Path, name: str) -> None:
    bad = TokenTrace("why?", ["a", "b"], [0.0, 0.0], [0.0, 0.0], 0.0, **{name: [1.0]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"trace 0 \(prompt 'why\?'\) has 2 tokens and 1 entries in {name}"):
        write(tmp_path, bad)


@pytest.mark.parametrize("theme", [0, 1])
def test_signs_of_turns_and_rewards_are_readable(theme: int) -> None:
    pairs = re.findall(r"--([\w-]+):light-dark\((#\w{6}),(#\w{6})\)", CSS)
    colors = {name: pair[theme] for name, *pair in pairs}
    assert min(contrast(colors[name], colors["card"]) for name in ("pay", "soft", "good", "bad")) >= 4.5  # WCAG 2 AA
    assert min(contrast(colors["ink"], colors[name]) for name in ("page", "card", "well")) >= 4.5
