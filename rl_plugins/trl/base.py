"""What all our trainers share: how they log, weigh terms of the loss, read checkpoints, and balance experts."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import is_initialized
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl.trainer.base_trainer import _BaseTrainer

from rl_plugins.functional.masking import masked_moments
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sharding import announce_loss
from rl_plugins.nn.sources import check_trainable_dtype
from rl_plugins.nn.target_heads import TARGET_NAME
from rl_plugins.nn.value_model import ValueModel
from rl_plugins.signals.critic_targets import per_head_means, value_loss, value_losses
from rl_plugins.trl.inputs import check_callback, check_inputs
from rl_plugins.trl.moe_callback import MoEBalancingCallback

# By which checkpoints of our own trainers are told from one another.
MARKS = (MTPHeads.mark, TARGET_NAME, ValueModel.mark, "rollout_0.pt")


class PluginTrainer(_BaseTrainer):
    """A TRL trainer that appends numbers, reduced over ranks, to the host's metrics, which are averaged until the next
    log."""

    args: Any
    _metrics: Any
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _are_weights_renamed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        host = super().__init__
        given = inspect.signature(host).bind(*args, **kwargs).arguments
        check_inputs(given, given["args"])
        host(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # whose engine keeps float32 copies
            check_trainable_dtype(self.model)
        self._connect_balancing()

    def add_callback(self, callback: Any) -> None:
        """Add a callback, if it is one of transformers' `Trainer`.

        Raises:
            TypeError: If it is of another host.
        """
        check_callback(callback)
        super().add_callback(callback)

    # Resuming

    def _own_files(self) -> dict[str, bool]:
        """Files that this trainer writes into a checkpoint, beside those of the host, and whether they have to be
        there."""
        return {}

    def _check_checkpoint(self, directory: Path) -> None:
        """Refuse a folder that this trainer cannot resume from, before anything is loaded.

        Raises:
            FileNotFoundError: If it is not there, is no checkpoint, or was written by another trainer.
        """
        given = f"resume_from_checkpoint={str(directory)!r}"
        if not directory.is_dir():
            raise FileNotFoundError(f"{given}: there is no such folder. Check the path.")
        instead = f"Start from it with model={str(directory)!r} instead of resume_from_checkpoint."
        if not (directory / TRAINER_STATE_NAME).is_file():
            raise FileNotFoundError(
                f"{given} is a model, or was written by another trainer: it has no {TRAINER_STATE_NAME}. {instead}"
            )
        own = self._own_files()
        missing = [name for name, needed in own.items() if needed and not (directory / name).is_file()]
        foreign = [name for name in MARKS if name not in own and (directory / name).is_file()]
        if missing or foreign:
            signs = [f"it has no {', '.join(missing)}"] if missing else []
            signs += [f"it has {', '.join(foreign)}"] if foreign else []
            raise FileNotFoundError(
                f"{given} was written by another trainer than this {type(self).__name__}, or with other settings: "
                f"{' and '.join(signs)}. {instead}"
            )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, after a look at the launcher and the checkpoint to resume from.

        Raises:
            FileNotFoundError: If the checkpoint is not there, or was written by another trainer.
            ValueError: If DeepSpeed is asked for in a process that no launcher has started.
        """
        launched = is_initialized() or "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
        if self.is_deepspeed_enabled and not launched:
            raise ValueError(
                "DeepSpeed needs a launcher, even for one process, and this one was started without. Run the script "
                "with `accelerate launch`, `torchrun` or `deepspeed`, or leave out the DeepSpeed config."
            )
        found, written = resume_from_checkpoint, Path(self.args.output_dir)
        if found is True:
            found = get_last_checkpoint(written) if written.is_dir() else None
        if found:
            self._check_checkpoint(Path(found))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _connect_balancing(self) -> None:
        """Put balancing callbacks where trackers and vLLM hear of them, and compute the router loss where the host
        cannot."""
        given = [c for c in self.callback_handler.callbacks if isinstance(c, MoEBalancingCallback)]
        for callback in given:
            callback.add_to(self)
        config = self.model.config.get_text_config()
        # TRL's fused forward reads this name, which deepseek_v3, glm4_moe, llama4, granitemoe and others do not have.
        if self.aux_loss_enabled and not hasattr(config, "num_experts"):
            self.aux_loss_enabled = config.output_router_logits = False
            if any(callback.config.aux_loss_coef > 0.0 for callback in given):
                raise ValueError("Give either router_aux_loss_coef or MoEBalancingCallback(aux_loss_coef=...).")
            coef = self.router_aux_loss_coef
            try:
                if given:
                    given[0].add_loss(coef).add_to(self)
                else:
                    MoEBalancingCallback(rate=0.0, aux_loss_coef=coef, record_load=False).add_to(self)
            except (TypeError, ValueError) as error:
                error.add_note("Or set router_aux_loss_coef=0.0 to train without a router loss.")
                raise

    # transformers' save_pretrained writes the experts of some architectures under other names, one by one, and its
    # Trainer reads such a file with load_state_dict(strict=False): the experts would silently stay as they are.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed_weights(str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self._are_weights_renamed = bool(load_result.missing_keys and load_result.unexpected_keys)
        if not self._are_weights_renamed:
            super()._issue_warnings_after_load(load_result)

    def _load_renamed_weights(self, directory: str) -> None:
        if self._are_weights_renamed:
            base = base_model_of(self.model)
            saved = type(base).from_pretrained(directory, dtype=base.dtype)
            base.load_state_dict(saved.state_dict(), strict=False)
            self._are_weights_renamed = False

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, reduction="sum")

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_metrics(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            # Explained variance of a constant return is undefined; a hole says so without spoiling the mean.
            if not value.isnan():
                self._metrics[self._mode][name].append(value.item())

    def _log_mean(self, name: str, x: Tensor, mask: Tensor) -> None:
        self._log_metrics({name: masked_moments(x.detach(), mask, reduce=self._sum_over_ranks)[0]})

    def _log_per_head(self, name: str, sums: Tensor, counts: Tensor) -> None:
        sums, counts = self._sum_over_ranks(torch.stack([sums, counts]).flatten()).view(2, -1)
        self._log_metrics(per_head_means(name, sums, counts))

    # Terms of the loss

    def _lm_head(self) -> nn.Module:
        lm_head = base_model_of(self.accelerator.unwrap_model(self.model)).get_output_embeddings()
        assert lm_head is not None
        return lm_head

    def _token_term(self, run: HeadRun, num_items: Tensor) -> Tensor | float:
        """lambda_1 L_MTP."""
        if run.token_losses is None or run.token_counts is None:
            return 0.0
        self._log_per_head("mtp/token_loss", run.token_losses.detach(), run.token_counts)
        term = self.args.mtp_loss_coef * run.token_losses.sum() / (len(run.token_losses) * num_items)
        announce_loss(self.model, term)
        return term

    def _value_term(
        self, values: Tensor, returns: Tensor, mask: Tensor, num_items: Tensor, old_values: Tensor
    ) -> Tensor:
        """lambda_2 L_TD of values (B, T, K) with gradient."""
        loss, sums, counts = value_loss(
            values,
            returns,
            mask,
            num_items=num_items,
            loss=value_losses(self.args.value_clip_range)[self.args.value_loss_type],
            old_values=old_values,
        )
        self._log_per_head("critic/value_loss", sums, counts)
        term = self.args.value_loss_coef * loss
        announce_loss(self.model, term)
        return term

    def _checkpoint_dir(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
