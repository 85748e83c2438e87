"""The policy's training signal: a loss per token by name, its average, and the share of tokens that were cut."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_plugins.functional.masking import Reduce, masked_mean, masked_moments, zero_masked
from rl_plugins.functional.policy_losses.aggregation import AGGREGATIONS, aggregate, prompt_weights
from rl_plugins.functional.policy_losses.clip import cispo, gmpo, gspo_token, ppo_clip, sapo, vanilla, vespo
from rl_plugins.functional.policy_losses.covariance import clip_cov, kl_cov
from rl_plugins.functional.policy_losses.future_kl import fipo
from rl_plugins.functional.policy_losses.gvpo import gvpo
from rl_plugins.functional.policy_losses.trust_region import bapo, cpgd, dppo
from rl_plugins.rollouts.batch import Batch, loss_mask
from rl_plugins.settings import keyword_names, with_numbers
from rl_plugins.signals.host import Host

PolicyFunction = Callable[..., Tensor]
"""`(logps, old_logps, advantages, mask, **options) -> loss per token`, all (B, T)."""


class LossEntry(NamedTuple):
    """Facts about a policy loss, so that no other code has to ask for its name.

    Attributes:
        function: Loss per token.
        aggregation: Usual way to average it.
        acts_on_policy: Whether the loss has its full effect while the policy is still the one that sampled. Otherwise
            its gradient at ratio 1 is that of `vanilla`, up to a positive factor: its clip, mask or weight has an
            effect only from the second update on a rollout.
        of_trl: Whether TRL has the loss under this name, with its own fields for the options.
        around_sampler: Whether its trust region is around the engine that sampled, if a separate engine did.
        fixed_level: Whether the level of its importance ratio is fixed, whatever `importance_sampling_level` says.
    """

    function: PolicyFunction
    aggregation: str
    acts_on_policy: bool = False
    of_trl: bool = False
    around_sampler: bool = False
    fixed_level: bool = False


def _vanilla(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    return vanilla(logps, advantages, mask)


# TRL's names for the clipped loss say how it is averaged; the others name the loss.
POLICY_LOSSES: dict[str, LossEntry] = {
    "grpo": LossEntry(ppo_clip, "sequence", of_trl=True),
    "bnpo": LossEntry(ppo_clip, "micro_batch", of_trl=True),
    "dr_grpo": LossEntry(ppo_clip, "constant", of_trl=True),
    "dapo": LossEntry(ppo_clip, "token", of_trl=True),
    "luspo": LossEntry(ppo_clip, "sequence_sum", of_trl=True),
    "cispo": LossEntry(cispo, "token", of_trl=True),
    "sapo": LossEntry(sapo, "sequence", of_trl=True),
    "vespo": LossEntry(vespo, "token", of_trl=True),
    "ppo_clip": LossEntry(ppo_clip, "token"),
    "vanilla": LossEntry(_vanilla, "token", acts_on_policy=True),
    "gpg": LossEntry(_vanilla, "token", acts_on_policy=True),
    "gspo_token": LossEntry(gspo_token, "sequence", fixed_level=True),
    "gmpo": LossEntry(gmpo, "sequence"),
    # The trust region of 2602.04879, section 5.2, is around the sampler.
    "dppo": LossEntry(dppo, "token", around_sampler=True),
    "fipo": LossEntry(fipo, "token"),
    "bapo": LossEntry(bapo, "token"),
    "cpgd": LossEntry(cpgd, "token"),
    "clip_cov": LossEntry(clip_cov, "token", acts_on_policy=True),
    "kl_cov": LossEntry(kl_cov, "token"),
    "gvpo": LossEntry(gvpo, "sequence"),
}
"""Every policy loss by name."""

BATCH_ARGUMENTS = ("groups", "sampler_weights", "reduce")
"""Keyword arguments of a loss that come with each batch instead of from the settings."""


def _keywords(function: PolicyFunction) -> list[str]:
    return [name for name in keyword_names(function) if name != "generator"]


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss with its settings.

    Args:
        name: One of `POLICY_LOSSES`.
        aggregation: Name of an aggregation of [`~rl_plugins.functional.aggregate`]; the loss's usual one by default.
        options: Keyword arguments of the loss function. Those not given keep the function's defaults, which are the
            paper's.

    Raises:
        ValueError: If a name is unknown (the message lists the valid ones) or the loss refuses the value of an option.
    """

    name: str
    aggregation: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in POLICY_LOSSES:
            raise ValueError(f"Unknown policy loss {self.name!r}; choose one of {', '.join(POLICY_LOSSES)}.")
        if not self.aggregation:
            object.__setattr__(self, "aggregation", POLICY_LOSSES[self.name].aggregation)
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"Unknown aggregation {self.aggregation!r}; choose one of {', '.join(AGGREGATIONS)}.")
        valid = self.accepted(self.name)
        unknown = sorted(set(self.options) - set(valid))
        if unknown:
            raise ValueError(
                f"The policy loss {self.name!r} has no option {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(valid) or 'none'}."
            )
        object.__setattr__(self, "options", with_numbers(self.options))
        self._try_options()

    def _try_options(self) -> None:
        x = torch.zeros(2, 2)
        try:
            self.per_token(x, x, x[:, 0], x, {"groups": torch.zeros(2, dtype=torch.long)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"The options {dict(self.options)} do not suit {self.name!r}: {error}") from error

    @staticmethod
    def accepted(name: str) -> list[str]:
        """List the names of the options of a loss."""
        return [key for key in _keywords(POLICY_LOSSES[name].function) if key not in BATCH_ARGUMENTS]

    @property
    def entry(self) -> LossEntry:
        """Facts about the loss."""
        return POLICY_LOSSES[self.name]

    @property
    def compares_groups(self) -> bool:
        """Whether the loss compares the completions of a prompt, which must then stay in one micro-batch."""
        return "groups" in self.batch_arguments

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss applies the correction for another sampler itself, instead of being multiplied by it."""
        return "sampler_weights" in self.batch_arguments

    @property
    def level(self) -> str:
        """Level of the importance ratio: `token` or `sequence`."""
        return str(self.options.get("level", "token"))

    @property
    def batch_arguments(self) -> list[str]:
        """Names of the arguments that the loss takes with every batch, besides the usual four tensors."""
        return [key for key in _keywords(POLICY_LOSSES[self.name].function) if key in BATCH_ARGUMENTS]

    def mark(self, batch: Batch, host: Host) -> None:
        """Put the entries about groups that the loss needs into a whole batch, before the batch is shuffled and cut:
        `groups` (B,), the number of each row's prompt, and `prompt_weights` (B,).

        Args:
            batch: Completions of this rank, those of a prompt side by side.
            host: The trainer or module.
        """
        if not self.compares_groups and self.aggregation != "prompt":
            return
        lengths = host.gather_rows(loss_mask(batch).sum(dim=1))  # of all ranks, since a prompt may lie on two
        if self.compares_groups:
            numbers = torch.arange(len(lengths), device=lengths.device) // host.group_size
            batch["groups"] = host.own_rows(numbers)
        if self.aggregation == "prompt":
            batch["prompt_weights"] = host.own_rows(prompt_weights(lengths, host.group_size))

    def per_token(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor,
        batch: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Compute the loss per token (B, T), 0 at masked positions."""
        given = {key: (batch or {}).get(key) for key in self.batch_arguments}
        return POLICY_LOSSES[self.name].function(logps, old_logps, advantages, mask, **self.options, **given)


def policy_loss(
    loss: PolicyLoss,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    num_items: Tensor | float | None = None,
    max_length: int | None = None,
    batch: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `L_policy`: the loss per token, weighted and aggregated.

    Args:
        loss: The policy loss, and how it is averaged.
        logps: `ln pi(y_t|s_t)` (B, T), with gradient.
        old_logps: `ln pi_old(y_t|s_t)` (B, T) of the policy that sampled.
        advantages: (B,) or (B, T).
        mask: Real tokens (B, T).
        weights: Factor on each token's loss (B, T) or (B, 1). It masks off-policy sequences or tokens of low entropy,
            or corrects for another sampler.
        num_items: Real tokens that `token` averages over; this batch's own by default.
        max_length: Length that `constant` divides by.
        batch: Entries that `loss.batch_arguments` names: `groups`, the id of each row's prompt (B,) (`gvpo` needs it);
            `sampler_weights` (B, T); `reduce`, which sums statistics over ranks. The aggregation `prompt` needs
            `prompt_weights` (B,), of [`~rl_plugins.functional.prompt_weights`].

    Returns:
        The loss (0-d), and which tokens do not move the policy (B, T), bool: their advantage is not 0, but the
        gradient of their loss is. For the clipped loss those are the clipped ones.

    Raises:
        ValueError: If shapes or settings are wrong.
    """
    learning = logps.requires_grad
    with torch.enable_grad():
        leaf = logps if learning else logps.detach().requires_grad_()
        token_loss = loss.per_token(leaf, old_logps, advantages, mask, batch)
        # The gradient stops at the log-probabilities: it costs a few elementwise operations, and none in the model.
        (slope,) = torch.autograd.grad(token_loss.sum(), leaf, retain_graph=learning)
    if not learning:
        token_loss = token_loss.detach()
    per_token = advantages if advantages.ndim == 2 else advantages[:, None]
    cut = (slope == 0) & (per_token != 0) & mask.bool()
    if weights is not None:
        # NaN in padding would reach the gradient through the product.
        token_loss = token_loss * zero_masked(weights.expand_as(token_loss), mask)
    return averaged(loss, token_loss, mask, num_items=num_items, max_length=max_length, batch=batch), cut


def averaged(
    loss: PolicyLoss,
    x: Tensor,
    mask: Tensor,
    *,
    num_items: Tensor | float | None,
    max_length: int | None,
    batch: Mapping[str, Any] | None,
) -> Tensor:
    """Average `x` (B, T) like the policy loss, so that both have the same units; the arguments are those of
    [`policy_loss`]."""
    return aggregate(
        x,
        mask,
        loss.aggregation,
        num_items=num_items,
        max_length=max_length,
        row_weights=(batch or {}).get("prompt_weights"),
    )


def inert_message(loss: PolicyLoss, where: str, remedy: str) -> str | None:
    """Write the warning that a policy loss has no effect of its own, since there is only one update per rollout.

    Args:
        loss: The policy loss.
        where: Settings that are the reason.
        remedy: Settings that would change this.

    Returns:
        Two sentences; `None` for a loss that acts on-policy.
    """
    if POLICY_LOSSES[loss.name].acts_on_policy:
        return None
    return (
        f"policy_loss={loss.name!r} compares the policy with the one that sampled, but with {where} there is one "
        "update per rollout, in which both are equal: its gradient is that of policy_loss='vanilla', up to a factor. "
        f"Only the advantage, the sampling and aggregation={loss.aggregation!r} act. {remedy}"
    )


@torch.no_grad()
def clip_shares(
    cut: Tensor, advantages: Tensor, mask: Tensor, *, reduce: Reduce | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Measure the share of tokens whose gradient was cut, under TRL's metric names.

    Args:
        cut: Second result of [`policy_loss`] (B, T).
        advantages: (B,) or (B, T); `low` counts the negative ones, `high` the positive ones.
        mask: Real tokens (B, T).
        reduce: Sums statistics over ranks.

    Returns:
        0-d means by metric name, and the shares `low`, `high` of each sequence (B, 2).
    """
    per_token = advantages if advantages.ndim == 2 else advantages[:, None]
    sides = {"low": cut & (per_token < 0), "high": cut & (per_token > 0), "region": cut}
    means = {f"clip_ratio/{side}_mean": masked_moments(x.float(), mask, reduce=reduce)[0] for side, x in sides.items()}
    rows = torch.stack([masked_mean(sides[side].float(), mask, dim=1) for side in ("low", "high")], dim=1)
    return means, rows
