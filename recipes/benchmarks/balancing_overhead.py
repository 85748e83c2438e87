"""Measure the cost of balancing: training steps of one MoE model with and without it, in turns.

    python recipes/benchmarks/balancing_overhead.py --json outputs/balancing_overhead.json

Two copies of a randomly initialised model with the same weights take the same batches: forward, backward, AdamW. They
take turns (A B B A ...), so that other work of the machine slows both. `loss_free` counts the load and moves the
bias; `aux` adds the gradient of the auxiliary loss.

    step    median time of a step over that of the plain copy
    inside  share of a step that is spent in the balancer's own code (its hooks and `update`). It is timed directly,
            because the times of steps differ from each other by more than this share

Goal: counting and update take at most 2 % of a step.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rl_plugins.moe import BalancingConfig, RouterBalancer

GOAL = 0.02
SETTINGS = {
    "loss_free": BalancingConfig(rate=1e-3),
    "aux": BalancingConfig(rate=0.0, aux_loss_coef=0.01),
}


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    config = AutoConfig.for_model(
        args.family,
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size,
        moe_intermediate_size=args.hidden_size // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 64,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=args.length,
    )
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        if hasattr(config, name):
            setattr(config, name, args.experts)
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(args.device).train()


class Clock:
    """Clock that adds up the seconds of the functions that it wraps."""

    def __init__(self, device: str) -> None:
        self.seconds, self.device = 0.0, device

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - start

        return timed


def put_clock_into(balancer: RouterBalancer, clock: Clock) -> None:
    """Time every hook of the balancer, and its update."""
    for handle in balancer._handles:
        hooks = handle.hooks_dict_ref()
        hooks[handle.id] = clock.around(hooks[handle.id])
    balancer.losses._add_gradient = clock.around(balancer.losses._add_gradient)
    balancer.update = clock.around(balancer.update)


class Run:
    """One copy of the model with its optimizer."""

    def __init__(self, args: argparse.Namespace, config: BalancingConfig | None) -> None:
        self.model = make_model(args)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.clock = Clock(args.device)
        self.balancer = None if config is None else RouterBalancer(self.model, config)
        if self.balancer is not None:
            put_clock_into(self.balancer, self.clock)
        self.steps: list[float] = []
        self.inside: list[float] = []

    def step(self, ids: torch.Tensor) -> None:
        start, self.clock.seconds = self.clock.now(), 0.0
        self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.balancer is not None:
            self.balancer.update()
        self.steps.append(self.clock.now() - start)
        self.inside.append(self.clock.seconds)


def measure(args: argparse.Namespace, config: BalancingConfig) -> dict[str, float]:
    """Alternate plain and balanced steps; the first of each is not counted."""
    plain, balanced = Run(args, None), Run(args, config)
    generator = torch.Generator().manual_seed(1)
    for i in range(args.steps + 1):
        ids = torch.randint(args.vocab_size, (args.batch_size, args.length), generator=generator).to(args.device)
        for run in (plain, balanced) if i % 2 else (balanced, plain):
            run.step(ids)
    step = statistics.median(balanced.steps[1:])
    return {
        "plain_s": statistics.median(plain.steps[1:]),
        "balanced_s": step,
        "step": step / statistics.median(plain.steps[1:]),
        "inside": statistics.median(balanced.inside[1:]) / step,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["qwen3_moe", "deepseek_v3"], help="transformers model types")
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=6, help="depth of the model")
    parser.add_argument("--experts", type=int, default=64, help="experts per layer")
    parser.add_argument("--top-k", type=int, default=8, help="experts per token")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens of the model")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=8, help="counted steps per copy")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    print(
        f"{args.layers} layers x {args.batch_size * args.length} tokens x {args.experts} experts, top {args.top_k}, "
        f"width {args.hidden_size}, {args.device}\n\n{'':24}{'plain':>10}{'balanced':>10}{'step':>8}{'inside':>9}"
    )
    for family in args.families:
        args.family = family
        for name, config in SETTINGS.items():
            figures = results[f"{family} {name}"] = measure(args, config)
            print(
                f"{family + ' ' + name:24}{figures['plain_s']:9.3f}s{figures['balanced_s']:9.3f}s"
                f"{figures['step']:8.3f}{figures['inside']:9.2%}"
            )
    print(f"\ngoal: inside at most {GOAL:.0%} for loss_free")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": {**vars(args), "json": str(args.json)}, "results": results}))


if __name__ == "__main__":
    main()
