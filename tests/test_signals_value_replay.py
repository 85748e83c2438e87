"""The replay of values: its steps by hand, its bounds, two ranks, resume, and exact values on frozen policies."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.nn import attach_mtp_heads
from rl_plugins.nn.target_heads import RowCopy, ValueCopy
from rl_plugins.rollouts.kept_rows import Rows
from rl_plugins.signals import critic_targets, value_losses
from rl_plugins.signals.options import OnlineValueOptions, ValueReplayOptions
from rl_plugins.signals.value_replay import RolloutOfRows, RolloutOfStates, ValueReplay, ValueTargets

from .helpers.exact_cases import ENOUGH, Case, accuracy, election, exact_mdp, random_policy, run_heads
from .helpers.tiny import make_tiny_model


class Alone:
    """A process without others."""

    device = torch.device("cpu")

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        return x


class Pair:
    """One of two ranks, each in a thread of its own."""

    device = torch.device("cpu")
    barrier = threading.Barrier(2, timeout=60)
    sent: dict[int, Tensor] = {}

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        self.sent[self.rank] = x
        self.barrier.wait()
        total = self.sent[0] + self.sent[1]
        self.barrier.wait()
        return total


def make_observed(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor | None) -> Tensor:
    return critic_targets(rewards, values, values, mask, after=after, lam_value=1.0).returns


def make_one_step(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor | None) -> Tensor:
    return critic_targets(rewards, values, values, mask, after=after, estimator="td").returns


OBSERVED, ONE_STEP = ValueTargets(make_observed, False), ValueTargets(make_one_step, True)


def make_replay(num_heads: int = 1, head_type: str = "parallel", ahead: int = 1, **options: Any) -> ValueReplay:
    heads = attach_mtp_heads(make_tiny_model(), num_heads, head_type=head_type)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    given = {"value_replay": 1, **options}
    options = ValueReplayOptions(**given)
    loss = value_losses()["squared"]
    return ValueReplay(ValueCopy(heads), options, num_heads=num_heads, loss=loss, ahead=ahead)


def make_rollout(seed: int, rows: int = 3, width: int = 5, features: tuple[int, ...] = (32,)) -> RolloutOfStates:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=g)
    mask = torch.arange(width) < lengths
    rewards = torch.randn(rows, width, generator=g) * mask
    return RolloutOfStates(torch.randn(int(mask.sum()), *features, generator=g), rewards, mask)


def weights(replay: ValueReplay) -> list[Tensor]:
    return [p.detach().clone() for p in replay.values.parameters()]


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_pass_is_a_step_of_adam_on_the_mean_squared_error(num_heads: int) -> None:
    """Few states make one step; head 2 learns what head 1 learns one token later, and nothing at the last token."""
    replay, rollout = make_replay(num_heads, value_replay_learning_rate=1e-2), make_rollout(0)
    by_hand = copy.deepcopy(replay.values)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    metrics = replay.learn(rollout, OBSERVED, Alone())

    errors, place = [], 0
    for rewards, mask in zip(rollout.rewards, rollout.mask, strict=True):
        length = int(mask.sum())
        values = by_hand(rollout.states[place : place + length])
        place += length
        for k in range(num_heads):
            for t in range(length - k):
                errors.append((values[t, k] - rewards[t + k :].sum()) ** 2)
    loss = torch.stack(errors).mean()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(weights(replay), [p.detach() for p in by_hand.parameters()])
    torch.testing.assert_close(metrics["critic/replay_loss"], loss.detach())
    assert float(metrics["critic/replay_states"]) == len(rollout.states)


def test_targets_bootstrap_from_the_copy_before_each_pass() -> None:
    """With one-step targets, two passes are two calls of one pass each."""
    twice, rollout = make_replay(value_replay=2), make_rollout(1)
    targets: list[Tensor] = []

    def noted(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor | None) -> Tensor:
        targets.append(make_one_step(rewards, values, mask, after))
        expected = torch.zeros_like(rewards)
        for row, length in enumerate(mask.sum(1).tolist()):
            for t in range(length):
                expected[row, t] = rewards[row, t] + (values[row, t + 1, 0] if t + 1 < length else 0.0)
        torch.testing.assert_close(targets[-1] * mask, expected)
        return targets[-1]

    twice.learn(rollout, ValueTargets(noted, True), Alone())
    assert len(targets) == 2
    assert not torch.equal(*targets)


def test_the_value_after_a_cut_counts() -> None:
    rollout = make_rollout(2)
    rollout.after = torch.tensor([0.0, 5.0, 0.0])
    seen: list[Tensor | None] = []

    def noted(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor | None) -> Tensor:
        seen.append(after)
        return make_observed(rewards, values, mask, after)

    make_replay().learn(rollout, ValueTargets(noted, True), Alone())
    assert seen[0] is rollout.after


def test_garbage_in_padding_changes_nothing() -> None:
    clean, dirty = make_replay(), make_replay()
    rollout, spoilt = make_rollout(3), make_rollout(3)
    spoilt.rewards = spoilt.rewards.masked_fill(~spoilt.mask, torch.nan)
    clean.learn(rollout, OBSERVED, Alone())
    dirty.learn(spoilt, OBSERVED, Alone())
    assert all(torch.equal(a, b) for a, b in zip(weights(clean), weights(dirty), strict=True))


def test_only_the_newest_rollouts_are_kept() -> None:
    replay = make_replay(value_replay_rollouts=2)
    rollouts = [make_rollout(seed) for seed in range(4)]
    for rollout in rollouts:
        replay.learn(rollout, OBSERVED, Alone())
    assert [kept is rollout for kept, rollout in zip(replay.rollouts, rollouts[2:], strict=True)] == [True, True]


def test_the_room_of_a_rollout_is_its_share_of_the_memory() -> None:
    assert make_replay(value_replay_size=100, value_replay_rollouts=8).room == 12
    assert make_replay(value_replay_size=1, value_replay_rollouts=8).room == 1


@pytest.mark.parametrize(("rows", "steps"), [(3, 1), (30, 1), (70, 3), (1000, 4)])
def test_a_pass_over_many_states_makes_four_steps(rows: int, steps: int) -> None:
    """A step has at least 64 states. The seed decides the order."""
    rollout = make_rollout(4, rows=rows, width=5)
    assert steps == min(4, max(1, len(rollout.states) // 64))
    first, same, other = make_replay(), make_replay(), make_replay()
    other.seed = 1
    for replay in (first, same, other):
        replay.learn(rollout, OBSERVED, Alone())
    assert all(state["step"] == steps for state in first.optimizer.state.values())
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(same), strict=True))
    assert steps == 1 or any(not torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))


def test_two_ranks_are_one_process_with_the_rows_of_both() -> None:
    """Ranks have different numbers of states, and one of them has none in the second rollout."""
    rollouts = [[make_rollout(5, rows=3), make_rollout(6, rows=5)], [make_rollout(7), make_rollout(8)]]
    nothing = rollouts[1][1]
    nothing.states, nothing.mask = nothing.states[:0], torch.zeros_like(nothing.mask)
    ranks = [make_replay(value_replay=2) for _ in range(2)]

    def work(rank: int) -> None:
        for both in rollouts:
            ranks[rank].learn(copy.copy(both[rank]), OBSERVED, Pair(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = make_replay(value_replay=2)
    for one, two in rollouts:
        joined = RolloutOfStates(
            torch.cat([one.states, two.states]),
            torch.cat([one.rewards, two.rewards]),
            torch.cat([one.mask, two.mask]),
        )
        alone.learn(joined, OBSERVED, Alone())
    assert all(torch.equal(a, b) for a, b in zip(weights(ranks[0]), weights(ranks[1]), strict=True))
    torch.testing.assert_close(weights(ranks[0]), weights(alone), rtol=1e-4, atol=1e-6)


def test_only_the_copy_learns() -> None:
    heads = attach_mtp_heads(make_tiny_model(), 2)
    before = {name: p.clone() for name, p in heads.named_parameters()}
    options = ValueReplayOptions(value_replay=1)
    replay = ValueReplay(ValueCopy(heads), options, num_heads=2, loss=value_losses()["squared"])
    started = weights(replay)
    replay.learn(make_rollout(9), OBSERVED, Alone())
    assert any(not torch.equal(a, b) for a, b in zip(started, weights(replay), strict=True))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in heads.named_parameters())


# Rows


def make_row_replay(**options: Any) -> ValueReplay:
    model = make_tiny_model()
    heads = attach_mtp_heads(model, 2, head_type="sequential")
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    given = ValueReplayOptions(**{"value_replay": 1, **options})
    return ValueReplay(RowCopy(heads), given, num_heads=2, loss=value_losses()["squared"], ahead=heads.ahead)


def make_rows(seed: int, count: int = 3, prompt: int = 4, width: int = 5, padding: float = 0.0) -> RolloutOfRows:
    """Rows of prompts that are padded on the left, and of completions that are padded on the right."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.randint(1, width + 1, (count, 1), generator=g)
    prompt_mask = torch.arange(prompt).flip(0) < torch.randint(1, prompt + 1, (count, 1), generator=g)
    whole = torch.cat([prompt_mask, mask], dim=1)
    hidden = torch.randn(count, prompt + width, 32, generator=g).masked_fill(~whole[..., None], padding)
    ids = torch.randint(2, 16, whole.shape, generator=g).masked_fill(~whole, 0)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    rewards = torch.randn(count, width, generator=g) * mask
    return RolloutOfRows(Rows(hidden, ids, whole.long(), positions), rewards, mask)


def test_a_pass_over_rows_is_a_step_of_adam_for_layers_and_values() -> None:
    """Every row alone, without padding, and both heads judge the state at their own place."""
    replay, rollout = make_row_replay(value_replay_learning_rate=1e-2), make_rows(0)
    by_hand = copy.deepcopy(replay.values)
    learning = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    metrics = replay.learn(rollout, OBSERVED, Alone())

    errors, (hidden, ids, whole, _) = [], rollout.rows
    for i, mask in enumerate(rollout.mask):
        real, length = whole[i].bool(), int(mask.sum())
        values = by_hand(hidden[i, real][None], ids[i, real][None], None, None)[0]
        first = int(real.sum()) - length - 1  # the prompt's last token
        for t in range(length):
            errors.append((values[first + t] - rollout.rewards[i, t:length].sum()) ** 2)
    loss = torch.stack(errors).mean()
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning)
    torch.testing.assert_close(metrics["critic/replay_loss"], loss.detach())
    # A step of Adam has the size of its learning rate whatever the gradient's, so that rounding of the smallest shows.
    torch.testing.assert_close(weights(replay), [p.detach() for p in by_hand.parameters()], atol=1e-4, rtol=1e-3)


def test_garbage_in_the_padding_of_rows_changes_nothing() -> None:
    clean, dirty = make_row_replay(value_replay=2), make_row_replay(value_replay=2)
    clean.learn(make_rows(1), OBSERVED, Alone())
    dirty.learn(make_rows(1, padding=1e3), OBSERVED, Alone())
    torch.testing.assert_close(weights(clean), weights(dirty), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["states", "rows"])
def test_a_resumed_replay_goes_on_as_if_nothing_had_happened(tmp_path: Any, kind: str) -> None:
    make, rollout = {"states": (make_replay, make_rollout), "rows": (make_row_replay, make_rows)}[kind]
    through, killed, resumed = (make(value_replay=2) for _ in range(3))
    for replay in (through, killed):
        for seed in range(3):
            replay.learn(rollout(seed, 400), OBSERVED, Alone())
    torch.save({"all": killed.state_dict(), "rank": killed.rank_state()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["all"])
    resumed.load_rank_state(saved["rank"])
    for replay in (through, resumed):
        for seed in (3, 4):
            replay.learn(rollout(seed, 400), ONE_STEP, Alone())
    assert all(torch.equal(a, b) for a, b in zip(weights(through), weights(resumed), strict=True))


def test_the_copy_of_the_layers_leaves_the_model_alone() -> None:
    replay = make_row_replay(value_replay=2)
    model = replay.values.heads._base[0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    started = weights(replay)
    replay.learn(make_rows(2), OBSERVED, Alone())
    changed = [not torch.equal(a, b) for a, b in zip(started, weights(replay), strict=True)]
    assert all(changed)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_new_layers_begin_alike_everywhere_and_larger() -> None:
    """Of width 32, so with a size of 0.18 instead of 0.02; the caller's random numbers are left alone."""
    copies = [make_row_replay().values for _ in range(3)]
    before = torch.get_rng_state()
    for judge, seed in zip(copies, (0, 0, 1), strict=True):
        judge.begin_afresh(seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = ([p.detach() for p in judge.parameters()] for judge in copies)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    query = copies[0].heads.layers[0].mtp_block.self_attn.q_proj.weight
    assert float(query.std()) == pytest.approx(32**-0.5, rel=0.1)


def test_rows_in_half_precision_are_judged_as_in_single(tmp_path: Any) -> None:
    replay, rollout = make_row_replay(), make_rows(3)
    hidden, *others = rollout.rows
    with torch.no_grad():
        single = replay.values(hidden, *others)
        half = replay.values(hidden.bfloat16(), *others)
    assert half.dtype == torch.float32 and all(p.dtype == torch.float32 for p in replay.values.parameters())
    mask = others[1].bool()
    assert (half - single)[mask].abs().max() < 0.05 * single[mask].abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_replay": -1}, "value_replay"),
        ({"value_replay": 1.5}, "value_replay"),
        ({"value_replay_rollouts": 0}, "value_replay_rollouts"),
        ({"value_replay_size": 0}, "value_replay_size"),
        ({"value_replay_learning_rate": 0.0}, "value_replay_learning_rate"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValueReplayOptions(**options)


def test_the_clipped_loss_is_refused() -> None:
    values = OnlineValueOptions(value_loss_type="clipped")
    ValueReplayOptions().check_values(values)
    with pytest.raises(ValueError, match="value_replay=0"):
        ValueReplayOptions(value_replay=1).check_values(values)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [OBSERVED, ONE_STEP], ids=["observed", "one_step"])
def test_replayed_values_are_exact_after_few_rollouts(targets: Any) -> None:
    """On a frozen policy: 16 rollouts of 256 strings, where the heads alone take 250 or more (test_trl_critic_exact).
    One-step targets bootstrap from the copy itself, and find the exact values as well."""
    case = Case(election, vocab_size=4, max_length=6)
    model = random_policy(case.vocab_size, case.seed)
    mdp = exact_mdp(model, case)
    heads = attach_mtp_heads(model, 1, inner_size=128)
    options = ValueReplayOptions(value_replay=6, value_replay_learning_rate=3e-3, value_replay_rollouts=16)
    replay = ValueReplay(ValueCopy(heads), options, num_heads=1, loss=value_losses()["squared"])
    generator = torch.Generator().manual_seed(1)
    for _ in range(16):
        tokens, mask, _ = mdp.sample(256, generator)
        with torch.no_grad():
            _, states = run_heads(model, heads, tokens)
        replay.learn(RolloutOfStates(states[mask], mdp.token_rewards(tokens).float(), mask), targets, Alone())
    heads.load_state_dict(replay.values.heads.state_dict())
    (score,) = accuracy(model, heads, mdp)
    print(targets.bootstraps, score)
    assert score >= ENOUGH
