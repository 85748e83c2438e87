"""The pictures of the documentation: each has a command, and each caption names it."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from rl_plugins.report import TokenTrace, write_token_values_html

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_images", ROOT / "recipes" / "draw_images.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_images"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    return module


def test_every_picture_has_a_command(recipe: ModuleType) -> None:
    folder = ROOT / "docs" / "images"
    files = [path for path in folder.rglob("*.*") if path.parent.name != "site"]  # whose icon is no picture of a page
    assert sorted(recipe.PICTURES) == sorted(path.relative_to(folder).as_posix() for path in files)
    for picture in recipe.PICTURES.values():
        program, what, *_ = picture.command.split()
        if program == "make":
            assert f"\n{what}: " in (ROOT / "Makefile").read_text()
        else:
            assert program == "python" and (ROOT / what).is_file()


def test_every_page_with_a_picture_names_its_command(recipe: ModuleType) -> None:
    shown = set()
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = " ".join(path.read_text().split())  # a command may wrap
        for name in re.findall(r"\]\((?:docs/)?images/([\w./]+)\)", text):
            shown.add(name)
            assert f"`{recipe.PICTURES[name].command}`" in text, f"{path.name} has no command for {name}"
    assert {"classic.png", "frozen_lake.png", "moe_load_none.png", "multi_turn.png"} <= shown


def test_the_list_has_all_commands(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--list"])
    listed = capsys.readouterr().out
    assert all(f"{name}\n    {picture.command}\n" in listed for name, picture in recipe.PICTURES.items())
    recipe.main(["--list", "curves.png"])
    assert "14 minutes; result: outputs/demo/curves.png" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        recipe.main(["curve.png"])
    assert "unknown image curve.png; choose from classic.png, curves.png" in capsys.readouterr().err


def test_pictures_come_from_results_that_are_there(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    monkeypatch.setattr(recipe, "IMAGES", tmp_path / "images")
    (tmp_path / "images").mkdir()
    told = recipe.draw("curves.png", train=False)
    assert told.startswith(
        "curves.png: left out, outputs/demo/curves.png is not there. Add --train to run (14 minutes): "
    )
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    Image.new("RGB", (30, 20), "#0072B2").save(tmp_path / "outputs" / "demo" / "curves.png")
    assert recipe.draw("curves.png", train=False) == "curves.png: drawn from outputs/demo/curves.png"
    with Image.open(tmp_path / "images" / "curves.png") as picture:
        assert picture.size == (30, 20) and picture.convert("RGB").getpixel((3, 3)) == (0, 0x72, 0xB2)


@pytest.mark.slow
def test_the_code_of_a_page_draws_its_picture(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "IMAGES", tmp_path)
    assert recipe.draw("frozen_lake.png", train=False) == "frozen_lake.png: drawn by the code of docs/tabular.md"
    with (
        Image.open(tmp_path / "frozen_lake.png") as drawn,
        Image.open(recipe.ROOT / "docs/images/frozen_lake.png") as old,
    ):
        assert drawn.size == old.size


@pytest.mark.slow
def test_a_picture_of_a_page(recipe: ModuleType, tmp_path: Path) -> None:
    if not any(map(shutil.which, recipe.BROWSERS)):
        pytest.skip("no Chromium or Chrome is installed")
    long = TokenTrace("Why?", [" word"] * 60, [0.01 * i for i in range(60)], [0.01] * 60, 1.0)
    page = write_token_values_html([long, long], tmp_path / "page.html", title="A page")
    sizes = {}
    for settings in ("only=1&tools=off", "only=1", ""):
        recipe.screenshot(page, tmp_path / "a.png", f"theme=dark&{settings}", (900, 1500))
        with Image.open(tmp_path / "a.png") as picture:
            sizes[settings] = picture.height
            assert picture.width == 900 and picture.convert("RGB").getpixel((0, 0)) == (0x14, 0x17, 0x1C)
    assert 300 < sizes["only=1&tools=off"] < sizes["only=1"] < sizes[""] < 1500
