"""Time our pooled balance loss against transformers' `load_balancing_loss_func`, at 24 layers of 8192 tokens.

    OMP_NUM_THREADS=1 python recipes/benchmarks/routing_speed.py

Both get the same logits. Ours counts the experts that the routers have chosen, which a forward pass returns anyway,
and calls `switch_balance_loss` for each layer with the mean load of all layers; transformers' chooses the experts
again. The two take turns within each repetition. The benchmark prints the median milliseconds of each, forward and
forward with backward, and the ratio within a repetition, as the median over repetitions. Values and gradients are
compared before anything is timed.

Goal: our forward pass is at least 5 times as fast, with and without a mask.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rl_plugins.functional import expert_counts, load_fractions, switch_balance_loss

GOAL = 5.0
Loss = Callable[[tuple[Tensor, ...]], Tensor]


def make_routers(
    layers: int, tokens: int, experts: int, k: int, device: str
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Make logits of every layer, and the experts that a softmax router chooses by them."""
    g = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(tokens, experts, generator=g).to(device).requires_grad_() for _ in range(layers))
    return logits, [x.detach().topk(k, dim=-1).indices for x in logits]


def gradient(loss: Loss, logits: tuple[Tensor, ...]) -> Tensor:
    """Compute the gradient with respect to the logits of all layers."""
    return torch.stack(torch.autograd.grad(loss(logits), logits))


def seconds(loss: Loss, logits: tuple[Tensor, ...], backward: bool) -> float:
    """Time one forward pass as in training, alone or with its backward pass."""
    on_gpu = logits[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = loss(logits)
    if backward:
        torch.autograd.grad(value, logits)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours: Loss, theirs: Loss, logits: tuple[Tensor, ...], repeats: int) -> dict[str, float]:
    """Compute relative differences of value and gradient, median milliseconds and ratios."""
    value, slope = theirs(logits), gradient(theirs, logits)
    figures = {
        "value_difference": ((ours(logits) - value).abs() / value).item(),
        "gradient_difference": ((gradient(ours, logits) - slope).abs().max() / slope.abs().max()).item(),
    }
    for name, backward in {"forward": False, "both": True}.items():
        times: list[tuple[float, float]] = []
        for repeat in range(repeats + 1):
            pair = seconds(ours, logits, backward), seconds(theirs, logits, backward)
            if repeat:  # the first round warms up
                times.append(pair)
        figures[f"{name}_ms"] = 1e3 * statistics.median(mine for mine, _ in times)
        figures[f"{name}_transformers_ms"] = 1e3 * statistics.median(other for _, other in times)
        figures[f"{name}_ratio"] = statistics.median(other / mine for mine, other in times)
    return figures


def measure(
    layers: int = 24, tokens: int = 8192, experts: int = 64, k: int = 8, repeats: int = 15, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Compare without a mask, and with one that hides a fifth of the tokens."""
    logits, indices = make_routers(layers, tokens, experts, k, device)
    padded = torch.rand(tokens, generator=torch.Generator().manual_seed(1)).to(device) > 0.2
    report = {}
    for name, mask in {"no mask": None, "mask": padded}.items():
        attention_mask = None if mask is None else mask.long()[None]

        def ours(logits: tuple[Tensor, ...], mask: Tensor | None = mask) -> Tensor:
            shares = torch.stack([load_fractions(expert_counts(i, experts, mask), k) for i in indices]).mean(0)
            return torch.stack([switch_balance_loss(x, shares, mask) for x in logits]).mean()

        def theirs(logits: tuple[Tensor, ...], mask: Tensor | None = attention_mask) -> Tensor:
            value = load_balancing_loss_func(logits, experts, k, mask)
            assert isinstance(value, Tensor)
            return value

        report[name] = compare(ours, theirs, logits, repeats)
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="MoE layers")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a batch")
    parser.add_argument("--experts", type=int, default=64, help="experts of a layer")
    parser.add_argument("--k", type=int, default=8, help="experts per token")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    sizes = (args.layers, args.tokens, args.experts)
    report = measure(*sizes, args.k, args.repeats, args.device)
    print(f"{sizes}, top-{args.k}, {args.device}, {torch.get_num_threads()} threads; ours, transformers', ratio")
    for name, figures in report.items():
        for part, label in {"forward": "forward", "both": "and backward"}.items():
            ours, theirs = figures[f"{part}_ms"], figures[f"{part}_transformers_ms"]
            print(f"{name:8}{label:13}{ours:8.2f} ms{theirs:8.2f} ms{figures[f'{part}_ratio']:7.2f}")
        value, slope = figures["value_difference"], figures["gradient_difference"]
        print(f"{name:8}differs by {value:.1e}, the gradient by {slope:.1e} of its largest entry")
    worst = min(figures["forward_ratio"] for figures in report.values())
    print(f"lowest forward ratio: {worst:.2f}, goal {GOAL:.0f}: {'met' if worst >= GOAL else 'missed'}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
