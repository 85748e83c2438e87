"""Where an optional package is missing, one error says which `pip install` helps."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
sys.path.insert(0, "recipes")
"""
# Package that is missing, extra that brings it, code that needs it.
PLACES = [
    ("trl", "trl", "import rl_plugins.trl"),
    ("accelerate", "trl", "import rl_plugins.trl"),
    ("datasets", "trl", "import rl_plugins.trl"),
    ("trl", "trl", "import sums"),
    ("lightning", "lightning", "import rl_plugins.lightning"),
    ("lightning", "lightning", "import rl_plugins.classic"),
    ("gymnasium", "lightning", "import rl_plugins.classic"),
    ("jsonargparse", "lightning", "import rl_plugins.lightning.cli"),
    # transformers imports an installed deepspeed by itself, so that the check is tried alone.
    ("deepspeed", "deepspeed", "from rl_plugins.extras import require; require('deepspeed', 'deepspeed')"),
    ("matplotlib", "report", "from rl_plugins.report import plot_training_curves as f; f([], 'x.png')"),
    ("matplotlib", "report", "from rl_plugins.report.curves import new_figure; new_figure(1, 1)"),
    ("reasoning_gym", "recipes", "import sums; sums.make_reward(sums.Script())"),
    ("gguf", "recipes", "import sums; sums.load_task(sums.Script(model='x', gguf_file='y'), 0)"),
    ("textarena", "textarena", "import textarena_game as g; g.make_textarena('GuessTheNumber-v0')"),
    ("lightning", "lightning", "import multi_turn as m; m.run_lightning('critic', 0, None, None)"),
]


def run(hidden: list[str], code: str) -> subprocess.CompletedProcess[str]:
    lines = [f"hidden = {hidden!r}", HIDE, code]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(("package", "extra", "code"), PLACES)
def test_the_error_names_the_extra(package: str, extra: str, code: str) -> None:
    assert extra in EXTRAS
    last = run([package], code).stderr.splitlines()[-1]
    assert last == f'ImportError: {package} is not installed. Run: pip install "rl-plugins[{extra}]"'


@pytest.mark.slow
@pytest.mark.parametrize("package", ["trl", "accelerate", "datasets"])
def test_a_command_without_its_extra_says_so_in_one_line(package: str) -> None:
    arguments = ["ppo", "--model_name_or_path", "x", "--use_peft", "--use_cpu", "--bf16", "False"]
    done = run([package], f"from rl_plugins.cli import main; main({arguments!r})")
    assert done.returncode == 2
    line = f'rl-plugins ppo: error: {package} is not installed. Run: pip install "rl-plugins[trl]"'
    assert done.stderr.splitlines()[-1] == line


def test_every_extra_of_the_package_is_looked_at() -> None:
    assert {extra for _, extra, _ in PLACES} == {*EXTRAS} - {"dev", "docs"}
