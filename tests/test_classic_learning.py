"""The policy gradient agents learn: CartPole, an off-policy one, and a task with continuous actions."""

import logging
import warnings
from typing import Any

import pytest
from lightning.pytorch import Trainer

from rl_plugins.classic import Linear, OffPolicyACAgent, PPOAgent, ReinforceAgent, TRPOAgent

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def learned(module: Any, episodes: int = 10) -> tuple[float, float]:
    """Mean return of the deterministic policy before and after training."""
    before = module.evaluate(episodes).returns.mean()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module)
    return float(before), float(module.evaluate(episodes).returns.mean())


@pytest.mark.slow
def test_ppo_learns_cartpole() -> None:
    """A quarter of the budget of SB3's zoo: there, seeds 0 to 3 reached between 154 and 500, and 500 in all of it."""
    module = PPOAgent(
        "CartPole-v1",
        total_steps=25_000,
        rollout_steps=32,
        epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        learning_rate=Linear(1e-3),
        clip_range=Linear(0.2),
        seed=0,
    )
    before, after = learned(module)
    assert before < 100 and after >= 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "steps", "reached"),
    [(ReinforceAgent, 40_000, 250), (OffPolicyACAgent, 30_000, 120)],
)
def test_cartpole_improves(agent: type, steps: int, reached: float) -> None:
    before, after = learned(agent("CartPole-v1", total_steps=steps, seed=1))
    assert before < 20 and after >= reached


@pytest.mark.slow
def test_pendulum_improves() -> None:
    """Continuous actions: -1300 is a pendulum that hangs, and a return rises only if it is swung up."""
    module = TRPOAgent(
        "Pendulum-v1",
        total_steps=30_000,
        num_envs=4,
        rollout_steps=256,
        gamma=0.9,
        normalize_observations=True,
        seed=2,
    )
    before, after = learned(module)
    assert before < -1200 and after > before + 200
