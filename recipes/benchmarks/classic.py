"""Compare returns and speed of the classic agents on CartPole-v1 with those of Stable-Baselines3, at equal settings.

    OMP_NUM_THREADS=1 python recipes/benchmarks/classic.py --seeds 0 1 2 3 4
    OMP_NUM_THREADS=1 python recipes/benchmarks/classic.py --speed_only --agents dqn a2c ppo trpo

The settings are those of `recipes/classic/`. The agent of Stable-Baselines3 (for TRPO, of sb3_contrib) is built from
the settings of ours, so that the two cannot differ. For every seed ours and theirs are trained one after the other in
one process and one thread, and take turns in being first. The benchmark times `Trainer.fit` and `learn`, by the clock
and by CPU time, which depends less on other work of the machine. Ratios are taken within a pair. The return is the
mean of `--episodes` episodes of the deterministic policy at the end, not of the best policy during training.

With `--json` every pair is written to the file when it is done, and pairs that the file has already are not run again.
`--plot` draws the learning curves of our agents.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from sb3_contrib import TRPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from rl_plugins.classic import Agent
from rl_plugins.classic.a2c import A2CSettings
from rl_plugins.classic.dqn import DQNSettings
from rl_plugins.classic.ppo import PPOSettings
from rl_plugins.classic.trpo import TRPOSettings
from rl_plugins.process_group import end_process_group

CONFIGS = Path(__file__).parents[1] / "classic"
ENV = "CartPole-v1"
ZOO = {"dqn": 500, "a2c": 500, "ppo": 500, "trpo": 500}
"""Returns that rl-baselines3-zoo reports for these settings and numbers of steps."""
GOALS = {"dqn": 475, "a2c": 475, "ppo": 475, "trpo": 475, "reinforce": 475, "qac": 475, "off_policy_ac": 400}
POINTS = 100  # of a learning curve
SPEED_SHARE = 5  # --speed_only takes a fifth of the steps


# Stable-Baselines3's agents, made from our settings.


def their_dqn(settings: DQNSettings, **common: Any) -> BaseAlgorithm:
    """Make DQN. It copies its target by environment steps, and ours by updates: here, both copy once per iteration."""
    assert settings.target_period == settings.gradient_steps and not settings.double_q and settings.tau is None
    return DQN(
        learning_rate=settings.learning_rate,
        buffer_size=settings.buffer_size,
        learning_starts=settings.learning_starts,
        batch_size=settings.batch_size,
        train_freq=settings.rollout_steps,
        gradient_steps=settings.gradient_steps,
        target_update_interval=settings.rollout_steps,
        exploration_fraction=settings.exploration_fraction,
        exploration_initial_eps=settings.epsilon_start,
        exploration_final_eps=settings.epsilon_end,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={"net_arch": list(settings.hidden_sizes)},
        **common,
    )


def their_a2c(settings: A2CSettings, **common: Any) -> BaseAlgorithm:
    return A2C(
        learning_rate=settings.learning_rate,
        n_steps=settings.rollout_steps,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.entropy_coef,
        vf_coef=settings.value_coef,
        max_grad_norm=settings.max_grad_norm,
        normalize_advantage=settings.normalize_advantages,
        policy_kwargs={"net_arch": list(settings.hidden_sizes)},
        **common,
    )


def their_ppo(settings: PPOSettings, **common: Any) -> BaseAlgorithm:
    return PPO(
        learning_rate=settings.learning_rate,
        n_steps=settings.rollout_steps,
        batch_size=settings.batch_size,
        n_epochs=settings.epochs,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip_range,
        ent_coef=settings.entropy_coef,
        vf_coef=settings.value_coef,
        max_grad_norm=settings.max_grad_norm,
        normalize_advantage=settings.normalize_advantages,
        policy_kwargs={"net_arch": list(settings.hidden_sizes)},
        **common,
    )


def their_trpo(settings: TRPOSettings, **common: Any) -> BaseAlgorithm:
    return TRPO(
        learning_rate=settings.learning_rate,
        n_steps=settings.rollout_steps,
        batch_size=settings.batch_size,
        gae_lambda=settings.gae_lambda,
        target_kl=settings.max_kl,
        cg_max_steps=settings.cg_steps,
        cg_damping=settings.cg_damping,
        line_search_max_iter=settings.line_search_steps,
        line_search_shrinking_factor=settings.line_search_shrink,
        n_critic_updates=settings.critic_epochs,
        normalize_advantage=settings.normalize_advantages,
        policy_kwargs={"net_arch": list(settings.hidden_sizes)},
        **common,
    )


THEIRS: dict[str, Callable[..., BaseAlgorithm]] = {
    "dqn": their_dqn,
    "a2c": their_a2c,
    "ppo": their_ppo,
    "trpo": their_trpo,
}
"""Agents of Stable-Baselines3, which has none for REINFORCE, QAC and off-policy actor-critic."""


# Training.


class Stopwatch:
    """Seconds of a block, by the clock and by CPU time of this process."""

    def __enter__(self) -> "Stopwatch":
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, cpu_seconds = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.times = {"seconds": seconds, "cpu_seconds": cpu_seconds}


class Curve(Callback):
    """Callback that records environment steps and the mean return of the last 100 episodes, now and then."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record a point, if there have been enough steps since the last one."""
        runner, last = pl_module.runner, self.points[-1][0] if self.points else 0
        if runner.returns and runner.steps - last >= pl_module.settings.total_steps / POINTS:
            self.points.append((runner.steps, round(float(np.mean(runner.returns)), 2)))


def make_ours(agent: str, seed: int, steps: int | None = None) -> Agent:
    """Make the agent of a file in `recipes/classic/`."""
    config = yaml.safe_load((CONFIGS / f"{agent}.yaml").read_text())["model"]
    config["init_args"] |= {"env": ENV, "seed": seed}
    if steps is not None:
        config["init_args"]["total_steps"] = steps
    parser = ArgumentParser()
    parser.add_subclass_arguments(Agent, "model")
    return parser.instantiate_classes(parser.parse_object({"model": config})).model


def make_theirs(agent: str, ours: Agent) -> BaseAlgorithm:
    """Make Stable-Baselines3's agent with the settings of ours."""
    envs = make_vec_env(ENV, n_envs=ours.settings.num_envs, seed=ours.seed)
    common = {"policy": "MlpPolicy", "env": envs, "gamma": ours.settings.gamma, "seed": ours.seed, "device": "cpu"}
    return THEIRS[agent](ours.settings, **common)


def train_ours(module: Agent, episodes: int) -> dict[str, Any]:
    """Train, evaluate."""
    curve = Curve()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[curve],
    )
    with Stopwatch() as watch:
        trainer.fit(module)
    result: dict[str, Any] = {"env_steps": module.runner.steps, **watch.times, "curve": curve.points}
    if episodes:
        result["return"] = float(module.evaluate(episodes).returns.mean())
    return result


def train_theirs(model: BaseAlgorithm, steps: int, episodes: int) -> dict[str, Any]:
    """Train, evaluate."""
    with Stopwatch() as watch:
        model.learn(steps)
    result: dict[str, Any] = {"env_steps": model.num_timesteps, **watch.times}
    if episodes:
        envs = make_vec_env(ENV, n_envs=1, seed=int(model.seed or 0) + 2**20)
        result["return"] = float(evaluate_policy(model, envs, n_eval_episodes=episodes, deterministic=True)[0])
    return result


def run_pair(agent: str, seed: int, steps: int | None, episodes: int) -> dict[str, Any]:
    """Run ours and theirs with one seed; the odd seeds begin with theirs."""
    ours = make_ours(agent, seed, steps)
    runs = {"ours": lambda: train_ours(ours, episodes)}
    if agent in THEIRS:
        theirs = make_theirs(agent, ours)
        runs["theirs"] = lambda: train_theirs(theirs, ours.settings.total_steps, episodes)
    order = sorted(runs, reverse=bool(seed % 2))
    return {"agent": agent, "seed": seed, "steps": ours.settings.total_steps, **{side: runs[side]() for side in order}}


# Reporting.


def speed(run: dict[str, Any], clock: str = "seconds") -> float:
    """Compute environment steps per second."""
    return float(run["env_steps"] / run[clock])


def summarise(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make one row per agent: returns of all seeds, medians of the speeds, and their ratios within each pair."""
    rows = []
    for agent in dict.fromkeys(pair["agent"] for pair in pairs):
        mine = [pair for pair in pairs if pair["agent"] == agent]
        row: dict[str, Any] = {"agent": agent, "steps": mine[0]["ours"]["env_steps"], "goal": GOALS[agent]}
        for side in ("ours", "theirs"):
            runs = [pair[side] for pair in mine if side in pair]
            row[f"{side}_returns"] = [run["return"] for run in runs if "return" in run]
            row[f"{side}_speed"] = statistics.median(map(speed, runs)) if runs else None
        both = [(pair["ours"], pair["theirs"]) for pair in mine if "theirs" in pair]
        for name, clock in {"ratio": "seconds", "cpu_ratio": "cpu_seconds"}.items():
            row[name] = [speed(ours, clock) / speed(theirs, clock) for ours, theirs in both]
        rows.append(row)
    return rows


def _returns(values: list[float], goal: float) -> str:
    if not values:
        return "-"
    reached = sum(value >= goal for value in values)
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}), {reached} of {len(values)}"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _ratios(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown."""
    lines = [
        "| agent | env steps | goal | return, ours: median (range), seeds at the goal | SB3's | zoo's "
        "| steps/s, ours | SB3's | ratio (range) | of CPU time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["agent"],
            f"{row['steps']:,}",
            str(row["goal"]),
            _returns(row["ours_returns"], row["goal"]),
            _returns(row["theirs_returns"], row["goal"]),
            str(ZOO.get(row["agent"], "-")),
            _speed(row["ours_speed"]),
            _speed(row["theirs_speed"]),
            _ratios(row["ratio"]),
            _ratios(row["cpu_ratio"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """List the goals that were missed."""
    missed = []
    for row in rows:
        returns = row["ours_returns"]
        if returns and statistics.median(returns) < row["goal"]:
            missed.append(f"{row['agent']}: median return {statistics.median(returns):.0f} below {row['goal']}")
        for name, clock in {"ratio": "by the clock", "cpu_ratio": "by CPU time"}.items():
            if row[name] and statistics.median(row[name]) < 1:
                ratio = f"{statistics.median(row[name]):.2f}"
                missed.append(f"{row['agent']}: {ratio} times as fast as Stable-Baselines3 {clock}, goal 1.0")
    return missed


def draw(pairs: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel per agent: the mean return of the last 100 episodes, thin for each seed, thick for the median."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    agents = list(dict.fromkeys(pair["agent"] for pair in pairs))
    columns = min(4, len(agents))
    rows = -(-len(agents) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2.1 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(agents) :]:
        ax.remove()
    for ax, agent in zip(axes.flat, agents, strict=False):
        curves = [np.array(pair["ours"]["curve"]) for pair in pairs if pair["agent"] == agent]
        for curve in curves:
            ax.plot(curve[:, 0], curve[:, 1], color="#56B4E9", linewidth=0.7)
        steps = np.linspace(max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves), POINTS)
        median = np.median([np.interp(steps, c[:, 0], c[:, 1]) for c in curves], axis=0)
        ax.plot(steps, median, color="#0072B2", linewidth=1.8)
        ax.set_title(agent, fontsize=9)
        ax.set_ylim(0, 510)
        ax.tick_params(labelsize=7)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        ax.grid(color="#dddddd", linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("return, last 100 episodes", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    with Image.open(path) as picture:  # two hues need no more than 32 colours: a third of the bytes
        few = picture.convert("RGB").quantize(32)
    few.save(path, optimize=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", choices=list(GOALS), default=list(GOALS), help="what to train")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="one pair of runs each")
    parser.add_argument("--steps", type=int, help="environment steps, instead of those of the settings")
    parser.add_argument("--episodes", type=int, default=100, help="episodes of the final evaluation")
    parser.add_argument("--speed_only", action="store_true", help="a fifth of the steps, and no evaluation")
    parser.add_argument("--json", type=Path, help="write all pairs to this file, go on from those in it")
    parser.add_argument("--plot", type=Path, help="draw the learning curves into this PNG")
    return parser.parse_args()


def main() -> None:
    """Train, print, draw."""
    args = parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pairs = json.loads(args.json.read_text())["pairs"] if args.json and args.json.is_file() else []
    done = {(pair["agent"], pair["seed"]) for pair in pairs}
    for seed in args.seeds:
        for agent in args.agents:
            if (agent, seed) in done:
                continue
            steps = args.steps
            if args.speed_only and steps is None:
                steps = make_ours(agent, seed).settings.total_steps // SPEED_SHARE
            pair = run_pair(agent, seed, steps, 0 if args.speed_only else args.episodes)
            pairs.append(pair)
            print(table(summarise([pair])).splitlines()[-1], flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({"pairs": pairs}))
    pairs.sort(key=lambda pair: (list(GOALS).index(pair["agent"]), pair["seed"]))
    rows = summarise(pairs)
    print(f"\n{table(rows)}\n")
    print("\n".join(verdicts(rows)) or "all goals are met")
    if args.plot:
        draw(pairs, args.plot)
    end_process_group()


if __name__ == "__main__":
    main()
