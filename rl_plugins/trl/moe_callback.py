"""MoE load balancing in any transformers `Trainer`."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from rl_plugins.moe.balancer import RouterBalancer, get_router_balancer
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.load_log import LoadLog
from rl_plugins.report.expert_load import LOAD_FILE_NAME, append_load
from rl_plugins.trl.callbacks import TrainerOnly
from rl_plugins.trl.host import own_router_loss, stream_biases_to_vllm


class MoEBalancingCallback(TrainerOnly, TrainerCallback, ExportableState):
    """Balances the experts of the model that a `Trainer` trains: by a selection bias, auxiliary losses, or both.

    ```python
    trainer = SFTTrainer(..., callbacks=[MoEBalancingCallback(rate=1e-3)])
    ```

    or `MoEBalancingCallback(rate=1e-3).add_to(trainer)`, which also brings `moe/...` to the trackers of `report_to`
    and the biases to vLLM; our own trainers do that by themselves. The metrics appear in the log, and the load of
    every expert in `moe_load.jsonl` in the output directory (draw it with `rl_plugins.report.plot_expert_load`).

    The logged `loss` stays the host's: the gradient of an auxiliary loss is added on the way back, and its value is
    `moe/aux_loss`. Biases are part of the trainer's checkpoints.

    Args:
        config: Settings; the defaults of [`BalancingConfig`] if not given.
        record_load: Write `moe_load.jsonl`.
        settings: Fields of [`BalancingConfig`] that differ from `config`.

    Raises:
        TypeError: When the model arrives, if it cannot be balanced.
        ValueError: For settings out of range; before training, for a schedule that never starts, an auxiliary loss
            beside the host's own, or float16.
    """

    def __init__(self, config: BalancingConfig | None = None, *, record_load: bool = True, **settings: Any) -> None:
        self.config = dataclasses.replace(config or BalancingConfig(), **settings)
        self.record_load = record_load
        self.balancer: RouterBalancer | None = None
        self._trainer: Trainer | None = None
        self._log = LoadLog()

    def add_to(self, trainer: Trainer) -> "MoEBalancingCallback":
        """Put the callback into a trainer, before its trackers, and connect it with vLLM where the trainer uses it.

        Raises:
            TypeError: If the model cannot be balanced.
            ValueError: If vLLM would route without the biases.
        """
        again = self._trainer is trainer
        self._connect(trainer)
        self._attach(trainer.model)
        generation = getattr(trainer, "vllm_generation", None)
        assert self.balancer is not None
        if generation is not None and not again:
            stream_biases_to_vllm(generation, [router for router in self.balancer.routers if router.has_bias])
        return self

    def add_loss(self, coef: float) -> "MoEBalancingCallback":
        """Add the auxiliary loss with a coefficient to what the callback does already."""
        self.config = dataclasses.replace(self.config, aux_loss_coef=coef, count_only=False)
        self._detach()
        return self

    def _connect(self, trainer: Trainer) -> None:
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]

    def _attach(self, model: nn.Module) -> None:
        if self.balancer is None:
            present = get_router_balancer(model)
            if present is not None:
                # The trainer has made this callback anew from a checkpoint; the old one is gone.
                present.detach()
                if present.host is not None and self in present.host.callback_handler.callbacks:
                    self._connect(present.host)
            self.balancer = RouterBalancer(model, self.config)
        self.balancer.host = self._trainer

    def _detach(self) -> None:
        if self.balancer is not None:
            self.balancer.detach()
            self.balancer = None

    # Events

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model before any engine wraps it."""
        self._attach(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that host and settings agree, and go on from a checkpoint."""
        self._attach(kwargs["model"])
        self.config.check_schedule(state.max_steps)
        self._check_host(args, kwargs["model"])
        if isinstance(state.stateful_callbacks.get(type(self).__name__), list):
            raise ValueError("The trainer has two MoEBalancingCallbacks. Put both settings into one.")
        if type(self).__name__ not in state.stateful_callbacks:
            # A checkpoint from a run without this callback: the trainer would not find it when it saves.
            self._detach()
            self._attach(kwargs["model"])
            state.stateful_callbacks[type(self).__name__] = self.state()
        elif state.global_step > 0:
            self._load_biases(state)
        else:
            assert self.balancer is not None
            self.balancer.read_again()

    def _load_biases(self, state: TrainerState) -> None:
        """Take over the biases of a checkpoint, if it was written with this callback."""
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        biases = saved.get("attributes", {}).get("biases")
        if biases is not None:
            assert self.balancer is not None
            self.balancer.load_state_dict({name: torch.tensor(bias) for name, bias in biases.items()})

    def _check_host(self, args: TrainingArguments, model: nn.Module) -> None:
        if self.config.has_loss and args.fp16:
            raise ValueError(
                "Auxiliary losses of MoEBalancingCallback do not know float16's loss scale. Train with bf16=True, or "
                "with a selection bias only (aux_loss_coef=0, z_loss_coef=0)."
            )
        own = own_router_loss(args if self._trainer is None else self._trainer, model)
        if own and self.config.aux_loss_coef > 0.0:
            raise ValueError(
                f"The host adds the model's own router loss already (coefficient {own}). Turn it off with "
                "router_aux_loss_coef=0.0 (TRL) or model.config.output_router_logits=False (transformers), or set "
                "aux_loss_coef=0."
            )
        if own and self.config.rate > 0.0:
            warnings.warn(
                f"The model's own router loss is on (coefficient {own}) beside the selection bias. Set "
                "router_aux_loss_coef=0.0 (TRL) or model.config.output_router_logits=False (transformers) for "
                "balancing without a loss.",
                stacklevel=2,
            )
        if self._trainer is None:
            assert self.balancer is not None
            added = any(router.injected is not None for router in self.balancer.routers)
            if getattr(args, "use_vllm", False) and (self.config.rate > 0.0 or added):
                raise ValueError("vLLM needs the biases: use MoEBalancingCallback(...).add_to(trainer).")
            if args.report_to:
                warnings.warn(
                    f"moe/... metrics come too late for {', '.join(args.report_to)}: callbacks=[...] puts this "
                    "callback behind the trackers. Use MoEBalancingCallback(...).add_to(trainer).",
                    stacklevel=2,
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weigh each micro-batch's auxiliary loss like the host weighs its loss."""
        assert self.balancer is not None
        steps = args.gradient_accumulation_steps
        if self._trainer is not None:
            # The last window of an epoch may be shorter.
            steps = self._trainer.current_gradient_accumulation_steps
        self.balancer.loss_scale = 1.0 / steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the biases after each optimizer step (DeepSpeed's engine steps inside `backward`)."""
        assert self.balancer is not None
        metrics = self.balancer.update((state.global_step - 1) / state.max_steps)
        self._log.add(metrics, self.balancer.last_counts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is left; where the trainer has gone back to its best model, go back to its biases."""
        self._write_load(args, state, self._log.flush()[1])
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = Path(state.best_model_checkpoint) / TRAINER_STATE_NAME
            self._load_biases(TrainerState.load_from_json(str(path)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics since the last log to those of training."""
        if logs is None or "loss" not in logs:
            return
        metrics, counts = self._log.flush()
        logs.update(metrics)
        state.log_history[-1].update(metrics)
        self._write_load(args, state, counts)

    def _write_load(self, args: TrainingArguments, state: TrainerState, counts: list[list[int]]) -> None:
        if self.record_load and counts and state.is_world_process_zero:
            assert self.balancer is not None
            layers = [router.name for router in self.balancer.routers]
            append_load(Path(args.output_dir) / LOAD_FILE_NAME, state.global_step, layers, counts)

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """What the trainer writes into `trainer_state.json`: settings and float32 biases."""
        biases = None
        if self.balancer is not None:
            biases = {name: bias.tolist() for name, bias in self.balancer.state_dict().items()}
        args = {**dataclasses.asdict(self.config), "record_load": self.record_load}
        return {"args": args, "attributes": {"biases": biases}}
