"""docs/tour.md: its names are where it says, both hosts call them in its order, and its numbers are the package's."""

import ast
import logging
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.functional import (
    completion_labels,
    head_targets,
    lambda_returns,
    next_state_values,
    polyak_update,
    squared_error,
    terminal_rewards,
)
from rl_plugins.lightning import GRPOModule, MTPCriticModule, PromptDataModule
from rl_plugins.nn.gradient import clamp_gradient
from rl_plugins.signals import OnlineValueOptions, PolicyLoss, ValueHeadOptions, value_loss, value_losses
from rl_plugins.signals.critic_targets import critic_targets, scale_advantages
from rl_plugins.signals.policy import policy_loss
from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer, MTPCriticConfig, MTPCriticTrainer

from .helpers.lightning_runs import every_step, fit
from .helpers.tiny import ON_CPU

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*"),
    pytest.mark.filterwarnings("ignore:policy_loss='dapo' compares"),  # one step shows the order
]
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "docs" / "tour.md"
PACKAGE = str(ROOT / "rl_plugins")
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./(rl_plugins/[\w./]+)\)")
Name = tuple[str, str]
"""File and qualified name of a function; no file for one of another library."""


# Names


@cache
def defined(file: str) -> set[str]:
    """Qualified names of the functions, classes, methods and constants that a file itself defines."""

    def names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(names(ast.parse((ROOT / file).read_text()).body))


def test_every_name_is_defined_in_the_file_of_its_link() -> None:
    links = LINK.findall(TOUR.read_text())
    assert len(links) > 100
    for name, file in links:
        if name.endswith(("/", ".py")):
            assert (ROOT / file).exists() and file == f"rl_plugins/{name}".rstrip("/"), name
        else:
            assert name in defined(file), f"{name} is not in {file}"


def test_every_folder_and_file_of_the_package_has_its_place() -> None:
    text = section("The folders")
    folders = {path.parent.name for path in (ROOT / "rl_plugins").glob("*/__init__.py")}
    files = {path.name for path in (ROOT / "rl_plugins").glob("*.py")} - {"__init__.py"}
    named = {name for name, _ in LINK.findall(text)}
    assert {f"{folder}/" for folder in folders} | files <= named


def section(heading: str) -> str:
    return TOUR.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_every_station_begins_with_its_files() -> None:
    for station in section("The life of a completion").split("\n### ")[1:]:
        linked = dict.fromkeys(file.removeprefix("rl_plugins/") for _, file in LINK.findall(station))
        listed = re.findall(r"`([\w/.]+)`", station.split("Files: ", 1)[1].split("\n\n", 1)[0])
        assert listed == [file for file in linked if file.endswith(".py")], station.splitlines()[0]


# Order

JOURNEYS: dict[str, tuple[tuple[Any, Any, Any], dict[str, Any]]] = {
    "a critic": ((MTPCriticTrainer, MTPCriticConfig, MTPCriticModule), {"num_generations": 1}),
    "groups and drafts": (
        (GRPOVariantTrainer, GRPOVariantConfig, GRPOModule),
        {
            "num_generations": 4,
            "advantage": "group_normalized",
            "speculative": True,
            "dynamic_sampling": True,
            "replay_buffer_size": 2,
        },
    ),
}


def main_line(host: str, journey: str) -> list[Name]:
    """The names on the lines of a host and a journey, in the order of the tour."""
    line: list[Name] = []
    for who, what in re.findall(r"^- ([\w ,]+): ((?:.+\n)(?:  .+\n)*)", section("The life of a completion"), re.M):
        hosts, _, condition = who.partition(", with ")
        assert hosts in ("TRL", "Lightning", "both") and condition in ("", *JOURNEYS), who
        if hosts in (host, "both") and condition in ("", journey):
            # A name in backticks is a link, or belongs to another library.
            found = re.findall(r"`([\w.]+)`(?:\]\(\.\./([\w./]+)\))?", what)
            line += [(file, name) for name, file in found]
    return line


def calls_of(run: Callable[[], Any], wanted: set[Name]) -> list[Name]:
    """Those functions that a run calls, in the order in which it does."""
    calls: list[Name] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            path, name = frame.f_code.co_filename, frame.f_code.co_qualname
            call = (f"rl_plugins{path.removeprefix(PACKAGE)}" if path.startswith(PACKAGE) else "", name)
            if call in wanted:
                calls.append(call)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def assert_in_order(line: list[Name], calls: list[Name]) -> None:
    """Each name is first called after the one before it in the line; one that is named again is called again."""
    calls = calls[calls.index(line[0]) :]  # what sets a run up is no part of the line
    place = -1
    for i, name in enumerate(line):
        assert name in calls, f"{name} is never called"
        first = calls.index(name) if name not in line[:i] else calls.index(name, place + 1)
        assert first > place, f"{name} is called before {line[i - 1]}"
        place = first


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Rewards that differ inside most groups."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


@pytest.fixture(scope="module")
def start(tiny_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model and its tokenizer: TRL makes the reference from a path."""
    path = tmp_path_factory.mktemp("start")
    tiny_model(initializer_range=0.2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("journey", JOURNEYS)
@pytest.mark.parametrize("host", ["TRL", "Lightning"])
def test_a_step_calls_the_main_line_in_order(
    host: str, journey: str, start: str, tokenizer: Any, dataset: Any, tmp_path: Path
) -> None:
    (trainer_class, config_class, module_class), options = JOURNEYS[journey]
    options = {**options, "max_completion_length": 6, "policy_loss": "dapo", "beta": 0.1}
    if host == "TRL":
        saved = {**ON_CPU, "save_strategy": "steps", "save_steps": 1, "save_only_model": False}
        args = config_class(str(tmp_path), per_device_train_batch_size=4, max_steps=1, **saved, **options)
        run = trainer_class(start, even, args, dataset, processing_class=tokenizer).train
    else:
        module = module_class(start, reward_funcs=even, **options)
        data = PromptDataModule([dict(row) for row in dataset], batch_size=4 // options["num_generations"])

        def run() -> None:
            fit(module, data, every_step(tmp_path), max_steps=1)

    torch.manual_seed(0)
    line = main_line(host, journey)
    assert len(line) > 50
    assert_in_order(line, calls_of(run, set(line)))


# Numbers


def table(number: int) -> dict[str, list[str]]:
    """Cells of one of the two tables of numbers, by the first, without the last, which says where they are from."""
    tables = re.findall(r"(?:^\|.*\n)+", section("One completion in numbers"), re.M)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number].splitlines()]
    return {row[0]: row[1:-1] for row in rows[2:]}


def numbers(cells: list[str]) -> list[float | None]:
    return [None if cell == "-" else float(cell) for cell in cells]


def shown(x: Tensor, mask: Tensor | None = None) -> list[float | None]:
    """As the tour writes them: four digits, nothing where there is no number."""
    real = torch.ones_like(x) if mask is None else mask
    return [round(v, 4) if there else None for v, there in zip(x.tolist(), real.tolist(), strict=True)]


def test_the_numbers_of_the_example(tokenizer: Any) -> None:
    rows, steps = table(0), table(1)
    heads, values = ValueHeadOptions(), OnlineValueOptions(lam_policy=0.95)
    assert "`lam_policy` is 0.95 instead of 1" in TOUR.read_text() and OnlineValueOptions().lam_policy == 1.0
    assert (values.gamma, values.lam_value, heads.num_mtp_heads) == (1.0, 1.0, 1)
    assert (values.value_loss_coef, heads.value_grad_clip, heads.target_tau) == (0.1, 1.0, 0.05)
    mask = torch.ones(1, 3)
    given = [[float(x) for x in rows[f"value of head {k}"]] for k in (1, 2)]
    v = torch.tensor(given).T[None]  # (B, T, K)
    slow = torch.tensor([[float(x) for x in rows["slow value of head 1"]]])

    # Tokens
    words = {str(d): tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)} | {"end": 1, "-": -100}
    prompt = torch.tensor([tokenizer("21+21=")["input_ids"]])
    completion = torch.tensor([[words[word] for word in rows["token `y_t`"]]])
    text = "".join(rows["token `y_t`"]).removesuffix("end")
    assert f"The prompt is `21+21=`, the completion `{text}`" in TOUR.read_text()
    labels = completion_labels(prompt, completion, mask, 2)
    for k in (1, 2):
        assert [words[word] for word in rows[f"token that head {k} learns"]] == labels[0, :, k - 1].tolist()

    # Advantages and targets
    rewards = terminal_rewards(torch.ones(1), mask)
    following = next_state_values(slow, mask)
    options = {"gamma": values.gamma, "lam_policy": values.lam_policy, "lam_value": values.lam_value}
    targets = critic_targets(rewards, v, slow[..., None], mask, estimator=values.advantage_estimator, **options)
    returns = lambda_returns(rewards, v[..., 0], mask, gamma=1.0, lam=0.95, next_values=following)
    whitened = scale_advantages(targets.advantages, v[..., 0], mask, scaling=values.advantage_scaling)
    goals, real = head_targets(targets.returns, mask, 2)
    expected = {
        "reward": rewards,
        "slow value of the next state": following,
        "TD error": targets.td_errors,
        "lambda-return, lambda 0.95": returns,
        "advantage": targets.advantages,
        "advantage, whitened": whitened,
    }
    for name, x in expected.items():
        assert numbers(rows[name]) == shown(x[0]), name
    errors = squared_error(v, goals)
    for k in (1, 2):
        assert numbers(rows[f"target of head {k}"]) == shown(goals[0, :, k - 1], real[0, :, k - 1])
        assert numbers(rows[f"squared error of head {k}"]) == shown(errors[0, :, k - 1], real[0, :, k - 1])

    # The step
    loss, *_ = value_loss(
        v, targets.returns, mask, num_items=3, loss=value_losses()[values.value_loss_type], old_values=v
    )
    logps = torch.full((1, 3), -1.0, requires_grad=True)
    policy, _ = policy_loss(PolicyLoss("dapo"), logps, logps.detach(), whitened, mask, num_items=3)
    (slope,) = torch.autograd.grad(policy, logps)
    limit = heads.value_grad_clip * values.value_loss_coef / 3  # type: ignore[operator]
    state = torch.zeros(1, 1, 2, requires_grad=True)
    clamp_gradient(state, max_norm=limit).backward(torch.tensor([[[0.03, 0.04]]]))
    weight = torch.tensor([0.1])
    polyak_update([weight], [torch.tensor([0.2])], tau=heads.target_tau)
    assert state.grad is not None
    made = {
        "value loss": loss,
        "its part of the loss": values.value_loss_coef * loss,
        "policy loss": policy.detach(),
        "its gradient": slope[0, 0],
        "limit": torch.tensor(limit),
        "norm": state.grad.norm(),
        "slow weight": weight[0],
    }
    assert len(steps) == len(made)
    for (name, x), (written, cells) in zip(made.items(), steps.items(), strict=True):
        assert written.startswith(name)
        assert numbers(cells) == shown(x[None]), name
