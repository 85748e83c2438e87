"""Sampled completions have exactly the distribution of plain sampling, whatever the heads draft.

The distribution of whole sequences is enumerated: one plain forward pass of each prefix, transformers' own processors
on each prefix, and no cache. Samples are compared with it by a chi-square test.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.alignment import completion_labels, completion_states
from rl_plugins.nn import MTPHeads
from rl_plugins.rollouts import SpeculativeDecoder
from rl_plugins.rollouts.speculative import verification

from .helpers.speculative_models import EOS, FAMILIES, attach_random_heads, make_plain, padded, processors_of

PROMPTS = [[3, 2], [2, 3, 2, 3], [3], [2, 2, 3]]
INITIALIZER = 0.8


@dataclass
class Setting:
    """A model with heads, and how it is sampled from: 6 tokens in the vocabulary and completions of 4, or 4 and 6."""

    heads: str
    num_drafts: int
    options: dict[str, Any]
    vocabulary: int = 6
    head_type: str = "parallel"
    family: str | None = None

    @property
    def tokens(self) -> int:
        return 10 - self.vocabulary


SETTINGS = {
    "plain": Setting("trained", 1, {}),
    "cold": Setting("trained", 2, {"temperature": 0.7}),
    "hot": Setting("copies", 4, {"temperature": 1.6}, vocabulary=4),
    "top_k": Setting("hopeless", 2, {"top_k": 3}),
    "top_p": Setting("trained", 4, {"top_p": 0.8}, vocabulary=4),
    "min_p": Setting("random", 2, {"min_p": 0.15}),
    "repetition": Setting("trained", 4, {"repetition_penalty": 1.8}, vocabulary=4),
    "impossible_drafts": Setting("ending", 4, {"min_new_tokens": 5, "no_repeat_ngram_size": 3}, vocabulary=4),
    "all": Setting(
        "trained",
        2,
        {"temperature": 0.8, "top_k": 5, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
    ),
    "sequential": Setting("trained", 1, {}, head_type="sequential"),
    "sequential_hot": Setting("trained", 3, {"temperature": 1.6}, vocabulary=4, head_type="sequential"),
    "sequential_random": Setting("random", 2, {"min_p": 0.15, "top_k": 4}, head_type="sequential"),
    "sequential_all": Setting(
        "trained",
        2,
        {"temperature": 0.8, "top_k": 5, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
        head_type="sequential",
    ),
    **{
        f"sequential_{family}": Setting("trained", 2, {"temperature": 1.2}, 5, "sequential", family)
        for family in ("mistral", "gemma2", "qwen3_moe", "deepseek_v3")
    },
}


def make_model(tiny_model: Callable[..., Any], setting: Setting) -> Any:
    """Tiny model whose next token depends on what came before, with heads of some quality."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    options = {"vocab_size": setting.vocabulary, "initializer_range": INITIALIZER}
    if setting.family is None:
        model = tiny_model(seed=3, **sizes, **options)
    else:
        model = make_plain(setting.family, {**FAMILIES[setting.family], **options}, "eager")
    scale = {"copies": 0.0, "random": 0.5, "hopeless": 30.0, "trained": 0.0, "ending": 0.0}[setting.heads]
    attach_random_heads(model, setting.num_drafts, scale, head_type=setting.head_type)
    if setting.heads == "trained":
        fit_heads(model)
    if setting.heads == "ending":
        draft_the_end(model)
    return model


def fit_heads(model: Any) -> None:
    """A few steps of the token loss on the model's own samples."""
    torch.manual_seed(0)
    inputs = padded([prompt for prompt in PROMPTS for _ in range(64)])
    ids = model.generate(**inputs, do_sample=True, max_new_tokens=8, eos_token_id=None)
    width = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, width:])], dim=1)
    heads: MTPHeads = model.mtp_heads
    labels = completion_labels(
        ids[:, :width], ids[:, width:], mask[:, width:], heads.config.num_heads, ahead=heads.ahead
    )
    select = partial(completion_states, num_tokens=labels.shape[1])
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for _ in range(40):
        with heads.running(select, lm_head=model.lm_head, labels=labels, with_values=False) as run:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert run.token_losses is not None and run.token_counts is not None
        loss = (run.token_losses / run.token_counts).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def draft_the_end(model: Any) -> None:
    """Heads that draft the end of text, almost surely and everywhere: `W_down silu(W_up n)` is then far towards its
    embedding, since the two halves of `W_up` are opposite and `silu(x) + silu(-x) >= 0`."""
    direction = model.lm_head.weight[EOS]
    for head in model.mtp_heads:
        half = head.up.weight.shape[0] // 2
        head.up.weight[half:] = -head.up.weight[:half]
        head.down.weight.copy_(100.0 * direction[:, None].expand_as(head.down.weight))


@dataclass
class Exact:
    """Probability of every completion of a prompt, and of every token of it."""

    probs: dict[tuple[int, ...], float]
    log_probs: dict[tuple[int, ...], list[float]]

    @classmethod
    def of(cls, model: Any, prompts: list[list[int]], setting: Setting) -> list["Exact"]:
        """Of each prompt, padded as in the batch."""
        inputs = padded(prompts)
        rows = [{name: tensor[[row]] for name, tensor in inputs.items()} for row in range(len(prompts))]
        return [enumerate_completions(model, row, setting) for row in rows]


@torch.no_grad()
def enumerate_completions(model: Any, inputs: dict[str, Tensor], setting: Setting) -> Exact:
    """All completions of one prompt, up to the end of text or the largest length."""
    options = {"top_k": 0, **setting.options}
    processors = processors_of(model, inputs, do_sample=True, max_new_tokens=setting.tokens, **options)
    start = int(inputs["attention_mask"].argmax())
    exact = Exact({}, {})
    open_prefixes: dict[tuple[int, ...], list[float]] = {(): []}
    for step in range(setting.tokens):
        prefixes = list(open_prefixes)
        tails = torch.tensor(prefixes, dtype=torch.long).reshape(len(prefixes), step)
        ids = torch.cat([inputs["input_ids"].expand(len(prefixes), -1), tails], dim=1)
        logits = model(input_ids=ids[:, start:], use_cache=False).logits[:, -1].float()
        scores = torch.cat([processors(ids[[i]], logits[[i]]) for i in range(len(ids))])
        following: dict[tuple[int, ...], list[float]] = {}
        for prefix, row_logs in zip(prefixes, scores.double().log_softmax(dim=-1).tolist(), strict=True):
            for token, log_prob in enumerate(row_logs):
                longer, logs = (*prefix, token), [*open_prefixes[prefix], log_prob]
                if log_prob == -math.inf:
                    continue
                if token == EOS or step == setting.tokens - 1:
                    exact.probs[longer], exact.log_probs[longer] = math.exp(math.fsum(logs)), logs
                else:
                    following[longer] = logs
        open_prefixes = following
    assert sum(exact.probs.values()) == pytest.approx(1.0, abs=1e-9)
    return exact


def tally(exact: list[Exact], output: Any, width: int) -> list[dict[tuple[int, ...], int]]:
    """Count the completions of each prompt, whose rows take turns, and check their log-probabilities."""
    counts: list[dict[tuple[int, ...], int]] = []
    for row, distribution in enumerate(exact):
        mine = output.sequences[row :: len(exact), width:]
        different, place, numbers = torch.unique(mine, dim=0, return_inverse=True, return_counts=True)
        cut = [tuple(c[: c.index(EOS) + 1] if EOS in c else c) for c in different.tolist()]
        for sequence, tokens in zip(cut, different.tolist(), strict=True):
            assert not any(tokens[len(sequence) :])  # padding behind the end
            assert sequence in distribution.probs, f"{sequence} is impossible"
        logs = [distribution.log_probs[c] + [0.0] * (mine.shape[1] - len(c)) for c in cut]
        error = output.log_probs[row :: len(exact)] - torch.tensor(logs)[place]
        assert error.abs().max() < 1e-5
        counts.append(dict(zip(cut, numbers.tolist(), strict=True)))
    return counts


def p_value(exact: Exact, counts: dict[tuple[int, ...], int]) -> float:
    """Chi-square test of counts against probabilities; cells with fewer than 8 expected are pooled."""
    total, rare, cells = sum(counts.values()), [0.0, 0.0], []
    for sequence, probability in sorted(exact.probs.items(), key=lambda item: item[1]):
        cell = [float(counts.get(sequence, 0)), probability * total]
        if cell[1] < 8.0 or 0.0 < rare[1] < 8.0:
            rare = [rare[0] + cell[0], rare[1] + cell[1]]
        else:
            cells.append(cell)
    observed, expected = torch.tensor([rare, *cells] if rare[1] else cells, dtype=torch.float64).unbind(dim=1)
    if len(expected) == 1:
        return 1.0  # all cells were pooled: there is nothing to compare
    chi_square = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, chi_square / 2))


def worst_p_value(
    exact: list[Exact], model: Any, decoder: SpeculativeDecoder, setting: Setting, rows: int, batches: int
) -> float:
    """Smallest p-value of all prompts, of `batches` batches of `rows` rows."""
    inputs = padded(PROMPTS[: len(exact)])
    taken = torch.arange(rows) % len(exact)
    totals: list[Counter[tuple[int, ...]]] = [Counter() for _ in exact]
    for _ in range(batches):
        output = model.generate(
            **{name: tensor[taken] for name, tensor in inputs.items()},
            **{"top_k": 0, **setting.options},
            max_new_tokens=setting.tokens,
            do_sample=True,
            custom_generate=decoder,
            return_dict_in_generate=True,
        )
        for total, counts in zip(totals, tally(exact, output, inputs["input_ids"].shape[1]), strict=True):
            total.update(counts)
    return min(p_value(distribution, total) for distribution, total in zip(exact, totals, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_completions_have_the_distribution_of_the_model(tiny_model: Callable[..., Any], name: str) -> None:
    setting = SETTINGS[name]
    model = make_model(tiny_model, setting)
    exact = Exact.of(model, PROMPTS, setting)
    for seed, cost in ((1, 0.0), (2, 0.1)):  # all drafts in every step, and as many as pay
        torch.manual_seed(seed)
        decoder = SpeculativeDecoder(draft_cost=cost)
        assert worst_p_value(exact, model, decoder, setting, rows=4096, batches=3) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "batches"), [(1, 250), (7, 400), (64, 60)])
@pytest.mark.parametrize("name", ["all", "sequential_all"])
def test_small_batches_have_the_distribution_of_the_model(
    tiny_model: Callable[..., Any], name: str, rows: int, batches: int
) -> None:
    setting = SETTINGS[name]
    model = make_model(tiny_model, setting)
    exact = Exact.of(model, PROMPTS[:rows], setting)
    torch.manual_seed(0)
    decoder = SpeculativeDecoder(draft_cost=0.1)
    assert worst_p_value(exact, model, decoder, setting, rows, batches) > 1e-4


@pytest.mark.slow
def test_the_distribution_is_right_and_wrong_rules_are_noticed(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting("random", 2, {"temperature": 0.9, "top_k": 4})
    model = make_model(tiny_model, setting)
    exact = Exact.of(model, PROMPTS[:2], setting)

    def measure() -> float:
        torch.manual_seed(0)
        return worst_p_value(exact, model, SpeculativeDecoder(draft_cost=0.0), setting, rows=4096, batches=2)

    assert measure() > 1e-4
    with monkeypatch.context() as patch:  # all drafts that are possible at all stay
        patch.setattr(verification, "acceptance_probs", lambda p, q: (p > 0).float())
        assert measure() < 1e-20
    with monkeypatch.context() as patch:  # the token in their place comes from p
        patch.setattr(verification, "residual_probs", lambda p, q: p)
        assert measure() < 1e-20
