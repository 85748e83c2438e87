"""Float32 copies of the heads outside the model: slow copies to bootstrap from, and copies that a replay trains."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.functional.target_networks import periodic_update, polyak_update
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.seeding import fixed_seed
from rl_plugins.nn.sequential_heads import SequentialHeads
from rl_plugins.nn.sharding import whole_module, whole_parameters
from rl_plugins.settings import check_number


def check_polyak(**settings: Any) -> None:
    """Refuse settings with which target heads would not follow the online heads.

    Args:
        settings: Step of the moving average and steps between copies, in this order, under the names that the user
            knows.

    Raises:
        TypeError: If one is no number.
        ValueError: If the step is outside [0, 1], or 0 without a period, or the period is below 1.
    """
    (tau_name, tau), (period_name, period) = settings.items()
    check_number(tau_name, tau)
    if not 0.0 <= tau <= 1.0:
        raise ValueError(f"{tau_name} must be in [0, 1], got {tau}.")
    if period is not None:
        check_number(period_name, period)
        if period < 1:
            raise ValueError(f"{period_name} must be at least 1 step, got {period}; use None for the moving average.")
    elif tau == 0.0:
        raise ValueError(
            f"{tau_name}=0 never moves the target heads: all values would bootstrap from the first ones. Set it above "
            f"0, such as 0.05, or copy the online heads every {period_name} steps."
        )


def _float32_copy(heads: MTPHeads, part: nn.Module, keep: tuple[Any, ...] = ()) -> Any:
    """Copy a part of the heads; the copy refers to the very objects in `keep`."""
    # Leave out the handle of the trunk's hook: its copy would bring copies of all other hooks of the trunk.
    memo: dict[int, Any] = {id(heads._handles): (), id(heads.observer): None, id(heads.inputs): None}
    return copy.deepcopy(part, memo | {id(x): x for x in keep}).float().requires_grad_(False)


class ValueCopy(nn.Module):
    """A float32 copy of the heads' value path, the part that makes values.

    The trunk is not copied: the copy reads the online trunk's hidden states, or the features that online decoder
    layers make of them, so it is cheap. Keep this module outside the model: there it stays in float32, in which a
    small step is not lost to rounding, and no engine partitions it.

    Args:
        heads: Online heads with full (gathered) weights.
    """

    def __init__(self, heads: MTPHeads) -> None:
        super().__init__()
        self.heads: nn.Module = _float32_copy(heads, heads.value_path)

    def forward(self, states: Tensor) -> Tensor:
        """Compute values (B, T, K), float32, from what the online heads judge: trunk states (B, T, D) for parallel
        heads, features (B, T, K, D) for sequential ones."""
        with torch.autocast(states.device.type, enabled=False):
            return self.heads(states.float())

    def outside(self) -> AbstractContextManager[None]:
        """Prepare the copy to run outside of the model's forward."""
        return nullcontext()


class RowCopy(nn.Module):
    """A float32 copy of sequential heads as a whole, decoder layers and values, which judges rows of trunk states.

    [`ValueCopy`] reads features that the online layers make, but this copy makes its own. So its layers can learn
    from states that were kept. Embedding and rotary embedding are the model's own, and the embedding is held constant.
    The layers compute in the precision of the states that they are given, the weights stay float32.

    Args:
        heads: Online heads with full (gathered) weights.
    """

    def __init__(self, heads: SequentialHeads) -> None:
        super().__init__()
        # The heads refer to the model and do not own it, so the copy refers to the same model.
        self.heads: SequentialHeads = _float32_copy(heads, heads, keep=(heads._base,))

    def forward(
        self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Compute values (B, S, K), float32, at every position of rows.

        Args:
            hidden: States of the trunk (B, S, D).
            input_ids: The tokens there (B, S).
            attention_mask: Real tokens (B, S); `None` for all.
            positions: Positions of the tokens (B, S); `None` for their places in the row.
        """
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(hidden.device.type, dtype=hidden.dtype if half else None, enabled=half):
            features = self.heads.deepen(hidden, input_ids, attention_mask, positions)
        return self.heads(features)

    @torch.no_grad()
    def begin_afresh(self, seed: int) -> None:
        """Replace the weights of layers that have never learned, so that they learn values sooner.

        The weights of new layers usually have the size 0.02, whatever their width. In narrow models such layers do
        next to nothing at first, which delays values that are learned within some dozen rollouts. Here the weights
        have the size `1 / sqrt(inputs)`, and the layers read the embedding of a token as much as the trunk's state.

        Args:
            seed: Seed of the weights; equal on all ranks.
        """
        with fixed_seed(seed):
            for depth in self.heads:
                size = depth.eh_proj.out_features
                depth.eh_proj.weight[:, :size] += torch.eye(size).to(depth.eh_proj.weight)
                for module in depth.mtp_block.modules():
                    if isinstance(module, nn.Linear):  # drawn on the CPU, whose generator alone has this seed
                        module.weight.copy_(torch.randn(module.weight.shape) * module.in_features**-0.5)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Make the model's embedding whole, to run outside of the model's forward; a collective operation."""
        embedding = self.heads._base[0].get_input_embeddings()
        with whole_parameters(list(embedding.parameters())), whole_module(embedding):
            yield


class PolyakTarget(ValueCopy):
    """A copy of the heads' value path that follows the online heads slowly.

    `theta' <- tau theta + (1 - tau) theta'` after every optimizer step (Lillicrap et al., 1509.02971, algorithm 1), or
    a hard copy every `period` steps (Mnih et al., 2015).

    Args:
        heads: Online heads with full (gathered) weights.
        tau: Step of the moving average, above 0 and at most 1.
        period: Copy every this many steps instead of averaging.

    Raises:
        ValueError: If `tau` is out of range, or `period` is below 1.
    """

    def __init__(self, heads: MTPHeads, *, tau: float = 0.05, period: int | None = None) -> None:
        super().__init__(heads)
        check_polyak(tau=tau, period=period)
        self.tau, self.period = tau, period

    @torch.no_grad()
    def forward(self, states: Tensor) -> Tensor:
        """Compute values without gradient; see [`ValueCopy.forward`]."""
        return super().forward(states)

    def update(self, online: Iterable[Tensor], *, step: int) -> None:
        """Move towards the online weights after optimizer step number `step`.

        Args:
            online: Full parameters of the online heads' value path, in the order of `value_path.parameters()`.
            step: Number of optimizer steps done; only `period` needs it.
        """
        if self.period is None:
            polyak_update(self.heads.parameters(), online, tau=self.tau)
        else:
            periodic_update(self.heads.parameters(), online, step=step, period=self.period)

    @torch.no_grad()
    def distance(self, online: Iterable[Tensor]) -> Tensor:
        """Compute the root mean square gap between target and online weights, a 0-d tensor."""
        gaps = [(t - o.float()).square() for t, o in zip(self.heads.parameters(), online, strict=True)]
        return (torch.stack([gap.sum() for gap in gaps]).sum() / sum(gap.numel() for gap in gaps)).sqrt()
