"""`BalancingConfig` refuses what cannot work, and says when the bias moves."""

import math
from typing import Any

import pytest

from rl_plugins.moe import BalancingConfig


def test_the_default_is_the_papers_rule_without_a_loss() -> None:
    config = BalancingConfig()
    assert (config.rate, config.rule, config.aux_loss_coef, config.z_loss_coef) == (1e-3, "sign", 0.0, 0.0)
    assert not config.has_loss
    assert BalancingConfig(aux_loss_coef=1e-3).has_loss and BalancingConfig(z_loss_coef=1e-3).has_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -1e-3}, r"rate=-0\.001: give 0"),
        ({"rate": math.nan}, "rate=nan: give 0"),
        ({"aux_loss_coef": -1.0}, r"aux_loss_coef=-1\.0: give 0"),
        ({"z_loss_coef": -1.0}, r"z_loss_coef=-1\.0: give 0"),
        ({"rule": "signed"}, "rule='signed': choose one of sign, proportional, quantile"),
        ({"aux_loss_type": "token"}, "aux_loss_type='token': choose one of layer, pooled, sequence"),
        ({"batch": "rank"}, "batch='rank': choose one of local, accumulated, global"),
        ({"scoring": "tanh"}, "scoring='tanh': choose one of softmax, sigmoid, or None"),
        ({"start": 0.5, "stop": 0.5}, r"start=0\.5, stop=0\.5: the bias would never move"),
        ({"start": 0.8, "stop": 0.2}, "would never move"),
        ({"start": -0.1}, "out of range"),
        ({"start": 1.0}, "would never move"),
        ({"stop": 1.1}, "out of range"),
        ({"stop": math.nan}, "would never move"),
        ({"batch": "global", "aux_loss_type": "sequence"}, "which counts each sequence alone. Set batch='local'"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancingConfig(**options)


def test_deepseek_v3s_schedule() -> None:
    config = BalancingConfig(rate=1e-3, stop=14.3 / 14.8)
    rates = [config.rate_at(step / 1000) for step in range(1000)]
    assert rates == [1e-3] * 967 + [0.0] * 33


def test_a_late_start() -> None:
    config = BalancingConfig(rate=0.5, start=0.25, stop=0.5)
    assert [config.rate_at(step / 8) for step in range(8)] == [0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert BalancingConfig(rate=0.5).rate_at(0.999) == 0.5


def test_a_schedule_between_two_steps_never_starts() -> None:
    config = BalancingConfig(start=0.3, stop=0.4)
    with pytest.raises(ValueError, match="in 4 optimizer steps the selection bias never moves"):
        config.check_schedule(4)
    config.check_schedule(10)
    BalancingConfig(rate=0.0, count_only=True, start=0.3, stop=0.4).check_schedule(4)
