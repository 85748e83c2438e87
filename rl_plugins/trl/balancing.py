"""MoE load balancing in any transformers `Trainer`."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from rl_plugins.moe.balancer import get_router_balancer
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.load_log import LOAD_FILE_NAME
from rl_plugins.moe.routers import is_attached
from rl_plugins.moe.run import BalancingRun
from rl_plugins.trl.callbacks import TrainerOnly
from rl_plugins.trl.card_text import BIAS_CODE, CARD, Method, balancing_parts, complete_card
from rl_plugins.trl.host import own_router_loss, stream_biases_to_vllm


class MoEBalancingCallback(TrainerOnly, TrainerCallback, ExportableState):
    """Balances the experts of the model that a `Trainer` trains: by a selection bias, auxiliary losses, or both.

    ```python
    trainer = SFTTrainer(..., callbacks=[MoEBalancingCallback(rate=1e-3)])
    ```

    or `MoEBalancingCallback(rate=1e-3).add_to(trainer)`, which also brings `moe/...` to the trackers of `report_to`
    and the biases to vLLM; our own trainers do that by themselves. The metrics appear in the log, and the load of
    every expert in `moe_load.jsonl` in the output directory (draw it with `rl_plugins.report.plot_expert_load`).

    The logged `loss` is still the host's own: the gradient of an auxiliary loss is added in the backward pass, and the
    metric `moe/aux_loss` has its value. Biases are part of the trainer's checkpoints.

    Args:
        config: Settings; the defaults of [`BalancingConfig`] if not given.
        record_load: Whether to write `moe_load.jsonl`.
        settings: Fields of [`BalancingConfig`] that differ from `config`.

    Raises:
        TypeError: If the model cannot be balanced; this is checked once the callback gets the model.
        ValueError: If a setting is out of range; before training, if the schedule never starts, an auxiliary loss
            would come on top of the host's own, or training is in float16.
    """

    def __init__(self, config: BalancingConfig | None = None, *, record_load: bool = True, **settings: Any) -> None:
        self.config = dataclasses.replace(config or BalancingConfig(), **settings)
        self.record_load = record_load
        self.run: BalancingRun | None = None
        self._trainer: Trainer | None = None

    def add_to(self, trainer: Trainer) -> "MoEBalancingCallback":
        """Put the callback into a trainer, before its trackers, and connect it with vLLM where the trainer uses it.

        Raises:
            TypeError: If the model cannot be balanced.
            ValueError: If vLLM would route without the biases.
        """
        again = self._trainer is trainer
        self._connect(trainer)
        if self.run is not None and self.run.balancer.lacks_routers():
            self._detach()  # since then the model has got sequential heads
        routers = self._run_on(trainer.model).balancer.routers
        generation = getattr(trainer, "vllm_generation", None)
        if generation is not None and not again:
            biased = [router for router in routers if router.has_bias]
            stream_biases_to_vllm(generation, [router for router in biased if not is_attached(router.name)])
        return self

    def add_loss(self, coef: float) -> "MoEBalancingCallback":
        """Add an auxiliary loss with a coefficient to the settings of this callback."""
        self.config = dataclasses.replace(self.config, aux_loss_coef=coef, count_only=False)
        self._detach()
        return self

    def _connect(self, trainer: Trainer) -> None:
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]

    def _run_on(self, model: nn.Module) -> BalancingRun:
        """Return the run of this callback; if there is none yet, make one that is attached to the model."""
        if self.run is None:
            self._take_over(model)
            self.run = BalancingRun(model, self.config, driver=self)
        return self.run

    def _take_over(self, model: nn.Module) -> None:
        """Detach the balancer of a callback that is no longer in use, and take that callback's place."""
        # With `restore_callback_states_from_checkpoint=True` a resumed run goes like this:
        #   1. `Trainer.__init__` calls `on_init_end` of the callback A that the user made: A attaches to the model.
        #   2. The user, or our trainer, calls `A.add_to(trainer)`: A knows the trainer, and stands before trackers.
        #   3. `Trainer.train` reads `trainer_state.json`, makes a callback B from what `A.state()` gave there, takes A
        #      out of its list and puts B at the end. Nobody tells A or B.
        #   4. `on_train_begin` of B finds A's balancer on the model, and A as its driver. B detaches that balancer,
        #      asks A for the trainer, and moves to the front.
        #   5. B attaches a balancer of its own, and loads the biases of the checkpoint.
        present = get_router_balancer(model)
        if present is None:
            return
        present.detach()
        if isinstance(present.driver, MoEBalancingCallback):
            trainer = present.driver._trainer
            # Not if this callback is one of two, or if an earlier trainer had the model.
            if trainer is not None and self in trainer.callback_handler.callbacks:
                self._connect(trainer)

    def _detach(self) -> None:
        if self.run is not None:
            self.run.detach()
            self.run = None

    # Events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Attach to the model before any engine wraps it."""
        self._run_on(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Check that host and settings agree, and load the biases of a checkpoint when training resumes."""
        run, name = self._run_on(kwargs["model"]), type(self).__name__
        self._check_host(args, kwargs["model"])
        if isinstance(state.stateful_callbacks.get(name), list):
            raise ValueError("The trainer has two MoEBalancingCallbacks. Put both settings into one.")
        if name not in state.stateful_callbacks:
            # A checkpoint from a run without this callback; its biases have come with the model. The trainer needs
            # this entry when it saves.
            self._detach()
            run = self._run_on(kwargs["model"])
            state.stateful_callbacks[name] = self.state()
        records = self.record_load and state.is_world_process_zero
        run.start(
            state.max_steps,
            float16=args.fp16,
            log_file=Path(args.output_dir) / LOAD_FILE_NAME if records else None,
            biases=self._saved_biases(state) if state.global_step > 0 else None,
        )

    def _saved_biases(self, state: TrainerState) -> dict[str, Tensor] | None:
        """Return the biases of a checkpoint, if it was written with this callback."""
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        biases = saved.get("attributes", {}).get("biases")
        return None if biases is None else {name: torch.tensor(bias) for name, bias in biases.items()}

    def _check_host(self, args: TrainingArguments, model: nn.Module) -> None:
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
            added = any(router.injected is not None for router in self._run_on(model).balancer.routers)
            if getattr(args, "use_vllm", False) and (self.config.rate > 0.0 or added):
                raise ValueError("vLLM needs the biases: use MoEBalancingCallback(...).add_to(trainer).")
            if args.report_to:
                warnings.warn(
                    f"moe/... metrics come too late for {', '.join(args.report_to)}: callbacks=[...] puts this "
                    "callback behind the trackers. Use MoEBalancingCallback(...).add_to(trainer).",
                    stacklevel=2,
                )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Give each micro-batch's auxiliary loss the weight that the host gives to its own loss."""
        steps = args.gradient_accumulation_steps
        if self._trainer is not None:
            # The last window of an epoch may be shorter.
            steps = self._trainer.current_gradient_accumulation_steps
        self._run_on(kwargs["model"]).before_step(1.0 / steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the biases after each optimizer step (DeepSpeed's engine steps inside `backward`)."""
        self._run_on(kwargs["model"]).after_step((state.global_step - 1) / state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics since the last log to those of training."""
        if logs is None or "loss" not in logs:
            return  # an evaluation, or the summary at the end
        metrics = self._run_on(kwargs["model"]).log(state.global_step)
        logs.update(metrics)
        # The trainer has copied `logs` into its history before it calls this.
        state.log_history[-1].update(metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log the last steps; if the trainer has loaded its best model, load the biases of that model."""
        run = self._run_on(kwargs["model"])
        run.log(state.global_step)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = Path(state.best_model_checkpoint) / TRAINER_STATE_NAME
            biases = self._saved_biases(TrainerState.load_from_json(str(path)))
            if biases is not None:
                run.load_state_dict(biases)

    # Checkpoints

    def describe(self, method: Method) -> Method:
        """Add to the description of a training how experts are balanced, and how to load biases that were added."""
        routers, code = [] if self.run is None else self.run.balancer.routers, method.code
        if any(router.injected is not None or router.is_rounded for router in routers):
            code = (*code, ("Loading the selection biases", BIAS_CODE))
        return dataclasses.replace(method, parts=(*method.parts, *balancing_parts(self.config)), code=code)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Complete the model card of a trainer that is not ours, if it has written one; ours call [`describe`]."""
        card = Path(str(args.output_dir)) / CARD
        if not state.is_world_process_zero or not card.is_file():
            return
        if "with rl_plugins" not in card.read_text(encoding="utf-8"):
            method = self.describe(Method(""))
            complete_card(card, method, trained_by=type(self).__name__, hub_id=args.hub_model_id)

    def state(self) -> dict[str, Any]:
        """Return settings and float32 biases, which the trainer writes into `trainer_state.json`."""
        biases = None
        if self.run is not None:
            biases = {name: bias.tolist() for name, bias in self.run.state_dict().items()}
        args = {**dataclasses.asdict(self.config), "record_load": self.record_load}
        return {"args": args, "attributes": {"biases": biases}}
