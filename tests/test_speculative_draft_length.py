"""How many tokens are drafted: as many as pay."""

import math

import pytest

from rl_plugins.rollouts.speculative.draft_length import (
    FIRST_GUESS,
    LONGEST_WAIT,
    MEASURED_STEPS,
    MEMORY,
    PROBE_EVERY,
    REMEMBERED_STEPS,
    DraftLength,
    _size,
)


def settled(draft_length: DraftLength, rates: list[float], rows: int = 10**8) -> DraftLength:
    """After a step with so many rows that its rates are the running means."""
    reached, passed, alive = [], [], float(rows)
    for rate in rates:
        reached.append(alive)
        passed.append(alive * rate)
        alive = max(alive * rate, 5e7)  # so that the later places are known, too
    draft_length.record(rows, passed, reached, 1.0)
    assert draft_length.acceptance == pytest.approx(rates, abs=1e-6)
    return draft_length


@pytest.mark.parametrize("cost", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize(
    "rates", [[0.9, 0.9, 0.9, 0.9], [0.8, 0.4, 0.1, 0.0], [0.3, 0.9, 0.9, 0.9], [0.6, 0.6, 0.6, 0.6]]
)
def test_the_number_of_drafts_brings_most_tokens_per_time(rates: list[float], cost: float) -> None:
    def speed(k: int) -> float:
        tokens, reaching = 1.0, 1.0
        for rate in rates[:k]:
            reaching *= rate
            tokens += reaching
        return tokens / (1.0 + cost * k)

    best = max(range(5), key=speed)
    assert settled(DraftLength(4, cost), rates).choose(8) == best


def test_none_where_drafts_are_bad_and_all_where_they_are_good() -> None:
    assert settled(DraftLength(3, 0.1), [0.01, 0.01, 0.01]).choose(4) == 0
    assert settled(DraftLength(3, 0.1), [0.99, 0.99, 0.99]).choose(4) == 3
    assert settled(DraftLength(3, 0.0), [0.0, 0.0, 0.0]).choose(4) == 3  # which cost nothing


def test_running_means_by_hand() -> None:
    draft_length = DraftLength(2, 0.1)
    assert draft_length.acceptance == [FIRST_GUESS, FIRST_GUESS]
    draft_length.record(4, [3.0, 1.0], [4.0, 3.0], 1.0)
    first = (3 + FIRST_GUESS) / 5
    assert draft_length.acceptance == pytest.approx([first, (1 + first) / 4])
    draft_length.record(4, [4.0], [4.0], 1.0)  # one draft only: the second place has nothing new of its own
    decay = math.exp(-4 / MEMORY)
    first = (3 * decay + 4 + FIRST_GUESS) / (4 * decay + 5)
    assert draft_length.acceptance == pytest.approx([first, (1 + first) / 4])


def test_all_are_tried_again_after_ever_longer_waits() -> None:
    draft_length, chosen = settled(DraftLength(3, 0.2), [0.0, 0.5, 0.5]), []
    waits = [PROBE_EVERY, 2 * PROBE_EVERY, LONGEST_WAIT, LONGEST_WAIT]
    for _ in range(sum(waits) + len(waits)):
        k = draft_length.choose(4)
        chosen.append(k)
        draft_length.record(4, [0.0] * k, [4.0, 0.0, 0.0][:k], 1.0)
    assert chosen == [k for wait in waits for k in [0] * wait + [3]] and waits == [128, 256, 512, 512]


def test_none_are_tried_again_where_time_is_measured() -> None:
    steps = 3 * PROBE_EVERY + 2
    once, twice = [3] * PROBE_EVERY, [3] * 2 * PROBE_EVERY
    for cost, expected in ((None, [*once, 0, *twice, 0]), (0.1, [3] * steps)):
        draft_length, chosen = DraftLength(3, cost), []
        for k in (0, 3) * MEASURED_STEPS:
            draft_length.record(4, [400.0] * k, [400.0] * k, 1.0)
        for _ in range(steps):
            k = draft_length.choose(4)
            chosen.append(k)
            draft_length.record(4, [4.0] * k, [4.0] * k, 1.0)
        assert chosen == expected


def test_times_are_measured_for_each_size_of_batch() -> None:
    draft_length, chosen = DraftLength(3), []
    for step in range(2 * MEASURED_STEPS):
        assert draft_length._costs(_size(8)) is None
        k = draft_length.choose(8)
        chosen.append(k)
        outlier = 5.0 if step < 2 else 0.0  # the shortest counts
        draft_length.record(8, [0.9] * k, [1.0] * k, outlier + 1.0 + 0.2 * k)
    assert chosen == [0, 3] * MEASURED_STEPS
    for rows in (8, 15):  # what was not measured lies between
        assert draft_length._costs(_size(rows)).tolist() == pytest.approx([1.0, 1.2, 1.4, 1.6])
    assert draft_length._costs(_size(16)) is None and draft_length._costs(_size(7)) is None
    assert draft_length.choose(16) == 0  # measures again


def test_measured_times_choose_what_brings_most_tokens_per_time() -> None:
    draft_length = DraftLength(3)
    for k, time in enumerate([1.0, 1.05, 2.5, 2.6]):  # a second draft happens to be dear
        for _ in range(MEASURED_STEPS):
            draft_length.record(4, [8e5] * k, [1e6] * k, time)
    # Tokens: 1, 1.8, 2.44, 2.952.
    assert draft_length.choose(4) == 1
    draft_length.record(4, [8e5] * 3, [1e6] * 3, 1.2)
    assert draft_length.choose(4) == 3
    for _ in range(REMEMBERED_STEPS):  # the newest steps count
        assert draft_length.choose(4) == 3
        draft_length.record(4, [8e5] * 3, [1e6] * 3, 9.0)
    assert draft_length._costs(_size(4)).tolist() == [1.0, 1.05, 2.5, 9.0]
    assert draft_length.choose(4) == 1


def test_draft_length_goes_on_where_it_was() -> None:
    def go(draft_length: DraftLength, steps: int) -> list[int]:
        chosen = []
        for step in range(steps):
            k = draft_length.choose(4)
            chosen.append(k)
            draft_length.record(4, [(0.1, 1.9)[step % 7 == 0]] * k, [4.0] * k, 1.0)
        return chosen

    whole, before, after = DraftLength(3, 0.2), PROBE_EVERY + 21, 3 * PROBE_EVERY
    expected = go(whole, before) + go(whole, after)
    first, second = DraftLength(3, 0.2), DraftLength(3, 0.2)
    found = go(first, before)
    state = first.state_dict()
    go(first, 5)  # the state is a copy
    second.load_state_dict(state)
    assert found + go(second, after) == expected
    assert second.acceptance == whole.acceptance
    assert len(set(expected[:before])) > 1 and len(set(expected[before:])) > 1
