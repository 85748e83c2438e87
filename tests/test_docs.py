"""The documentation: its code runs, its commands exist, and nothing that it should name is missing.

In a Markdown file the code blocks run in order, in one namespace, in an empty directory, with tiny models in place
of Qwen/Qwen3-0.6B and Qwen/Qwen3-30B-A3B, on the CPU, for two steps. A `diff` block runs twice, before and after the
change. Lines `# -> ...` are what a block prints. `<!-- skip-test: reason -->` before a block skips it.
"""

import argparse
import ast
import contextlib
import importlib.util
import inspect
import io
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch.distributed.run import get_args_parser
from trl import GRPOConfig, SFTConfig, TrlParser

import rl_plugins.lightning
from rl_plugins import classic, functional, plot_command
from rl_plugins.functional import AGGREGATIONS
from rl_plugins.hooks import TESTED
from rl_plugins.moe import BalancingConfig, RouterBalancer
from rl_plugins.rollouts import ProcessRewardModel, SpeculativeDecoder, rewards_per, text_steps
from rl_plugins.signals import ADVANTAGES, POLICY_LOSSES, DraftOptions, HeadOptions, PolicyLoss, advantage_options
from rl_plugins.signals.presets import GRPO_PRESETS, PPO_PRESETS, Preset
from rl_plugins.trl import (
    EpisodeRollouts,
    GRPOVariantConfig,
    GRPOVariantTrainer,
    MTPCriticConfig,
    MTPCriticTrainer,
    MTPSFTConfig,
    PPOConfig,
    PPOTrainer,
)
from rl_plugins.trl.scripts import online

from .helpers.moe_models import make_moe_model
from .helpers.tiny import ON_CPU, digit_reward, make_dataset

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CRITIC, VARIANTS, PPO, MOE, SPECULATIVE, REWARDS = (
    ROOT / "docs" / f"{name}.md" for name in ("critic", "variants", "ppo", "moe", "speculative", "rewards")
)
LOGS = ROOT / "docs" / "logs.md"
METRICS = ("critic/", "mtp/", "phasic/", "sampling/", "value_tracker/", "clip_ratio/", "moe/")
RECIPES = ("mtp_critic", "grpo_variants", "ppo", "moe_balancing")
PARSED_RECIPES = ("multi_turn",)
"""Recipes whose `main` parses the command line by itself."""
LIGHTNING_RECIPES = ("lightning_mtp_critic", "lightning_classic")
STOCK_MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B")
LIGHTNING_ON_CPU = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "limit_val_batches": 1,
}
ORIGINAL_PARSE = argparse.ArgumentParser.parse_args
BLOCK = re.compile(r"(?:^<!-- skip-test: (?P<reason>.+) -->\n+)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    kind: str
    text: str
    line: int
    reason: str | None


def blocks(path: Path, *kinds: str) -> list[Block]:
    text = path.read_text()
    found = [
        Block(m["kind"], m["text"], text[: m.start("text")].count("\n"), m["reason"]) for m in BLOCK.finditer(text)
    ]
    return [block for block in found if block.kind in kinds]


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


# Python


def versions(block: Block) -> list[str]:
    """The scripts of a block: a diff has two."""
    if block.kind == "python":
        return [block.text]
    lines = block.text.splitlines()
    return ["\n".join(line[1:] for line in lines if line[:1] != drop) for drop in "+-"]


def adapted(source: str, models: dict[str, Path]) -> str:
    for name, path in models.items():
        source = source.replace(name, str(path))
    source = re.sub(r"\bmax_steps=\d+", "max_steps=2", source)
    bar = "RolloutProgressBar()" in source  # Lightning refuses one together with none
    source = re.sub(r"(?<![\w.])Trainer\(", f"Trainer(**LIGHTNING_ON_CPU, enable_progress_bar={bar}, ", source)
    return re.sub(r"\b((?:GRPO|SFT|GRPOVariant|MTPCritic|MTPSFT|PPO|RL)Config)\(", r"\1(**ON_CPU, ", source)


@pytest.fixture(scope="module")
def small_models(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tokenizer: Any
) -> dict[str, Path]:
    folders = {}
    for name, model in zip(STOCK_MODELS, (tiny_model(), make_moe_model("qwen3_moe")), strict=True):
        folders[name] = tmp_path_factory.mktemp("model")
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def own_entries() -> Iterator[None]:
    """Take back what a page adds to the tables of advantages and policy losses."""
    with mock.patch.dict(ADVANTAGES), mock.patch.dict(POLICY_LOSSES):
        yield


PROGRAMS = [path for path in DOCS if blocks(path, "python", "diff")]


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=names(PROGRAMS))
def test_code_runs(
    path: Path, small_models: dict[str, Path], own_entries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__", "ON_CPU": ON_CPU, "LIGHTNING_ON_CPU": LIGHTNING_ON_CPU}
    for block in blocks(path, "python", "diff"):
        if block.reason is not None:
            continue
        for source in versions(block):
            printed = io.StringIO()
            # Newlines in front, so that a traceback has the line of the file.
            code = compile("\n" * block.line + adapted(source, small_models), str(path), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            expected = re.findall(r"^# -> (.*)$", source, re.M)
            assert not expected or printed.getvalue().splitlines() == expected


def test_the_readme_changes_names_only() -> None:
    (diff,) = blocks(ROOT / "README.md", "diff")
    before, after = versions(diff)
    assert "GRPOTrainer" in before and "MTPCriticTrainer" in after
    renamed = before.replace("from trl", "from rl_plugins.trl").replace("GRPO", "MTPCritic")
    assert renamed == after


# Commands


def commands(path: Path) -> Iterator[list[str]]:
    """Words of every command in the bash blocks, without `NAME=value` in front."""
    for block in blocks(path, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def load_recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"recipe_{name}"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe_options() -> dict[str, set[str]]:
    """Options of every recipe, by its path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")  # where they find sums.py
        modules = {f"recipes/{name}.py": load_recipe(name) for name in RECIPES}
        shared = importlib.import_module("sums").Script
    scripts = {program: getattr(module, "Script", shared) for program, module in modules.items()}
    return {program: options(TrlParser((scripts[program], module.Config))) for program, module in modules.items()}


def options(parser: Any) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def flags(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def check_lightning_command(name: str, arguments: list[str]) -> None:
    """Have Lightning's command line parse the arguments, and stop there."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.syspath_prepend(ROOT / "recipes")
        patch.chdir(ROOT)
        recipe = load_recipe(name)
        patch.setattr(recipe, "has_chat_template", lambda model: False, raising=False)  # it would ask the hub
        with pytest.raises(SystemExit) as end:
            recipe.main([*arguments, "--print_config"])
    assert end.value.code == 0 and "trainer:" in printed.getvalue()


def check_parsed_command(name: str, arguments: list[str]) -> None:
    """Have a recipe parse the arguments, and stop there."""
    parsed: list[str] = []

    def parse(parser: argparse.ArgumentParser) -> None:
        parsed.extend(vars(ORIGINAL_PARSE(parser, arguments)))
        raise SystemExit(0)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse), pytest.raises(SystemExit) as end:
        load_recipe(name).main()
    assert end.value.code == 0 and parsed


def check_command(words: list[str], recipes: dict[str, set[str]]) -> None:
    program, *arguments = words
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert arguments and set(arguments) <= targets
    elif program == "rl-plugins" and arguments[0] == "plot":
        assert plot_command.make_parser().parse_args(arguments[1:]).runs
    elif program == "rl-plugins":
        assert arguments[0] in online.TRAINERS
        assert flags(arguments) <= options(online.make_parser(arguments[0]))
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        extras = re.fullmatch(r"\.\[(.+)\]", arguments[-1])
        assert arguments[:2] == ["install", "-e"] and extras and set(extras[1].split(",")) <= set(known)
    elif program == "torchrun":
        parsed = get_args_parser().parse_args(arguments)
        check_command([parsed.training_script, *parsed.training_script_args], recipes)
    elif program == "python":
        check_command(arguments, recipes)
    elif Path(program).stem in LIGHTNING_RECIPES:
        check_lightning_command(Path(program).stem, arguments)
    elif Path(program).stem in PARSED_RECIPES:
        check_parsed_command(Path(program).stem, arguments)
    else:
        assert (ROOT / program).is_file()
        if program not in recipes:
            assert program.startswith("recipes/launch/")
            program = "recipes/mtp_critic.py"  # what they launch
        assert flags(arguments) <= recipes[program]
        assert all((ROOT / word).exists() for word in arguments if word.startswith("recipes/"))


SHELLS = [path for path in DOCS if blocks(path, "bash")]


@pytest.mark.slow
@pytest.mark.parametrize("path", SHELLS, ids=names(SHELLS))
def test_commands_exist(path: Path, recipe_options: dict[str, set[str]]) -> None:
    for words in commands(path):
        check_command(words, recipe_options)


def test_make_targets_in_prose_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCS:
        assert set(re.findall(r"`make ([\w-]+)`", path.read_text())) <= targets, path.name


# Completeness


def test_the_table_of_versions_is_that_of_constraints_and_ranges() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, listed)}
    table = {name: cells for name, *cells in rows(ROOT / "docs" / "versions.md", "Tested together")}
    assert set(TESTED) <= set(table)
    for name, (tested, newest, allowed, _) in table.items():
        assert tested == pins[name]
        assert SpecifierSet(allowed.strip("`")) == ranges[name]
        assert tested in ranges[name] and newest in ranges[name] and Version(newest) >= Version(tested)
    assert "(docs/versions.md)" in (ROOT / "CONTRIBUTING.md").read_text()


def rows(path: Path, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading."""
    section = re.split(rf"^##+ {re.escape(heading)}$", path.read_text(), flags=re.M)[1]
    lines = section.split("\n#", 1)[0].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in line.strip("|").replace(r"\|", "/").split("|")] for line in table]


def default(config: type, name: str) -> Any:
    (option,) = [f for f in fields(config) if f.name == name]
    return option.default if option.default is not MISSING else option.default_factory()  # type: ignore[misc]


def own_options(config: type, host: type) -> set[str]:
    """Options that the host does not have, or that have another default there."""
    theirs = {f.name for f in fields(host)}
    return {f.name for f in fields(config) if f.name not in theirs or default(config, f.name) != default(host, f.name)}


# Options of every trainer that are in a table of their own.
DRAFTS = (*fields(HeadOptions), *fields(DraftOptions))
SPECULATION = {f.name for f in DRAFTS}


def test_options_of_speculative_rollouts() -> None:
    table = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows(SPECULATIVE, "Options")}
    assert table == {f.name: f.default for f in DRAFTS}


def test_options_and_their_defaults() -> None:
    table = {row[0].strip("`"): row[1] for row in rows(CRITIC, "Options")}
    of_heads = {f.name for f in fields(HeadOptions)}
    critic = own_options(MTPCriticConfig, GRPOConfig) - (SPECULATION - of_heads)
    sft = {f.name for f in fields(MTPSFTConfig)} - {f.name for f in fields(SFTConfig)}
    assert set(table) == critic | sft
    for name, cell in table.items():
        written = re.fullmatch(r"(?P<critic>[^(]*?) ?(?:\((?P<sft>.+)\))?", cell.replace("`", ""))
        assert written is not None
        for config, shown in ((MTPCriticConfig, written["critic"]), (MTPSFTConfig, written["sft"])):
            if shown and shown != "hidden size":
                assert ast.literal_eval(shown) == default(config, name), name
        if name in critic & sft and not written["sft"]:
            assert default(MTPSFTConfig, name) == default(MTPCriticConfig, name), name


@pytest.mark.parametrize(("path", "config"), [(VARIANTS, GRPOVariantConfig), (PPO, PPOConfig)])
def test_options_of_the_other_trainers(path: Path, config: type) -> None:
    table = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows(path, "Options")}
    assert table == {name: default(config, name) for name in own_options(config, GRPOConfig) - SPECULATION}


def test_options_of_balancing() -> None:
    table = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows(MOE, "Options")}
    assert table == {f.name: f.default for f in fields(BalancingConfig)}


def test_options_in_prose_exist() -> None:
    configs = (MTPCriticConfig, MTPSFTConfig, GRPOVariantConfig, PPOConfig, BalancingConfig)
    known = {f.name for config in configs for f in fields(config)} | {"record_load", "extra_modules", "callbacks"}
    functions = (SpeculativeDecoder, ProcessRewardModel, rewards_per, EpisodeRollouts)
    known |= {name for function in functions for name in inspect.signature(function).parameters}
    known |= {"use_mtp", "use_cache"}
    modules = [getattr(package, name) for package in (rl_plugins.lightning, classic) for name in package.__all__]
    known |= {name for module in modules for name in inspect.signature(module).parameters}
    agents = [getattr(classic, name) for name in classic.__all__ if name.endswith("Agent")]
    known |= {f.name for agent in agents for f in fields(inspect.get_annotations(agent)["settings"])}
    known |= {"strategy", "collate_fn", "accumulate_grad_batches", "precision", "rollout_func"}
    for path in DOCS:
        prose = BLOCK.sub("", path.read_text())
        spans = re.findall(r"`([^`\n]+)`", prose)
        named = {name for span in spans for name in re.findall(r"(?:^|, )([a-z]\w*)=", span)}
        assert named <= known, path.name


# Tables of variants.md and ppo.md


def keyed(path: Path, heading: str) -> dict[str, list[str]]:
    """Rows of a table by the name in their first cell, each of which is there once."""
    table = rows(path, heading)
    found = {row[0].strip("`"): row[1:] for row in table}
    assert len(found) == len(table)
    return found


def settings(cell: str) -> dict[str, Any]:
    """What the spans `name=value` of a cell set."""
    return {name: ast.literal_eval(value) for name, value in re.findall(r"`(\w+)=([^`]+)`", cell)}


def keywords(cell: str) -> dict[str, Any]:
    """Options and defaults in a cell such as "`k`, `eps` 1e-6"; `...` stands for no default."""
    pairs = re.findall(r"`(\w+)`(?: (\([^)]*\)|[^,]+))?(?:, |$)", cell)
    return {name: ast.literal_eval(value) if value else ... for name, value in pairs}


def defaults(function: Callable[..., Any], names: list[str]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    given = {name: parameters[name].default for name in names if name in parameters}
    return {name: ... if given.get(name, ...) is inspect.Parameter.empty else given.get(name, ...) for name in names}


def test_advantages_and_their_options() -> None:
    table = keyed(VARIANTS, "Advantages")
    assert list(table) == [*ADVANTAGES]
    for name, cells in table.items():
        function = getattr(functional, name, functional.forget_factor)  # which gets the options of value_tracker
        assert keywords(cells[-1]) == defaults(function, advantage_options(name)), name


def test_policy_losses_and_their_options() -> None:
    table = keyed(VARIANTS, "Policy losses")
    assert list(table) == [*POLICY_LOSSES]
    for name, cells in table.items():
        function, aggregation, acts_on_policy = POLICY_LOSSES[name][:3]
        assert cells[-2].strip("`") == aggregation, name
        assert cells[-3] == ("yes" if acts_on_policy else "no"), name
        assert keywords(cells[-1]) == defaults(function, PolicyLoss.accepted(name)), name


def test_aggregations() -> None:
    assert list(keyed(VARIANTS, "Aggregation")) == [*AGGREGATIONS]


def test_ways_of_sampling() -> None:
    named = {name for row in rows(VARIANTS, "Sampling") for name in re.findall(r"`(\w+)`", row[0])}
    sampling = {"dynamic_sampling", "reject_uniform", "replay_buffer_size", "overlong_shaping"}
    assert named == sampling and named <= {f.name for f in fields(GRPOVariantConfig)}


def check_preset(preset: Preset, written: dict[str, Any]) -> None:
    loss = PolicyLoss(preset["policy_loss"], preset.get("aggregation", ""))
    assert written == {**preset, "aggregation": loss.aggregation}


def test_presets_of_the_variants() -> None:
    table = keyed(VARIANTS, "Presets")
    assert list(table) == [*GRPO_PRESETS]
    for name, (_, advantage, loss, aggregation, rest, _) in table.items():
        cells = {"advantage": advantage, "policy_loss": loss, "aggregation": aggregation}
        check_preset(GRPO_PRESETS[name], {k: v.strip("`") for k, v in cells.items()} | settings(rest))


def test_presets_of_ppo() -> None:
    table = keyed(PPO, "Presets")
    assert list(table) == [*PPO_PRESETS]
    for name, (_, loss, aggregation, rest) in table.items():
        cells = {"policy_loss": loss, "aggregation": aggregation}
        check_preset(PPO_PRESETS[name], {k: v.strip("`") for k, v in cells.items()} | settings(rest))


# Metrics


QUICK = {
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "max_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


class Run(NamedTuple):
    trainer: type
    config: type
    options: dict[str, Any]


MTP_RUN = Run(MTPCriticTrainer, MTPCriticConfig, {"phasic_every": 1, "value_replay": 1})
PPO_RUN = Run(PPOTrainer, PPOConfig, {"beta": 0.0})  # a reference model is loaded from a path
VARIANT_RUNS = [
    Run(GRPOVariantTrainer, GRPOVariantConfig, {"preset": "dapo", "replay_buffer_size": 2}),
    Run(GRPOVariantTrainer, GRPOVariantConfig, {"preset": "spo"}),
]


DRAFTING_RUN = Run(GRPOVariantTrainer, GRPOVariantConfig, {"speculative": True})
RUNS = [MTP_RUN, *VARIANT_RUNS, PPO_RUN, DRAFTING_RUN]
BOOKKEEPING = re.compile(r"epoch|step|total_flos|train_\w+|runtime|samples_per_second|steps_per_second")
"""Entries of a log that are transformers' own, and say nothing about training."""


def documented() -> set[str]:
    """Metrics that the page on logs names in the first cells of its tables."""
    cells = re.findall(r"^\| (`[^|]+) \|", LOGS.read_text(), re.M)
    found = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(found) == len(set(found)), "a metric is there twice"
    return set(found)


def normal(name: str) -> str:
    """Name of a metric without the prefix of evaluation, the head's number and the reward function's name."""
    name = re.sub(r"head_\d+$", "head_k", name.removeprefix("eval_"))
    return re.sub(r"^rewards/[^/]+/", "rewards/<name>/", name)


@pytest.fixture(scope="module")
def logged(tiny_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Metrics of runs that switch on whatever logs something."""

    @rewards_per("step", separator="+")
    def steps(completions: list[str], **kwargs: Any) -> list[list[float]]:
        return [[1.0] * len(text_steps(text, "+")) for text in completions]

    found: set[str] = set()
    for run in RUNS:
        args = run.config(str(tmp_path_factory.mktemp("run")), **ON_CPU, **QUICK, **run.options)
        data = make_dataset().select(range(16))
        rewards = [digit_reward, steps] if run is MTP_RUN else digit_reward
        trainer = run.trainer(tiny_model(), rewards, args, data, data.select(range(8)), processing_class=tokenizer)
        trainer.train()
        found |= {normal(name) for entry in trainer.state.log_history for name in entry}
    return {name for name in found if not BOOKKEEPING.fullmatch(name)}


@pytest.mark.slow
def test_every_metric_has_its_row(logged: set[str]) -> None:
    ours = {name for name in documented() if name.startswith(METRICS) and not name.startswith("moe/")}
    of_vllm = {name for name in ours if "logp_difference" in name or "importance_sampling" in name}
    assert ours - of_vllm == {name for name in logged if name.startswith(METRICS)}
    assert logged <= documented()


@pytest.mark.slow
def test_pages_mention_metrics_that_are_logged(logged: set[str]) -> None:
    for path in DOCS:
        mentioned = set(re.findall(rf"`((?:{'|'.join(METRICS)})[a-z_/]+)`", path.read_text()))
        assert {name for name in mentioned if not name.endswith("/")} <= documented(), path.name


def test_metrics_of_balancing() -> None:
    model = make_moe_model("qwen3_moe").train()
    balancer = RouterBalancer(model, BalancingConfig(aux_loss_coef=0.1, z_loss_coef=0.1))
    ids = torch.randint(2, 10, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    assert {name for name in documented() if name.startswith("moe/")} == {*balancer.update()}


# Links


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=names(DOCS))
def test_links_and_images_are_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", path.read_text())):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("path", DOCS, ids=names(DOCS))
def test_nothing_is_left_to_fill_in(path: Path) -> None:
    assert not re.findall(r"\{\{\w+\}\}|TODO_\w+", path.read_text())


def test_paths_in_prose_exist() -> None:
    for path in DOCS:
        for name in re.findall(r"`((?:recipes|tests|docs|rl_plugins)/[\w./]+)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


RIDDLES = re.compile(r"(What|How|As|Same|The same|That|This|It|They|These|Those|Nothing)\b(?! tensor)")
"""Words with which no docstring begins: the reader does not know yet what they stand for."""


def test_docstrings_begin_with_what_they_are_about() -> None:
    found = []
    for path in [*sorted((ROOT / "rl_plugins").rglob("*.py")), *sorted((ROOT / "recipes").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if RIDDLES.match(text):
                    found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not found
