"""The page of token values in a browser: search, themes, keys and the line of values do what they say."""

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from rl_plugins.report import TokenTrace, write_token_values_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OWN = [True, True, True, False, True]
TRACES = [
    TokenTrace("p", ["the", " answer", "\n", "is", " f", "our"], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.2] * 6, 1.0),
    TokenTrace(
        "p", ["Four", " \udce2\udc89", "≈", " env", "4"], [0.1] * 5, [-0.5] * 5, 0.0, tool_mask=[1, 1, 1, 0, 1]
    ),
]
# Runs in the page after its own script, and leaves what it found in the title.
SCRIPT = """<script>{
const found = {};
const one = (selector) => document.querySelector(selector);
const click = (selector) => one(selector).click();
const texts = (selector) => [...document.querySelectorAll(selector)].map((el) => el.textContent);
const key = (name) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
BODY
document.title = "FOUND" + JSON.stringify(found) + "END";
}</script></body>"""


def in_browser(tmp_path: Path, body: str, settings: str = "") -> dict[str, Any]:
    path = write_token_values_html(TRACES, tmp_path / "a.html", title="T")
    path.write_text(path.read_text("utf-8").replace("</body>", SCRIPT.replace("BODY", body)), "utf-8")
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    options += ["--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [BROWSER, *options, f"{path.as_uri()}#{settings}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r"<title>FOUND(.*?)END</title>", done.stdout)
    assert match is not None, "the script in the page failed"
    return json.loads(unescape(match[1]))


pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")]


def test_search_finds_what_spreads_over_tokens(tmp_path: Path) -> None:
    found = in_browser(
        tmp_path,
        """const search = (text) => { find.value = text; find.dispatchEvent(new Event("input")); };
        search("four"); found.four = texts(".hit"); found.told = one("#found").value;
        click("#next"); click("#next"); found.now = texts(".now"); found.place = one("#found").value;
        click("#next"); found.around = one("#found").value;
        search("answer is f"); found.line = texts(".hit");
        search("≈"); found.sign = texts(".hit");
        search("five"); found.none = [one("#found").value, one("#next").disabled];
        search("four"); click("[data-pick=wrong]"); found.filtered = one("#found").value;""",
        settings="find=env",
    )
    assert found["four"] == ["␣f", "our", "Four"] and found["told"] == "2 found"
    assert found["now"] == ["Four"] and found["place"] == "2 of 2" and found["around"] == "1 of 2"
    assert found["line"] == ["␣answer", "↵", "is", "␣f"]
    assert found["sign"] == ["≈"]
    assert found["none"] == ["not found", True]
    assert found["filtered"] == "1 found"


def test_themes_and_settings_of_the_address(tmp_path: Path) -> None:
    body = """const colors = () => getComputedStyle(document.body).backgroundColor;
    found.address = [colors(), document.body.dataset.mode, texts("article:not(.left-out) h2").join()];
    found.pressed = texts("[aria-pressed=true]");
    found.tools = getComputedStyle(one(".find")).display;
    click("[data-pick=light]"); found.light = colors();
    click("[data-pick=system]"); found.system = document.documentElement.dataset.theme ?? "system";"""
    found = in_browser(tmp_path, body, "theme=dark&mode=delta&sort=surprise&only=2&tools=off")
    assert found["address"] == ["rgb(20, 23, 28)", "delta", "#2"]
    assert found["pressed"] == ["TD error", "all 2", "largest |δ|", "dark"]
    assert (found["tools"], found["light"], found["system"]) == ("none", "rgb(255, 255, 255)", "system")
    shown = "found.shown = texts('article:not(.left-out) h2').join();"
    assert in_browser(tmp_path, shown, "only=1,2")["shown"] == "#1,#2"


@pytest.mark.parametrize(("copies", "drawn"), [(1, "visible"), (500, "auto")])
def test_only_large_pages_leave_out_what_is_not_on_the_screen(
    tmp_path: Path, copies: int, drawn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two completions have 6 and 5 tokens, and 5500 tokens are many."""
    monkeypatch.setattr(sys.modules[__name__], "TRACES", TRACES * copies)
    found = in_browser(tmp_path, "found.drawn = getComputedStyle(one('article:last-of-type')).contentVisibility;")
    assert found["drawn"] == drawn


def test_keys_and_the_line_of_values(tmp_path: Path) -> None:
    found = in_browser(
        tmp_path,
        """const at = () => document.activeElement.textContent;
        one(".t").focus(); key("ArrowRight"); key("ArrowRight"); found.right = at();
        found.stops = document.querySelectorAll("article:first-child .t[tabindex='0']").length;
        found.cursor = one("article .cursor").getAttribute("transform");
        found.tip = one("#tip").textContent;
        key("Escape"); found.hidden = one("#tip").hidden;
        key("End"); found.end = at();
        const chart = document.querySelectorAll("article .chart")[1];
        const box = chart.querySelector("svg").getBoundingClientRect();
        chart.dispatchEvent(new MouseEvent("click", { bubbles: true, clientX: box.right - 1, clientY: box.top + 5 }));
        found.clicked = at(); found.second = chart.querySelector(".cursor").getAttribute("transform");
        key("Home"); key("ArrowRight"); found.bytes = one("#tip").textContent.split("\\n")[0];
        click("#numbers"); found.numbers = texts(".t").length + " " + one(".t").dataset.n;""",
    )
    assert (found["right"], found["stops"], found["cursor"]) == ("↵", 1, "translate(2 0)")
    assert found["tip"] == "token 2   ↵\nV(s_t)  0.400\nδ_t     +0.200  better than expected"
    assert found["hidden"] is True and found["end"] == "our"
    assert (found["clicked"], found["second"]) == ("4", "translate(3 0)")  # the environment's token takes no time
    assert found["bytes"] == "token 1   ␣  bytes E2 89, no character by themselves"
    assert found["numbers"] == "11 0.00"
