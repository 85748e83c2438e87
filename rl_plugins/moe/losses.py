"""Auxiliary losses of the routers: their gradient joins that of the logits on the way back."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rl_plugins.functional.routing import Scoring, router_z_loss, sequence_balance_loss, switch_balance_loss
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.routers import Router
from rl_plugins.moe.routing_pass import RoutingPass


class RouterLosses:
    """Gradients of the load-balancing loss and the z-loss, each averaged over layers.

    Both are sums over layers of functions of one layer's logits (the load f is a constant), so a hook on those logits
    can add the gradient when it passes. It needs no loss from the model, and checkpointing cannot cut it off: where a
    layer runs again, the logits of the second run carry the hook.

    Args:
        config: Coefficients.
        routers: Routers by number.

    Raises:
        ValueError: If a router's code does not tell its scoring, or pooled layers differ in their experts.
    """

    def __init__(self, config: BalancingConfig, routers: Sequence[Router]) -> None:
        self.config, self.routers = config, routers
        self.token_scale: Tensor | float = 1.0
        self.row_scale: Tensor | float = 1.0
        self._waiting: list[RoutingPass] = []
        self._terms: dict[str, Tensor] = {}
        self._attached = self._arrived = False
        if config.aux_loss_coef > 0.0:
            for router in routers:
                self.scoring(router)
        if config.aux_loss_type == "pooled" and len({router.num_experts for router in routers}) > 1:
            raise ValueError("aux_loss_type='pooled' needs layers with equal numbers of experts; use 'layer'.")

    def scoring(self, router: Router) -> Scoring:
        """How a router's logits become affinities.

        Raises:
            ValueError: If neither its code nor the config says.
        """
        scoring = self.config.scoring or router.scoring
        if scoring is None:
            raise ValueError(
                f"The code of {router.name} ({type(router.module).__name__}) does not tell whether its affinities are "
                "a softmax or a sigmoid of the logits. Pass scoring='softmax' or 'sigmoid'."
            )
        return scoring

    # Forward

    def on_router(self, i: int, current: RoutingPass, logits: Tensor, indices: Tensor) -> None:
        """A router has run in a training forward."""
        if self.config.has_loss and not self._attach(i, current, logits, indices):
            current.waiting.append((i, indices))

    def finish(self, current: RoutingPass) -> None:
        """The forward is over; routers without gradient may run again for it."""
        if current.waiting:
            self._waiting.append(current)

    def on_router_again(self, i: int, output: object) -> None:
        """A router has run outside any forward, as checkpointing makes it: once more for one that is waiting."""
        waiting = [
            (current, j)
            for current in reversed(self._waiting)
            for j, (router, _) in enumerate(current.waiting)
            if router == i
        ]
        if not waiting:
            return
        logits, indices = self.routers[i].read(output)
        # Backward usually takes the newest forward first; which of several it is, the experts tell.
        found = (p for p in waiting if len(waiting) == 1 or torch.equal(p[0].waiting[p[1]][1], indices))
        current, j = next(found, waiting[0])
        if self._attach(i, current, logits, indices):
            del current.waiting[j]

    # Backward

    def _attach(self, i: int, current: RoutingPass, logits: Tensor, indices: Tensor) -> bool:
        """Have the gradient added on the way back, if there will be one."""
        if logits.requires_grad:
            logits.register_hook(partial(self._add_gradient, i, current, logits.detach(), indices))
            self._attached = True
        return logits.requires_grad

    def _add_gradient(self, i: int, current: RoutingPass, logits: Tensor, indices: Tensor, grad: Tensor) -> Tensor:
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
        self, i: int, current: RoutingPass, logits: Tensor, indices: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """Coefficient and value of each loss of one layer, from its logits (N, E)."""
        terms = {}
        if self.config.aux_loss_coef > 0.0:
            terms["aux_loss"] = (self.config.aux_loss_coef, self._balance_loss(i, current, logits, indices))
        if self.config.z_loss_coef > 0.0:
            mask = current.token_mask(len(logits), logits.device)
            terms["z_loss"] = (self.config.z_loss_coef, router_z_loss(logits, mask))
        return terms

    def _balance_loss(self, i: int, current: RoutingPass, logits: Tensor, indices: Tensor) -> Tensor:
        mask, scoring = current.token_mask(len(logits), logits.device), self.scoring(self.routers[i])
        if self.config.aux_loss_type != "sequence":
            fractions = [current.fractions[i].to(logits.device)]
            return switch_balance_loss([logits], [indices], mask, scoring=scoring, fractions=fractions)
        rows = current.rows(len(logits))
        return sequence_balance_loss(
            logits.view(*rows, -1),
            indices.view(*rows, -1),
            None if mask is None else mask.view(rows),
            scoring=scoring,
        )

    # Optimizer step

    def flush(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, Tensor]:
        """Mean value of each loss over layers, micro-batches and ranks since the last call, 0-d.

        Micro-batches weigh as they do in the gradient.

        Args:
            reduce: Sum of a tensor over ranks; called where a loss is on.
            device: Where to reduce.

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
        nothing = torch.zeros(2)
        sums = [self._terms.get(name, nothing).to(device) for name in names]
        self._terms, self._waiting = {}, []
        if not names:
            return {}
        return {name: total / number for name, (total, number) in zip(names, reduce(torch.stack(sums)), strict=True)}
