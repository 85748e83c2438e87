"""Draw the pictures of the documentation in docs/images, each by the command that a table has for it.

    python recipes/draw_images.py                            # pictures that need no training, or whose runs are there
    python recipes/draw_images.py --list                     # every picture with its command and its time
    python recipes/draw_images.py --train curves.png         # train what a picture needs, then draw it

Commands that train write their results to `outputs/`, and are not run again while these results exist. Pictures of
pages need an installed Chromium or Chrome.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CODE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Picture:
    """A picture of the documentation.

    Args:
        command: Command that makes the result, in the root of the repository.
        result: File that the command writes, a picture or a page.
        time: Time of the command on one core, where it was measured.
        settings: Part of a page's address behind `#`, for a picture of that page.
        size: Width and largest height of the picture of a page.
        needs: Folder of logs that the command reads, if the command itself draws into docs/images.
    """

    command: str
    result: str
    time: str = "not measured"
    settings: str = ""
    size: tuple[int, int] = (1100, 800)
    needs: str = ""

    @property
    def page(self) -> str | None:
        """The page of the documentation whose code draws the picture; `None` if a command draws it."""
        return self.result if self.result.endswith(".md") else None


DEMO = "python recipes/mtp_critic.py --output_dir outputs/demo"
DRAWINGS = "python docs/site/drawings.py"
LOGS = "python docs/site/log_pictures.py outputs/logs"
RUNS = "recipes/benchmarks/measured/tokens_to_target"
EXPERTS = "python recipes/moe_balancing.py --output_dir outputs/moe_balancing"
PICTURES = {
    "classic.png": Picture(
        "python recipes/benchmarks/classic.py --json outputs/classic.json --plot outputs/classic.png",
        "outputs/classic.png",
    ),
    "curves.png": Picture(DEMO, "outputs/demo/curves.png", "14 minutes"),
    "frozen_lake.png": Picture("python recipes/draw_images.py frozen_lake.png", "docs/tabular.md", "seconds"),
    "gradient_quality.png": Picture(
        "python recipes/benchmarks/gradient_quality.py",
        "outputs/gradient_quality/gradient_quality.png",
        "9 minutes on two cores",
    ),
    "moe_load_loss_free.png": Picture(EXPERTS, "outputs/moe_balancing/loss_free/expert_load.png", "4 minutes"),
    "moe_load_none.png": Picture(EXPERTS, "outputs/moe_balancing/none/expert_load.png", "4 minutes"),
    "moe_max_violation.png": Picture(EXPERTS, "outputs/moe_balancing/max_violation.png", "4 minutes"),
    "multi_turn.png": Picture(
        "python recipes/multi_turn.py --methods critic grpo process reward_to_go --seeds 0 1 2 3 4",
        "outputs/multi_turn/curves.png",
    ),
    "presets.png": Picture(
        "python recipes/benchmarks/presets.py --methods mtp_critic spo dapo ppo gspo dr_grpo --seeds 42 1 2",
        "outputs/presets/presets.png",
    ),
    "smollm2_values.png": Picture(
        "make smollm2", "outputs/smollm2/token_values.html", "29 minutes", settings="theme=light&tools=off&only=3,5"
    ),
    "tokens_to_target.png": Picture(
        f"python recipes/benchmarks/tokens_to_target.py --output_dir {RUNS} --table"
        " --tasks delay_16 delay_64 sums words cipher random",
        f"{RUNS}/tokens_to_target.png",
        "seconds",
    ),
    "token_values.png": Picture(
        DEMO, "outputs/demo/token_values.html", "14 minutes", settings="mode=delta&sort=surprise&theme=light"
    ),
    **{
        f"drawings/{name}.svg": Picture(DRAWINGS, f"docs/images/drawings/{name}.svg", "seconds")
        for name in ("balancing", "critic", "mtp_modules", "speculative", "time_index")
    },
    **{
        f"logs_{name}.png": Picture(LOGS, f"docs/images/logs_{name}.png", "seconds", needs="outputs/logs")
        for name in ("critic", "policy", "rewards")
    },
}
"""Every file of docs/images."""


def draw(name: str, train: bool) -> str:
    """Draw one picture, and say what was done.

    Args:
        name: File name in docs/images.
        train: Whether to run a command whose result does not exist.

    Raises:
        subprocess.CalledProcessError: The command failed.
        FileNotFoundError: No browser is installed, or the command did not write its result.
    """
    picture, goal = PICTURES[name], IMAGES / name
    if picture.page is not None:
        run_code(ROOT / picture.page, goal)
        return f"{name}: drawn by the code of {picture.page}"
    result = ROOT / picture.result
    if result == goal:
        if not (ROOT / picture.needs).exists():
            script = picture.command.split()[1]
            return f"{name}: left out, {picture.needs} is not there. {script} says at its top which runs it needs."
        subprocess.run([sys.executable, *shlex.split(picture.command)[1:]], check=True, cwd=ROOT)
        return f"{name}: drawn by {picture.command}"
    if not result.is_file():
        if not train:
            absent = f"{name}: left out, {picture.result} is not there."
            return f"{absent} Add --train to run ({picture.time}): {picture.command}"
        program, *words = shlex.split(picture.command)
        subprocess.run([sys.executable if program == "python" else program, *words], check=True, cwd=ROOT)
    if not result.is_file():
        raise FileNotFoundError(f"{picture.command} did not write {picture.result}")
    if result.suffix == ".html":
        screenshot(result, goal, picture.settings, picture.size)
    else:
        shutil.copyfile(result, goal)
    shrink(goal)
    return f"{name}: drawn from {picture.result}"


def run_code(page: Path, goal: Path) -> None:
    """Run the code of a page, up to the block that writes a file of the picture's name, and keep that file."""
    blocks = CODE.findall(page.read_text())
    last = next(i for i, block in enumerate(blocks) if goal.name in block)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        namespace: dict[str, object] = {}
        for block in blocks[: last + 1]:
            exec(compile(block, str(page), "exec"), namespace)
        shutil.copyfile(goal.name, goal)
    shrink(goal)


def screenshot(page: Path, goal: Path, settings: str, size: tuple[int, int]) -> None:
    """Take a picture of a page, without the empty part at the bottom.

    Args:
        page: HTML file.
        goal: PNG to write.
        settings: Part of the address behind `#`.
        size: Width and largest height.

    Raises:
        FileNotFoundError: No Chromium or Chrome is installed.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"a picture of {page.name} needs a browser: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
        options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
        if os.name == "posix" and os.getuid() == 0:
            options.append("--no-sandbox")  # for root, as in a container, Chromium does not start with a sandbox
        options += [f"--window-size={size[0]},{size[1]}", f"--screenshot={goal}"]
        subprocess.run([browser, *options, f"{page.resolve().as_uri()}#{settings}"], check=True, capture_output=True)
    with Image.open(goal) as picture:
        whole = picture.convert("RGB")
    background = Image.new("RGB", whole.size, whole.getpixel((0, whole.height - 1)))
    box = ImageChops.difference(whole, background).getbbox()
    if box is not None:
        whole.crop((0, 0, whole.width, min(box[3] + 20, whole.height))).save(goal)


def shrink(path: Path) -> None:
    """Save a picture with 256 colours, which takes a third of the bytes."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the chosen pictures, or list them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="file names in docs/images; all by default")
    parser.add_argument("--list", action="store_true", help="print every picture with its command, and draw none")
    parser.add_argument("--train", action="store_true", help="also run commands that train, which takes long")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.images) - set(PICTURES))
    if unknown:
        parser.error(f"unknown image {', '.join(unknown)}; choose from {', '.join(PICTURES)}")
    for name in options.images or PICTURES:
        picture = PICTURES[name]
        if options.list:
            print(f"{name}\n    {picture.command}\n    time: {picture.time}; result: {picture.result}")
        else:
            print(draw(name, options.train), flush=True)


if __name__ == "__main__":
    main()
