"""Compare policy gradients with the exact one: a learned critic beside other methods (with `symbols.py`).

    OMP_NUM_THREADS=1 python recipes/benchmarks/gradient_quality.py --output_dir outputs/gradient_quality

32 prompts of mixed difficulty ask for strings of six tokens over four symbols. The policy is a small Qwen3, which
`MTPCriticTrainer` trains from random weights, with a sequential head and a replay of its values. After 50, 100 and 200
updates the gradients are measured for the policy at that time. All its strings are enumerated
(`rl_plugins.tabular.TokenMDP`), so that values and the gradient of the expected reward are exact. 20 batches of 256
completions, eight of each prompt, are drawn. Every method computes its gradient from the same completions. There are
two kinds of reward:

    at the end   1 if the prompt's one to four key tokens are right, else 0
    every step   a share of 1 for each right key token, paid at once

Methods: GRPO, RLOO, REINFORCE++ and SPO (whose tracker has seen every rollout of the run), PPO's value model (a
network of its own that has learned from every rollout of the run), the critic with its learned values, and, as the
upper limit, exact values of the prompt alone and of every token.

    SNR      length of the mean gradient along the exact one, divided by the root mean square of the rest: the parts in
             other directions, and the variation along the exact gradient. Bias counts as noise.
    cosine   of one batch's gradient to the exact gradient, mean over the batches
    bias     1 - cosine of the mean of all batches' gradients to the exact gradient; an upper bound, since some noise
             is left in 20 batches

The benchmark writes `gradient_quality.json` and `gradient_quality.png`, and prints a table.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from symbols import CRITIC, SYMBOLS, small_policy, symbol_tokenizer
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from rl_plugins.functional.alignment import completion_states
from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.nn import ValueModel
from rl_plugins.nn.target_heads import RowCopy
from rl_plugins.process_group import end_process_group
from rl_plugins.report.curves import COLORS, LINE_STYLES, new_figure, save_png, style_axes
from rl_plugins.signals import OnlineValueOptions, PPOValueOptions, advantages_of, critic_targets, scale_advantages
from rl_plugins.signals.value_tracker import TrackedAdvantages
from rl_plugins.tabular import TokenMDP
from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer

LENGTH, PROMPTS, PROMPT_LENGTH = 6, 32, 3
GROUP = 8
KEY_PLACES = (0, 2, 3, 5)
MOMENTS = (50, 100, 200)
REWARDS = {"at the end": False, "every step": True}
EXACT_LAMBDAS = (1.0, 0.95, 0.5, 0.0)
# The task


class Task:
    """Strings that each prompt asks for, and their rewards.

    Args:
        every_step: Whether each right key token is paid at once, instead of all of them at the end.
    """

    def __init__(self, every_step: bool = False) -> None:
        self.every_step = every_step
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.cartesian_prod(*[torch.arange(SYMBOLS)] * PROMPT_LENGTH)
        self.prompts = self.prompts[torch.randperm(len(self.prompts), generator=generator)[:PROMPTS]]
        self.goals = torch.randint(SYMBOLS, (PROMPTS, LENGTH), generator=generator)
        self.num_keys = torch.arange(PROMPTS) % len(KEY_PLACES) + 1

    def step_rewards(self, prompt: int, strings: Tensor) -> Tensor:
        """Compute the rewards (N, d) after each token of strings (N, d) that answer a prompt."""
        paid = torch.zeros(strings.shape, dtype=torch.float64)
        count = int(self.num_keys[prompt])
        for place in KEY_PLACES[:count]:
            if place < strings.shape[1]:
                paid[:, place] = (strings[:, place] == self.goals[prompt, place]).double() / count
        return paid

    def total(self, prompt: int, strings: Tensor) -> Tensor:
        """Add up the rewards of finished strings (N, T) -> (N,)."""
        shares = self.step_rewards(prompt, strings).sum(1)
        return shares if self.every_step else (shares > 1 - 1e-9).double()

    def language(self, prompt: int, policy: Callable[[Tensor], Tensor]) -> TokenMDP:
        """Make the decision process of all strings with which a policy may answer a prompt."""

        def last(strings: Tensor) -> Tensor:
            if self.every_step:
                return self.step_rewards(prompt, strings)[:, -1]
            return self.total(prompt, strings)

        sizes = {"vocab_size": SYMBOLS, "max_length": LENGTH}
        step_reward = (lambda s: self.step_rewards(prompt, s)[:, -1]) if self.every_step else None
        return TokenMDP(policy, last, step_reward=step_reward, **sizes)

    def spelled(self) -> list[str]:
        """Return the prompts as text."""
        return ["".join(map(str, prompt)) for prompt in self.prompts.tolist()]

    def reward(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
        """Compute rewards; the trainers take this method as their reward function."""
        rows, numbers = [], {text: i for i, text in enumerate(self.spelled())}
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            string = torch.tensor([ids])
            steps = self.step_rewards(numbers[prompt], string)[0].tolist()
            rows.append(steps if self.every_step else float(self.total(numbers[prompt], string)))
        return rows


# Exact values and the exact gradient


class Exact:
    """All strings of a policy, with their values.

    Tables are (prompts, 4^d) for the states of depth d, or (prompts, 4^d, 4) for the actions in them.

    Args:
        model: The policy.
        task: The task.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task = model, task
        with torch.no_grad():
            languages = [task.language(i, self._policy(prompt)) for i, prompt in enumerate(task.prompts)]
        self.probabilities = [
            torch.stack(tables) for tables in zip(*(x.probabilities for x in languages), strict=True)
        ]
        self.action_values = [
            torch.stack(tables) for tables in zip(*(x.action_values for x in languages), strict=True)
        ]
        self.values = [torch.stack(tables) for tables in zip(*(x.values for x in languages), strict=True)][:LENGTH]
        self.rewards = [torch.stack(tables) for tables in zip(*(x.rewards for x in languages), strict=True)]
        # Every state of every depth is a prefix of one of these strings. In the first of them 0s follow the prefix.
        self.strings = torch.cartesian_prod(*[torch.arange(SYMBOLS)] * (LENGTH - 1))

    def _policy(self, prompt: Tensor) -> Callable[[Tensor], Tensor]:
        def policy(prefixes: Tensor) -> Tensor:
            ids = torch.cat([prompt.expand(len(prefixes), -1), prefixes], dim=1)
            return self.model(input_ids=ids, use_cache=False).logits[:, -1].double().softmax(-1)

        return policy

    @property
    def score(self) -> float:
        """Expected reward, mean over the prompts."""
        return float(self.values[0].mean())

    def gradient(self) -> Tensor:
        """Compute the gradient of the expected reward, flat: `E_s[sum_a pi(a|s) Q(s, a) grad ln pi(a|s)]`, summed over
        the states of a string (Sutton et al., 1999)."""
        reached = torch.ones(PROMPTS, 1, dtype=torch.float64)
        weights = []
        for depth in range(LENGTH):
            chosen = reached[..., None] * self.probabilities[depth]
            weights.append(chosen * (self.action_values[depth] - self.values[depth][..., None]))
            reached = chosen.flatten(1)
        total = torch.zeros(len(flat_parameters(self.model)), dtype=torch.float64)
        for i, prompt in enumerate(self.task.prompts):
            ids = torch.cat([prompt.expand(len(self.strings), -1), self.strings], dim=1)
            logits = self.model(input_ids=ids, use_cache=False).logits[:, PROMPT_LENGTH - 1 :]
            terms = [
                (weights[depth][i] * logits[:: SYMBOLS ** (LENGTH - 1 - depth), depth].double().log_softmax(-1)).sum()
                for depth in range(LENGTH)
            ]
            total += flat_gradient(torch.stack(terms).sum(), self.model)
        return total / PROMPTS

    @torch.no_grad()
    def tables_of(self, values: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Compute learned values of all states, as tables.

        Args:
            values: Returns values (N, LENGTH) of the states of rows of token ids (N, PROMPT_LENGTH + LENGTH - 1).
        """
        tables: list[list[Tensor]] = [[] for _ in range(LENGTH)]
        for prompt in self.task.prompts:
            found = values(torch.cat([prompt.expand(len(self.strings), -1), self.strings], dim=1)).double()
            for depth in range(LENGTH):
                tables[depth].append(found[:: SYMBOLS ** (LENGTH - 1 - depth), depth])
        return [torch.stack(rows) for rows in tables]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Draw `GROUP` strings for every prompt.

        Returns:
            Strings (N, T), rewards of their tokens (N, T), and the rows of their states in the tables, T of (N,).
        """
        prompt = torch.arange(PROMPTS).repeat_interleave(GROUP)
        row = torch.zeros(len(prompt), dtype=torch.long)
        tokens, rewards, rows = [], [], []
        for depth in range(LENGTH):
            rows.append(row)
            action = torch.multinomial(self.probabilities[depth][prompt, row], 1, generator=generator).squeeze(1)
            rewards.append(self.rewards[depth][prompt, row, action])
            tokens.append(action)
            row = row * SYMBOLS + action
        return torch.stack(tokens, 1), torch.stack(rewards, 1).float(), rows


def look_up(tables: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Look up the values (N, T) of drawn strings."""
    prompt = torch.arange(PROMPTS).repeat_interleave(GROUP)
    return torch.stack([table[prompt, row] for table, row in zip(tables, rows, strict=True)], dim=1).float()


def policy_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the policy's own parameters, without those of the heads inside it."""
    return [p for name, p in model.named_parameters() if "mtp_heads" not in name]


def flat_parameters(model: nn.Module) -> Tensor:
    """Join the policy's own weights in one vector."""
    return torch.cat([p.detach().flatten() for p in policy_parameters(model)])


def flat_gradient(total: Tensor, model: nn.Module, keep: bool = False) -> Tensor:
    """Compute the gradient with respect to the policy's own weights, as one vector in float64."""
    found = torch.autograd.grad(total, policy_parameters(model), retain_graph=keep, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(policy_parameters(model), found, strict=True)]
    return torch.cat([g.double().flatten() for g in whole])


# Methods: advantages (N,) or (N, T) of one batch of completions


def advantages_by_method(
    task: Task,
    rewards: Tensor,
    rows: list[Tensor],
    tables: dict[str, list[Tensor]],
    tracked: TrackedAdvantages,
    keys: list[str],
) -> dict[str, Tensor]:
    """Make the advantages of every method from one batch of completions.

    Args:
        task: The task.
        rewards: Rewards of the tokens (N, T).
        rows: Rows of the states in the tables.
        tables: Values by name: `exact`, `critic` and `ppo`.
        tracked: SPO's tracker.
        keys: Prompt of every completion, as the tracker knows it.
    """
    mask, scores = torch.ones(rewards.shape, dtype=torch.bool), rewards.sum(1)
    found = {
        "GRPO": advantages_of("group_normalized", scores, GROUP, mask, options={}),
        "RLOO": advantages_of("leave_one_out", scores, GROUP, mask, options={}),
        "REINFORCE++": advantages_of("batch_normalized", scores, 1, mask, options={}),
        "SPO": tracked.advantages(keys, scores)[0],
    }

    def of_values(name: str, options: OnlineValueOptions, **changes: Any) -> Tensor:
        values = look_up(tables[name], rows)
        given = {"lam_policy": options.lam_policy, "lam_value": options.lam_value, **changes}
        targets = critic_targets(rewards, values[..., None], values[..., None], mask, **given)
        return scale_advantages(targets.advantages, values, mask, scaling=options.advantage_scaling)

    found["PPO's value model"] = of_values("ppo", PPOValueOptions())
    found["critic"] = of_values("critic", OnlineValueOptions())
    for lam in EXACT_LAMBDAS:
        found[f"critic, lambda {lam:g}"] = of_values("critic", OnlineValueOptions(), lam_policy=lam)
    baseline = look_up(tables["exact"], rows)[:, :1]
    found["exact V(s_0)"] = scale_advantages((scores[:, None] - baseline).expand_as(rewards), baseline, mask)
    for lam in EXACT_LAMBDAS:
        found[f"exact values, lambda {lam:g}"] = of_values("exact", OnlineValueOptions(), lam_policy=lam)
    return found


# Measuring


def explained(tables: list[Tensor], exact: Exact) -> float:
    """Compute `1 - MSE / Var` of learned values against exact ones, over the states that the policy visits."""
    reached, errors, squares, means, total = torch.ones(PROMPTS, 1, dtype=torch.float64), 0.0, 0.0, 0.0, 0.0
    for depth in range(LENGTH):
        errors += float((reached * (tables[depth] - exact.values[depth]) ** 2).sum())
        squares += float((reached * exact.values[depth] ** 2).sum())
        means += float((reached * exact.values[depth]).sum())
        total += float(reached.sum())
        reached = (reached[..., None] * exact.probabilities[depth]).flatten(1)
    return 1.0 - errors / (squares - means**2 / total)


def measure(
    model: nn.Module,
    task: Task,
    learned: dict[str, Callable[[Tensor], Tensor]],
    tracked: TrackedAdvantages,
    batches: int,
) -> dict[str, Any]:
    """Compare the gradients of all methods for the present policy.

    Args:
        model: The policy.
        task: The task.
        learned: Values by name, see [`Exact.tables_of`].
        tracked: SPO's tracker.
        batches: Number of batches to draw.
    """
    exact = Exact(model, task)
    goal = exact.gradient()
    tables = {"exact": exact.values, **{name: exact.tables_of(values) for name, values in learned.items()}}
    keys = [key for key in tracked_keys(task) for _ in range(GROUP)]
    prompts = task.prompts.repeat_interleave(GROUP, dim=0)
    generator, gradients = torch.Generator().manual_seed(0), {}
    for _ in range(batches):
        tokens, rewards, rows = exact.draw(generator)
        logits = model(input_ids=torch.cat([prompts, tokens[:, :-1]], dim=1), use_cache=False).logits
        chosen = logits[:, PROMPT_LENGTH - 1 :].log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        for method, advantages in advantages_by_method(task, rewards, rows, tables, tracked, keys).items():
            per_token = advantages if advantages.ndim == 2 else advantages[:, None]
            gradients.setdefault(method, []).append(flat_gradient((per_token * chosen).mean(), model, keep=True))
    quality = {method: compare(torch.stack(found), goal) for method, found in gradients.items()}
    return {
        "score": exact.score,
        "explained_variance": {name: explained(tables[name], exact) for name in learned},
        "methods": quality,
    }


def compare(gradients: Tensor, goal: Tensor) -> dict[str, float]:
    """Compute SNR, cosine and bias of the gradients (N, P) of N batches against the exact one (P,)."""
    unit = goal / goal.norm()
    along = gradients @ unit
    rest = gradients - along.mean() * unit
    cosines = along / gradients.norm(dim=1).clamp(min=1e-12)
    mean = gradients.mean(0)
    return {
        "snr": float(along.mean() / rest.square().sum(1).mean().sqrt().clamp(min=1e-12)),
        "cosine": float(cosines.mean()),
        "bias": 1.0 - float(mean @ unit / mean.norm().clamp(min=1e-12)),
    }


def tracked_keys(task: Task) -> list[str]:
    """Return the prompts as the tracker knows them."""
    return task.spelled()


# Training


class Observer(TrainerCallback):
    """Callback that lets the other methods learn from every rollout of the run, and measures after some updates.

    Args:
        task: The task.
        options: Options of the command line.
    """

    def __init__(self, task: Task, options: argparse.Namespace) -> None:
        self.task, self.options = task, options
        self.tracked = TrackedAdvantages({"forget": 0.9})
        self.found: dict[int, dict[str, Any]] = {}

    def begin(self, trainer: MTPCriticTrainer) -> None:
        """Make PPO's value model, which begins as a copy of the policy."""
        self.trainer = trainer
        config = PPOValueOptions()
        self.value_model = ValueModel.prepare(None, trainer.model)
        self.optimizer = torch.optim.AdamW(self.value_model.parameters(), lr=self.options.value_learning_rate)
        self.clip = config.value_clip_range

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn from the rollout, and measure after the chosen updates."""
        batch = self.trainer.last_rollout
        texts = self.trainer.processing_class.batch_decode(batch["prompt_ids"])
        keys = [text.replace(" ", "") for text in texts]
        self.tracked.remember(keys, batch["scores"], None)
        self.tracked.absorb(lambda rows: torch.zeros(0))
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        targets = batch["rewards"].flip(1).cumsum(1).flip(1)
        for _ in range(self.options.value_updates):
            values = completion_states(self.value_model(ids), LENGTH)
            loss = (values - targets).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if state.global_step in self.options.moments:
            began = time.time()
            learned = {"critic": self._critic, "ppo": self._value_model}
            model = self.trainer.model.eval()
            self.found[state.global_step] = measure(model, self.task, learned, self.tracked, self.options.batches)
            model.train()
            print(f"{state.global_step} updates, measured in {time.time() - began:.0f} s", file=sys.stderr)

    def _critic(self, ids: Tensor) -> Tensor:
        critic: Any = self.trainer.critic
        found: list[Tensor] = []

        def observe(hidden: Tensor) -> None:
            if isinstance(critic.target, RowCopy):
                found.append(critic.target(hidden, ids, None, None))
            else:
                found.append(critic.target(critic.module.states(hidden)))

        with critic.module.watching(observe):
            self.trainer.model(input_ids=ids, use_cache=False)
        return found[0][:, PROMPT_LENGTH - 1 :, 0]

    def _value_model(self, ids: Tensor) -> Tensor:
        return self.value_model(ids)[:, PROMPT_LENGTH - 1 :]


def run(task: Task, seed: int, options: argparse.Namespace, name: str) -> dict[int, dict[str, Any]]:
    """Train a policy from random weights, and measure during training."""
    torch.set_num_threads(1)
    set_seed(seed)
    observer = Observer(task, options)
    args = MTPCriticConfig(
        output_dir=str(options.output_dir / name),
        per_device_train_batch_size=PROMPTS * GROUP,
        steps_per_generation=1,
        max_completion_length=LENGTH,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=max(options.moments),
        logging_steps=50,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        seed=seed,
        **{**CRITIC, **options.critic},
    )
    trainer = MTPCriticTrainer(
        small_policy(),
        task.reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": task.spelled() * GROUP}),
        processing_class=symbol_tokenizer(),
        callbacks=[observer],
    )
    trainer.remove_callback(PrinterCallback)
    observer.begin(trainer)
    trainer.train()
    end_process_group()
    return observer.found


# The report


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Format a table in Markdown: SNR of every method at every moment, also in units of GRPO's, means over seeds."""
    lines = []
    for name, moments in found.items():
        steps = [*moments]
        lines += ["", f"Reward {name}. SNR of one batch, and in brackets in units of GRPO's:", ""]
        lines.append("| method | " + " | ".join(f"{step} updates" for step in steps) + " | cosine | bias |")
        lines.append("|---|" + "---|" * (len(steps) + 2))
        for method in moments[steps[0]][0]["methods"]:
            cells = []
            for step in steps:
                own = mean_of(moments[step], method, "snr")
                cells.append(f"{own:.2f} ({own / mean_of(moments[step], 'GRPO', 'snr'):.1f})")
            last = [f"{mean_of(moments[steps[-1]], method, key):.2f}" for key in ("cosine", "bias")]
            lines.append(f"| {method} | " + " | ".join([*cells, *last]) + " |")
        for key, title in (("critic", "critic"), ("ppo", "PPO's value model")):
            cells = [f"{statistics.fmean(x['explained_variance'][key] for x in moments[step]):.2f}" for step in steps]
            lines.append(f"| explained variance, {title} | " + " | ".join(cells) + " | | |")
        scores = [f"{statistics.fmean(x['score'] for x in moments[step]):.2f}" for step in steps]
        lines.append("| expected reward of the policy | " + " | ".join(scores) + " | | |")
    return lines


def mean_of(runs: list[dict[str, Any]], method: str, key: str) -> float:
    """Average a figure of a method over the seeds."""
    return statistics.fmean(run["methods"][method][key] for run in runs)


SHOWN = ("GRPO", "RLOO", "REINFORCE++", "SPO", "PPO's value model", "critic", "exact V(s_0)", "exact values, lambda 1")


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the SNR over updates, with a panel for each kind of reward."""
    figure = new_figure(10, 4.2)
    for number, (name, moments) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), number + 1)
        for index, method in enumerate(SHOWN):
            heights = [mean_of(runs, method, "snr") for runs in moments.values()]
            color, style = COLORS[index % len(COLORS)], LINE_STYLES[index % len(LINE_STYLES)]
            axes.plot([*moments], heights, style, color=color, label=method, linewidth=2)
        axes.set(xlabel="updates of policy and critic", ylabel="signal-to-noise of a batch's gradient")
        axes.set_title(f"reward {name}", fontsize=11)
        axes.set_ylim(bottom=0)
        style_axes(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_png(figure, path)


def main() -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gradient_quality"), help="where to write")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="a run for each")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--moments", nargs="+", type=int, default=[*MOMENTS], help="updates after which to measure")
    parser.add_argument("--batches", type=int, default=20, help="batches of 256 completions for each moment")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the policy")
    parser.add_argument("--value_learning_rate", type=float, default=1e-3, help="of PPO's value model")
    parser.add_argument("--value_updates", type=int, default=4, help="of PPO's value model on each rollout")
    parser.add_argument("--critic", type=json.loads, default={}, help="further options of the critic, as JSON")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    ignore_known_warnings()
    jobs = [(name, every_step, seed) for name, every_step in REWARDS.items() for seed in options.seeds]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        runs = [pool.submit(run, Task(every_step), seed, options, f"{name} {seed}") for name, every_step, seed in jobs]
    found: dict[str, dict[str, Any]] = {
        name: {
            step: [run.result()[step] for job, run in zip(jobs, runs, strict=True) if job[0] == name]
            for step in options.moments
        }
        for name in REWARDS
    }
    (options.output_dir / "gradient_quality.json").write_text(json.dumps(found, indent=1))
    print("\n".join(table(found)))
    draw(found, options.output_dir / "gradient_quality.png")


if __name__ == "__main__":
    main()
