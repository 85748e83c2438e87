"""One training run with balanced experts, for any host: the methods that its callback calls, event by event."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rl_plugins.moe.balancer import RouterBalancer
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.load_log import ExpertLoadLog, append_expert_load


class BalancingRun:
    """Balances the experts of a model over a training run: checks settings, moves biases, keeps the log of loads.

    ```python
    run = BalancingRun(model, BalancingConfig(rate=1e-3))  # before an engine wraps the model, if possible
    run.start(num_steps, log_file=Path("outputs/moe_load.jsonl"), biases=checkpoint)
    for step in range(num_steps):
        run.before_step(loss_scale=1 / len(micro_batches))
        ...  # forwards, backwards, the optimizer's step
        run.after_step(step / num_steps)
        if (step + 1) % 10 == 0:
            print(run.log(step + 1))
    run.detach()
    ```

    Args:
        model: Causal LM, or a PEFT model around one.
        config: Settings.
        driver: The object that calls the methods, so that another driver can take over from it (see
            [`get_router_balancer`]).

    Raises:
        TypeError: If the model cannot be balanced.
        ValueError: If it is being balanced already, or the settings do not fit it.
    """

    def __init__(self, model: nn.Module, config: BalancingConfig, *, driver: Any = None) -> None:
        self.config = config
        self.balancer = RouterBalancer(model, config)
        self.balancer.driver = driver
        self._log_file: Path | None = None
        self._load = ExpertLoadLog()

    def start(
        self,
        num_steps: int | None,
        *,
        float16: bool = False,
        log_file: Path | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin the training, once an engine has the model.

        Args:
            num_steps: Optimizer steps of the training; `None` if unknown.
            float16: Whether the host trains in float16, with a loss scale.
            log_file: File that the load of every expert is appended to; `None` on all ranks but one, or for no file.
            biases: Float32 biases of a checkpoint to go on from, as [`state_dict`] gave them.

        Raises:
            ValueError: For a schedule that never starts, an auxiliary loss in float16, or biases of another model.
        """
        if num_steps is not None:
            self.config.check_schedule(num_steps)
        if float16 and self.config.has_loss:
            # The gradient of this loss is added in the backward pass, when the host's loss has been scaled already.
            raise ValueError(
                "The auxiliary losses of balancing do not know float16's loss scale. Train in bfloat16, or with a "
                "selection bias only (aux_loss_coef=0, z_loss_coef=0)."
            )
        self._log_file = log_file
        if biases is None:
            # The engine may have given the model other numbers than it had when the balancer read them.
            self.balancer.read_again()
        else:
            self.balancer.load_state_dict(biases)

    def before_step(self, loss_scale: Tensor | float, row_scale: Tensor | float | None = None) -> None:
        """Weigh the auxiliary losses of the coming micro-batches; call before their backward.

        Args:
            loss_scale: Factor by which the host multiplies the loss of a micro-batch.
            row_scale: Factor for the loss per sequence, where rows have other weights than tokens.
        """
        self.balancer.scale_losses(loss_scale, row_scale)

    def after_step(self, progress: float) -> dict[str, Tensor]:
        """Move the biases after an optimizer step, on all ranks.

        Args:
            progress: Share of the training that was over before this step, in [0, 1).

        Returns:
            Metrics of this step, see [`RouterBalancer.update`].
        """
        # The counts are summed over ranks already, so that the file of one rank has those of all.
        metrics = self.balancer.update(progress)
        self._load.add(metrics, self.balancer.last_counts)
        return metrics

    def log(self, step: int) -> dict[str, float]:
        """Append the loads since the last call to the file.

        Args:
            step: Optimizer steps done.

        Returns:
            Metrics, each the mean over the steps since the last call; empty where no step was made.
        """
        # On every rank, also where no file is written: otherwise sums and metrics would pile up there.
        metrics, counts = self._load.flush()
        if self._log_file is not None and counts:
            layers = [router.name for router in self.balancer.routers]
            append_expert_load(self._log_file, step, layers, counts)
        return metrics

    def detach(self) -> None:
        """Take the hooks off the model; added biases stay."""
        self.balancer.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the float32 biases by router, on the CPU."""
        return self.balancer.state_dict()

    def load_state_dict(self, biases: Mapping[str, Tensor]) -> None:
        """Go on with saved biases.

        Raises:
            ValueError: If they belong to other routers, or another number of experts; nothing is changed then.
        """
        self.balancer.load_state_dict(biases)
