"""Policies and rewards so small that the exact values are known, and how near to them values come."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl_plugins.functional.alignment import completion_states, head_targets
from rl_plugins.nn import HeadRun, MTPHeads
from rl_plugins.tabular import TokenMDP

PROMPT = 0  # the one-token prompt of every string


ENOUGH = 0.95


def election(strings: Tensor) -> Tensor:
    """Win, draw or loss: whether 1s or 2s are in the majority."""
    return torch.sign((strings == 1).sum(1) - (strings == 2).sum(1)).double()


def lead(strings: Tensor) -> Tensor:
    """A quarter for every token after which the 1s lead, and minus as much where the 2s do."""
    return election(strings) / 4


@dataclass(frozen=True)
class Case:
    reward: Callable[[Tensor], Tensor]
    vocab_size: int
    max_length: int
    eos_token_id: int | None = None
    gamma: float = 1.0
    seed: int = 2
    steps: int = 400
    step_reward: Callable[[Tensor], Tensor] | None = None


def random_policy(vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    """A random Qwen3 whose states and probabilities depend visibly on the whole prefix."""
    torch.manual_seed(seed)
    hidden = 64
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        # The usual 0.02 makes attention uniform and every policy the same.
        initializer_range=hidden**-0.5,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def with_prompt(tokens: Tensor) -> Tensor:
    return torch.cat([torch.full_like(tokens[:, :1], PROMPT), tokens], dim=1)


def exact_mdp(model: Qwen3ForCausalLM, case: Case) -> TokenMDP:
    def policy(prefixes: Tensor) -> Tensor:
        ids = torch.cat([torch.full((len(prefixes), 1), PROMPT), prefixes], dim=1)
        return model(input_ids=ids, use_cache=False).logits[:, -1].double().softmax(-1)

    return TokenMDP(
        policy,
        case.reward,
        step_reward=case.step_reward,
        vocab_size=case.vocab_size,
        max_length=case.max_length,
        eos_token_id=case.eos_token_id,
        gamma=case.gamma,
    )


def run_heads(model: Qwen3ForCausalLM, heads: MTPHeads, tokens: Tensor) -> tuple[HeadRun, Tensor]:
    """One forward over prompt + tokens: the run with the values (B, T, K), and the states (B, T, D)."""
    states: list[Tensor] = []

    def select(hidden: Tensor) -> Tensor:
        states.append(completion_states(hidden, tokens.shape[1]))
        return states[0]

    with heads.running(select, value_grad_scale=0.0) as run:
        model.model(input_ids=with_prompt(tokens), use_cache=False)
    return run, states[0].detach()


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, heads: MTPHeads, mdp: TokenMDP, strings: int = 4000) -> list[float]:
    """`1 - E[(v_k - exact)^2] / Var(exact)` per head over the policy's states: explained variance that counts bias."""
    tokens, mask, _ = mdp.sample(strings, torch.Generator().manual_seed(2))
    values = run_heads(model, heads, tokens)[0].values
    assert values is not None
    _, exists = head_targets(torch.zeros_like(values[..., 0]), mask, values.shape[-1])
    scores = []
    for k in range(values.shape[-1]):
        exact = mdp.forecast(tokens, k + 1)[exists[..., k]]
        error = (values[..., k][exists[..., k]].double() - exact).square().mean()
        scores.append(float(1 - error / exact.var()))
    return scores


def digits_tokenizer(vocab_size: int, eos_token_id: int | None) -> PreTrainedTokenizerFast:
    """One digit per token, so that the model's vocabulary is the MDP's."""
    vocab = {str(i): i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=str(eos_token_id), pad_token=str(eos_token_id), padding_side="left"
    )
