"""Parts of speculative decoding: the cache, the processors, the stopping criteria, how many tokens are drafted, and
what it costs."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from rl_plugins.nn import attach_mtp_heads
from rl_plugins.nn.cache_name import cache_name
from rl_plugins.rollouts import DraftStatistics, SpeculativeDecoder
from rl_plugins.rollouts.speculative.cache import SPARE_SLOTS, RollbackCache, RollbackLayer, kept_slots
from rl_plugins.rollouts.speculative.decoding import SPARE_SHARE, Decoding
from rl_plugins.rollouts.speculative.drafters import Verified, make_drafter
from rl_plugins.rollouts.speculative.score_processing import ScoreProcessor
from rl_plugins.rollouts.speculative.stopping import Stopping
from rl_plugins.rollouts.speculative.verification import Drafts, verify

from .helpers.speculative_models import FAMILIES, PROMPTS, attach_random_heads, decode, make, padded, processors_of

# The cache


def test_kept_slots_by_hand() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    slots, after = kept_slots(mask)
    assert slots.tolist() == [[0, 2, 3], [4, 1, 2], [2, 3, 4]]
    assert after.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_kept_slots_of_the_drawing_in_decoding() -> None:
    slots, after = kept_slots(torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]]))
    assert slots.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 2, 3]]
    assert after.tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]


def test_kept_slots_of_a_full_mask_changes_nothing() -> None:
    slots, after = kept_slots(torch.ones(2, 4, dtype=torch.long))
    assert slots.tolist() == [[0, 1, 2, 3]] * 2 and after.tolist() == [[1] * 4] * 2


def test_a_buffer_grows_like_a_concatenation() -> None:
    layer, generator = RollbackLayer(), torch.Generator().manual_seed(0)
    keys, values = torch.zeros(3, 2, 0, 4), torch.zeros(3, 2, 0, 6)
    for size in (5, 1, 3, 70, 2, 200, 1):
        new_keys, new_values = (torch.randn(3, 2, size, d, generator=generator) for d in (4, 6))
        keys, values = torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2)
        found = layer.update(new_keys, new_values)
        assert torch.equal(found[0], keys) and torch.equal(found[1], values)
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.get_seq_length() == keys.shape[2]
        assert layer.get_mask_sizes(3) == (keys.shape[2] + 3, 0)


def test_a_buffer_is_copied_only_when_it_is_full() -> None:
    layer, places = RollbackLayer(), []
    for _ in range(SPARE_SLOTS + 2):
        layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
        places.append(layer.keys.data_ptr())
    assert len(set(places)) == 2
    assert [a == b for a, b in pairwise(places)].index(False) == SPARE_SLOTS


def test_slots_are_forgotten_and_moved_by_hand() -> None:
    cache = RollbackCache(layers=[RollbackLayer(), RollbackLayer(is_sliding=True)])
    assert cache.is_windowed and not RollbackCache(layers=[RollbackLayer()]).is_windowed
    states = torch.arange(10.0).reshape(2, 1, 5, 1)  # rows 0..4 and 5..9
    for layer in range(2):
        cache.update(states, -states, layer)
    cache.trim(1)
    assert cache.get_seq_length() == 4
    assert cache.layers[0].keys.flatten().tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    cache.select(torch.tensor([1, 0]), torch.tensor([[0, 2, 3], [3, 0, 1]]))
    for layer in cache.layers:
        assert layer.keys[:, 0, :, 0].tolist() == [[5, 7, 8], [3, 0, 1]]
        assert torch.equal(layer.values, -layer.keys)
    keys, _ = cache.update(torch.full((2, 1, 1, 1), 99.0), torch.zeros(2, 1, 1, 1), 0)
    assert keys[:, 0, :, 0].tolist() == [[5, 7, 8, 99], [3, 0, 1, 99]]
    cache.select(torch.tensor([1]), torch.tensor([[1, 2]]))
    assert cache.layers[0].keys.flatten().tolist() == [0, 1]


def test_a_layer_without_tokens_can_be_trimmed_and_selected() -> None:
    layer = RollbackLayer()
    layer.trim(0)
    layer.select(torch.tensor([0]), torch.tensor([[0]]))
    assert layer.get_seq_length() == 0 and not layer.is_initialized


# Processors

PROCESSED: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 3},
    {"min_length": 8},
    {"bad_words_ids": [[3], [5, 5], [4, 6]]},
    {"sequence_bias": {(5, 6): 5.0, (7,): -2.0}},
    {"suppress_tokens": [3, 6]},
    {"begin_suppress_tokens": [4, 5]},
    {"exponential_decay_length_penalty": (1, 1.5)},
    {"forced_eos_token_id": 1},
    {"typical_p": 0.7, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
    {"top_h": 0.6},
    {"remove_invalid_values": True, "renormalize_logits": True},
    {"temperature": 0.5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "top_k": 6, "min_new_tokens": 2},
]


@pytest.mark.parametrize("options", PROCESSED, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("prompts", [[[3, 4, 5], [6], [7, 5, 5, 6]], [[3, 4, 5, 3], [6, 5, 5, 4], [7, 5, 5, 6]]])
def test_processors_see_what_generate_shows_them(
    tiny_model: Callable[..., Any], options: dict[str, Any], prompts: list[list[int]]
) -> None:
    model, inputs = tiny_model(), padded(prompts)
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([inputs["input_ids"], torch.randint(2, 9, (3, 8), generator=generator)], dim=1)
    scores = 3 * torch.randn(3, 4, 16, generator=generator)
    lengths, settings = torch.tensor([6, 4, 7]), {"do_sample": True, "max_new_tokens": 5, "top_k": 0, **options}
    expected = torch.stack([
        # A batch with this row alone, and one call for one prefix.
        torch.cat([alone(row, inputs, model, settings)(ids[[row], : lengths[row] + j], scores[[row], j].clone())
                   for j in range(4)])
        for row in range(3)
    ])  # fmt: skip
    processor = ScoreProcessor(processors_of(model, inputs, **settings))
    assert len(processor.processors) >= 1
    for rows in ([0, 1, 2], [2, 0], [1]):
        chosen = torch.tensor(rows)
        found = processor(scores[chosen], ids[chosen], lengths[chosen], chosen)
        torch.testing.assert_close(found, expected[chosen])


def alone(row: int, inputs: dict[str, Tensor], model: Any, settings: dict[str, Any]) -> Any:
    return processors_of(model, {name: tensor[[row]] for name, tensor in inputs.items()}, **settings)


def test_drafts_are_processed_as_if_they_followed_the_settled_tokens(tiny_model: Callable[..., Any]) -> None:
    model, inputs = tiny_model(), padded([[3, 4, 5], [6]])
    settings = {"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.5, "top_k": 4, "max_new_tokens": 9}
    processor = ScoreProcessor(processors_of(model, inputs, **settings, no_repeat_ngram_size=2))
    ids = torch.cat([inputs["input_ids"], torch.tensor([[7, 8, 9], [2, 2, 2]])], dim=1)
    scores = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 3])
    found = processor.drafts(scores, ids, lengths, torch.arange(2))
    for row in range(2):
        plain = alone(row, inputs, model, settings)
        for j in range(3):
            expected = plain(ids[[row], : lengths[row]], scores[[row], j].clone())
            torch.testing.assert_close(found[[row], j], expected)


# Stopping


class Even(StoppingCriteria):
    """Ends rows behind an even token, the second of a pair at the earliest."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, -1] % 2 == 0) & (input_ids[:, -2] % 2 == 0)


def test_stopping_cut_by_hand() -> None:
    ids = torch.tensor([
        [3, 5, 7, 7, 7, 7, 0],
        [3, 5, 7, 1, 7, 1, 0],
        [3, 5, 7, 1, 7, 7, 0],
        [3, 5, 5, 5, 5, 5, 1],
        [3, 4, 6, 7, 7, 7, 7],
        [3, 5, 4, 6, 1, 7, 7],
    ])  # fmt: skip
    lengths = torch.tensor([2, 2, 2, 4, 2, 2])
    count = torch.tensor([3, 3, 1, 2, 3, 3])
    criteria = StoppingCriteriaList([MaxLengthCriteria(6), EosTokenCriteria(torch.tensor([1]))])
    kept, ended = Stopping(criteria).cut(ids, lengths, count, 3)
    # Nothing ends it; end of text; end of text among what does not count; full; nothing; end of text.
    assert kept.tolist() == [3, 2, 1, 2, 3, 3]
    assert ended.tolist() == [False, True, False, True, False, True]
    criteria.append(Even())
    kept, ended = Stopping(criteria).cut(ids, lengths, count, 3)
    assert kept.tolist() == [3, 2, 1, 2, 1, 2]
    assert ended.tolist() == [False, True, False, True, True, True]


def test_stopping_takes_the_smallest_length_and_all_ends() -> None:
    ends = [EosTokenCriteria(torch.tensor([1, 4])), EosTokenCriteria(torch.tensor([5]))]
    stopping = Stopping(StoppingCriteriaList([MaxLengthCriteria(9), MaxLengthCriteria(7), *ends]))
    assert stopping.max_length == 7 and stopping.eos is not None and stopping.eos.tolist() == [1, 4, 5]
    assert Stopping(StoppingCriteriaList([MaxLengthCriteria(9)])).eos is None


# The verdict


def test_greedy_verdict_by_hand() -> None:
    scores = torch.zeros(3, 3, 4)
    for row, best in enumerate([[1, 2, 3], [1, 2, 3], [1, 2, 3]]):
        scores[row, torch.arange(3), torch.tensor(best)] = 1.0
    drafts = Drafts(ScoreProcessor([]), torch.zeros(3, 1, dtype=torch.long), torch.ones(3), torch.arange(3), False)
    wanted = torch.tensor([[1, 2], [1, 3], [0, 2]])
    drafts.choose(torch.nn.functional.one_hot(wanted, 4).float())
    verdict = verify(scores, drafts)
    assert verdict.num_accepted.tolist() == [2, 1, 0]
    assert [row[: n + 1] for row, n in zip(verdict.tokens.tolist(), [2, 1, 0], strict=True)] == [
        [1, 2, 3],
        [1, 2],
        [1],
    ]
    assert verdict.acceptance_probs.tolist() == [[1, 1], [1, 0], [0, 1]]
    expected = 1.0 - torch.tensor([1.0, 0.0, 0.0, 0.0]).exp().sum().log()
    torch.testing.assert_close(verdict.log_probs[0], expected.expand(3))


# The drafter


@pytest.mark.parametrize("family", ["llama", "granite", "cohere", "gemma2", "gpt_neox"])
def test_new_heads_draft_from_the_distribution_of_the_model(family: str) -> None:
    model = make(family, FAMILIES[family], "eager")
    for head in model.mtp_heads:
        torch.nn.init.zeros_(head.down.weight)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        states = model.base_model(ids).last_hidden_state
        drafter, seen = make_drafter(model), []
        valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
        steps, rows = torch.zeros_like(ids), torch.arange(2)
        drafter.observe(Verified(states, ids, None, valid, torch.ones_like(ids), ids[:, 0], steps, rows))
        drafter.propose(2, lambda logits: seen.append(logits) or logits.argmax(dim=-1))
        drafter.select(torch.tensor([1]), torch.tensor([[0]]))
        drafter.propose(1, lambda logits: seen.append(logits) or logits.argmax(dim=-1))
    last = torch.stack([output.logits[0, 1], output.logits[1, 3]])
    torch.testing.assert_close(seen[0], last[:, None].expand(2, 2, -1))
    torch.testing.assert_close(seen[1], last[1:, None])


def test_statistics_by_hand() -> None:
    statistics = DraftStatistics(3)
    assert statistics.tokens_per_step != statistics.tokens_per_step  # NaN
    statistics.add(4, 7, [4, 2], [2, 1])
    statistics.add(1, 1, [1, 0, 0], [0, 0, 0])
    assert (statistics.steps, statistics.tokens) == (5, 8)
    assert (statistics.reached, statistics.accepted) == ([5, 2, 0], [2, 1, 0])
    assert statistics.acceptance[:2] == [0.4, 0.5] and statistics.acceptance[2] != statistics.acceptance[2]
    assert statistics.tokens_per_step == 1.6


# What it costs


class Passes:
    """Counts a model's forward passes, the tokens that go through, and the rows of logits of its LM head."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        self.logits: list[tuple[int, ...]] = []
        self.handles = [
            model.model.register_forward_hook(lambda m, args, output: self.tokens.append(output[0][..., 0].numel())),
            model.lm_head.register_forward_hook(lambda m, args, output: self.logits.append(tuple(output.shape))),
        ]

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.slow
def test_hopeless_heads_cost_next_to_nothing(tiny_model: Callable[..., Any]) -> None:
    model = attach_random_heads(tiny_model(seed=1, initializer_range=0.5, tie_word_embeddings=False), 2, 100.0)
    inputs = {"input_ids": torch.randint(2, 16, (4, 5), generator=torch.Generator().manual_seed(0))}
    options = {"max_new_tokens": 100, "do_sample": True, "eos_token_id": None}
    with Passes(model) as plain:
        model.generate(**inputs, **options)
    decoder = SpeculativeDecoder(draft_cost=0.2)
    torch.manual_seed(0)
    with Passes(model) as speculative:
        model.generate(**inputs, **options, custom_generate=decoder)
    assert len(plain.tokens) == 100
    assert 0.95 * 100 <= len(speculative.tokens) <= 100
    assert sum(speculative.tokens) <= 1.1 * sum(plain.tokens)
    assert decoder.last is not None and 0 < decoder.last.statistics.reached[0] < 40


def test_good_heads_save_forward_passes(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(initializer_range=0.02).eval()  # nearly the same token over and over
    attach_mtp_heads(model, 3)
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    with Passes(model) as passes:
        model.generate(
            **inputs, max_new_tokens=41, eos_token_id=None, do_sample=False,
            custom_generate=SpeculativeDecoder(draft_cost=0.05),
        )  # fmt: skip
    assert len(passes.tokens) <= 1 + 40 / 4 + 3


def test_the_last_token_is_not_drafted(tiny_model: Callable[..., Any]) -> None:
    model = attach_random_heads(tiny_model(), 3, 0.0)
    for new, expected in ((1, [6]), (2, [6, 2]), (3, [6, 2 * 2])):
        with Passes(model) as passes:
            model.generate(
                torch.tensor([[3, 4, 5], [6, 7, 8]]),
                max_new_tokens=new,
                eos_token_id=None,
                do_sample=False,
                custom_generate=SpeculativeDecoder(draft_cost=0.0),
            )
        assert passes.tokens[: len(expected)] == expected


def test_logits_are_made_for_the_drafts_alone(tiny_model: Callable[..., Any]) -> None:
    model = attach_random_heads(tiny_model(seed=1, initializer_range=0.5, tie_word_embeddings=False), 3, 0.05)
    inputs = padded([[3, 4, 5, 6, 7, 8, 9], [7, 8], [4], [5, 5, 6]])
    with Passes(model) as passes:
        model.generate(
            **inputs, max_new_tokens=12, do_sample=False, custom_generate=SpeculativeDecoder(draft_cost=0.0)
        )
    assert passes.logits[0] == (4, 1, 16)  # the prompts
    assert all(rows <= 4 and positions <= 3 + 1 for rows, positions, _ in passes.logits)
    assert max(positions for _, positions, _ in passes.logits) == 4
    assert min(rows for rows, _, _ in passes.logits) < 4  # rows that have ended cost nothing


@pytest.mark.slow
def test_the_cache_does_not_fill_up_with_rejected_drafts(tiny_model: Callable[..., Any]) -> None:
    model = attach_random_heads(tiny_model(seed=1, initializer_range=0.5, tie_word_embeddings=False), 3, 0.3)
    inputs, new, slots = padded([[3, 4, 5, 6], [7, 8], [4], [5, 5, 6]] * 6), 60, []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        slots.append(kwargs[cache_name()].get_seq_length())

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    decoder = SpeculativeDecoder(draft_cost=0.0)
    torch.manual_seed(0)
    model.generate(**inputs, max_new_tokens=new, do_sample=True, eos_token_id=None, custom_generate=decoder)
    handle.remove()
    assert decoder.last is not None
    rejected = sum(decoder.last.statistics.reached) - sum(decoder.last.statistics.accepted)
    assert rejected > new  # they would be many
    assert max(slots) <= (4 + new) / (1.0 - SPARE_SHARE) + 3


@pytest.mark.parametrize("head_type", ["parallel", "sequential"])
def test_rows_that_have_all_ended_keep_no_slot_of_a_draft(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, head_type: str
) -> None:
    """A rank whose rows have ended takes steps with the others, of as many drafts as they make."""
    model = attach_random_heads(tiny_model(initializer_range=0.3), 2, 0.05, head_type=head_type)
    expected = decode(model, padded(PROMPTS)).sequences
    plan, sizes = Decoding._plan, []

    def go_on(self: Decoding, listener: Any) -> int | None:
        num_drafts = plan(self, listener) if self.num_unfinished else None
        if num_drafts is not None:
            return num_drafts
        self.synced = True  # and so keeps all rows
        sizes.append((self.mask.shape[1], self.cache.get_seq_length()))
        return 2 if len(sizes) < 4 else None

    monkeypatch.setattr(Decoding, "_plan", go_on)
    assert torch.equal(decode(model, padded(PROMPTS)).sequences, expected)
    assert all(width == cached for width, cached in sizes)
    assert [after[0] - before[0] for before, after in pairwise(sizes)] == [1, 1, 1]
