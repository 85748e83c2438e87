"""Options of the policy loss, for every trainer that has one."""

import warnings
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from rl_plugins.functional.policy_losses.aggregation import AGGREGATIONS
from rl_plugins.signals.checks import check_choice
from rl_plugins.signals.policy import POLICY_LOSSES, PolicyLoss
from rl_plugins.trl.speculative_config import SpeculativeArguments

# Which of TRL's loss types averages like this; it carries the KL term, so that KL and policy loss share their units.
# None averages like `prompt`: there the trainer adds the KL term itself.
CARRIERS = {
    "token": "dapo",
    "prompt": "dapo",
    "micro_batch": "bnpo",
    "sequence": "grpo",
    "constant": "dr_grpo",
    "sequence_sum": "luspo",
}
HOST_LOSSES = {*CARRIERS.values(), "cispo", "sapo", "vespo"}
# TRL's field for an option of a loss.
HOST_FIELDS = {
    "epsilon_low": "epsilon",
    "epsilon_high": "epsilon_high",
    "delta": "delta",
    "level": "importance_sampling_level",
    "temperature_pos": "sapo_temperature_pos",
    "temperature_neg": "sapo_temperature_neg",
    "k_pos": "vespo_k_pos",
    "lambda_pos": "vespo_lambda_pos",
    "k_neg": "vespo_k_neg",
    "lambda_neg": "vespo_lambda_neg",
}


class SingleGeneration(int):
    """1 that passes GRPO's check for at least two generations, which advantages without a group do not need."""

    def __lt__(self, other: object) -> bool:
        return False


def field_default(config: type, name: str) -> Any:
    """Default of a field of a dataclass."""
    (found,) = [f for f in fields(config) if f.name == name]
    return found.default


@dataclass
class PolicyLossArguments(SpeculativeArguments):
    r"""
    Options of the policy loss, mixed into the trainers' configs; those of [`SpeculativeArguments`] apply as well.

    Parameters:
        > Parameters that control the policy loss

        policy_loss (`str`, *optional*):
            Loss per token, by name: those of TRL (`"grpo"`, `"dapo"`, `"dr_grpo"`, `"bnpo"`, `"luspo"`, `"cispo"`,
            `"sapo"`, `"vespo"`) and `"ppo_clip"`, `"vanilla"`, `"gpg"`, `"gspo_token"`, `"gmpo"`, `"dppo"`, `"fipo"`,
            `"bapo"`, `"cpgd"`, `"clip_cov"`, `"kl_cov"`, `"gvpo"`. `None` leaves the loss to TRL's `loss_type`.
        policy_loss_kwargs (`dict` or `str`, *optional*):
            Options of the loss, such as `{"ratio": 0.0002}` for `"clip_cov"`. What is not given comes from TRL's
            field of that meaning (`epsilon`, `epsilon_high`, `delta`, ...) where that is set, else from the paper.
        aggregation (`str`, *optional*):
            How the loss is averaged: `"token"` (TRL's `dapo`), `"prompt"` (DAPO's equation, CISPO, ScaleRL),
            `"sequence"` (GRPO), `"constant"` (Dr. GRPO), `"sequence_sum"` (LUSPO) or `"micro_batch"` (BNPO). Defaults
            to what the loss is used with.
    """

    policy_loss: str | None = field(
        default=None,
        metadata={"help": "Policy loss by name (None: TRL's loss_type).", "choices": [*POLICY_LOSSES]},
    )
    policy_loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the policy loss, as a dict or a JSON string."}
    )
    aggregation: str | None = field(
        default=None,
        metadata={"help": "How the policy loss is averaged (default: as usual for it).", "choices": [*AGGREGATIONS]},
    )

    @property
    def groupless(self) -> bool:
        """Whether advantages need no group, so that one completion per prompt will do."""
        return True

    @property
    def own_advantages(self) -> str | None:
        """Where the advantages come from, in a few words; `None` leaves them to the host."""
        return None

    @property
    def scales_rewards_like(self) -> str | None:
        """The host's `scale_rewards` that our own advantages are the same as, if there is one."""
        return None

    def __post_init__(self) -> None:
        generations: Any = getattr(self, "num_generations", None)
        if self.groupless and generations == 1:
            self.num_generations: Any = SingleGeneration(1)
        super().__post_init__()  # type: ignore[misc]  # the host's, which parses JSON strings
        self.num_generations = generations
        self.settle_policy_loss()
        self.check_host_advantages()
        self.check_speculation()

    def make_policy_loss(self) -> PolicyLoss | None:
        """The loss that the options name; `None` leaves it to the host.

        Raises:
            ValueError: If a name or an option is unknown.
        """
        name = self.policy_loss
        if name is None:
            if self.aggregation is None and not self.policy_loss_kwargs:
                return None
            name = str(getattr(self, "loss_type", "dapo"))
        check_choice("policy_loss", name, POLICY_LOSSES)
        kwargs = self.policy_loss_kwargs or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f"policy_loss_kwargs must be a dict or JSON of one, got {kwargs!r}.")
        return PolicyLoss(name, self.aggregation or "", {**self._host_options(name), **kwargs})

    def _host_options(self, name: str) -> dict[str, Any]:
        """What TRL's own fields say about the options of a loss: those that differ from TRL's defaults."""
        accepted = PolicyLoss.accepted(name)
        options = {
            option: getattr(self, host)
            for option, host in HOST_FIELDS.items()
            if option in accepted and getattr(self, host) != field_default(GRPOConfig, host)
        }
        if "epsilon_low" in options and "epsilon_high" in accepted:
            options.setdefault("epsilon_high", options["epsilon_low"])  # as in TRL
        return options

    def settle_policy_loss(self) -> None:
        """Validate, and let TRL's `loss_type` carry the terms beside the policy loss in the same units.

        Raises:
            ValueError: If a name or an option is unknown.
        """
        loss = self.make_policy_loss()
        if loss is None:
            return
        self._check_loss_fields(loss)
        self.policy_loss, self.aggregation = loss.name, loss.aggregation
        self.loss_type: str = CARRIERS[loss.aggregation]

    def _check_loss_fields(self, loss: PolicyLoss) -> None:
        """Refuse fields of the host that this loss does not read; the host's own losses are spared, as in TRL."""
        host_fields: Any = self
        carrier = CARRIERS[loss.aggregation]
        if self.loss_type not in (field_default(GRPOConfig, "loss_type"), loss.name, carrier):
            warnings.warn(
                f"loss_type={self.loss_type!r} has no effect: policy_loss={loss.name!r} takes its place.", stacklevel=4
            )
        accepted = PolicyLoss.accepted(loss.name)
        # The host's KL term, where it is corrected, has a ratio at this level, too.
        corrected = host_fields.beta != 0.0 and host_fields.use_bias_correction_kl
        kept = {"level"} if corrected or loss.name == "gspo_token" else set()
        for option, host in HOST_FIELDS.items() if loss.name not in HOST_LOSSES else ():
            if option in accepted or option in kept or getattr(self, host) == field_default(GRPOConfig, host):
                continue
            reads = [HOST_FIELDS[name] for name in accepted if name in HOST_FIELDS]
            raise ValueError(
                f"{host}={getattr(self, host)!r} has no effect on policy_loss={loss.name!r}, which reads "
                f"{', '.join(reads) or 'none of the fields of TRL'}. Leave it out, or choose another loss."
            )

    def check_host_advantages(self) -> None:
        """Refuse fields of the host that are about its own advantages, where there are others.

        Raises:
            ValueError: If one is set.
        """
        source = self.own_advantages
        for name in ("scale_rewards", "multi_objective_aggregation") if source else ():
            value = getattr(self, name)
            same = name == "scale_rewards" and value == self.scales_rewards_like
            if value != field_default(GRPOConfig, name) and not same:
                raise ValueError(
                    f"{name}={value!r} has no effect: it is about TRL's own advantages, and here they "
                    f"come from {source}. Leave it at {field_default(GRPOConfig, name)!r}; rewards are summed with "
                    "reward_weights."
                )
