"""The benchmark of gradients: its exact gradient against brute force, its measures by hand, and a whole run."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "recipes" / "benchmarks"))
    import gradient_quality as bench


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts and strings of three tokens, few enough to add up one by one."""
    for name, value in (("LENGTH", 3), ("PROMPTS", 2), ("GROUP", 4), ("KEY_PLACES", (0, 2))):
        monkeypatch.setattr(bench, name, value)


def policy(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = bench.small_policy().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.usefixtures("small")
def test_the_exact_gradient_is_the_sum_over_all_strings(every_step: bool) -> None:
    """`grad sum_y pi(y) r(y)`, with the probability of every string as a product."""
    model, task = policy(), bench.Task(every_step)
    exact = bench.Exact(model, task)
    strings = torch.tensor(list(itertools.product(range(bench.SYMBOLS), repeat=3)))
    total = torch.zeros((), dtype=torch.float64)
    for i, prompt in enumerate(task.prompts):
        ids = torch.cat([prompt.expand(len(strings), -1), strings], dim=1)
        logits = model(input_ids=ids, use_cache=False).logits[:, bench.PROMPT_LENGTH - 1 : -1].double()
        logps = logits.log_softmax(-1).gather(-1, strings[..., None]).squeeze(-1).sum(1)
        total = total + (logps.exp() * task.total(i, strings)).sum() / 2
    assert exact.score == pytest.approx(float(total), abs=1e-6)
    expected = bench.flat_gradient(total, model)
    assert expected.norm() > 0.01
    torch.testing.assert_close(exact.gradient(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("small")
def test_rewards_of_the_task_by_hand() -> None:
    end, steps = bench.Task(False), bench.Task(True)
    assert end.num_keys.tolist() == [1, 2]
    goal = end.goals[1]
    right, half = goal[None].clone(), goal[None].clone()
    half[0, 2] = (half[0, 2] + 1) % bench.SYMBOLS
    assert end.total(1, torch.cat([right, half])).tolist() == [1.0, 0.0]
    assert steps.total(1, torch.cat([right, half])).tolist() == [1.0, 0.5]
    assert steps.step_rewards(1, right).tolist() == [[0.5, 0.0, 0.5]]
    text = end.spelled()
    assert end.reward(text, [end.goals[0].tolist(), half[0].tolist()]) == [1.0, 0.0]
    assert steps.reward(text[1:], [half[0].tolist()]) == [[0.5, 0.0, 0.0]]


@pytest.mark.usefixtures("small")
def test_learned_values_are_looked_up_at_the_right_states() -> None:
    """A "learned" value that spells the state's tokens as a number."""
    model, task = policy(), bench.Task()
    exact = bench.Exact(model, task)

    def spelled(ids: Tensor) -> Tensor:
        rows = ids[:, bench.PROMPT_LENGTH :]
        return torch.stack([(rows[:, :d] * 10 ** torch.arange(d)).sum(1) for d in range(3)], dim=1).float()

    tokens, rewards, rows = exact.draw(torch.Generator().manual_seed(0))
    found = bench.look_up(exact.tables_of(spelled), rows)
    expected = torch.stack([(tokens[:, :d] * 10 ** torch.arange(d)).sum(1) for d in range(3)], dim=1).float()
    assert torch.equal(found, expected)
    prompt = torch.arange(2).repeat_interleave(4)
    totals = torch.stack([task.total(int(p), tokens[i : i + 1])[0] for i, p in enumerate(prompt)])
    torch.testing.assert_close(rewards.sum(1).double(), totals)
    assert bench.explained(exact.values, exact) == pytest.approx(1.0)
    means = [torch.full_like(table, float(exact.score)) for table in exact.values]
    assert bench.explained(means, exact) <= 1e-9


def test_measures_by_hand() -> None:
    goal = torch.tensor([2.0, 0.0])
    found = bench.compare(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), goal)
    # Along the goal 3 and 1, mean 2; the rest is (1, 4) and (-1, 0), of squares 17 and 1.
    assert found["snr"] == pytest.approx(2 / 3)
    assert found["cosine"] == pytest.approx((0.6 + 1.0) / 2)
    assert found["bias"] == pytest.approx(1 - 2 / 8**0.5)


@pytest.mark.slow
def test_a_short_run_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    critic = json.dumps({"mtp_head_type": "sequential", "value_replay": 1, "disable_tqdm": True})
    arguments = ["--seeds", "0", "--moments", "1", "2", "--batches", "2", "--critic", critic]
    monkeypatch.setattr(sys, "argv", ["gradient_quality.py", "--output_dir", str(tmp_path), *arguments])
    bench.main()
    found = json.loads((tmp_path / "gradient_quality.json").read_text())
    assert set(found) == {"at the end", "every step"}
    for moments in found.values():
        assert set(moments) == {"1", "2"}
        for (run,) in moments.values():
            assert 0 < run["score"] < 1 and {"critic", "ppo"} == set(run["explained_variance"])
            exact = run["methods"]["exact values, lambda 1"]
            assert exact["snr"] > 0 and 0 < exact["cosine"] <= 1
    assert (tmp_path / "gradient_quality.png").stat().st_size > 10_000
    assert "| GRPO | " in capsys.readouterr().out
