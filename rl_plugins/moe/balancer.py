"""Counts the load of every expert during training, moves selection biases, and adds auxiliary losses."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rl_plugins.functional.routing import (
    expert_counts,
    load_entropy,
    load_fractions,
    max_violation,
    router_probabilities,
    selection_bias_quantile,
    selection_bias_update,
)
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.files import check_biases_fit, save_beside
from rl_plugins.moe.losses import RouterLosses
from rl_plugins.moe.routers import Router, find_routers
from rl_plugins.moe.routing_pass import RoutingPass
from rl_plugins.nn.attachment import base_model_of, trunk_of
from rl_plugins.nn.sharding import is_fsdp2, show_trained, whole_parameters

Reduce = Callable[[Tensor], Tensor]

ATTRIBUTE = "router_balancer"


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over the default process group; `x` itself without one."""
    if distributed.is_available() and distributed.is_initialized():
        x = x.clone()
        distributed.all_reduce(x)
    return x


def get_router_balancer(model: nn.Module) -> "RouterBalancer | None":
    """The balancer at work on a model, or `None`."""
    balancer = vars(trunk_of(base_model_of(model))).get(ATTRIBUTE)
    return balancer if isinstance(balancer, RouterBalancer) and balancer.is_active else None


class RouterBalancer:
    """Balances the experts of one model during its training.

    It lives in hooks: one around the trunk, which says when a training forward runs, and one on every router. Tokens
    count once, in forwards with gradient of a model in training mode; not in evaluation, in no-grad passes, or when
    checkpointing runs a layer again; padding never. The gradient of an auxiliary loss is added to that of the
    router's logits on the way back, so it needs neither a loss from the model nor a particular checkpointing, and the
    forward stays as it was, bit for bit.

    The host calls [`update`] after every optimizer step, and sets `loss_scale` to what it multiplies the loss of a
    micro-batch by (1 / accumulation steps). Nothing here is a parameter or buffer: engines neither see nor save it.

    Args:
        model: Causal LM, or a PEFT model around one; before or after an engine has wrapped it.
        config: What to do.
        reduce: Sum of a tensor over ranks.
        extra_modules: More modules with routers, such as native MTP layers. Run those inside [`counting`].

    Raises:
        TypeError: If the model has no routers, or one that cannot be counted or biased.
        ValueError: If the model is being balanced already, its code does not tell how logits become affinities, or
            its layers cannot be pooled.
    """

    def __init__(
        self,
        model: nn.Module,
        config: BalancingConfig | None = None,
        *,
        reduce: Reduce = sum_over_ranks,
        extra_modules: Sequence[nn.Module] = (),
    ) -> None:
        self.config = config or BalancingConfig()
        self.reduce = reduce
        self.routers = find_routers(model, extra_modules)
        self.losses = RouterLosses(self.config, self.routers)
        self._model, self._trunk = model, trunk_of(base_model_of(model))
        if get_router_balancer(model) is not None:
            raise ValueError("This model is being balanced already; call detach() of its balancer first.")
        if self.config.rate > 0.0:
            self._add_biases()
        for router in self.routers:
            router.keep_float32()
        if any(router.has_bias for router in self.routers):
            save_beside(model)
        self.masters = self._read_biases()
        self.last_counts: list[Tensor] = []
        self._counts: dict[int, Tensor] = {}
        self._targets: dict[int, Tensor] = {}
        self._pass: RoutingPass | None = None
        self._has_counted = False
        self.is_active = True
        self.host: Any = None  # whoever drives it, for a driver that takes over
        trunk = self._trunk
        setattr(trunk, ATTRIBUTE, self)
        self._handles = [
            trunk.register_forward_pre_hook(self._on_trunk_start, with_kwargs=True),
            trunk.register_forward_hook(self._on_trunk_end, always_call=True),
            # Before an engine's hooks, which put other tensors in place of the outputs that the graph goes on from.
            *(
                router.module.register_forward_hook(partial(self._on_router, i), prepend=True)
                for i, router in enumerate(self.routers)
            ),
        ]

    # Set-up

    def _add_biases(self) -> None:
        for router in self.routers:
            if not router.has_bias:
                router.check_can_add_bias()
        for router in self.routers:
            router.add_bias()
            if router.injected is not None:
                router.injected.keep_scores = self.config.rule == "quantile"
            elif self.config.rule == "quantile":
                self.losses.scoring(router)
            # `from_pretrained` makes every parameter trainable, also biases that their architecture freezes.
            router.stored_bias.requires_grad_(False)

    def detach(self) -> None:
        """Stop counting. Added biases stay, since the model was trained with them (`remove_selection_bias`), and so do
        float32 biases of which the model has rounded copies."""
        for handle in self._handles:
            handle.remove()
        for router in self.routers:
            router.release_float32()
        delattr(self._trunk, ATTRIBUTE)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouterBalancer":
        # A copy of the model (a reference model) carries copies of the hooks; they must not count for the original.
        idle = copy.copy(self)
        idle.is_active = False
        return idle

    @property
    def loss_scale(self) -> Tensor | float:
        """What the host multiplies the loss of a micro-batch by."""
        return self.losses.token_scale

    @loss_scale.setter
    def loss_scale(self, scale: float) -> None:
        self.set_loss_scales(scale, scale)

    def set_loss_scales(self, by_tokens: Tensor | float, by_rows: Tensor | float) -> None:
        """Set [`loss_scale`] where micro-batches differ in size.

        Args:
            by_tokens: For losses that are means over tokens.
            by_rows: For the loss per sequence, a mean over rows.
        """
        self.losses.token_scale, self.losses.row_scale = by_tokens, by_rows

    # Forward

    def _on_trunk_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.is_active and module.training and torch.is_grad_enabled()):
            return
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given: dict[str, Any] = {**bound, **bound.get("kwargs", {})}
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        mask = given.get("attention_mask")
        # Masks of other shapes (block-diagonal, per layer type) belong to packed rows, which have no padding.
        mask = mask[:, -tokens.shape[1] :] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._pass = RoutingPass(mask, (tokens.shape[0], tokens.shape[1]))

    def _on_trunk_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current, self._pass = self._pass, None
        # A forward that failed has no output: it counts nothing, and must not wait for other ranks.
        if current is not None and output is not None:
            self._finish(current)

    @contextmanager
    def counting(self, mask: Tensor) -> Iterator[None]:
        """Count the routers that run in this context although the trunk does not: native MTP layers.

        Args:
            mask: Real tokens (B, S) of what the routers see.
        """
        self._pass = RoutingPass(mask, (mask.shape[0], mask.shape[1])) if torch.is_grad_enabled() else None
        try:
            yield
            if self._pass is not None:
                self._finish(self._pass)
        finally:
            self._pass = None

    def _finish(self, current: RoutingPass) -> None:
        for total, new in ((self._counts, current.counts), (self._targets, current.targets)):
            total.update({i: total[i] + x if i in total else x for i, x in new.items()})
        if self.config.aux_loss_coef > 0.0 and current.counts:
            current.fractions = self._fractions(current)
        self.losses.finish(current)

    def _fractions(self, current: RoutingPass) -> dict[int, Tensor]:
        """Load f (E,) of each router that ran: its tokens over all tokens, so that it sums to k."""
        counts = [current.counts[i] if self.config.batch == "local" else self._counts[i] for i in current.counts]
        if self.config.batch == "global":
            counts = list(self.reduce(torch.cat(counts)).split([len(c) for c in counts]))
        shares = [load_fractions(c, self.routers[i].top_k) for i, c in zip(current.counts, counts, strict=True)]
        if self.config.aux_loss_type == "pooled":
            shares = [torch.stack(shares).mean(dim=0)] * len(shares)
        return dict(zip(current.counts, shares, strict=True))

    def _on_router(self, i: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self._pass
        if not self.is_active:
            return
        if current is not None:
            logits, indices = self.routers[i].read(output)
            self._count(i, current, logits.detach(), indices)
            self.losses.on_router(i, current, logits, indices)
        elif torch.is_grad_enabled():
            self.losses.on_router_again(i, output)

    @torch.no_grad()
    def _count(self, i: int, current: RoutingPass, logits: Tensor, indices: Tensor) -> None:
        router = self.routers[i]
        mask = current.token_mask(len(indices), indices.device)
        counts = expert_counts(indices, router.num_experts, mask)
        current.counts[i] = current.counts[i] + counts if i in current.counts else counts
        if self.config.rule == "quantile" and self.config.rate > 0.0:
            targets = selection_bias_quantile(
                self._scores(router, logits), self.masters[i].to(indices.device), router.top_k, mask
            )
            weighted = targets * counts.sum()
            current.targets[i] = current.targets[i] + weighted if i in current.targets else weighted

    def _scores(self, router: Router, logits: Tensor) -> Tensor:
        """What the router compares when it selects experts (N, E), without the bias."""
        if router.injected is not None:
            assert router.injected.scores is not None
            return router.injected.scores.float()
        return logits.float().sigmoid() if self.losses.scoring(router) == "sigmoid" else router_probabilities(logits)

    # Update

    @torch.no_grad()
    def update(self, progress: float = 0.0) -> dict[str, Tensor]:
        """Call once after every optimizer step, on all ranks: one all-reduce of the counts, then the biases move.

        The quantile rule and the values of losses are a second and a third, for what they add.

        Args:
            progress: Share of the training that was over before this step, in [0, 1).

        Returns:
            Metrics as 0-d tensors: `moe/max_violation` (mean over layers) and `moe/max_violation_worst`,
            `moe/load_entropy`, `moe/unused_experts` (share without a token), `moe/bias_range` (largest difference
            between two experts of a layer), `moe/aux_loss` and `moe/z_loss` where they are on.

        Raises:
            RuntimeError: At the first step, if no router has run, or the gradient of the loss has reached none.
        """
        self._check_first_step()
        self.last_counts = self._reduced_counts()
        rate = self.config.rate_at(progress)
        if rate > 0.0:
            self._move_biases(rate)
        elif self.config.rate > 0.0:
            # An engine that took the parameters over after they were frozen may have put old values back.
            self._write_biases()
        self._counts, self._targets = {}, {}
        losses = self.losses.flush(self.reduce, self.last_counts[0].device)
        return self._metrics() | {f"moe/{name}": value for name, value in losses.items()}

    def _check_first_step(self) -> None:
        if not (self._counts or self._has_counted):
            raise RuntimeError(
                f"No router of {type(self._trunk).__name__} ran in a training forward. Fused kernels bypass the "
                "routers (load the model with use_kernels=False), and so does a forward that calls the layers alone."
            )
        self._has_counted = True

    def _reduced_counts(self) -> list[Tensor]:
        device = next(iter(self._counts.values())).device if self._counts else self.masters[0].device
        counts = [
            self._counts[i].to(device)
            if i in self._counts
            else torch.zeros(r.num_experts, dtype=torch.int64, device=device)
            for i, r in enumerate(self.routers)
        ]
        return list(self.reduce(torch.cat(counts)).split([r.num_experts for r in self.routers]))

    def _move_biases(self, rate: float) -> None:
        targets = None
        if self.config.rule == "quantile":
            device = self.last_counts[0].device
            sums = [self._targets.get(i, torch.zeros_like(m)).to(device) for i, m in enumerate(self.masters)]
            sums = list(self.reduce(torch.cat(sums)).split([len(m) for m in self.masters]))
            targets = [x / c.sum().clamp(min=1) for x, c in zip(sums, self.last_counts, strict=True)]
        for num_experts in {router.num_experts for router in self.routers}:
            layers = [i for i, router in enumerate(self.routers) if router.num_experts == num_experts]
            counts = torch.stack([self.last_counts[i] for i in layers])
            moved = selection_bias_update(
                torch.stack([self.masters[i].to(counts.device) for i in layers]),
                counts,
                rate=rate,
                rule=self.config.rule,
                targets=None if targets is None else torch.stack([targets[i] for i in layers]),
            )
            for i, bias in zip(layers, moved.unbind(), strict=True):
                self.masters[i] = bias
        self._write_biases()

    def _metrics(self) -> dict[str, Tensor]:
        violations = torch.stack([max_violation(counts) for counts in self.last_counts])
        metrics = {
            "max_violation": violations.mean(),
            "max_violation_worst": violations.max(),
            "load_entropy": torch.stack([load_entropy(counts) for counts in self.last_counts]).mean(),
            "unused_experts": (torch.cat(self.last_counts) == 0).float().mean(),
        }
        if any(router.has_bias for router in self.routers):
            metrics["bias_range"] = torch.stack([bias.max() - bias.min() for bias in self.masters]).max()
        return {f"moe/{name}": value for name, value in metrics.items()}

    # Biases and checkpoints

    def _read_biases(self) -> list[Tensor]:
        """Float32 copies of the live biases; zeros for a router without one."""
        live = [router.bias if router.has_bias else torch.zeros(router.num_experts) for router in self.routers]
        with whole_parameters(live) as whole:
            return [bias.detach().reshape(-1).float().clone() for bias in whole]

    def read_again(self) -> None:
        """Take over the live biases before the first step, once an engine has the model.

        Where FSDP2 saves memory while loading (`cpu_ram_efficient_loading`), one rank reads the checkpoint, and the
        others get its values with the sharding.
        """
        if not self._has_counted and is_fsdp2(self._model):
            self.masters = self._read_biases()

    @torch.no_grad()
    def _write_biases(self) -> None:
        show_trained(self._model)
        with whole_parameters([router.stored_bias for router in self.routers], writing=True) as whole:
            for router, master, live in zip(self.routers, self.masters, whole, strict=True):
                router.set_bias(master, live)

    def state_dict(self) -> dict[str, Tensor]:
        """The float32 biases by router, on the CPU."""
        return {router.name: bias.cpu() for router, bias in zip(self.routers, self.masters, strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with saved biases.

        Raises:
            ValueError: If they belong to other routers, or another number of experts; nothing is changed then.
        """
        check_biases_fit(state, self.routers, whose="the checkpoint")
        self.masters = [state[router.name].to(bias) for router, bias in zip(self.routers, self.masters, strict=True)]
        if any(bias.any() for bias in self.masters):
            self._add_biases()
            save_beside(self._model)
        if all(router.has_bias for router in self.routers):
            self._write_biases()
