"""Exports, callbacks, loggers, the command line and exact values of Lightning's language-model modules."""

import copy
import csv
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from rl_plugins.lightning import (
    MoEBalancingCallback,
    MTPCriticModule,
    MTPSFTModule,
    PromptDataModule,
    RolloutProgressBar,
    TokenValueReport,
)
from rl_plugins.lightning.models import find_language_model
from rl_plugins.moe.load_log import LOAD_FILE_NAME
from rl_plugins.rollouts.rewards import reward_name
from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer, PPOConfig, PPOTrainer

from .helpers.exact_cases import ENOUGH, PROMPT, Case, accuracy, digits_tokenizer, election, exact_mdp, random_policy
from .helpers.lightning_runs import LORA, ONLINE, Numbers, changed, fit, module_factory, perturb, prompts, weights
from .helpers.moe_models import make_moe_model

pytestmark = pytest.mark.filterwarnings(r"ignore:::lightning\.pytorch.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def dice() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make(tiny_model: Callable[..., Any], tokenizer: Any, reward: Any) -> Make:
    """Factory: a module on a tiny model; keywords go to the module."""
    return module_factory(tiny_model, tokenizer, reward)


# Exports


def critic_args(tmp_path: Path, config: Any, **options: Any) -> Any:
    return config(
        str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=4,
        max_completion_length=5, max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, beta=0.0,
        num_iterations=1, **options
    )  # fmt: skip


HOSTS: dict[str, tuple[Any, Any]] = {"critic": (MTPCriticConfig, MTPCriticTrainer), "ppo": (PPOConfig, PPOTrainer)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTS)
def test_there_and_back(make: Make, reward: Any, dataset: Dataset, tmp_path: Path, kind: str) -> None:
    """Lightning -> TRL -> Lightning: every weight, those of the critic too."""
    config, trainer_class = HOSTS[kind]
    module = make(kind, num_iterations=1, **({"num_mtp_heads": 1} if kind == "critic" else {}))
    fit(module, PromptDataModule(prompts(), batch_size=4), max_steps=2)
    module.save_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 4, 12, 5]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, module.model.eval()(input_ids=ids).logits)
    trainer = trainer_class(str(tmp_path / "out"), reward, critic_args(tmp_path, config), dataset)
    assert not changed(weights(module.model), weights(trainer.model))
    trainer.train()
    trainer.save_model(str(tmp_path / "back"))
    back = ONLINE[kind](str(tmp_path / "back"), reward_funcs=reward, beta=0.0, max_completion_length=5)
    assert not changed(weights(trainer.model), weights(back.model))
    assert changed(weights(module.model), weights(back.model))
    fit(back, PromptDataModule(prompts(), batch_size=4), max_steps=1)


def test_fine_tuned_heads_go_on_in_the_critic(tiny_model: Any, tokenizer: Any, reward: Any, tmp_path: Path) -> None:
    module = MTPSFTModule(tiny_model(), tokenizer, num_mtp_heads=3, mtp_inner_size=16, head_learning_rate=1e-2)
    rows = [{**row, "completion": row["answer"]} for row in prompts()]
    fit(module, PromptDataModule(rows, batch_size=4), max_steps=2)
    module.save_pretrained(tmp_path)
    critic = MTPCriticModule(str(tmp_path), reward_funcs=reward, num_mtp_heads=3, mtp_inner_size=16)
    assert not changed(weights(module.model), weights(critic.model))
    apart = MTPCriticModule(
        tiny_model(), tokenizer, reward, num_mtp_heads=3, mtp_inner_size=16, mtp_heads_path=str(tmp_path)
    )
    assert not changed(weights(module.mtp_heads), weights(apart.mtp_heads))


def test_an_exported_adapter(make: Make, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_model(initializer_range=0.2)
    module = make("critic", get_peft_model(copy.deepcopy(base), LORA))
    fit(module, PromptDataModule(prompts(), batch_size=4), max_steps=2)
    module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ids = torch.tensor([[3, 4, 12, 5]])
    with torch.no_grad():
        expected = module.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(base.eval()(input_ids=ids).logits, expected, atol=1e-3)
    heads = make("critic", base, mtp_heads_path=str(tmp_path)).mtp_heads
    assert not changed(weights(module.mtp_heads), weights(heads))


# Callbacks and loggers


@pytest.mark.parametrize("kind", ["critic", "ppo"])
def test_the_report_shows_the_newest_completions(make: Make, tmp_path: Path, kind: str) -> None:
    module = make(kind, num_iterations=1)
    perturb(module.model)
    report = TokenValueReport(tmp_path / "page.html", limit=2, title="What it thinks")
    fit(module, PromptDataModule(prompts(), batch_size=4, shuffle=False), report, max_steps=2)
    page = (tmp_path / "page.html").read_text()
    assert "<h1>What it thinks</h1>" in page and "After 2 optimizer steps." in page
    assert "11+11=" in page and "12+12=" in page and "13+13=" not in page, "two completions of the second batch"
    batch = module.last_rollout
    for name, expected in (("value", batch["old_values"][..., 0]), ("delta", batch["td_errors"])):
        shown = [float(x) for x in re.findall(rf'data-{name}="([^"]+)"', page)]
        assert shown == pytest.approx(expected[:2][batch["critic_mask"][:2]].tolist(), rel=1e-5, abs=1e-12)
        assert len(set(shown)) > 2
    assert re.findall(r"<b>expected answer</b> ([^<]*)<", page) == ["22", "24"]
    assert [float(x) for x in re.findall(r'data-reward="([^"]+)"', page)] == batch["scores"][:2].tolist()


def test_no_report_without_a_critic(make: Make) -> None:
    with pytest.raises(ValueError, match="shows a critic's values of completions, and GRPOModule is no module"):
        fit(make("grpo"), PromptDataModule(prompts(), batch_size=2), TokenValueReport(), max_steps=1)


@pytest.mark.slow
def test_reports_follow_validation(make: Make, tmp_path: Path) -> None:
    written: list[int] = []

    class Spy(TokenValueReport):
        def _write(self, trainer: Trainer, pl_module: Any) -> None:
            super()._write(trainer, pl_module)
            written.append(trainer.global_step)

    data = PromptDataModule(prompts(), prompts(2), batch_size=4)
    fit(make("critic"), data, Spy(), max_steps=2, val_check_interval=1, default_root_dir=tmp_path)
    assert written == [1, 2, 2]  # two validations, and the end
    assert (tmp_path / "token_values.html").is_file()


def test_the_progress_bar_moves_during_a_rollout(make: Make) -> None:
    shown: list[str] = []

    class Spy(RolloutProgressBar):
        def init_train_tqdm(self) -> Any:
            bar = super().init_train_tqdm()
            describe = bar.set_description
            bar.set_description = lambda text=None, refresh=True: (shown.append(text), describe(text, refresh))
            return bar

    module = make("grpo", max_completion_length=9)
    module.generation["suppress_tokens"] = [0, 1]
    bar = Spy(leave=False)
    fit(module, PromptDataModule(prompts(), batch_size=4), bar, max_steps=2, enable_progress_bar=True)
    assert [text for text in shown if "Rollout" in text] == ["Rollout 4/9", "Rollout 8/9"] * 2
    assert shown[shown.index("Rollout 8/9") + 1 :].count("Epoch 0") >= 2
    metrics = bar.get_metrics(module.trainer, module)
    assert {"loss", "reward"} <= set(metrics) and "v_num" not in metrics
    assert metrics["reward"] == f"{float(module.trainer.callback_metrics['reward']):.3g}"


@pytest.mark.slow
def test_numbers_reach_the_logger(make: Make, tmp_path: Path) -> None:
    numbers, logger = Numbers(), CSVLogger(tmp_path)
    module = make("critic", num_iterations=2, beta=0.1)
    fit(
        module, PromptDataModule(prompts(), prompts(2), batch_size=4), numbers, logger=logger, max_steps=4,
        log_every_n_steps=1, val_check_interval=2,
    )  # fmt: skip
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["loss"]]
    assert [int(row["step"]) for row in trained] == [0, 1, 2, 3]
    names = {
        "loss", "reward", "kl", "entropy", "completions/mean_length", "clip_ratio/region_mean", "critic/value_loss",
        "mtp/token_loss/head_2", "critic/explained_variance/head_1", "critic/target_gap", "critic/grad_norm",
    }  # fmt: skip
    for row, seen in zip(trained, numbers.rows, strict=True):
        assert names <= seen.keys()
        for name in seen.keys() & row.keys():
            if not name.startswith("eval_"):
                assert float(row[name]) == pytest.approx(seen[name], rel=1e-6), name
    assert trained[0]["reward"] == trained[1]["reward"] != trained[2]["reward"], "one rollout for two steps"
    validated = [row for row in rows if row["eval_reward"]]
    assert len(validated) == 2 and all(row["eval_critic/value_mean"] for row in validated)


@pytest.mark.parametrize("kind", ONLINE)
def test_experts_are_balanced_in_every_module(make: Make, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    model = make_moe_model("qwen3_moe", vocab_size=16)
    numbers = Numbers()
    balancing = MoEBalancingCallback(rate=1e-2)
    module = make(kind, model, beta=0.1, num_iterations=2)
    fit(
        module, PromptDataModule(prompts(), batch_size=4), balancing, numbers, max_steps=2,
        logger=CSVLogger(tmp_path), log_every_n_steps=1,
    )  # fmt: skip
    found = {name for name in numbers.rows[-1] if name.startswith("moe/")}
    assert found and all(math.isfinite(numbers.rows[-1][name]) for name in found)
    (path,) = tmp_path.rglob(LOAD_FILE_NAME)
    # One training forward a step: two of three layers have experts, and every token goes to two of them. Rollouts,
    # passes without gradient and a value model do not count.
    batch = module.last_rollout
    real = int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
    loads = [json.loads(line) for line in path.read_text().splitlines()]
    assert [load["step"] for load in loads] == [1, 2]
    for load in loads:
        assert load["layers"] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
        assert [sum(counts) for counts in load["counts"]] == [2 * real] * 2


def test_language_models_are_found_in_modules(make: Make) -> None:
    module = make("ppo")
    assert find_language_model(module) is module.model
    assert find_language_model(torch.nn.Linear(1, 1)) is None


# The command line


def odd_digits(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(sum(character in "13579" for character in text)) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MTPCriticModule", "GRPOModule", "PPOModule", "MTPSFTModule"])
def test_the_command_line_builds_modules_from_text(tiny_model: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{**row, "completion": row["answer"]} for row in prompts()]
    reward = f"{__name__}.odd_digits"
    online = {
        "model.reward_funcs": reward if name == "GRPOModule" else f"[{reward}, {reward}]",
        "model.max_completion_length": "5",
        "model.beta": "0.0",
        "model.policy.policy_loss_kwargs": json.dumps({"epsilon_high": 0.3}),
    }
    arguments = {
        "model": f"rl_plugins.lightning.{name}",
        "model.model": str(tmp_path / "model"),
        "model.learning_rate": "0.5",
        "model.weight_decay": "0.25",
        **({"model.heads.num_mtp_heads": "3"} if name.startswith("MTP") else {}),
        **({} if name == "MTPSFTModule" else online),
        "data": "rl_plugins.lightning.PromptDataModule",
        "data.train_dataset": json.dumps(rows),
        "data.batch_size": "4",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": "1",
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    text = [f"--{key}={value}" for key, value in arguments.items()]
    cli = LightningCLI(run=False, save_config_callback=None, seed_everything_default=0, args=text)
    assert type(cli.model).__name__ == name and cli.datamodule.batch_size == 4
    assert (cli.model.language.learning_rate, cli.model.language.weight_decay) == (0.5, 0.25)
    if name != "MTPSFTModule":
        assert [reward_name(func) for func in cli.model.reward_funcs] == ["odd_digits"] * (1 + (name != "GRPOModule"))
        assert cli.model.policy_loss.options == {"epsilon_high": 0.3}
    if name.startswith("MTP"):
        assert cli.model.mtp_heads.config.num_heads == 3
    before = weights(cli.model)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert changed(before, weights(cli.model))


# Values are right


@pytest.mark.slow
def test_the_critic_finds_the_exact_values_of_a_frozen_policy() -> None:
    """As TRL's critic trainer does (tests/test_trl_critic_exact.py), and the trunk stays as it is."""
    case = Case(election, vocab_size=4, max_length=5, eos_token_id=3, gamma=0.9, seed=3)
    model = random_policy(case.vocab_size, case.seed)
    mdp = exact_mdp(model, case)
    trunk = weights(model)

    def score(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        strings = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in completion_ids], batch_first=True)
        return case.reward(strings).tolist()

    module = MTPCriticModule(
        model, digits_tokenizer(case.vocab_size, case.eos_token_id), score, learning_rate=0.0, head_learning_rate=1e-2,
        gamma=case.gamma, value_grad_scale=0.0, num_mtp_heads=2, mtp_inner_size=128, mtp_loss_coef=0.0, target_tau=0.1,
        lam_value=0.7, max_completion_length=case.max_length, num_iterations=4,
    )  # fmt: skip
    torch.manual_seed(0)
    fit(module, PromptDataModule([{"prompt": str(PROMPT)}] * 128, batch_size=128), max_steps=120)
    assert all(torch.equal(model.get_parameter(name), before) for name, before in trunk.items())
    scores = accuracy(model.eval(), module.mtp_heads, mdp)
    # Half the rollouts of that test, for time: the forecast of head 2 is not quite there.
    assert scores[0] >= ENOUGH and scores[1] >= 0.9, scores
