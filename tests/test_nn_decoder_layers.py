"""Sequential heads on every family of decoders: features by slow loops, causality, padding, streams, gradients; and
the models that they do not fit."""

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from rl_plugins.nn import SequentialHeads, attach_mtp_heads, base_model_of, logit_cap, logit_divisor
from rl_plugins.nn.attaching import prepare_mtp_heads
from rl_plugins.nn.attachment import trunk_of
from rl_plugins.nn.decoder_layers import DecoderStack

from .helpers.decoder_families import CORE, OTHERS, REFUSED, make_decoder, make_refused
from .helpers.sequential_heads import features_of, slow_features, trunk_states
from .helpers.vision_models import vision_language

K, LENGTH, PAD = 2, 7, 3
IDS = torch.randint(2, 24, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * LENGTH])
CHANGED = 4


@cache
def made(family: str) -> tuple[Any, SequentialHeads]:
    """A model with heads, whose blocks have the weights of the last layer; the tests leave both as they are."""
    model = make_decoder(family)
    heads = SequentialHeads(model, K).attach(model)
    for depth in heads:
        depth.mtp_block.load_state_dict(DecoderStack(model).last.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in heads.value_heads.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return model, heads


def close(found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


# What holds for every family


def single_prefixes(family: str) -> None:
    """Features of whole rows are those of every prefix alone."""
    model, heads = made(family)
    with torch.no_grad():
        features = features_of(model, heads, IDS)
    close(features, slow_features(model, heads, IDS))
    assert not features[:, 0].any() and not features[:, 1, 1].any() and features[:, 2:].abs().amin(-1).max() > 0


def causal(family: str) -> None:
    """What comes after a state changes neither its features nor its value, and what leads to it does: the value of
    `s_t` does not know `y_t`."""
    model, heads = made(family)
    later = IDS.clone()
    later[:, CHANGED:] = (later[:, CHANGED:] + 5) % 22 + 2
    with torch.no_grad():
        before, after = (features_of(model, heads, ids) for ids in (IDS, later))
        values, others = heads(before), heads(after)
    close(after[:, :CHANGED], before[:, :CHANGED], 5e-5)  # experts batch tokens in another way
    close(others[:, :CHANGED], values[:, :CHANGED], 5e-5)
    assert ((after - before)[:, CHANGED].abs().amax(-1) > 1e-3).all()
    assert ((others - values)[:, CHANGED].abs() > 1e-4).all()


def padding(family: str) -> None:
    """Rows padded on the left have the features of the rows."""
    model, heads = made(family)
    ids = torch.cat([torch.full((2, PAD), 7), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, PAD, dtype=torch.long), torch.ones_like(IDS)], dim=1)
    with torch.no_grad():
        alone = features_of(model, heads, IDS)
        try:
            found = features_of(model, heads, ids, mask, position_ids=positions_of(mask))
        except TypeError:  # families that count positions themselves
            found = features_of(model, heads, ids, mask)
    close(found[:, PAD:], alone)
    assert not found[:, :PAD].any()


def stream(family: str) -> None:
    """Features of rows in pieces are those of whole rows, padded ones among them. Without padding `generate` gives
    the model no mask, but positions, as packed rows have them."""
    model, heads = made(family)
    for mask, given in ((MASK, MASK), (torch.ones_like(MASK), None)):
        positions = positions_of(mask)
        with torch.no_grad():
            hidden = trunk_states(model, IDS, mask)
            whole = heads.deepen(hidden, IDS, mask, positions)
        for cuts in ((0, 3, 4, LENGTH), (0, 1, 2, LENGTH)):
            pieces = heads.stream()
            found = [
                pieces(hidden[:, a:b], IDS[:, a:b], given if given is None else given[:, :b], positions[:, a:b])
                for a, b in zip(cuts, cuts[1:], strict=False)
            ]
            close(torch.cat(found, dim=1), whole)


def gradients(family: str) -> None:
    """Each loss reaches every parameter that is to learn from it, and the token loss no other."""
    model, heads = made(family)
    labels = IDS[:, 1:, None].expand(-1, -1, K)
    model.zero_grad()
    lm_head, divisor, cap = model.get_output_embeddings(), logit_divisor(model.config), logit_cap(model.config)
    with heads.running(lambda x: x[:, :-1], lm_head=lm_head, labels=labels, divisor=divisor, cap=cap) as run:
        model(input_ids=IDS, use_cache=False)
    assert run.token_losses is not None and run.token_losses.isfinite().all() and (run.token_losses > 0).all()
    run.token_losses.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in (*trunk_of(model).parameters(), *heads.value_heads.parameters()))
    assert all(p.grad is not None for p in heads.layers.parameters() if p.requires_grad)
    assert run.values is not None
    run.values.square().sum().backward()
    assert all(p.grad is not None for p in heads.parameters() if p.requires_grad)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads) and len(grads) > len(list(heads.parameters()))


def last_layer(family: str) -> None:
    """A block is a layer like the trunk's last one, and is called as the trunk calls that."""
    model, heads = made(family)
    stack, seen = DecoderStack(model), {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["in"] = args[0] if args else kwargs["hidden_states"]
        seen["out"] = output[0] if isinstance(output, tuple) else output

    copied = dict(stack.last.named_parameters())
    for name, p in heads.layers[1].mtp_block.named_parameters():
        assert p is not copied[name] and torch.equal(p, copied[name]), name
    handle = stack.last.register_forward_hook(note, with_kwargs=True)
    try:
        for mask in (None, MASK):
            with torch.no_grad():
                trunk_states(model, IDS, mask)
                context = stack.context(seen["in"], torch.arange(LENGTH).expand(2, -1), mask, None, 1)
                found = heads.layers[1].mtp_block(seen["in"], **context)
            real = slice(None) if mask is None else mask.bool()
            close((found[0] if isinstance(found, tuple) else found)[real], seen["out"][real], 1e-5)
    finally:
        handle.remove()


def assert_logits(model: Any) -> None:
    """The model's logits are what heads make of its states."""
    logits = model.get_output_embeddings()(trunk_states(model, IDS)).float() / logit_divisor(model.config)
    cap = logit_cap(model.config)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    close(logits, model(input_ids=IDS, use_cache=False).logits.float(), 1e-5)


def main_head(family: str) -> None:
    """The LM head makes of the trunk's states what the model says, and of a new depth's what it says of the state that
    the depth has read, but for token and block."""
    model = make_decoder(family)
    heads = SequentialHeads(model, 1).attach(model)
    depth, norm = heads.layers[0], DecoderStack(model).norm
    gain = getattr(norm, "weight", None)
    with torch.no_grad():
        assert_logits(model)
        hidden = trunk_states(model, IDS)
        if gain is not None and norm(torch.ones(1, len(gain))).any():  # an RMS norm, as a trained model has it
            gain.mul_(torch.linspace(0.5, 1.5, len(gain))).add_(0.1)
            model.mtp_heads = heads = SequentialHeads(model, 1)
            depth, hidden = heads.layers[0], trunk_states(model, IDS)
        depth.eh_proj.weight[:, : hidden.shape[-1]] = 0.0
        with patch.object(depth.mtp_block, "forward", lambda x, **context: x):
            found = heads.deepen(hidden, IDS, None, None)[:, 1:, 0]
    close(found, hidden[:, :-1], 1e-3)


CHECKS: list[Callable[[str], None]] = [
    single_prefixes,
    causal,
    padding,
    stream,
    gradients,
    last_layer,
    main_head,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", CORE)
def test_family(family: str, check: Callable[[str], None]) -> None:
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_family(family: str) -> None:
    for check in CHECKS:
        check(family)
    made.cache_clear()


@torch.no_grad()
def test_logits_of_recurrent_gemma() -> None:
    """The cap has a name of its own there."""
    model = make_decoder("recurrent_gemma", lru_width=32, logits_soft_cap=0.5)
    assert logit_cap(model.config) == 0.5
    assert_logits(model)


# Models that they do not fit


@pytest.mark.parametrize("family", REFUSED)
def test_refused_family(family: str) -> None:
    model = make_refused(family)
    with pytest.raises(ValueError, match=REFUSED[family][1]):
        attach_mtp_heads(model, head_type="sequential")
    assert "mtp_heads" not in dict(model.named_children())


def test_encoder_decoders_are_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model; sequential heads"):
        attach_mtp_heads(model, head_type="sequential")


def test_layers_that_attend_to_an_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match="GPT2Block of GPT2LMHeadModel attends to an encoder, too"):
        attach_mtp_heads(make_decoder("gpt2", add_cross_attention=True), head_type="sequential")


def test_embeddings_of_another_width_are_refused(tiny_model: Any) -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.set_input_embeddings(nn.Embedding(16, 8))
    with pytest.raises(ValueError, match="Embeddings of Qwen3ForCausalLM are 8 wide and hidden states 32, so that a"):
        attach_mtp_heads(model, head_type="sequential")


def test_a_trunk_without_rotary_embedding_is_refused(tiny_model: Any) -> None:
    model = tiny_model()
    del model.model.rotary_emb
    with pytest.raises(ValueError, match="needs position embeddings, but Qwen3Model has no `rotary_emb` to make them"):
        attach_mtp_heads(model, head_type="sequential")


def test_a_class_of_layers_that_takes_more_than_a_config_is_refused(tiny_model: Any) -> None:
    model = tiny_model()

    class Gated(type(model.model.layers[-1])):  # type: ignore[misc]
        def __init__(self, config: Any, layer_idx: int, gate: float) -> None:
            super().__init__(config, layer_idx)

    model.model.layers[-1] = Gated(model.config, 1, 0.5)
    with pytest.raises(ValueError, match="Gated of Qwen3ForCausalLM cannot be built from the model's config:.*gate"):
        attach_mtp_heads(model, head_type="sequential")


# Models around models


def test_a_vision_language_model() -> None:
    """Its decoder is a stack like any other, inside a trunk that also sees images."""
    model, _ = vision_language("llava_next")
    heads = attach_mtp_heads(model.eval(), 2, head_type="sequential")
    assert isinstance(heads, SequentialHeads)
    ids = IDS % 16
    with torch.no_grad():
        close(features_of(model, heads, ids), slow_features(model, heads, ids))


def test_positions_of_images_are_refused() -> None:
    model, _ = vision_language("qwen2_5_vl")
    with pytest.raises(ValueError, match="gives every token three positions, of time, height and width, which only"):
        attach_mtp_heads(model, head_type="sequential")


def lora(model: Any, **options: Any) -> Any:
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return get_peft_model(model, LoraConfig(**options))


def move(model: Any) -> None:
    """Move what is trained, so that adapters are no longer zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def test_heads_on_an_adapted_model_have_no_adapters(tiny_model: Any) -> None:
    """Blocks are those of the model without adapters, read what the adapted trunk makes, and learn beside them."""
    model, plain = lora(tiny_model()), tiny_model()
    move(model)
    heads = SequentialHeads(base_model_of(model), 2).attach(model)
    expected = SequentialHeads(plain, 2)
    assert heads.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in heads.state_dict().items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "mtp_heads" not in name}
    assert trained and all("lora_" in name for name in trained)
    assert all(p.requires_grad for p in heads.parameters())
    ids = IDS % 16
    with torch.no_grad():
        close(features_of(model, heads, ids), slow_features(base_model_of(model), heads, ids))
    labels = ids[:, 1:, None].expand(-1, -1, 2)
    lm_head = base_model_of(model).lm_head
    with heads.running(lambda x: x[:, :-1], lm_head=lm_head, labels=labels, detach_tokens=False) as run:
        model(input_ids=ids)
    assert run.token_losses is not None
    run.token_losses.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained <= with_gradient


@pytest.mark.parametrize("head_type", ["parallel", "sequential"])
def test_adapters_that_come_after_the_heads_are_taken_out_of_them(head_type: str, tiny_model: Any) -> None:
    """PEFT adapts every module of a name that it was told, those of heads among them."""
    model = tiny_model()
    heads = attach_mtp_heads(model, 2, head_type=head_type)
    before = {name: x.clone() for name, x in heads.state_dict().items()}
    model = lora(model, target_modules="all-linear")
    assert any("lora_" in name for name, _ in heads.named_parameters())
    assert prepare_mtp_heads(model, 2, head_type=head_type) is heads
    assert heads.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in heads.state_dict().items())
    assert all(p.requires_grad for p in heads.parameters())
    adapters = {name for name, p in model.named_parameters() if p.requires_grad and "mtp_heads" not in name}
    assert adapters and all("lora_" in name for name in adapters)
    model(input_ids=IDS % 16)


# New layers


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_blocks_start_as_new_layers(family: str) -> None:
    model = make_decoder(family)
    new = SequentialHeads(model, 2)
    fresh = dict(new.layers[0].mtp_block.named_parameters())
    for name, p in DecoderStack(model).last.named_parameters():
        assert fresh[name].shape == p.shape
        assert torch.equal(fresh[name], p) == bool((p == p.flatten()[0]).all()), name  # norms and biases
    attached = attach_mtp_heads(model, 2, head_type="sequential")
    assert all(torch.equal(x, new.state_dict()[name]) for name, x in attached.state_dict().items())


def test_weights_that_never_learn_stay_so() -> None:
    """Selection biases of experts, which no gradient reaches: DDP would wait for it."""
    model = make_decoder("afmoe")
    heads = attach_mtp_heads(model, 1, head_type="sequential")
    constant = {name for name, p in heads.named_parameters() if not p.requires_grad}
    assert constant == {"layers.0.mtp_block.mlp.expert_bias"}
    heads.requires_grad_(False)
    assert not any(p.requires_grad for p in heads.parameters())
    assert {name for name, p in heads.requires_grad_().named_parameters() if not p.requires_grad} == constant
