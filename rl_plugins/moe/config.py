"""Settings of the balancing of experts."""

from dataclasses import dataclass
from typing import Literal, get_args

from rl_plugins.functional.routing import BiasRule, Scoring
from rl_plugins.settings import settle_numbers

BalanceBatch = Literal["local", "accumulated", "global"]
AuxLossType = Literal["layer", "pooled", "sequence"]


@dataclass(frozen=True)
class BalancingConfig:
    """Settings of [`RouterBalancer`]: a selection bias, auxiliary losses, or both; or neither, and it only counts.

    Args:
        rate: Step u of the selection bias per optimizer step (2408.15664, algorithm 1), in the units of the router's
            scores: probabilities for softmax and sigmoid routers, logits for gpt_oss, granitemoe and llama4. 0 leaves
            the biases alone.
        rule: Rule by which the bias moves; see `functional.selection_bias_update`.
        start: Share of the training after which the bias begins to move, in [0, 1).
        stop: Share of the training after which the bias stands still, in (start, 1]. DeepSeek-V3 (2412.19437, section
            4.2) stopped after 14.3 of 14.8 trillion tokens: 0.966.
        aux_loss_coef: Coefficient alpha of the load-balancing loss, averaged over layers. Its scale is transformers'
            `router_aux_loss_coef`.
        aux_loss_type: `"layer"`: Switch (2101.03961, equation 4) for each layer. `"pooled"`: over all layers at once,
            as transformers computes it. `"sequence"`: DeepSeek-V3 (equation 17), per sequence.
        z_loss_coef: Coefficient of the router z-loss (2202.08906, equation 5), averaged over layers.
        batch: Tokens over which the load f of the auxiliary loss is counted: this micro-batch of this rank
            (`"local"`), the micro-batches since the last optimizer step (`"accumulated"`), or those of all ranks
            (`"global"`, 2501.11873).
        scoring: Whether routers score experts by softmax or sigmoid, where their code does not show it.
        count_only: Count and log the load, and balance nothing; needs `rate=0` and no loss.

    Raises:
        TypeError: For a value that is no number.
        ValueError: For a value out of range, a schedule that never starts, or `rate=0` without a loss.
    """

    rate: float = 1e-3
    rule: BiasRule = "sign"
    start: float = 0.0
    stop: float = 1.0
    aux_loss_coef: float = 0.0
    aux_loss_type: AuxLossType = "layer"
    z_loss_coef: float = 0.0
    batch: BalanceBatch = "local"
    scoring: Scoring | None = None
    count_only: bool = False

    def __post_init__(self) -> None:
        settle_numbers(self)
        for name in ("rate", "aux_loss_coef", "z_loss_coef"):
            # Written so that NaN is refused, too.
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 (off) or more.")
        for name, choices in (("rule", BiasRule), ("aux_loss_type", AuxLossType), ("batch", BalanceBatch)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}.")
        if self.scoring is not None and self.scoring not in get_args(Scoring):
            raise ValueError(f"scoring={self.scoring!r}: choose one of {', '.join(get_args(Scoring))}, or None.")
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(
                f"start={self.start}, stop={self.stop}: the bias would never move, or the shares of the training are "
                "out of range. Give 0 <= start < stop <= 1."
            )
        if self.batch != "local" and self.aux_loss_type == "sequence":
            raise ValueError(
                f"batch={self.batch!r} does not go with aux_loss_type='sequence', which counts each sequence alone. "
                "Set batch='local', or choose another aux_loss_type."
            )
        # Counting alone must be asked for: otherwise a forgotten coefficient would silently balance nothing.
        if self.count_only == (self.rate > 0.0 or self.has_loss):
            raise ValueError(
                f"count_only=True balances nothing, but rate={self.rate}, aux_loss_coef={self.aux_loss_coef} and "
                f"z_loss_coef={self.z_loss_coef}. Set all three to 0, or leave out count_only."
                if self.count_only
                else "rate=0 without a loss balances nothing. Give rate > 0 (such as 1e-3), aux_loss_coef > 0 or "
                "z_loss_coef > 0, or count_only=True to log the load of the experts only."
            )

    @property
    def has_loss(self) -> bool:
        """Whether an auxiliary loss adds to the gradient."""
        return self.aux_loss_coef > 0.0 or self.z_loss_coef > 0.0

    def rate_at(self, progress: float) -> float:
        """Return the step of the bias after a share `progress` of the training.

        `stop=1.0` never stops the bias: a host may train for longer than it has announced.
        """
        return self.rate if self.start <= progress and (progress < self.stop or self.stop == 1.0) else 0.0

    def check_schedule(self, num_steps: int) -> None:
        """Refuse a schedule in which no optimizer step of this training moves the bias.

        Args:
            num_steps: Optimizer steps of the training; the progress of step i is i / num_steps.

        Raises:
            ValueError: If no step moves it.
        """
        if self.rate > 0.0 and not any(self.rate_at(step / num_steps) for step in range(num_steps)):
            raise ValueError(
                f"start={self.start}, stop={self.stop}: in {num_steps} optimizer steps the selection bias never "
                "moves. Widen the window, train longer, or set rate=0."
            )
