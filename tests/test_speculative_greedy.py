"""Speculative greedy decoding gives the tokens of stock `generate`, with its options, over model families; values and
log-probabilities are those of plain forward passes; what cannot be decoded is refused."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from rl_plugins.nn import PolyakTarget, ValueHead
from rl_plugins.nn.mtp_heads import HEAD_TYPES
from rl_plugins.rollouts import SpeculativeDecoder, SpeculativeOutput, completion_values, speculating

from .helpers.speculative_models import (
    EOS,
    FAMILIES,
    NEW,
    PARALLEL_ONLY,
    PROMPTS,
    attach_random_heads,
    decode,
    decode_with_values,
    make,
    padded,
    plain,
    randomise_heads,
)


@pytest.fixture(scope="module", params=HEAD_TYPES)
def model(tiny_model: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """Tiny model that says something, with three heads of which some drafts are accepted."""
    model = tiny_model(seed=1, initializer_range=0.5, tie_word_embeddings=False)
    return attach_random_heads(model, 3, 0.05, head_type=request.param)


def completions(output: SpeculativeOutput, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Up to and with the first end of text."""
    rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def some_are_accepted(output: SpeculativeOutput) -> bool:
    statistics = output.statistics
    return 0 < sum(statistics.accepted) < sum(statistics.reached)


# Batches and options


@pytest.mark.slow
def test_batches_of_every_size_with_ragged_prompts(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ends, accepted = set(), 0
    for rows in (1, 2, 3, 5, 8, 13, 32):
        lengths = torch.randint(1, 10, (rows,), generator=generator).tolist()
        inputs = padded([torch.randint(2, 16, (n,), generator=generator).tolist() for n in lengths])
        output = decode(model, inputs)
        assert torch.equal(output.sequences, plain(model, inputs))
        lengths = [len(completion) for completion in completions(output, inputs)]
        statistics, ends = output.statistics, ends | set(lengths)
        accepted += some_are_accepted(output)
        assert statistics.tokens == sum(lengths) - rows  # the prompt's pass brings the first of each row
        # A draft is reached where those before it were accepted and did not end the row.
        assert all(b <= a for a, b in zip(statistics.accepted, statistics.reached[1:], strict=False))
        assert statistics.reached[0] <= statistics.steps
        assert sum(statistics.accepted) <= statistics.tokens <= sum(statistics.accepted) + statistics.steps
    assert len(ends) > 4  # rows end at different places
    assert accepted >= 5


OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"max_length": 13, "max_new_tokens": None},
    {"eos_token_id": [1, 3, 7, 9], "pad_token_id": 0},
    {"eos_token_id": None},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6, "eos_token_id": [1, 3, 5, 7, 9, 11]},
    {"bad_words_ids": [[3], [5, 5], [4, 6]]},
    {"suppress_tokens": [3, 6, 9]},
    {"begin_suppress_tokens": [5, 6, 8]},
    {"sequence_bias": {(5, 6): 5.0, (7,): 2.0}},
    {"exponential_decay_length_penalty": (3, 1.5)},
    {"forced_eos_token_id": 1},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 3, "renormalize_logits": True},
    {"max_time": 1000.0},
    {"prefill_chunk_size": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options_of_generate(model: Any, options: dict[str, Any]) -> None:
    inputs = padded(PROMPTS)
    assert torch.equal(decode(model, inputs, **options).sequences, plain(model, inputs, **options))


def test_without_padding_and_without_a_mask(model: Any) -> None:
    inputs = {"input_ids": torch.randint(2, 16, (6, 5), generator=torch.Generator().manual_seed(2))}
    output = decode(model, inputs)
    assert torch.equal(output.sequences, plain(model, inputs))
    assert some_are_accepted(output)
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=SpeculativeDecoder())
    assert torch.equal(tokens, output.sequences)  # a plain tensor where no dictionary is asked for


def test_positions_given_once_for_all_rows(model: Any) -> None:
    inputs = {"input_ids": torch.randint(2, 16, (3, 5), generator=torch.Generator().manual_seed(2))}
    positions = torch.arange(5)[None] + 4
    found = decode(model, inputs, position_ids=positions).sequences
    assert torch.equal(found, plain(model, inputs, position_ids=positions))


class EndsWith(StoppingCriteria):
    """Stops a row behind two equal tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == input_ids[:, -2]


def letters() -> PreTrainedTokenizerFast:
    """One token per letter; transformers' stop strings need those from a to f."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdefghijklmn"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.slow
def test_stopping_criteria_row_by_row(model: Any) -> None:
    inputs = padded([[3, 4, 5, 6], [7, 8, 9], [10, 11, 12], [4, 6], [5, 5, 6, 3, 2]])
    unstopped = decode(model, inputs)
    text = letters().batch_decode([completion[4:6] for completion in completions(unstopped, inputs)])
    for criterion in (EndsWith(), StopStringCriteria(letters(), text[:3])):
        options = {"stopping_criteria": StoppingCriteriaList([criterion])}
        found = decode(model, inputs, **options)
        assert torch.equal(found.sequences, plain(model, inputs, **options))
        # A stop is followed by padding, and by no end of text.
        lengths = [sum(token != 0 for token in row) for row in completions(found, inputs)]
        assert any(n < len(row) for n, row in zip(lengths, completions(unstopped, inputs), strict=True))


def test_generate_refuses_stop_strings_of_custom_methods(model: Any) -> None:
    # The reason why the decoder's docstring points to StopStringCriteria; it goes when this fails.
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        decode(model, padded(PROMPTS), stop_strings=["a"], tokenizer=letters())


def test_several_samples_per_prompt(model: Any) -> None:
    inputs = padded(PROMPTS)
    torch.manual_seed(0)
    output, values, _ = decode_with_values(model, inputs, do_sample=True, num_return_sequences=3, temperature=1.5)
    assert output.sequences.shape[0] == values.shape[0] == 15
    assert torch.equal(output.sequences[:, :7], inputs["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in output.sequences.tolist()}) > 10
    torch.manual_seed(0)
    again = decode(model, inputs, do_sample=True, num_return_sequences=3, temperature=1.5)
    assert torch.equal(output.sequences, again.sequences)


@pytest.mark.slow
def test_samples_depend_on_the_seed_alone_with_a_given_cost(model: Any) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        decoder = SpeculativeDecoder(draft_cost=0.1)
        found.append([decode(model, padded(PROMPTS), do_sample=True, decoder=decoder).sequences for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_fewer_drafts_than_heads(model: Any) -> None:
    output = decode(model, padded(PROMPTS), decoder=SpeculativeDecoder(2, draft_cost=0.0))
    assert torch.equal(output.sequences, plain(model, padded(PROMPTS)))
    assert output.statistics.reached[1] > 0 and output.statistics.reached[2] == 0


def test_the_last_position_of_a_model_is_in_reach() -> None:
    # Rows that are ahead of the others would draft beyond it.
    model = make("gpt2", {"max_position_embeddings": 4 + NEW, "eos_token_id": None}, "eager", num_heads=4)
    inputs = {"input_ids": torch.randint(2, 24, (8, 4), generator=torch.Generator().manual_seed(0))}
    output = decode(model, inputs)
    assert torch.equal(output.sequences, plain(model, inputs))
    assert some_are_accepted(output)


def test_listener_hears_the_length_after_every_step(model: Any) -> None:
    heard: list[int] = []
    output = decode(model, padded(PROMPTS), decoder=SpeculativeDecoder(draft_cost=0.0, listener=heard.append))
    assert heard == sorted(heard) and heard[0] == 1
    assert heard[-1] == output.sequences.shape[1] - 7


# Model families

EAGER_ONLY = ("bloom", "gemma2", "gpt_oss")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "attention", "head_type"),
    [
        (f, a, h)
        for f in FAMILIES
        for a in ("eager", "sdpa")
        for h in HEAD_TYPES
        if (a == "eager" or f not in EAGER_ONLY) and (h == "parallel" or f not in PARALLEL_ONLY)
    ],
)
def test_families_greedy_tokens_values_and_log_probs(family: str, attention: str, head_type: str) -> None:
    model, inputs = make(family, FAMILIES[family], attention, head_type=head_type), padded(PROMPTS)
    output, values, _ = decode_with_values(model, inputs)
    assert torch.equal(output.sequences, plain(model, inputs))
    assert some_are_accepted(output)
    # A decoder layer of its own adds its own rounding.
    check_values_and_log_probs(model, inputs, output, values, 1e-5 if head_type == "parallel" else 5e-5)


def check_values_and_log_probs(
    model: Any, inputs: dict[str, Tensor], output: SpeculativeOutput, values: Tensor, tolerance: float = 1e-5
) -> None:
    """Compare with one plain forward pass of each row alone."""
    done = completions(output, inputs)
    prompts = [
        row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    for row, alone in enumerate(completion_values(model, prompts, done)):
        length = len(done[row])
        torch.testing.assert_close(values[row, :length], alone, atol=tolerance, rtol=tolerance)
        with torch.no_grad():
            logits = model(torch.tensor([prompts[row] + done[row]]), use_cache=False).logits[0, -length - 1 : -1]
        expected = logits.float().log_softmax(dim=-1).gather(1, torch.tensor(done[row])[:, None])[:, 0]
        torch.testing.assert_close(output.log_probs[row, :length], expected, atol=2 * tolerance, rtol=tolerance)
        assert not output.log_probs[row, length:].any()
        assert not values[row, length:].any()


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_bfloat16(head_type: str) -> None:
    model, inputs = make("llama", {}, "sdpa", head_type=head_type).to(torch.bfloat16), padded(PROMPTS)
    output, values, _ = decode_with_values(model, inputs)
    assert output.log_probs.dtype == values.dtype == torch.float32
    assert some_are_accepted(output)
    check_values_and_log_probs(model, inputs, output, values, tolerance=0.1)


# Values


@pytest.mark.slow
@pytest.mark.parametrize("flush_every", [1, 3, 64])
def test_values_of_rows_that_leave_the_batch(model: Any, flush_every: int) -> None:
    options = {"eos_token_id": [1, 3, 7], "pad_token_id": 0}
    target = PolyakTarget(model.mtp_heads)
    randomise_heads(target.heads, 0.05, seed=1)
    inputs = padded([*PROMPTS, *[[2 + i, 15 - i, 3] for i in range(12)]])
    output, values, target_values = decode_with_values(model, inputs, **options)
    tails = output.sequences[:, 7:].tolist()
    stops = [next((i + 1 for i, t in enumerate(row) if t in options["eos_token_id"]), NEW) for row in tails]
    assert len(set(stops)) > 4 and NEW in stops
    _, online, slow = decode_with_values(model, inputs, target, flush_every, **options)
    torch.testing.assert_close(online, values, atol=1e-6, rtol=1e-6)
    assert torch.equal(values, target_values)
    rows = [row[mask.bool()].tolist() for row, mask in zip(*inputs.values(), strict=True)]
    done = [row[:stop] for row, stop in zip(tails, stops, strict=True)]
    seen: list[Tensor] = []
    for found, heads in ((online, model.mtp_heads), (slow, target)):
        for row, (prompt, completion) in enumerate(zip(rows, done, strict=True)):
            with model.mtp_heads.watching(lambda h: seen.append(model.mtp_heads.states(h))):
                model(torch.tensor([prompt + completion]))
            hidden = seen.pop()[:, -len(completion) - 1 : -1]
            torch.testing.assert_close(found[row, : len(completion)], heads(hidden)[0], atol=1e-5, rtol=1e-5)
            assert not found[row, len(completion) :].any()
    assert (online - slow).abs().max() > 0.1


def test_a_recorder_holds_the_values_of_one_call(model: Any) -> None:
    decoder = SpeculativeDecoder(draft_cost=0.0)
    first, values, _ = decode_with_values(model, padded(PROMPTS), decoder=decoder)
    assert decoder.recorder is None
    decode(model, padded(PROMPTS[:2]), decoder=decoder)  # whose values nobody wants
    check_values_and_log_probs(model, padded(PROMPTS), first, values)
    inputs = padded(PROMPTS[:2])
    output, values, _ = decode_with_values(model, inputs, decoder=decoder, max_new_tokens=5)
    assert values.shape == (2, 5, 3)
    check_values_and_log_probs(model, inputs, output, values)


def test_values_are_only_made_for_a_recorder(model: Any) -> None:
    made: list[int] = []
    of_values = [module for module in model.mtp_heads.modules() if isinstance(module, ValueHead)]
    handles = [module.register_forward_hook(lambda *args: made.append(1)) for module in of_values]
    output = decode(model, padded(PROMPTS))
    assert not made
    again, *_ = decode_with_values(model, padded(PROMPTS))
    for handle in handles:
        handle.remove()
    assert made and torch.equal(output.sequences, plain(model, padded(PROMPTS)))
    assert torch.equal(again.sequences, output.sequences)


# Hosts


@pytest.mark.slow
def test_lora(tiny_model: Callable[..., Any]) -> None:
    model = attach_random_heads(tiny_model(seed=1, initializer_range=0.5, tie_word_embeddings=False), 3, 0.05)
    before = plain(model, padded(PROMPTS))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(model, config)
    inputs = padded(PROMPTS)
    expected = plain(lora, inputs)
    assert not torch.equal(expected, before)
    assert torch.equal(decode(lora, inputs).sequences, expected)
    decoder = SpeculativeDecoder(draft_cost=0.0)
    with speculating(lora, decoder):
        assert torch.equal(lora.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    assert some_are_accepted(decoder.last)


def test_speculating_injects_and_restores(model: Any) -> None:
    outer, inner, inputs = SpeculativeDecoder(), SpeculativeDecoder(1), padded(PROMPTS)
    with speculating(model, outer):
        with speculating(model, inner):
            plain(model, inputs)
            assert inner.last is not None and outer.last is None
        plain(model, inputs)
        assert outer.last is not None
    inner.last = outer.last = None
    plain(model, inputs)
    assert inner.last is None and outer.last is None and "generate" not in vars(model)
    with pytest.raises(RuntimeError, match="inside"), speculating(model, outer):
        raise RuntimeError("inside")
    assert "generate" not in vars(model)


def test_the_model_stays_as_it_was(model: Any) -> None:
    hooks, parameters = len(model.model._forward_hooks), [p.clone() for p in model.parameters()]
    assert hooks == 1 and model.mtp_heads.observer is None
    for training in (True, False):
        model.train(training)
        decode(model, padded(PROMPTS))
        assert model.training is training
    assert len(model.model._forward_hooks) == hooks and model.mtp_heads.observer is None
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
