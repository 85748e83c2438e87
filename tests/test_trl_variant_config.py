"""`GRPOVariantConfig`: what it refuses and why, its presets, JSON and the command line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, TrlParser

from rl_plugins.signals.presets import GRPO_PRESETS
from rl_plugins.trl import GRPOVariantConfig

Args = Callable[..., GRPOVariantConfig]
OWN = {f.name for f in dataclasses.fields(GRPOVariantConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}


@pytest.fixture
def make_args(tmp_path: Path) -> Args:
    """Factory: a config; keywords win over what makes it run here."""

    def factory(**options: Any) -> GRPOVariantConfig:
        return GRPOVariantConfig(
            **{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", **options}
        )

    return factory


ALL_ADVANTAGES = "reward, group_normalized, .*batch_normalized, reward_to_go, .*, value_tracker, lambda_trace"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"advantage": "gae"}, f"Unknown advantage 'gae'; choose one of {ALL_ADVANTAGES}"),
    ({"advantage": "group_normalized", "advantage_kwargs": {"epsilon": 1}}, "has no option 'epsilon'; it has eps"),
    ({"advantage": "group_centered", "advantage_kwargs": {"eps": 1}}, "has no option 'eps'; it has none"),
    ({"advantage": "length_weighted", "advantage_kwargs": {"lengths": 1}}, "has no option 'lengths'"),
    ({"advantage": "value_tracker", "advantage_kwargs": {"lam": 1}}, "has no option 'lam'; it has forget, half_life"),
    ({"advantage_kwargs": {"k": 2}}, "advantage_kwargs are options of an advantage, but advantage is None"),
    ({"advantage": "kalman", "advantage_kwargs": [1]}, "advantage_kwargs must be a dict or JSON of one"),
    ({"advantage": "value_tracker", "num_generations": 1, "advantage_kwargs": {"forget": 2.0}}, "outside .0, 1."),
    ({"advantage": "value_tracker", "num_generations": 1, "advantage_kwargs": {"half_life": 0.0}}, "half_life=0.0"),
    (
        {"advantage": "value_tracker", "num_generations": 1, "advantage_kwargs": {"forget": 0.9, "low": 0.5}},
        "do not suit 'value_tracker': forget replaces half_life, low and high",
    ),
    ({"advantage": "lambda_trace", "advantage_kwargs": {"style": "late"}}, "do not suit 'lambda_trace'"),
    ({"advantage": "kalman", "advantage_kwargs": {"measurement_var": "big"}}, "do not suit 'kalman'"),
    ({"advantage": "max_likelihood", "overlong_shaping": True}, "max_likelihood. needs rewards of at least 0"),
    ({"advantage": "group_centered_rescaled", "reject_uniform": True}, "correct twice"),
    ({"advantage": "lambda_trace", "policy_loss": "gvpo"}, "gvpo' compares whole completions"),
    ({"policy_loss": "dppo", "policy_loss_kwargs": {"threshold": -1.0}}, "do not suit 'dppo'"),
    ({"policy_loss": "clip_cov", "policy_loss_kwargs": {"ratio": 2}}, "do not suit 'clip_cov'"),
    ({"advantage": "pass_at_k"}, "but k is None. Set advantage_kwargs={'k': ...} to at least 1 and less"),
    (
        {"advantage": "pass_at_k", "advantage_kwargs": {"k": 9}},
        "num_generations=8 completions of a prompt, but k is 9",
    ),
    ({"preset": "pass_at_k", "num_generations": 4}, "but k is 4. .* every advantage is 0"),
    ({"advantage": "pass_at_k", "advantage_kwargs": {"k": 0}}, "but k is 0"),
    ({"preset": "pass_at_k", "num_generations": 2}, "num_generations=2 completions of a prompt, but k is 4"),
    ({"kl_in_reward": True, "advantage": "batch_normalized"}, "beta > 0; they are 'batch_normalized' and 0.0"),
    ({"kl_in_reward": True, "beta": 0.1}, "'batch_normalized' or 'reward_to_go' and beta > 0; they are None and 0.1"),
    ({"kl_in_reward": True, "beta": 0.1, "advantage": "reward"}, "they are 'reward' and 0.1"),
    ({"num_generations": 1}, "at least 2 generations"),
    ({"num_generations": 1, "advantage": "group_normalized"}, "at least 2 generations"),
    ({"num_generations": 1, "advantage": "lambda_trace"}, "at least 2 generations"),
    (
        {"num_generations": 1, "advantage": "reward", "dynamic_sampling": True},
        "num_generations is 1. Set num_generations to at",
    ),
    ({"num_generations": 1, "advantage": "reward", "reject_uniform": True}, "num_generations is 1"),
    ({"num_generations": 1, "advantage": "batch_normalized", "replay_buffer_size": 2}, "num_generations is 1"),
    ({"preset": "reinforce_rej", "num_generations": 1}, "at least 2 generations"),
    ({"advantage": "value_tracker", "dynamic_sampling": True}, "'value_tracker' needs no groups"),
    ({"advantage": "value_tracker", "reject_uniform": True}, "'value_tracker' needs no groups"),
    ({"advantage": "value_tracker", "replay_buffer_size": 4}, "'value_tracker' needs no groups"),
    (
        {"advantage": "group_centered", "multi_objective_aggregation": "normalize_then_sum"},
        "multi_objective_aggregation='normalize_then_sum' has no effect.* from advantage='group_centered'",
    ),
    ({"max_draws": 0}, "max_draws must be at least 1, got 0"),
    ({"replay_buffer_size": -1}, "replay_buffer_size must be at least 0, got -1"),
    ({"replay_max_age": -1}, "replay_max_age must be at least 0, got -1"),
    (
        {"overlong_shaping": True, "overlong_cache": 0},
        "overlong_cache must be between 1 and max_completion_length=512",
    ),
    ({"overlong_shaping": True, "overlong_cache": 513}, "max_completion_length=512, got 513"),
    ({"policy_loss": "ppo"}, "Unknown policy_loss 'ppo'; choose one of grpo, .*gvpo"),
    ({"policy_loss": "gvpo", "policy_loss_kwargs": {"k": 1}}, "'gvpo' has no option 'k'; it has beta"),
    (
        {"policy_loss": "gvpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "num_generations=8 does not divide per_device_train_batch_size=4",
    ),
    ({"per_device_train_batch_size": 4}, "divisible|multiple"),
    ({"preset": "ppo"}, f"Unknown preset 'ppo'; choose one of {', '.join(GRPO_PRESETS).replace('+', '[+]')}"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[",".join(map(str, options)) for options, _ in BAD])
def test_bad_options_say_what_to_do(make_args: Args, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_args(**options)


@pytest.mark.parametrize("option", [{"dynamic_sampling": True}, {"replay_buffer_size": 2}], ids=str)
def test_groups_across_processes_are_not_moved(
    make_args: Args, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GRPOVariantConfig, "world_size", property(lambda self: 2))
    make_args(per_device_train_batch_size=4, num_generations=8)
    with pytest.raises(ValueError, match="num_generations=8 does not divide the 4 completions of a process"):
        make_args(per_device_train_batch_size=4, num_generations=8, **option)


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": "pass_at_k", "advantage_kwargs": {"k": 7, "normalize": True}},
        {"advantage": "value_tracker", "advantage_kwargs": {"forget": 0.9}, "num_generations": 1},
        {"advantage": "reward", "num_generations": 1},
        {"advantage": "batch_normalized", "num_generations": 1, "kl_in_reward": True, "beta": 0.1},
        {"dynamic_sampling": True, "reject_uniform": True, "replay_buffer_size": 3, "max_draws": 1},
        {"overlong_shaping": True, "overlong_cache": 256},
        {"policy_loss": "gvpo", "num_generations": 4, "gradient_accumulation_steps": 2},
        {"overlong_cache": 0},  # unused
    ],
    ids=str,
)
def test_good_options_are_kept(make_args: Args, options: dict[str, Any]) -> None:
    args = make_args(**options)
    assert {name: getattr(args, name) for name in options} == options
    assert type(args.num_generations) is int


def test_the_slope_of_the_penalty_is_a_fifth(make_args: Args) -> None:
    assert make_args(overlong_shaping=True, max_completion_length=100).overlong_cache == 20
    assert make_args(overlong_shaping=True, max_completion_length=3).overlong_cache == 1
    assert make_args(max_completion_length=100).overlong_cache is None


def test_stock_defaults_apart_from_ours(make_args: Args, tmp_path: Path) -> None:
    ours = make_args()
    stock = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    shared = {f.name for f in dataclasses.fields(GRPOConfig)}
    assert {name for name in shared if getattr(ours, name) != getattr(stock, name)} <= {"logging_dir"}
    off = {"max_draws": 10, "replay_buffer_size": 0, "replay_max_age": 8, "draft_cost": 0.2}
    off |= {"num_mtp_heads": 1, "head_learning_rate": 1e-4, "mtp_loss_coef": 0.1, "mtp_detach_trunk": True}
    off |= {"mtp_head_type": "parallel", "mtp_loss_type": "tokens", "mtp_loss_share": 0.25}
    assert {name: getattr(ours, name) for name in OWN if getattr(ours, name)} == {k: v for k, v in off.items() if v}
    assert not ours.samples and not ours.moves_rows


# Presets


@pytest.mark.parametrize("name", GRPO_PRESETS)
def test_a_preset_sets_its_fields(make_args: Args, name: str) -> None:
    args = make_args(preset=name)
    assert {key: getattr(args, key) for key in GRPO_PRESETS[name]} == GRPO_PRESETS[name]


def test_numbers_of_some_papers(make_args: Args) -> None:
    def options(name: str) -> dict[str, Any]:
        loss = make_args(preset=name).make_policy_loss()
        assert loss is not None
        return {"aggregation": loss.aggregation, **loss.options}

    assert options("grpo") == {"aggregation": "sequence"}
    assert options("dapo") == {"aggregation": "token", "epsilon_high": 0.28}
    assert options("dr_grpo") == {"aggregation": "constant"}
    sequence = {"aggregation": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
    assert options("gspo") == {**sequence, "level": "sequence"} and options("gspo_token") == sequence
    assert options("rloo") == {"aggregation": "sequence_sum"}
    assert options("cispo") == options("scale_rl") == {"aggregation": "prompt", "epsilon_high": 5.0}
    # MiniMax-M1, eq. 2 and what follows eq. 5; ScaleRL, section 4.
    assert GRPO_PRESETS["cispo"]["advantage"] == "group_normalized" and make_args(preset="cispo").dynamic_sampling
    assert GRPO_PRESETS["scale_rl"]["advantage"] == "group_centered_batch_normalized"
    assert make_args(preset="scale_rl").reject_uniform and not make_args(preset="scale_rl").dynamic_sampling
    assert options("kl_cov") == {"aggregation": "token", "ratio": 2e-3}
    assert make_args(preset="rloo").beta == 0.03 and make_args(preset="spo").num_generations == 1


def test_the_user_wins_over_a_preset(make_args: Args) -> None:
    args = make_args(preset="rloo", advantage="group_centered", aggregation="token", beta=0.5)
    assert (args.advantage, args.policy_loss, args.aggregation, args.beta) == (
        "group_centered",
        "vanilla",
        "token",
        0.5,
    )
    args = make_args(preset="gmpo", epsilon=0.05, policy_loss="grpo")
    assert (args.advantage, args.policy_loss, args.epsilon, args.epsilon_high) == (
        "group_normalized",
        "grpo",
        0.05,
        0.4,
    )
    args = make_args(preset="pass_at_k", advantage_kwargs='{"k": 2}')
    assert args.advantage_kwargs == {"k": 2}
    args = make_args(preset="spo", num_generations=4)
    assert (args.advantage, args.num_generations) == ("value_tracker", 4)


def test_the_user_wins_also_with_a_default(make_args: Args, tmp_path: Path) -> None:
    args = make_args(preset="dapo", overlong_shaping=False, epsilon_high=None)
    assert args.dynamic_sampling and not args.overlong_shaping and args.epsilon_high is None
    assert make_args(preset="grpo", beta=0.0).beta == 0.0
    with pytest.raises(ValueError, match="at least 2 generations|num_generations is 1"):
        make_args(preset="dapo", num_generations=1)
    # A parser names every field, so there only other values than the defaults count as set.
    words = f"--output_dir {tmp_path} --use_cpu True --bf16 False --preset dapo".split()
    (parsed,) = TrlParser((GRPOVariantConfig,)).parse_args_and_config([*words, "--overlong_shaping", "False"])  # type: ignore[arg-type]
    assert parsed.overlong_shaping and parsed.epsilon_high == 0.28
    (parsed,) = TrlParser((GRPOVariantConfig,)).parse_args_and_config([*words, "--epsilon_high", "0.3"])  # type: ignore[arg-type]
    assert parsed.epsilon_high == 0.3


def again(args: GRPOVariantConfig) -> GRPOVariantConfig:
    init = {f.name for f in dataclasses.fields(GRPOVariantConfig) if f.init}
    # The host derives one of these two from the other, and refuses both at once.
    init -= {"generation_batch_size"}
    assert json.loads(args.to_json_string()) == json.loads(json.dumps(args.to_dict()))
    return GRPOVariantConfig(**{k: v for k, v in json.loads(args.to_json_string()).items() if k in init})


@pytest.mark.parametrize("name", [None, *GRPO_PRESETS])
def test_json_round_trip(make_args: Args, name: str | None) -> None:
    args = make_args(preset=name, replay_max_age=3)
    twin = again(args)
    for f in dataclasses.fields(GRPOVariantConfig):
        if not f.name.endswith(("_dir", "_token")):  # the host hides its tokens
            assert getattr(twin, f.name) == getattr(args, f.name), f.name
    assert twin.make_policy_loss() == args.make_policy_loss()
    assert type(twin.num_generations) is int


def test_json_keeps_what_the_user_set(make_args: Args) -> None:
    args = make_args(
        preset="dapo", advantage="pass_at_k", advantage_kwargs={"k": 2}, policy_loss_kwargs={"epsilon_low": 0.1}
    )
    twin = again(args)
    assert {name: getattr(twin, name) for name in OWN} == {name: getattr(args, name) for name in OWN}
    assert twin.advantage_kwargs == {"k": 2} and twin.policy_loss_kwargs == {"epsilon_low": 0.1}


# Command line

COMMAND_LINE: dict[str, tuple[str, Any]] = {
    "preset": ("dapo", "dapo"),
    "advantage": ("pass_at_k", "pass_at_k"),
    "advantage_kwargs": ('{"k":2,"normalize":true}', {"k": 2, "normalize": True}),
    "kl_in_reward": ("False", False),
    "dynamic_sampling": ("True", True),
    "max_draws": ("3", 3),
    "reject_uniform": ("True", True),
    "overlong_shaping": ("True", True),
    "overlong_cache": ("16", 16),
    "replay_buffer_size": ("32", 32),
    "replay_max_age": ("4", 4),
    "policy_loss": ("gmpo", "gmpo"),
    "policy_loss_kwargs": ('{"epsilon_low":0.3}', {"epsilon_low": 0.3}),
    "aggregation": ("constant", "constant"),
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


def parse(words: list[str]) -> GRPOVariantConfig:
    (args,) = TrlParser((GRPOVariantConfig,)).parse_args_and_config(words)
    assert isinstance(args, GRPOVariantConfig)
    return args


def test_command_line_reaches_every_field(tmp_path: Path) -> None:
    assert set(COMMAND_LINE) == OWN
    common = f"--output_dir {tmp_path} --use_cpu True --bf16 False --report_to none".split()
    words = [word for name, (text, _) in COMMAND_LINE.items() for word in (f"--{name}", text)]
    args = parse([*common, *words])
    assert {name: getattr(args, name) for name in OWN} == {name: value for name, (_, value) in COMMAND_LINE.items()}
    one = parse([*common, "--preset", "dapo", "--advantage", "kalman", "--num_generations", "4"])
    assert (one.advantage, one.policy_loss, one.epsilon_high, one.dynamic_sampling) == ("kalman", "dapo", 0.28, True)
    for wrong in (["--preset", "ppo"], ["--advantage", "gae"], ["--policy_loss", "ppo"], ["--aggregation", "mean"]):
        with pytest.raises(SystemExit):
            parse([*common, *wrong])


def test_every_field_has_help_and_is_documented() -> None:
    inherited = {f.name for f in dataclasses.fields(GRPOConfig)}
    docs = "".join(config.__doc__ or "" for config in GRPOVariantConfig.__mro__[:-1])
    for f in dataclasses.fields(GRPOVariantConfig):
        if f.name not in inherited:
            assert f.metadata["help"], f.name
            text = f.metadata["help"]
            assert f"{f.name} (`" in docs or f"{f.name}: {text}" in docs, f.name


def test_presets_name_fields_that_exist() -> None:
    fields = {f.name for f in dataclasses.fields(GRPOVariantConfig)}
    for name, preset in GRPO_PRESETS.items():
        assert set(preset) <= fields and {"advantage", "policy_loss"} <= set(preset), name
