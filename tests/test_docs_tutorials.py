"""The notebooks of docs/tutorials: they run from top to bottom, and their saved outputs are in order.

Numbers are asserted twice: by the cells of the notebooks themselves, and here in what the notebooks print.
"""

import base64
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from .helpers.site_files import load_site_file

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = ["balance_experts", "classic_chapters", "grpo_to_critic", "multi_turn", "token_values"]
RIDDLES = re.compile(r"(?:^|[.!?:]\s+)(What|How|As|The same|Same)\b", re.M)
"""Words with which no sentence of a tutorial begins."""


hooks = load_site_file("hooks")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    """Text of all outputs, of both streams."""
    return "\n".join(
        output.get("text", output.get("data", {}).get("text/plain", ""))
        for cell in code(notebook)
        for output in cell.outputs
    )


def numbers_of(notebook: Any, pattern: str) -> list[float]:
    """Numbers in the one line of the output that matches."""
    (match,) = re.finditer(pattern, printed(notebook))
    return [float(number) for number in match.groups()]


def check_results(name: str, notebook: Any) -> None:
    """What the notebook has found out, as it prints it."""
    if name == "classic_chapters":
        best, random_return = numbers_of(notebook, r"from the start: best ([\d.]+), random ([\d.]+)")
        assert best == pytest.approx(0.180, abs=1e-3) and random_return == pytest.approx(0.008, abs=1e-3)
        assert numbers_of(notebook, r"TD\(0\): largest error ([\d.]+)")[0] < 0.03
        network, firm = numbers_of(notebook, r"network's policy ([\d.]+), best on firm ice ([\d.]+)")
        assert network > 0.95 * firm
    elif name == "grpo_to_critic":
        start, end = numbers_of(notebook, r"MTPCriticTrainer +([\d.]+) +([\d.]+)")
        assert end > start
        assert numbers_of(notebook, r"explained variance at the end ([\d.]+)")[0] > 0
    elif name == "multi_turn":
        assert numbers_of(notebook, r"a reward per turn +([\d.]+)")[0] > 0.2
    elif name == "balance_experts":
        without, balanced = numbers_of(
            notebook, r"busiest expert above its share: ([\d.]+) without, ([\d.]+) balanced"
        )
        assert balanced < without / 2
    elif name == "token_values":
        assert numbers_of(notebook, r"variance of the exact values explained: ([\d.]+)")[0] > 0.15
    else:
        raise AssertionError(f"no results are checked of {name}")


# Saved outputs


def test_all_notebooks_are_there_and_small() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000
    listed = re.findall(r"\((\w+)\.ipynb\)", (FOLDER / "index.md").read_text())
    assert sorted(set(listed)) == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_saved_outputs_are_whole(path: Path) -> None:
    notebook = read(path)
    assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"(^|[\s\"'(=])/\w+/|FutureWarning", printed(notebook)), "a path of a machine, or a warning"
    check_results(path.stem, notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_figure_has_a_caption_below_it(path: Path) -> None:
    cells, figures = read(path).cells, 0
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        pictures = [o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        draws = re.search(r"plt\.show\(\)|^draw\(|^Image\(", cell.source, re.M)
        assert len(pictures) == bool(cell.cell_type == "code" and draws), cell.source
        if pictures:
            figures += 1
            assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")
            assert following is not None and following.source.startswith("*"), "no caption"
            assert hooks.caption([following]) != "Figure"
    assert figures >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_prose_is_plain_and_its_links_lead_somewhere(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type != "markdown":
            continue
        assert not RIDDLES.findall(re.sub(r"^( {4}|\|).*$", "", cell.source, flags=re.M)), cell.source
        for target in re.findall(r"\]\(([^)]+)\)", cell.source):
            assert target.startswith("https://") or (FOLDER / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_only_public_names_are_used(path: Path) -> None:
    for cell in code(read(path)):
        for module in re.findall(r"^(?:from|import) (rl_plugins[\w.]*)", cell.source, re.M):
            assert module.count(".") == 1, f"{module} is not a folder of the package"
        assert not re.search(r"\._[a-z]", cell.source)


# The site


def test_a_notebook_becomes_a_page() -> None:
    text, figures = hooks.notebook_page(FOLDER / "classic_chapters.ipynb")
    assert text.startswith("# Classic reinforcement learning")
    assert "```python\nimport gymnasium as gym\n" in text
    assert "``` { .text .output }\n16 states, 4 actions" in text
    assert "![Every cell shows its exact value under the random policy." in text
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == set(figures)
    assert hooks.link_text("classic_chapters.ipynb", "tutorials/classic_chapters.ipynb", "docs").startswith("Classic")
    link = hooks.site_link(
        "tutorials/multi_turn.ipynb#x", "getting_started.md", "docs", SimpleNamespace(repo_url=None)
    )
    assert link == "tutorials/multi_turn.md#x"


@pytest.mark.parametrize(
    "address", ["https://github.com/example/rl_plugins", "https://github.com/example/rl_plugins.git/"]
)
def test_colab_is_linked_once_the_repository_is_on_github(address: str) -> None:
    links = hooks.notebook_links("multi_turn", SimpleNamespace(repo_url=address))
    page = "https://colab.research.google.com/github/example/rl_plugins/blob/main/docs/tutorials/multi_turn.ipynb"
    assert f"[Open in Colab]({page})" in links
    assert '%pip install "rl-plugins[trl,lightning,report] @ git+https://github.com/example/rl_plugins"' in links


@pytest.mark.parametrize("address", [None, "", "https://example.org/rl_plugins"])
def test_colab_is_not_linked_without_an_address_on_github(address: str | None) -> None:
    links = hooks.notebook_links("multi_turn", SimpleNamespace(repo_url=address))
    assert "(multi_turn.ipynb)" in links and "colab" not in links.lower()


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs_from_top_to_bottom(path: Path) -> None:
    done = load_site_file("notebooks").run(path)  # raises at the first cell that fails
    assert "FutureWarning" not in printed(done)
    check_results(path.stem, done)
    shown, saved = ([len(cell.outputs) > 0 for cell in code(notebook)] for notebook in (done, read(path)))
    assert all(now or not then for now, then in zip(shown, saved, strict=True))
