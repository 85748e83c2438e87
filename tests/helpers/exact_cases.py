"""Policies and rewards so small that the exact values are known, and how near to them values come."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl_plugins.functional.alignment import completion_states, head_targets
from rl_plugins.nn import HeadRun, MTPHeads, PolyakTarget
from rl_plugins.signals import critic_targets, value_loss, value_losses
from rl_plugins.tabular import TokenMDP

PROMPT = 0  # the token of which the prompt of every string is made, usually once


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
    prompt_length: int = 1


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


def with_prompt(tokens: Tensor, length: int = 1) -> Tensor:
    return torch.cat([tokens.new_full((len(tokens), length), PROMPT), tokens], dim=1)


def exact_mdp(model: Qwen3ForCausalLM, case: Case) -> TokenMDP:
    def policy(prefixes: Tensor) -> Tensor:
        ids = with_prompt(prefixes, case.prompt_length)
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


def run_heads(
    model: Qwen3ForCausalLM, heads: MTPHeads, tokens: Tensor, *, prompt_length: int = 1
) -> tuple[HeadRun, Tensor]:
    """One forward over prompt + tokens: the run with the values (B, T, K), and what they are read off: states
    (B, T, D), or features (B, T, K, D) of sequential heads."""
    states: list[Tensor] = []

    def select(hidden: Tensor) -> Tensor:
        states.append(completion_states(hidden, tokens.shape[1]))
        return states[0]

    with heads.running(select, value_grad_scale=0.0) as run:
        model.model(input_ids=with_prompt(tokens, prompt_length), use_cache=False)
    return run, states[0].detach()


def train_heads(
    model: Qwen3ForCausalLM,
    heads: MTPHeads,
    mdp: TokenMDP,
    *,
    estimator: str,
    steps: int,
    strings: int = 256,
    prompt_length: int = 1,
) -> None:
    """The package's own pieces in a plain loop; only the heads learn.

    Args:
        estimator: Of the targets; `exact` regresses on the exact values.
        steps: Of the optimizer.
        strings: Drawn for each step.
    """
    model.requires_grad_(False)
    heads.requires_grad_(True)
    target = PolyakTarget(heads, tau=0.1)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        tokens, mask, _ = mdp.sample(strings, generator)
        run, states = run_heads(model, heads, tokens, prompt_length=prompt_length)
        assert run.values is not None
        returns = mdp.state_values(tokens).float()
        if estimator != "exact":
            returns = critic_targets(
                mdp.token_rewards(tokens).float(),
                run.values.detach(),
                target(states),
                mask,
                estimator=estimator,
                gamma=mdp.gamma,
                lam_value=0.7,
                ahead=heads.ahead,
            ).returns
        loss, _, _ = value_loss(
            run.values,
            returns,
            mask,
            num_items=mask.sum(),
            loss=value_losses()["squared"],
            old_values=run.values.detach(),
            ahead=heads.ahead,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        target.update(heads.value_path.parameters(), step=step)


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, heads: MTPHeads, mdp: TokenMDP, strings: int = 4000, *, prompt_length: int = 1
) -> list[float]:
    """`1 - E[(v_k - exact)^2] / Var(exact)` per head over the policy's states: explained variance that counts bias."""
    tokens, mask, _ = mdp.sample(strings, torch.Generator().manual_seed(2))
    values = run_heads(model, heads, tokens, prompt_length=prompt_length)[0].values
    assert values is not None
    ahead = heads.ahead
    _, exists = head_targets(torch.zeros_like(values[..., 0]), mask, values.shape[-1], ahead=ahead)
    scores = []
    for k in range(values.shape[-1]):
        exact = mdp.forecast(tokens, 1 + k * ahead)[exists[..., k]]
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
