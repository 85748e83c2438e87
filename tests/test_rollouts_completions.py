"""Rollouts by a model's own `generate`: padding, ends, and equality with one prompt at a time."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from rl_plugins.rollouts.completions import (
    Completions,
    eos_token_ids,
    generate_completions,
    pad_left,
    until_eos,
)

PROMPTS = [[3, 4, 12, 5], [7, 13], [2, 2, 12, 9, 14, 3, 6], [8]]
GREEDY: dict[str, Any] = {"do_sample": False, "top_p": None, "top_k": None}


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model(initializer_range=0.3, seed=2).eval()


def generate(model: Any, prompts: Any = PROMPTS, sampling: Any = GREEDY, **options: Any) -> Completions:
    arguments = {"pad_token_id": 0, "eos": [1], "max_completion_length": 6, "sampling": sampling, **options}
    return generate_completions(model, prompts, **arguments)


@torch.no_grad()
def slow_greedy(model: Any, prompt: list[int], length: int, eos: list[int]) -> list[int]:
    """The likeliest token after another, without cache and padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length and (len(ids) == len(prompt) or ids[-1] not in eos):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_padding_by_hand() -> None:
    ids, mask = pad_left([[5], [6, 7, 8]], 0, "cpu")
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_masks_end_with_the_first_end() -> None:
    ids = torch.tensor([[4, 1, 1, 5], [2, 3, 4, 5], [9, 4, 4, 1], [1, 2, 3, 4]])
    mask, ended = until_eos(ids, [1])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, False, True, True] and mask.dtype == torch.long
    mask, ended = until_eos(ids, [1, 3])
    assert mask.sum(1).tolist() == [2, 2, 4, 1] and ended.all()


def test_tokens_that_end_a_completion(model: Any, tokenizer: Any) -> None:
    assert eos_token_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [9, 3]
    assert eos_token_ids(model, tokenizer) == [1, 3, 9]
    model.generation_config.eos_token_id = 5
    assert eos_token_ids(model, SimpleNamespace(eos_token_id=None)) == [5]
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, tokenizer) == [1]
    with pytest.raises(
        ValueError, match="Neither the model's generation config nor the tokenizer has an eos_token_id"
    ):
        eos_token_ids(model, SimpleNamespace(eos_token_id=None))


def test_ragged_prompts_complete_as_they_do_alone(model: Any) -> None:
    alone = [slow_greedy(model, prompt, 6, [1]) for prompt in PROMPTS]
    eos = alone[0][2]  # a token that the first completion reaches in the middle, so that ends differ
    alone = [slow_greedy(model, prompt, 6, [eos]) for prompt in PROMPTS]
    lengths = [len(ids) for ids in alone]
    assert len(set(lengths)) > 1
    together = generate(model, eos=[eos])
    assert together.token_lists() == alone
    assert together.ended.tolist() == [ids[-1] == eos for ids in alone]
    assert together.completion_mask.sum(1).tolist() == lengths
    assert (together.completion_ids[together.completion_mask == 0] == 0).all()
    for ids, mask, prompt in zip(together.prompt_ids, together.prompt_mask, PROMPTS, strict=True):
        assert ids[mask.bool()].tolist() == prompt
    assert together.prompt_ids[1].tolist() == [0] * 5 + PROMPTS[1]
    # And equal to transformers' own generate, row by row.
    for prompt, ids in zip(PROMPTS, alone, strict=True):
        own = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
        assert own[0, len(prompt) :].tolist() == ids


@pytest.mark.slow
def test_sampling_follows_the_policy_at_its_temperature(model: Any) -> None:
    """First tokens of many completions are as frequent as the model says."""
    torch.manual_seed(0)
    first = generate(model, [PROMPTS[0]] * 20000, {"temperature": 0.7}, max_completion_length=1).completion_ids[:, 0]
    with torch.no_grad():
        exact = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    shares = torch.bincount(first, minlength=16) / 20000
    # Four standard deviations of each share.
    assert ((shares - exact).abs() < 4 * (exact * (1 - exact) / 20000).sqrt() + 1e-4).all()
    torch.manual_seed(0)
    few = generate(model, [PROMPTS[0]] * 500, {"top_k": 2}, max_completion_length=1).completion_ids[:, 0]
    assert set(few.tolist()) == set(exact.topk(2).indices.tolist())


def test_settings_win_over_the_models_own_generation_config(model: Any) -> None:
    """Models come with one: 0.6 and 20 for Qwen3's temperature and top_k."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    torch.manual_seed(0)
    expected = generate(model, sampling=sampling).completion_ids
    model.generation_config.update(temperature=0.01, top_k=1, top_p=0.1, max_new_tokens=2, repetition_penalty=3.0)
    torch.manual_seed(0)
    assert torch.equal(generate(model, sampling=sampling).completion_ids, expected)
    # What is not said comes from the model, as in TRL.
    torch.manual_seed(0)
    assert not torch.equal(generate(model, sampling={}).completion_ids, expected)


def test_every_decoding_step_is_told(model: Any) -> None:
    steps: list[int] = []
    ids = generate(model, listener=steps.append, eos=[15], max_completion_length=5).completion_ids
    assert steps == list(range(1, ids.shape[1] + 1))


def test_training_mode_is_given_back(model: Any, tiny_model: Callable[..., Any]) -> None:
    dropping = tiny_model(initializer_range=0.3, seed=2, attention_dropout=0.5).train()
    expected = generate(model)
    assert torch.equal(generate(dropping).completion_ids, expected.completion_ids), "no dropout while generating"
    assert dropping.training and dropping.model.layers[0].training
    assert not generate(model.eval()).completion_ids.requires_grad and not model.training

    def refuse(tokens: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(dropping, listener=refuse)
    assert dropping.training


def test_adapters_take_part(model: Any) -> None:
    before = generate(model).completion_ids
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(generate(adapted).completion_ids, before)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    after = generate(adapted)
    assert not torch.equal(after.completion_ids, before)
    with adapted.disable_adapter():
        assert torch.equal(generate(adapted).completion_ids, before)


def test_an_empty_prompt_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="A prompt has no tokens: check the tokenizer and the `prompt` column"):
        generate(model, [[3], []])


def test_token_lists_leave_out_padding() -> None:
    ids: Tensor = torch.tensor([[4, 5, 0], [0, 6, 1]])
    completions = Completions(ids, ids, ids, torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([False, True]))
    assert completions.token_lists() == [[4, 5], [0, 6, 1]]
