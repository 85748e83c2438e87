"""Values saved while generating equal those of one full forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_plugins.nn import MTPHeads, PolyakTarget, TrunkInputs, ValueModel, attach_mtp_heads
from rl_plugins.nn.mtp_heads import HEAD_TYPES
from rl_plugins.rollouts import values
from rl_plugins.rollouts.values import EachStep, ValueRecord, WholeRows, completion_values

PROMPTS = [[3, 12, 3, 14], [4, 5, 12, 4, 5, 14], [14]]
EOS = 1


def randomise(heads: MTPHeads, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


@pytest.fixture(params=HEAD_TYPES)
def model(tiny_model: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """Tiny model with two random heads, whose output distribution is far from uniform."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    randomise(attach_mtp_heads(model, 2, head_type=request.param), 1)
    return model.eval()


@pytest.fixture
def parallel(tiny_model: Callable[..., Any]) -> Any:
    """The same with parallel heads, which any hidden states can be given."""
    model = tiny_model()
    randomise(attach_mtp_heads(model, 2), 1)
    return model.eval()


@pytest.fixture
def target(model: Any) -> PolyakTarget:
    """Slow heads that differ from the online ones."""
    target = PolyakTarget(model.mtp_heads)
    randomise(target.heads, 2)
    return target


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def generate(model: Any, record: ValueRecord | EachStep, num_tokens: int = 7, **options: Any) -> list[list[int]]:
    """Completions, recorded step by step, each up to and with its first end-of-sequence token."""
    ids, mask = padded(PROMPTS)
    torch.manual_seed(0)
    steps = record if isinstance(record, EachStep) else EachStep(record)
    with steps.following(model):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, **options)
    completions = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in completions]


def full_pass(model: Any, target: PolyakTarget | None, completions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Values from one forward over left-padded prompts and right-padded completions."""
    width = max(map(len, completions))
    ids, mask = padded(PROMPTS)
    tail = torch.tensor([row + [0] * (width - len(row)) for row in completions])
    tail_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
    record = ValueRecord(model.mtp_heads, target)
    with model.mtp_heads.watching(WholeRows(record, width)), torch.no_grad():
        model(input_ids=torch.cat([ids, tail], 1), attention_mask=torch.cat([mask, tail_mask], 1))
    passed = record.finish(width)
    assert passed is not None
    return passed


@pytest.mark.parametrize("flush_every", [1, 3, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": False, "use_cache": False},
        {"prefill_chunk_size": 4},  # the prompts' 6 tokens in two passes
        {"prefill_chunk_size": 5},  # the second of one token
        {"cache_implementation": "static", "disable_compile": True},
        {"repetition_penalty": 1.3, "min_p": 0.05},
    ],
)
def test_recorded_values_are_those_of_a_full_forward(
    model: Any, target: PolyakTarget, flush_every: int, options: dict[str, Any]
) -> None:
    record = ValueRecord(model.mtp_heads, target, flush_every=flush_every)
    completions = generate(model, record, **options)
    num_tokens = max(map(len, completions))
    saved = record.finish(num_tokens)
    if model.mtp_heads.reads_rows and "cache_implementation" in options:
        assert saved is None  # the rows' own attention mask is not in reach, and a pass gives the values
        return
    assert saved is not None
    online, slow = saved
    assert online.shape == slow.shape == (3, num_tokens, 2)
    full_online, full_slow = full_pass(model, target, completions)
    alone = completion_values(model, PROMPTS, completions)
    assert [tuple(v.shape) for v in alone] == [(len(c), 2) for c in completions]
    for b, completion in enumerate(completions):
        real = slice(0, len(completion))
        torch.testing.assert_close(online[b, real], full_online[b, real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(slow[b, real], full_slow[b, real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(online[b, real], alone[b], atol=1e-5, rtol=1e-5)
    assert (online[:2, :2] - slow[:2, :2]).abs().min() > 1e-4  # the two networks really differ
    assert alone[0][:, 0].std() > 1e-3  # and so do the states


def test_without_a_target_the_online_values_come_twice(model: Any) -> None:
    record = ValueRecord(model.mtp_heads)
    completions = generate(model, record, num_tokens=3)
    saved = record.finish(3)
    assert saved is not None and torch.equal(*saved)
    passed = full_pass(model, None, completions)
    assert torch.equal(*passed)


def test_finish_pads_and_cuts(parallel: Any) -> None:
    for length in (2, 5, 8):
        record = ValueRecord(parallel.mtp_heads, flush_every=2)
        states, rows = torch.randn(3, 5, 32), torch.arange(3)
        for t in range(5):
            record.add(states[:, t : t + 1], torch.full((3, 1), t), rows)
        saved = record.finish(length)
        assert saved is not None and saved[0].shape == (3, length, 2)
        expected = parallel.mtp_heads(states)
        torch.testing.assert_close(saved[0][:, :5], expected[:, : min(length, 5)])
        assert not saved[0][:, 5:].any()


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"custom_generate": lambda model, input_ids, **kwargs: torch.cat([input_ids, input_ids[:, :1]], 1)},
    ],
)
def test_passes_that_are_not_tokens_are_not_recorded(
    model: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "prompt_lookup_num_tokens" in options:
        monkeypatch.setitem(globals(), "PROMPTS", [[3, 12, 3, 12, 3, 12]])  # one row, with repetitions
    record = ValueRecord(model.mtp_heads)
    generate(model, record, num_tokens=12, **options)
    assert not EachStep(record).usable and record.finish(12) is None


def account(heads: MTPHeads, *widths: int, prompt: int = 5, rows: int = 2) -> bool:
    """Whether a record of one token per pass of these widths is usable."""
    record = ValueRecord(heads)
    steps = EachStep(record)

    def passes(ids: Tensor, stopping_criteria: Any) -> Tensor:
        for width in widths:
            steps(torch.randn(rows, abs(width), 32))
            if width > 0:  # below 0: no token is chosen yet
                ids = torch.cat([ids, ids[:, :1]], 1)
                stopping_criteria(ids, None)
        return ids

    steps._generate(passes, torch.ones(2, prompt, dtype=torch.long))
    return record.finish(4) is not None


def test_all_tokens_must_have_gone_through_the_model(parallel: Any) -> None:
    heads = parallel.mtp_heads
    assert account(heads, 5, 1, 1)  # with a cache
    assert account(heads, 5, 6, 7)  # without one
    assert account(heads, 1, 1, prompt=1)
    assert account(heads, -4, 1, 1) and account(heads, -2, -2, 1, 1)  # a prompt in chunks
    assert not account(heads, 5, 2, 1)  # a draft that was rejected
    assert not account(heads, 6, 1, 1)  # one beside the prompt
    assert not account(heads, 4, 1)  # a cache from elsewhere
    assert not account(heads, 5, -1, 1)  # drafts of the parallel's own first layers
    assert not account(heads, 5, 1, rows=4)  # beams
    assert not account(heads)  # nothing ran


def test_idle_passes_after_the_end_are_not_recorded(parallel: Any) -> None:
    # Where ranks run in step, one that has ended goes on without choosing tokens.
    assert account(parallel.mtp_heads, 5, 1, -1, -1)


@pytest.mark.parametrize("chosen", [1, 2, 3, 6, 7])
def test_ranks_run_the_heads_equally_often(model: Any, chosen: int) -> None:
    """Seven passes, the last ones idle: under ZeRO-3 every run of the heads waits for all ranks."""
    record, runs = ValueRecord(model.mtp_heads, flush_every=3), []
    steps, heads = EachStep(record), model.mtp_heads
    watched = [heads.value_path, *(list(heads) if heads.reads_rows else [])]
    handles = [module.register_forward_hook(lambda *args: runs.append(1)) for module in watched]

    def passes(ids: Tensor, stopping_criteria: Any) -> Tensor:
        for i in range(7):
            width = 1 if i else 5
            heads.inputs = TrunkInputs(ids[:, :width], torch.ones(2, 5 + i), None)
            steps(torch.randn(2, width, 32))
            if i < chosen:
                ids = torch.cat([ids, ids[:, :1]], 1)
                stopping_criteria(ids, None)
        return ids

    steps._generate(passes, torch.ones(2, 5, dtype=torch.long))
    saved = record.finish(chosen)
    for handle in handles:
        handle.remove()
    assert len(runs) == 3 * len(watched) and saved is not None and bool((saved[0] != 0).any(-1).all())


def test_only_completions_that_were_generated_have_been_recorded(model: Any) -> None:
    steps = EachStep(ValueRecord(model.mtp_heads))
    completions = generate(model, steps, do_sample=True, temperature=50.0)
    width = max(map(len, completions))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in completions])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
    assert steps.made(ids, mask)
    assert steps.made(ids.masked_fill(mask == 0, 9), mask)
    assert not steps.made(ids.flip(0), mask.flip(0)) and not steps.made(ids[:2], mask[:2])
    longer = torch.cat([ids, ids, ids], 1)
    assert steps.made(longer, torch.cat([mask, 0 * mask, 0 * mask], 1))
    assert not steps.made(longer, torch.ones_like(longer))
    other = ids.clone()
    other[0, 0] += 1
    assert not steps.made(other, mask)
    assert not EachStep(ValueRecord(model.mtp_heads)).made(ids, mask)
    steps.record.complete = False
    assert not steps.made(ids, mask)


def test_a_generate_of_ones_own_is_not_followed(model: Any) -> None:
    record = ValueRecord(model.mtp_heads)
    model.generate = model.generate  # any callable of the user
    generate(model, record)
    assert record.finish(7) is None and "generate" in vars(model)
    del model.generate
    own = type("Own", (type(model),), {"generate": lambda self, ids, **kwargs: ids.repeat(1, 2)})
    model.__class__ = own
    generate(model, record)
    assert record.finish(7) is None


def test_following_leaves_no_trace(model: Any) -> None:
    record = ValueRecord(model.mtp_heads)
    with pytest.raises(TypeError), EachStep(record).following(model):
        model.generate(nonsense=object(), input_ids=torch.ones(1, 2, dtype=torch.long), max_new_tokens="x")
    assert "generate" not in vars(model) and model.mtp_heads.observer is None


def test_no_graph_is_kept(parallel: Any) -> None:
    record = ValueRecord(parallel.mtp_heads)
    record.add(torch.randn(2, 1, 32, requires_grad=True), torch.zeros(2, 1, dtype=torch.long), torch.arange(2))
    saved = record.finish(1)
    assert saved is not None and not saved[0].requires_grad
    one_pass = ValueRecord(parallel.mtp_heads)
    WholeRows(one_pass, 2)(torch.randn(2, 3, 32, requires_grad=True))
    saved = one_pass.finish(2)
    assert saved is not None and not saved[0].requires_grad


def test_whole_rows_are_joined_chunk_by_chunk(parallel: Any) -> None:
    hidden, runs = torch.randn(5, 6, 32), []
    record = ValueRecord(parallel.mtp_heads)
    rows = WholeRows(record, 4)
    handle = parallel.mtp_heads.register_forward_hook(lambda *args: runs.append(1))
    for chunk in hidden.split(2):
        rows(chunk)
        assert len(runs) == rows._num_rows // 2 + rows._num_rows % 2  # inside the pass that it watches
    handle.remove()
    rows(hidden)  # a later pass, such as the reference parallel's, comes after
    saved = record.finish(4)
    assert saved is not None and saved[0].shape == (10, 4, 2)
    torch.testing.assert_close(saved[0][:5], parallel.mtp_heads(hidden[:, 1:5]))


def test_values_of_a_value_model_are_recorded_too(model: Any, tiny_model: Callable[..., Any]) -> None:
    """Its observers receive values, to which the record adds the last dimension."""
    critic = ValueModel(tiny_model(seed=3).model).attach(model)
    torch.nn.init.normal_(critic.head.weight)
    ids = torch.tensor([[3, 12, 3, 14, 5], [4, 5, 12, 4, 9]])
    record = ValueRecord(lambda values: values.unsqueeze(-1))
    rows = WholeRows(record, 3)
    with critic.watching(rows):
        for row in ids:
            model(input_ids=row[None])
    saved = record.finish(3)
    assert saved is not None and torch.equal(*saved) and not saved[0].requires_grad
    torch.testing.assert_close(saved[0], critic(ids)[:, 1:4].detach().unsqueeze(-1))
    with pytest.raises(TypeError, match="seen through an Attachment, got function"), EachStep(record).following(model):
        pass


def test_completion_values_errors(model: Any, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no MTP heads. Call attach_mtp_heads\(model\) or load_mtp_heads"):
        completion_values(tiny_model(), [[3]], [[4]])
    with pytest.raises(ValueError, match="keep at least the last prompt token"):
        completion_values(model, [[]], [[4, 5]])
    with pytest.raises(ValueError, match="zip"):
        completion_values(model, [[3]], [])
    assert completion_values(model, [[3, 4]], [[]])[0].shape == (0, 2)
    assert values.completion_values(model, [], []) == []
