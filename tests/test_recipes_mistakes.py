"""Whatever a user gives wrongly to a recipe is one line on stderr and exit status 2."""

import sys
from pathlib import Path

import pytest

from .test_recipes import load_recipe

Cases = dict[str, tuple[list[str], str]]

TRL_RECIPES = ("mtp_critic", "ppo", "grpo_variants", "moe_balancing")
TRL: Cases = {
    "an unknown option": (["--learning_rte=1"], "unknown option --learning_rte=1; did you mean --learning_rate?"),
    "a stray value": (["stray"], "unexpected value 'stray'"),
    "no number": (["--learning_rate=fast"], "invalid float value: 'fast'"),
    "a fraction": (["--max_steps=1.5"], "invalid int value: '1.5'"),
    "no truth value": (["--use_cpu=perhaps"], "perhaps"),
    "an unknown schedule": (["--lr_scheduler_type=zigzag"], "zigzag"),
    "no config file": (["--config=nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    "a forgotten config file": (["--config"], "expected one file"),
    "a config file that is no YAML": (["--config=no_yaml.yaml"], "no_yaml.yaml is no YAML"),
    "an unknown option in the file": (["--config=unknown.yaml"], "in the --config file: unknown option"),
    "options that are no JSON": (["--lr_scheduler_kwargs={a: 1}"], "--lr_scheduler_kwargs: {a: 1} is no JSON"),
}
ONLINE: Cases = {
    "no model": (["--model=./nowhere"], "nowhere"),
    "an unknown loss": (["--policy_loss=nosuch"], "invalid choice: 'nosuch'"),
    "a negative learning rate": (["--learning_rate=-1"], "learning_rate must be at least 0"),
    "an empty batch": (["--per_device_train_batch_size=0"], "per_device_train_batch_size must be at least 1"),
    "temperature 0": (["--temperature=0"], "temperature must be above 0"),
    "no step": (["--max_steps=0"], "max_steps=0 does not mean an end at once"),
    "no truth value for the page": (["--open=perhaps"], "perhaps"),
}
OWN: dict[str, Cases] = {
    "mtp_critic": {"no head": (["--num_mtp_heads=0"], "num_mtp_heads must be at least 1"), **ONLINE},
    "ppo": {"a preset of GRPO": (["--preset=dapo"], "invalid choice: 'dapo'"), **ONLINE},
    "grpo_variants": {"an unknown preset": (["--preset=dapoo"], "invalid choice: 'dapoo'"), **ONLINE},
    "moe_balancing": {
        "an unknown way": (["--balancing", "nosuch"], "--balancing nosuch: choose from none, aux, loss_free"),
    },
    "multi_turn": {
        "an unknown option": (["--nosuch=1"], "unrecognized arguments: --nosuch=1"),
        "an unknown method": (["--methods", "nosuch"], "invalid choice: 'nosuch'"),
        "no number": (["--updates=ten"], "invalid int value: 'ten'"),
        "no JSON": (["--critic={a"], "--critic: invalid loads value: '{a'"),
        "an unknown option of the critic": (['--critic={"nosuch": 1}', "--cpu"], "nosuch"),
        "an unknown host": (["--host=jax"], "invalid choice: 'jax'"),
        "an output folder that is a file": (["--output_dir=a_file"], "a_file"),
        "an empty batch": (["--episodes=0", "--cpu"], "per_device_train_batch_size must be at least 1"),
    },
    "lightning_mtp_critic": {
        "no command": ([], "fit"),
        "an unknown option": (["fit", "--model.nosuch=1"], "nosuch"),
        "no number": (["fit", "--trainer.max_steps=ten"], "max_steps"),
        "no config file": (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        "an unknown accelerator": (["fit", "--trainer.accelerator=abacus"], "abacus"),
        "an unknown task": (["fit", "--data.task=nosuch"], "nosuch"),
    },
    "lightning_classic": {
        "no command": ([], "fit"),
        "an unknown agent": (["fit", "--model=NoAgent"], "NoAgent"),
        "an unknown option": (["fit", "--model=PPOAgent", "--model.nosuch=1"], "nosuch"),
        "an unknown environment": (["fit", "--model=PPOAgent", "--model.env=Nowhere-v0"], "Nowhere"),
        "no number": (["fit", "--model=PPOAgent", "--model.total_steps=ten"], "total_steps"),
        "no config file": (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        "no checkpoint": (
            ["fit", "--model=PPOAgent", "--model.env=CartPole-v1", "--ckpt_path=x.ckpt"],
            "--ckpt_path x",
        ),
    },
}
CASES = [
    pytest.param(recipe, *case, id=f"{recipe}: {name}")
    for recipe, own in OWN.items()
    for name, case in {**(TRL if recipe in TRL_RECIPES else {}), **own}.items()
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "given", "message"), CASES)
def test_a_mistake_is_one_line(
    recipe: str,
    given: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_yaml.yaml").write_text("learning_rate: [1")
    (tmp_path / "unknown.yaml").write_text("learning_rte: 0.1")
    (tmp_path / "a_file").write_text("")
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *given])
    with pytest.raises(SystemExit) as stopped:
        load_recipe(recipe).main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{recipe}.py") and ": error: " in line and message in line
