"""Auxiliary losses of the routers: their gradient is added to that of the logits in the backward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from rl_plugins.functional.masking import Reduce
from rl_plugins.functional.routing import (
    Scoring,
    load_fractions,
    router_z_loss,
    sequence_balance_loss,
    switch_balance_loss,
)
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.routers import Router


@dataclass
class RoutingCounts:
    """Tokens per expert of one training forward, kept until its gradient has passed every router.

    Args:
        mask: Real tokens (B, S), or `None` where all are real.
        shape: (B, S).
        counts: Tokens per expert (E,), by router.
        targets: Biases (E,) that the quantile rule moves to, times the number of tokens, by router.
        fractions: Load f (E,) that the auxiliary loss refers to, by router; filled once the forward is over.
        waiting: Routers whose logits do not carry the loss's gradient yet, with the experts that they chose (N, k).
            Under reentrant checkpointing these are all routers, until their layers run again.
    """

    mask: Tensor | None
    shape: tuple[int, int]
    counts: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    fractions: dict[int, Tensor] = field(default_factory=dict)
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)

    def token_mask(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """Return the mask of a router's tokens (N,); `None` where it sees other tokens than the trunk (images)."""
        if self.mask is None or self.mask.numel() != num_tokens:
            return None
        return self.mask.reshape(-1).to(device)

    def rows(self, num_tokens: int) -> tuple[int, int]:
        """Return the shape of a router's N tokens: (B, S), or (1, N) where it sees other tokens than the trunk."""
        return self.shape if num_tokens == self.shape[0] * self.shape[1] else (1, num_tokens)


class RouterLosses:
    """Gradients of the load-balancing loss and the z-loss, each averaged over layers.

    Both are sums over layers. The term of a layer depends on this layer's logits alone (the load f is a constant), so
    a hook on the logits can add its gradient in the backward pass. The model need not return a loss. Checkpointing
    works, too: where a layer runs again, the logits of the second run carry the hook.

    Args:
        config: Coefficients.
        routers: The routers; their places in this list are their numbers.
        reduce: Sums a tensor over ranks.

    Raises:
        ValueError: If the code of a router does not show its scoring, or pooled layers have different numbers of
            experts.
    """

    def __init__(self, config: BalancingConfig, routers: Sequence[Router], reduce: Reduce) -> None:
        self.config, self.routers, self.reduce = config, routers, reduce
        self.token_scale: Tensor | float = 1.0
        self.row_scale: Tensor | float = 1.0
        self._waiting: list[RoutingCounts] = []
        # Name of a loss -> (sum of weight * value, sum of weights), since the last optimizer step.
        self._terms: dict[str, Tensor] = {}
        self._attached = self._arrived = False
        if config.aux_loss_coef > 0.0:
            for router in routers:
                self.scoring(router)
        if config.aux_loss_type == "pooled" and len({router.num_experts for router in routers}) > 1:
            raise ValueError("aux_loss_type='pooled' needs layers with equal numbers of experts; use 'layer'.")

    def scoring(self, router: Router) -> Scoring:
        """Return `softmax` or `sigmoid`, by which a router scores experts.

        Raises:
            ValueError: If neither the config nor the code of the router says.
        """
        scoring = self.config.scoring or router.scoring
        if scoring is None:
            raise ValueError(
                f"The code of {router.name} ({type(router.module).__name__}) does not tell whether its affinities are "
                "a softmax or a sigmoid of the logits. Pass scoring='softmax' or 'sigmoid'."
            )
        return scoring

    # Forward

    def on_router(self, i: int, current: RoutingCounts, logits: Tensor, indices: Tensor) -> None:
        """Attach the gradient of router `i`, which has run in a training forward, or put the router on the waiting
        list."""
        if self.config.has_loss and not self._attach(i, current, logits, indices):
            current.waiting.append((i, indices))

    def finish(self, current: RoutingCounts, window: Mapping[int, Tensor]) -> None:
        """End a forward: compute the load that its loss refers to, and wait for the routers that had no gradient.

        Args:
            current: The forward.
            window: Tokens per expert since the last optimizer step, this forward included, by router.
        """
        # Not earlier: the gradient of the first router may refer to the load of the last.
        if self.config.aux_loss_coef > 0.0 and current.counts:
            current.fractions = self._fractions(current, window)
        if current.waiting:
            self._waiting.append(current)

    def _fractions(self, current: RoutingCounts, window: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Load f (E,) of each router that ran: its tokens over all tokens, so that it sums to k."""
        counts = [current.counts[i] if self.config.batch == "local" else window[i] for i in current.counts]
        if self.config.batch == "global":
            # All layers in one all-reduce.
            counts = list(self.reduce(torch.cat(counts)).split([len(c) for c in counts]))
        shares = [load_fractions(c, self.routers[i].top_k) for i, c in zip(current.counts, counts, strict=True)]
        if self.config.aux_loss_type == "pooled":
            # transformers' loss is E sum_i mean_l(f) mean_l(P). With the mean of f in every layer, the mean of the
            # layers' losses is that product, and each layer still needs no other layer's logits.
            shares = [torch.stack(shares).mean(dim=0)] * len(shares)
        return dict(zip(current.counts, shares, strict=True))

    def on_router_again(self, i: int, output: object) -> None:
        """Attach the gradient of router `i`, which checkpointing has run outside of any forward."""
        # Reentrant checkpointing runs a layer without gradient in the forward, and once more, with gradient, in the
        # backward. Only the logits of the second run are part of the graph, and the second run does not say which
        # forward it belongs to. Micro-batches A and B of a model with routers 0 to 2, both forwards before one
        # backward:
        #
        #     after the forwards   A waits for routers 0, 1, 2     B waits for routers 0, 1, 2
        #     layer of router 2 runs again                         A's or B's?
        #
        # Its tokens are those of the first run, so it chooses the experts that the first run chose: where they equal
        # those that B's router 2 chose, B no longer waits for router 2, and the next run of router 2 can only be A's.
        # With one forward waiting, the usual case, there is nothing to compare, and no wait for a GPU.
        waiting = [
            (current, j)
            for current in reversed(self._waiting)
            for j, (router, _) in enumerate(current.waiting)
            if router == i
        ]
        if not waiting:
            return  # the layer had its gradient in the forward (non-reentrant checkpointing), or there is no loss
        logits, indices = self.routers[i].read(output)
        # The newest forward is asked first, since backward usually begins with it. It is also taken where no forward
        # fits: a kernel that rounds differently in the second run may swap two experts with nearly equal scores.
        found = (p for p in waiting if len(waiting) == 1 or torch.equal(p[0].waiting[p[1]][1], indices))
        current, j = next(found, waiting[0])
        if self._attach(i, current, logits, indices):
            del current.waiting[j]

    # Backward

    def _attach(self, i: int, current: RoutingCounts, logits: Tensor, indices: Tensor) -> bool:
        """Hook the gradient of the loss into the backward pass, if there will be one."""
        if logits.requires_grad:
            # The hook keeps detached logits: with the graph behind them they would keep themselves alive.
            logits.register_hook(partial(self._add_gradient, i, current, logits.detach(), indices))
            self._attached = True
        return logits.requires_grad

    def _add_gradient(self, i: int, current: RoutingCounts, logits: Tensor, indices: Tensor, grad: Tensor) -> Tensor:
        # Backward turns gradients off, and this layer's loss needs a small graph of its own, from a float32 leaf.
        with torch.enable_grad():
            leaf = logits.float().requires_grad_()
            terms = self._losses(i, current, leaf, indices)
            scaled = [coef * self._scale(name) * term for name, (coef, term) in terms.items()]
            (extra,) = torch.autograd.grad(torch.stack(scaled).sum() / len(current.counts), leaf)
        self._arrived = True
        for name, (_, term) in terms.items():
            weighed = torch.stack([term.detach(), term.new_ones(())]) * self._scale(name)
            self._terms[name] = weighed + self._terms.get(name, 0.0)
        return grad + extra.to(grad.dtype)

    def _scale(self, name: str) -> Tensor | float:
        per_row = name == "aux_loss" and self.config.aux_loss_type == "sequence"
        return self.row_scale if per_row else self.token_scale

    def _losses(
        self, i: int, current: RoutingCounts, logits: Tensor, indices: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """Coefficient and value of each loss of one layer, from its logits (N, E)."""
        terms = {}
        if self.config.aux_loss_coef > 0.0:
            terms["aux_loss"] = (self.config.aux_loss_coef, self._balance_loss(i, current, logits, indices))
        if self.config.z_loss_coef > 0.0:
            mask = current.token_mask(len(logits), logits.device)
            terms["z_loss"] = (self.config.z_loss_coef, router_z_loss(logits, mask))
        return terms

    def _balance_loss(self, i: int, current: RoutingCounts, logits: Tensor, indices: Tensor) -> Tensor:
        mask, scoring = current.token_mask(len(logits), logits.device), self.scoring(self.routers[i])
        if self.config.aux_loss_type != "sequence":
            return switch_balance_loss(logits, current.fractions[i], mask, scoring=scoring)
        rows = current.rows(len(logits))
        return sequence_balance_loss(
            logits.view(*rows, -1),
            indices.view(*rows, -1),
            None if mask is None else mask.view(rows),
            scoring=scoring,
        )

    # Optimizer step

    def flush(self, device: torch.device) -> dict[str, Tensor]:
        """Return the mean value of each loss over layers, micro-batches and ranks since the last call, 0-d.

        Micro-batches have the weights that they have in the gradient.

        Args:
            device: Device to reduce on.

        Raises:
            RuntimeError: If no gradient has ever come through the logits that should have carried it.
        """
        if self._attached and not self._arrived:
            raise RuntimeError(
                "The auxiliary loss has not reached any router: its logits are not part of the graph that the loss "
                "was differentiated through. Balance this model with a selection bias (rate > 0) instead."
            )
        coefs = {"aux_loss": self.config.aux_loss_coef, "z_loss": self.config.z_loss_coef}
        names = [name for name, coef in coefs.items() if coef > 0.0]
        # A rank whose routers had no gradient takes part in the all-reduce, or the others would wait for it.
        nothing = torch.zeros(2)
        sums = [self._terms.get(name, nothing).to(device) for name in names]
        # Forwards that still wait had no backward pass; kept, they would take recomputations of the next step.
        self._terms, self._waiting = {}, []
        if not names:
            return {}
        return {
            name: total / number for name, (total, number) in zip(names, self.reduce(torch.stack(sums)), strict=True)
        }
