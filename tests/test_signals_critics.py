"""The critic inside the policy: the clamp of its gradient keeps its units whatever a host does to the loss."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.rollouts.batch import Batch
from rl_plugins.signals import HeadCritic, ValueHeadOptions, ValueOptions

from .helpers.lightning_runs import perturb

ALONE = SimpleNamespace(device=torch.device("cpu"), sum_over_ranks=lambda x: x)


def trunk_gradient(
    make_model: Callable[..., Any], factor: float, clip: float | None
) -> tuple[Tensor, tuple[float, float, float]]:
    """Gradient of the embeddings of a loss times `factor`, over that factor, and what the clamp counted."""
    model = make_model(initializer_range=0.2, tie_word_embeddings=False)
    critic = HeadCritic(
        ValueHeadOptions(num_mtp_heads=2, value_grad_clip=clip, mtp_loss_coef=0.0), ValueOptions(value_loss_coef=0.5)
    )
    critic.attach(model)
    perturb(critic.training.heads)  # fresh heads give values of 0, which send no gradient on
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3]])
    ones, returns = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1.0, 0.2, 30.0, 0.0], [0.0, 0.5, -2.0, 0.1]])
    batch: Batch = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_ids": ids[:, 2:],
        "completion_mask": ones,
        "critic_mask": ones,
        "returns": returns,
        "old_values": torch.zeros(2, 4, 2),
    }
    num_items = torch.tensor(8.0)
    with critic.learning(batch, num_items, alone=False) as run:
        model(input_ids=ids, logits_to_keep=5)
    loss, _ = critic.loss(run, batch, num_items, ALONE)
    (factor * loss).backward()
    norms, clamped, tokens = critic.gradient_totals(ALONE).tolist()
    return model.get_input_embeddings().weight.grad / factor, (norms, clamped, tokens)


@pytest.mark.parametrize("factor", [0.25, 65536.0], ids=["one of four micro-batches", "scaled for float16"])
def test_the_clamp_keeps_its_units_when_the_loss_is_scaled(tiny_model: Callable[..., Any], factor: float) -> None:
    """A limit that ignored the factor would clamp nothing at 0.25 and nearly all at 65536."""
    plain, seen = trunk_gradient(tiny_model, 1.0, 1.0)
    scaled, seen_scaled = trunk_gradient(tiny_model, factor, 1.0)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-9)
    assert seen_scaled == pytest.approx(seen, rel=1e-5) and 0 < seen[1] < seen[2] == 8
    unclamped, _ = trunk_gradient(tiny_model, 1.0, None)
    assert (unclamped - plain).abs().max() > 0.1 * unclamped.abs().max()
