"""`BalancingRun` without a host: its log, its file, and going on from saved biases."""

from pathlib import Path

import pytest
import torch

from rl_plugins.moe import BalancingConfig, BalancingRun, find_routers, read_expert_load

from .helpers.moe_models import make_moe_model

BATCHES = torch.randint(2, 40, (4, 3, 9), generator=torch.Generator().manual_seed(0))


def step(run: BalancingRun, i: int) -> dict[str, float]:
    """One step of four, on a model whose weights stay."""
    run.before_step(0.5)
    run.balancer._model(input_ids=BATCHES[i], labels=BATCHES[i]).loss.backward()
    return {name: value.item() for name, value in run.after_step(i / 4).items()}


def test_the_log_has_means_and_the_file_has_sums(tmp_path: Path) -> None:
    run = BalancingRun(make_moe_model("mixtral").train(), BalancingConfig(rate=0.05, aux_loss_coef=0.1))
    assert run.log(0) == {}
    run.start(4, log_file=tmp_path / "new" / "load.jsonl")
    steps, counts = [], []
    for i in range(3):
        steps.append(step(run, i))
        counts.append(torch.stack(run.balancer.last_counts))
        if i == 1:
            means = run.log(2)
            assert means == pytest.approx({name: (steps[0][name] + steps[1][name]) / 2 for name in means}, rel=1e-6)
            assert means.keys() == steps[0].keys() and "moe/aux_loss" in means
    assert run.log(3) == pytest.approx(steps[2]) and run.log(3) == {}
    history = read_expert_load(tmp_path / "new" / "load.jsonl")
    assert history.steps == [2, 3] and history.layers == [router.name for router in run.balancer.routers]
    assert history.counts == [(counts[0] + counts[1]).tolist(), counts[2].tolist()]
    assert len((tmp_path / "new" / "load.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_run_goes_on_from_saved_biases(family: str) -> None:
    config = BalancingConfig(rate=0.05, stop=0.75)
    whole = BalancingRun(make_moe_model(family).train(), config)
    whole.start(4)
    for i in range(2):
        step(whole, i)
    saved = whole.state_dict()
    model = make_moe_model(family).train()
    resumed = BalancingRun(model, config)
    resumed.start(4, biases=saved)
    for i in (2, 3):
        step(whole, i)
        assert step(resumed, i)["moe/bias_range"] > 0
    resumed.detach()
    for router, (name, bias) in zip(find_routers(model), whole.state_dict().items(), strict=True):
        assert torch.equal(router.bias, bias) and not torch.equal(bias, saved[name])
    BalancingRun(model, config)  # the model is free again


def test_a_run_that_cannot_work_does_not_start() -> None:
    def run(**settings: float) -> BalancingRun:
        return BalancingRun(make_moe_model("mixtral"), BalancingConfig(**settings))

    with pytest.raises(ValueError, match="in 4 optimizer steps the selection bias never moves"):
        run(start=0.9).start(4)
    run(start=0.9).start(None)
    for loss in ("aux_loss_coef", "z_loss_coef"):
        with pytest.raises(ValueError, match="do not know float16's loss scale. Train in bfloat16"):
            run(**{loss: 0.1}).start(4, float16=True)
    run(rate=0.1).start(4, float16=True)
    evaluated = run(rate=0.1)
    evaluated.balancer._model.eval()
    with pytest.raises(RuntimeError, match=r"MixtralModel is in evaluation mode.* Call model.train\(\)"):
        step(evaluated, 0)
