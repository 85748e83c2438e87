"""The MTP heads of a LightningModule: attached or loaded, run inside a training forward, and their losses."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor, nn

from rl_plugins.lightning.accumulation import ends_window
from rl_plugins.lightning.language_module import LanguageModule
from rl_plugins.lightning.polyak_callback import polyak_callback, target_of
from rl_plugins.lightning.ranks import sum_over_ranks
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.gradient import GradientStats
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.native_mtp import NativeMTP
from rl_plugins.nn.target_heads import PolyakTarget, check_polyak
from rl_plugins.nn.token_loss import logit_divisor
from rl_plugins.signals.checks import check_at_least, check_whole
from rl_plugins.signals.critic_targets import per_head_means

TokenTerm = tuple[Tensor | float, dict[str, Tensor], dict[str, Tensor]]


class HeadTraining:
    """What [`MTPSFTModule`] and [`MTPCriticModule`] do with their heads; no module itself, since the heads are the
    model's.

    [`NativeTraining`] is its counterpart for native MTP layers.

    Args:
        model: The policy.
        source: What the policy was made from: heads beside a path's weights are loaded.
        num_heads: K.
        inner_size: Width of each head's residual block; the model's hidden size by default.
        heads_path: Folder of heads saved by an earlier run.
        token_loss_coef: lambda_1, weight of the heads' token loss.
        detach_trunk: Keep the token loss out of the trunk.
        value_loss_coef: lambda_2, weight of the value loss.
        value_grad_scale: Factor on the value gradient that enters the trunk.
        value_grad_clip: Largest norm of one token's value gradient into the trunk, in units of the unweighted squared
            error; `None` does not clamp.
        temperature: Of sampling.
        draft_only: Train the heads to draft, and leave the values as they are.

    Raises:
        ValueError: If a setting is out of range, or the model's heads are others.
    """

    attribute = MTPHeads.name

    def __init__(
        self,
        model: nn.Module,
        source: object,
        *,
        num_heads: int,
        inner_size: int | None,
        heads_path: str | None,
        token_loss_coef: float,
        detach_trunk: bool,
        value_loss_coef: float = 0.0,
        value_grad_scale: float = 0.0,
        value_grad_clip: float | None = None,
        temperature: float = 1.0,
        draft_only: bool = False,
    ) -> None:
        check_at_least(1, num_mtp_heads=num_heads, mtp_inner_size=inner_size)
        check_at_least(0, mtp_loss_coef=token_loss_coef, value_loss_coef=value_loss_coef)
        check_at_least(0, value_grad_scale=value_grad_scale, value_grad_clip=value_grad_clip)
        self.model, self.token_loss_coef, self.value_loss_coef = model, token_loss_coef, value_loss_coef
        self.detach_trunk, self.value_grad_scale, self.value_grad_clip = (
            detach_trunk,
            value_grad_scale,
            value_grad_clip,
        )
        check_whole(num_mtp_heads=num_heads, mtp_inner_size=inner_size)
        if heads_path is not None:
            MTPHeads.check_saved(heads_path)
        saved = heads_path or (MTPHeads.find(source) if isinstance(source, str) else None)
        self.heads = MTPHeads.prepare(model, num_heads, inner_size=inner_size, path=saved)
        self.draft_only = draft_only
        if draft_only:
            self.heads.draft_only()
        self.divisor = logit_divisor(base_model_of(model).config, temperature) if token_loss_coef else 1.0
        self._stats: GradientStats | None = None
        self._limit: Tensor | None = None

    @contextmanager
    def running(
        self,
        select: Callable[[Tensor], Tensor],
        labels: Tensor | None,
        num_items: Tensor,
        *,
        target: PolyakTarget | None = None,
        heads_only: bool = False,
    ) -> Iterator[HeadRun]:
        """Run the heads in the training forward inside the block.

        Args:
            select: Picks the states from the trunk's hidden states.
            labels: Tokens of the heads (B, T, K).
            num_items: Tokens that the losses are averaged over, the units of the gradient clamp.
            target: Slow heads to run on the same states.
            heads_only: Keep all gradients out of the trunk.
        """
        clip = self.value_grad_clip
        self._limit = None if clip is None else (clip * self.value_loss_coef / num_items).float()
        with self.heads.running(
            select,
            lm_head=base_model_of(self.model).get_output_embeddings(),
            labels=labels if self.token_loss_coef else None,
            divisor=self.divisor,
            detach_tokens=heads_only or self.detach_trunk,
            value_grad_scale=0.0 if heads_only else self.value_grad_scale,
            value_grad_norm=self._limit,
            target=target,
            with_values=not self.draft_only,
        ) as run:
            self._stats = run.stats
            yield run

    def keep_units(self, value_term: Tensor) -> None:
        """Have the clamp scaled as the host scales the loss on its way back: Lightning divides it by the number of
        micro-batches, DeepSpeed once more, and float16 multiplies it."""
        limit, self._limit = self._limit, None
        if limit is None or not value_term.requires_grad:
            return

        def scale(grad: Tensor) -> None:
            limit.mul_(grad.float())  # the very tensor that the clamp will read

        value_term.register_hook(scale)

    def token_term(self, run: HeadRun, num_items: Tensor) -> TokenTerm:
        """lambda_1 L_MTP, its metrics and their weights."""
        return token_term(run.token_losses, run.token_counts, num_items, self.token_loss_coef)

    def gradient_totals(self, module: nn.Module) -> Tensor | None:
        """What the backward pass showed of the value gradient into the trunk, over all ranks: sum of norms, clamped
        tokens, tokens (3,); `None` where there was none."""
        stats, self._stats = self._stats, None
        return None if stats is None else sum_over_ranks(stats.totals(next(module.parameters()).device))

    def hook(self) -> None:
        """Have the heads run in the model's forward."""
        self.heads.hook(self.model)

    def save(self, directory: Path) -> None:
        """Write the heads beside the model."""
        self.heads.save(directory)


class NativeTraining:
    """What [`MTPSFTModule`] does with native MTP layers, instead of [`HeadTraining`].

    Args:
        model: The model: layers attached to it, or those of its checkpoint, are trained on.
        num_layers: K.
        token_loss_coef: lambda_1, weight of the layers' token loss.
        detach_trunk: Keep the token loss out of the trunk.

    Raises:
        ValueError: If a setting is out of range, the architecture has no native layers, or the model has another
            number of them.
    """

    attribute = NativeMTP.name

    def __init__(self, model: nn.Module, *, num_layers: int, token_loss_coef: float, detach_trunk: bool) -> None:
        check_at_least(1, num_mtp_heads=num_layers)
        check_at_least(0, mtp_loss_coef=token_loss_coef)
        self.model, self.token_loss_coef, self.detach_trunk = model, token_loss_coef, detach_trunk
        self.heads = NativeMTP.prepare(model, num_layers)
        self.divisor = logit_divisor(base_model_of(model).config)

    def running(self, inputs: Mapping[str, Tensor]) -> AbstractContextManager[HeadRun]:
        """Run the layers in the training forward inside the block.

        Args:
            inputs: Tensors `input_ids`, `attention_mask`, `labels` (B, L).
        """
        lm_head = base_model_of(self.model).get_output_embeddings()
        assert lm_head is not None
        return self.heads.running(
            lm_head,
            inputs["input_ids"],
            inputs["labels"],
            inputs["attention_mask"],
            divisor=self.divisor,
            detach_trunk=self.detach_trunk,
        )

    def token_term(self, run: HeadRun, num_items: Tensor) -> TokenTerm:
        """lambda_1 L_MTP, its metrics and their weights."""
        return token_term(run.token_losses, run.token_counts, num_items, self.token_loss_coef)

    def gradient_totals(self, module: nn.Module) -> Tensor | None:
        """None: there are no values."""
        return None

    def hook(self) -> None:
        """Have the layers run in the model's forward."""
        self.heads.hook(self.model)

    def save(self, directory: Path) -> None:
        """Add the layers to the model's checkpoint."""
        self.heads.save(directory)


def token_term(sums: Tensor | None, counts: Tensor | None, num_items: Tensor, coef: float) -> TokenTerm:
    """lambda_1 L_MTP of the heads' summed losses and numbers of labels (K,), its metrics and their weights."""
    if sums is None or counts is None:
        return 0.0, {}, {}
    metrics, weights = head_means("mtp/token_loss", sums.detach(), counts)
    return coef * sums.sum() / (len(sums) * num_items), metrics, weights


def head_means(name: str, sums: Tensor, counts: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """[`~rl_plugins.signals.per_head_means`] of all ranks, and how many targets each is a mean over."""
    sums, counts = sum_over_ranks(sums), sum_over_ranks(counts)
    weights = {name: counts.sum(), **{f"{name}/head_{k + 1}": count for k, count in enumerate(counts)}}
    return per_head_means(name, sums, counts), weights


class HeadsModule(LanguageModule):
    """A [`LanguageModule`] with MTP heads, or native MTP layers in their place: their optimizer group, target heads,
    metrics and export."""

    head_training: HeadTraining
    native_training: NativeTraining | None = None
    head_learning_rate: float | None
    target_tau: float
    target_update_every: int | None
    _gradients: Tensor | None = None

    def train_heads(
        self,
        source: object,
        *,
        head_learning_rate: float | None,
        target_tau: float,
        target_update_every: int | None,
        **settings: Any,
    ) -> None:
        """Attach heads to the model, or go on with those that it has; `settings` are [`HeadTraining`]'s.

        Raises:
            ValueError: If a setting is out of range, or the model's heads are others.
        """
        check_at_least(0, head_learning_rate=head_learning_rate)
        check_at_least(1, target_update_every=target_update_every)
        check_polyak(target_tau=target_tau, target_update_every=target_update_every)
        self.head_learning_rate = head_learning_rate
        self.target_tau, self.target_update_every = target_tau, target_update_every
        self.head_training = HeadTraining(self.model, source, **settings)

    def train_native(self, *, head_learning_rate: float | None, **settings: Any) -> None:
        """Train native MTP layers instead; `settings` are [`NativeTraining`]'s.

        Raises:
            ValueError: If a setting is out of range, or the model's layers are others.
        """
        check_at_least(0, head_learning_rate=head_learning_rate)
        self.head_learning_rate = head_learning_rate
        self.native_training = NativeTraining(self.model, **settings)

    @property
    def _training(self) -> HeadTraining | NativeTraining:
        return self.native_training or self.head_training

    @property
    def mtp_heads(self) -> MTPHeads:
        """The heads, which are a submodule of the model."""
        return self.head_training.heads

    @property
    def polyak_target(self) -> PolyakTarget | None:
        """The slow heads; `None` for native layers, and without a trainer, where the online heads stand in for
        them."""
        return None if self._trainer is None or self.native_training is not None else target_of(self.trainer)

    def learning_rates(self) -> dict[str, float | None]:
        """The heads have their own."""
        return {self._training.attribute: self.head_learning_rate}

    def configure_callbacks(self) -> list[Callback]:
        """The target heads, unless the Trainer has its own; none for native layers."""
        callbacks = super().configure_callbacks()
        if self.native_training is not None:
            return callbacks
        return callbacks + polyak_callback(self.trainer, self.target_tau, self.target_update_every)

    def restore_hooks(self) -> None:
        """The heads run in a hook of the trunk."""
        self._training.hook()

    def on_after_backward(self) -> None:
        """Log what the backward passes of an optimizer step showed of the value gradient."""
        totals = self._training.gradient_totals(self)
        if totals is not None:
            self._gradients = totals if self._gradients is None else self._gradients + totals
        if self._gradients is not None and ends_window(self):
            (norms, clamped, tokens), self._gradients = self._gradients, None
            tokens = tokens.clamp(min=1.0)
            self.log_metrics({"critic/grad_norm": norms / tokens, "critic/grad_clamped": clamped / tokens})

    def _save_extras(self, directory: Path) -> None:
        self._training.save(directory)
