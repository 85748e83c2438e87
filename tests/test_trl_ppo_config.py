"""`PPOConfig`: what it refuses and why, its preset, and that it survives JSON and the command line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, TrlParser

from rl_plugins.trl import PPOConfig

Make = Callable[..., PPOConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Factory: a config for a run on CPU."""

    def factory(**options: Any) -> PPOConfig:
        return PPOConfig(str(tmp_path), **{"use_cpu": True, "bf16": False, "report_to": "none", **options})

    return factory


BAD: list[tuple[dict[str, Any], str]] = [
    ({"preset": "ppo"}, "Unknown preset 'ppo'; choose one of vpg"),
    ({"advantage_estimator": "ppo"}, "Unknown advantage_estimator 'ppo'; choose one of gae, td, mc"),
    ({"advantage_scaling": "batch"}, "Unknown advantage_scaling 'batch'; choose one of none, whiten, value"),
    ({"value_loss_type": "l1"}, "Unknown value_loss_type 'l1'; choose one of squared, clipped, huber"),
    ({"policy_loss": "ppo"}, "Unknown policy_loss 'ppo'; choose one of grpo, .*gvpo"),
    ({"policy_loss": "dppo", "policy_loss_kwargs": {"treshold": 1}}, "has no option 'treshold'; it has divergence"),
    ({"aggregation": "mean"}, "Unknown aggregation 'mean'; choose one of token, "),
    ({"gamma": 1.01}, r"gamma must be in \[0, 1\], got 1.01"),
    ({"gamma": float("nan")}, r"gamma must be in \[0, 1\]"),
    ({"lam_policy": 2.0}, r"lam_policy must be in \[0, 1\], got 2.0"),
    ({"lam_value": -1.0}, r"lam_value must be in \[0, 1\], got -1.0"),
    ({"length_adaptive_alpha": 0.0}, "length_adaptive_alpha must be above 0, got 0.0"),
    ({"value_loss_coef": -0.1}, "value_loss_coef must be at least 0"),
    ({"value_clip_range": 0.0}, "value_clip_range must be above 0, got 0.0"),
    ({"value_learning_rate": -1.0}, "value_learning_rate must be at least 0, got -1.0"),
    ({"value_warmup_steps": -1}, "value_warmup_steps must be at least 0, got -1"),
    ({"reward_range": [1.0, 0.0]}, r"reward_range must be \[smallest, largest\], got \[1.0, 0.0\]"),
    ({"sync_ref_model": True}, "Set sync_ref_model=False"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[",".join(map(str, options)) for options, _ in BAD])
def test_bad_options_say_what_to_do(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.0, "lam_policy": 1.0, "lam_value": 0.0},
        {"beta": 0.0, "kl_in_reward": True},
        {"beta": 0.1, "kl_in_reward": False},
        {"value_learning_rate": None, "num_iterations": 1, "num_generations": 4, "steps_per_generation": 2},
        {"value_learning_rate": 0.0, "value_warmup_steps": 10, "entropy_coef": 0.1},
    ],
)
def test_good_options_are_kept(make: Make, options: dict[str, Any]) -> None:
    args = make(**options)
    assert {name: getattr(args, name) for name in options} == options


def test_one_generation_is_a_plain_one(make: Make) -> None:
    args = make()
    assert type(args.num_generations) is int and args.num_generations == 1


def test_stock_defaults_apart_from_ours(make: Make, tmp_path: Path) -> None:
    ours, stock = make(), GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    shared = {f.name for f in dataclasses.fields(GRPOConfig)}
    differ = {name: getattr(ours, name) for name in shared if getattr(ours, name) != getattr(stock, name)}
    differ.pop("logging_dir", None)
    assert differ == {"num_generations": 1, "beta": 0.05, "num_iterations": 4}
    assert ours.value_loss_type == "clipped" and ours.kl_in_reward and ours.lam_policy == 0.95
    assert not ours.calibrate_values


def test_preset(make: Make) -> None:
    vpg = make(preset="vpg")
    assert (vpg.policy_loss, vpg.advantage_estimator, vpg.num_iterations, vpg.value_loss_type) == (
        "vanilla",
        "mc",
        1,
        "squared",
    )
    others = {f.name for f in dataclasses.fields(PPOConfig)}
    others -= {"preset", "policy_loss", "aggregation", "advantage_estimator", "num_iterations", "value_loss_type"}
    plain = make()
    assert all(getattr(vpg, name) == getattr(plain, name) for name in others if not name.startswith("_"))
    # What the user sets wins.
    own = make(preset="vpg", num_iterations=2, advantage_estimator="td", value_loss_type="huber", policy_loss="gpg")
    assert (own.num_iterations, own.advantage_estimator, own.value_loss_type, own.policy_loss) == (
        2,
        "td",
        "huber",
        "gpg",
    )


COMMAND_LINE = {
    "preset": ("vpg", "vpg"),
    "value_model_path": ("critic", "critic"),
    "value_model_init_kwargs": ('{"dtype":"bfloat16"}', {"dtype": "bfloat16"}),
    "value_learning_rate": ("1e-3", 1e-3),
    "beta": ("0.2", 0.2),
    "kl_in_reward": ("False", False),
    "num_iterations": ("3", 3),
    "num_generations": ("1", 1),
    "lam_policy": ("0.9", 0.9),
    "calibrate_values": ("True", True),
    "discounted_objective": ("True", True),
    "length_adaptive_alpha": ("0.05", 0.05),
    "advantage_scaling": ("value", "value"),
    "reward_range": ("-1.0 2.0", [-1.0, 2.0]),
    "value_warmup_steps": ("3", 3),
    "value_loss_coef": ("0.3", 0.3),
    "value_loss_type": ("huber", "huber"),
    "value_clip_range": ("0.4", 0.4),
    "gamma": ("0.99", 0.99),
    "advantage_estimator": ("td", "td"),
    "lam_value": ("0.7", 0.7),
    "time_unit": ("turn", "turn"),
    "bootstrap_truncated": ("true", True),
    "policy_loss": ("dppo", "dppo"),
    "policy_loss_kwargs": ('{"threshold":0.1}', {"threshold": 0.1}),
    "aggregation": ("constant", "constant"),
    "overlong_shaping": ("True", True),
    "overlong_cache": ("4", 4),
    "num_mtp_heads": ("3", 3),
    "mtp_head_type": ("parallel", "parallel"),
    "mtp_loss_type": ("distribution", "distribution"),
    "mtp_loss_share": ("0.5", 0.5),
    "mtp_inner_size": ("16", 16),
    "mtp_heads_path": ("heads", "heads"),
    "head_learning_rate": ("1e-3", 1e-3),
    "mtp_loss_coef": ("0.2", 0.2),
    "mtp_detach_trunk": ("False", False),
    "speculative": ("True", True),
    "num_draft_tokens": ("2", 2),
    "draft_cost": ("0.1", 0.1),
}
OVERRIDDEN = {"num_generations", "beta", "num_iterations"}


def own_fields() -> set[str]:
    inherited = {f.name for f in dataclasses.fields(GRPOConfig)}
    return {f.name for f in dataclasses.fields(PPOConfig)} - inherited | OVERRIDDEN


def test_json_round_trip(make: Make) -> None:
    args = make(**{name: value for name, (_, value) in COMMAND_LINE.items()})
    as_dict = args.to_dict()
    assert as_dict["num_generations"] == 1 and type(as_dict["num_generations"]) is int
    from_json = json.loads(args.to_json_string())
    # The host derives one of these two from the other, and refuses both at once.
    init = {f.name for f in dataclasses.fields(PPOConfig) if f.init} - {"generation_batch_size"}
    again = PPOConfig(**{name: value for name, value in from_json.items() if name in init})
    for name in sorted(own_fields()):
        assert getattr(again, name) == getattr(args, name) == from_json[name] == COMMAND_LINE[name][1], name


def test_command_line_reaches_every_field(tmp_path: Path) -> None:
    assert set(COMMAND_LINE) == own_fields()
    words = f"--output_dir {tmp_path} --use_cpu True --bf16 False --report_to none".split()
    for name, (text, _) in COMMAND_LINE.items():
        words += [f"--{name}", *text.split()]
    (args,) = TrlParser((PPOConfig,)).parse_args_and_config(words)
    assert {name: getattr(args, name) for name in COMMAND_LINE} == {n: value for n, (_, value) in COMMAND_LINE.items()}
    for wrong in (["--preset", "ppo"], ["--value_loss_type", "l1"]):
        with pytest.raises(SystemExit):
            TrlParser((PPOConfig,)).parse_args_and_config([*words, *wrong])


def test_yaml_reaches_every_field(tmp_path: Path) -> None:
    config = {name: value for name, (_, value) in COMMAND_LINE.items()}
    config |= {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    words = ["--config", str(tmp_path / "run.yaml"), "--value_learning_rate", "0.5"]
    (args,) = TrlParser((PPOConfig,)).parse_args_and_config(words)
    expected = {name: value for name, (_, value) in COMMAND_LINE.items()} | {"value_learning_rate": 0.5}
    assert {name: getattr(args, name) for name in COMMAND_LINE} == expected


def test_every_field_has_help_and_is_documented() -> None:
    docs = "".join(config.__doc__ or "" for config in PPOConfig.__mro__[:-1] if config.__module__.startswith("rl_"))
    for f in dataclasses.fields(PPOConfig):
        if f.name in own_fields():
            assert f.metadata["help"], f.name
            text = f.metadata["help"]
            assert f"{f.name} (`" in docs or f"{f.name}: {text}" in docs, f.name
            if f.metadata.get("choices"):
                assert f.default is None or f.default in f.metadata["choices"], f.name
