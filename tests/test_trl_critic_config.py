"""`MTPCriticConfig`: what it refuses and why, and that it survives JSON and the command line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, TrlParser

from rl_plugins.trl import MTPCriticConfig

ArgsFactory = Callable[..., MTPCriticConfig]

BAD = [
    ({"advantage_estimator": "ppo"}, "Unknown advantage_estimator 'ppo'; choose one of gae, td, mc"),
    ({"advantage_scaling": "batch"}, "Unknown advantage_scaling 'batch'; choose one of none, whiten, value"),
    ({"value_loss_type": "l1"}, "Unknown value_loss_type 'l1'; choose one of squared, clipped, huber"),
    ({"num_mtp_heads": 0}, "num_mtp_heads must be at least 1, got 0"),
    ({"mtp_inner_size": 0}, "mtp_inner_size must be at least 1, got 0"),
    ({"mtp_head_type": "serial"}, "Unknown mtp_head_type 'serial'; choose one of parallel, sequential"),
    ({"mtp_head_type": "sequential", "mtp_inner_size": 8}, "mtp_inner_size=8 is the width of a parallel head"),
    ({"mtp_loss_type": "labels"}, "mtp_loss_type"),
    ({"mtp_loss_share": 0.0}, "mtp_loss_share must be above 0"),
    ({"mtp_loss_share": 1.5}, "mtp_loss_share"),
    ({"target_update_every": 0}, "target_update_every must be at least 1, got 0"),
    ({"gamma": 1.01}, r"gamma must be in \[0, 1\], got 1.01"),
    ({"gamma": -0.1}, r"gamma must be in \[0, 1\]"),
    ({"gamma": float("nan")}, r"gamma must be in \[0, 1\]"),
    ({"lam_policy": 2.0}, r"lam_policy must be in \[0, 1\], got 2.0"),
    ({"lam_value": -1.0}, r"lam_value must be in \[0, 1\], got -1.0"),
    ({"target_tau": 1.5}, r"target_tau must be in \[0, 1\], got 1.5"),
    ({"length_adaptive_alpha": 0.0}, "length_adaptive_alpha must be above 0, got 0.0"),
    ({"mtp_loss_coef": -0.1}, "mtp_loss_coef must be at least 0"),
    ({"value_loss_coef": -0.1}, "value_loss_coef must be at least 0"),
    ({"value_grad_scale": -1.0}, "value_grad_scale must be at least 0"),
    ({"value_grad_clip": -1.0}, "value_grad_clip must be at least 0"),
    ({"head_learning_rate": -1.0}, "head_learning_rate must be at least 0"),
    ({"value_clip_range": 0.0}, "value_clip_range must be above 0, got 0.0"),
    ({"reward_range": [1.0, 0.0]}, r"reward_range must be \[smallest, largest\], got \[1.0, 0.0\]"),
    ({"reward_range": [1.0]}, r"reward_range must be \[smallest, largest\]"),
    ({"value_warmup_steps": -1}, "value_warmup_steps must be at least 0, got -1"),
    ({"kl_in_reward": True}, "beta is 0. Set beta > 0"),
    ({"sync_ref_model": True, "beta": 0.1}, "Set sync_ref_model=False"),
    ({"phasic_every": -1}, "phasic_every must be at least 0, got -1"),
    ({"phasic_every": 1, "phasic_epochs": 0}, "phasic_epochs must be at least 1, got 0"),
    ({"phasic_every": 1, "phasic_kl_coef": -1.0}, "phasic_kl_coef must be at least 0, got -1.0"),
    ({"phasic_every": 1, "phasic_epochs": 1, "num_iterations": 2}, "num_iterations = 2 must divide the second"),
    (
        {"phasic_every": 1, "steps_per_generation": 2, "gradient_accumulation_steps": 4},
        "gradient_accumulation_steps = 4 must divide both numbers",
    ),
    # Without a critic one generation is what stock GRPO refuses.
    ({"use_critic": False, "num_generations": 1}, "at least 2 generations per prompt, but num_generations is 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[",".join(map(str, options)) for options, _ in BAD])
def test_bad_options_say_what_to_do(
    critic_args: ArgsFactory, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        critic_args(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.0, "lam_policy": 1.0, "lam_value": 0.0, "target_tau": 1.0},
        {"kl_in_reward": True, "beta": 0.1},
        {"phasic_every": 2, "phasic_epochs": 2, "num_iterations": 2, "steps_per_generation": 2},
        {"phasic_every": 3, "phasic_epochs": 1, "gradient_accumulation_steps": 2},
        {"use_critic": False, "num_generations": 2, "sync_ref_model": True, "beta": 0.1},
        {"value_grad_clip": None, "head_learning_rate": None, "mtp_inner_size": 8, "target_update_every": 5},
    ],
)
def test_good_options_are_kept(critic_args: ArgsFactory, tmp_path: Path, options: dict[str, Any]) -> None:
    args = critic_args(tmp_path, **options)
    assert {name: getattr(args, name) for name in options} == options


def test_one_generation_is_a_plain_one(critic_args: ArgsFactory, tmp_path: Path) -> None:
    args = critic_args(tmp_path)
    assert type(args.num_generations) is int and args.num_generations == 1
    assert args.num_generations < 2
    assert critic_args(tmp_path, num_generations=4).num_generations == 4
    with pytest.raises(ValueError):
        critic_args(tmp_path, num_generations=3)  # 8 completions are no multiple of 3


def test_stock_defaults_apart_from_ours(tmp_path: Path) -> None:
    ours = MTPCriticConfig(str(tmp_path), use_cpu=True, bf16=False)
    stock = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    shared = {f.name for f in dataclasses.fields(GRPOConfig)}
    differ = {name for name in shared if getattr(ours, name) != getattr(stock, name)}
    assert differ - {"logging_dir"} == {"num_generations"}


def test_json_round_trip(critic_args: ArgsFactory, tmp_path: Path) -> None:
    args = critic_args(tmp_path, reward_range=[-1.0, 2.0], lam_policy=0.5, advantage_estimator="td")
    as_dict = args.to_dict()
    assert as_dict["num_generations"] == 1 and type(as_dict["num_generations"]) is int
    from_json = json.loads(args.to_json_string())
    ours = {f.name for f in dataclasses.fields(MTPCriticConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    # The host derives one of these two from the other, and refuses both at once.
    init = {f.name for f in dataclasses.fields(MTPCriticConfig) if f.init} - {"generation_batch_size"}
    again = MTPCriticConfig(**{name: value for name, value in from_json.items() if name in init})
    assert len(ours) == 46
    for name in sorted(ours | {"num_generations"}):
        assert getattr(again, name) == getattr(args, name) == from_json[name], name


COMMAND_LINE = {
    "use_critic": ("True", True),
    "num_generations": ("1", 1),
    "lam_policy": ("0.9", 0.9),
    "calibrate_values": ("False", False),
    "discounted_objective": ("True", True),
    "length_adaptive_alpha": ("0.05", 0.05),
    "advantage_scaling": ("value", "value"),
    "reward_range": ("-1.0 2.0", [-1.0, 2.0]),
    "kl_in_reward": ("True", True),
    "value_warmup_steps": ("3", 3),
    "value_replay": ("2", 2),
    "value_replay_rollouts": ("4", 4),
    "value_replay_size": ("1000", 1000),
    "value_replay_learning_rate": ("1e-2", 1e-2),
    "phasic_every": ("4", 4),
    "phasic_epochs": ("2", 2),
    "phasic_kl_coef": ("0.5", 0.5),
    "num_mtp_heads": ("3", 3),
    "mtp_head_type": ("parallel", "parallel"),
    "mtp_loss_type": ("distribution", "distribution"),
    "mtp_loss_share": ("0.5", 0.5),
    "mtp_inner_size": ("16", 16),
    "mtp_heads_path": ("heads", "heads"),
    "head_learning_rate": ("1e-3", 1e-3),
    "mtp_loss_coef": ("0.2", 0.2),
    "mtp_detach_trunk": ("False", False),
    "value_loss_coef": ("0.3", 0.3),
    "value_loss_type": ("huber", "huber"),
    "value_clip_range": ("0.4", 0.4),
    "value_grad_scale": ("0.5", 0.5),
    "value_grad_clip": ("2.0", 2.0),
    "gamma": ("0.99", 0.99),
    "advantage_estimator": ("mc", "mc"),
    "lam_value": ("0.7", 0.7),
    "time_unit": ("turn", "turn"),
    "bootstrap_truncated": ("true", True),
    "target_tau": ("0.01", 0.01),
    "target_update_every": ("10", 10),
    "bootstrap_lookahead": ("True", True),
    "policy_loss": ("dppo", "dppo"),
    "policy_loss_kwargs": ('{"threshold":0.1}', {"threshold": 0.1}),
    "aggregation": ("constant", "constant"),
    "overlong_shaping": ("True", True),
    "overlong_cache": ("4", 4),
    "speculative": ("True", True),
    "num_draft_tokens": ("2", 2),
    "draft_cost": ("0.1", 0.1),
}


def test_command_line_reaches_every_field(tmp_path: Path) -> None:
    own = {f.name for f in dataclasses.fields(MTPCriticConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    own |= {"num_generations"}
    assert set(COMMAND_LINE) == own
    words = f"--output_dir {tmp_path} --use_cpu True --bf16 False --beta 0.1 --report_to none".split()
    for name, (text, _) in COMMAND_LINE.items():
        words += [f"--{name}", *text.split()]
    (args,) = TrlParser((MTPCriticConfig,)).parse_args_and_config(words)  # type: ignore[arg-type]
    assert {name: getattr(args, name) for name in COMMAND_LINE} == {n: value for n, (_, value) in COMMAND_LINE.items()}
    with pytest.raises(SystemExit):
        TrlParser((MTPCriticConfig,)).parse_args_and_config([*words, "--advantage_estimator", "ppo"])  # type: ignore[arg-type]


def test_every_field_has_help_and_is_documented() -> None:
    inherited = {f.name for f in dataclasses.fields(GRPOConfig)} - {"num_generations"}
    docs = "".join(config.__doc__ or "" for config in MTPCriticConfig.__mro__[:-1])
    for f in dataclasses.fields(MTPCriticConfig):
        if f.name not in inherited:
            assert f.metadata["help"], f.name
            text = f.metadata["help"]
            assert f"{f.name} (`" in docs or f"{f.name}: {text}" in docs, f.name
