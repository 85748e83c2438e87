"""The value heads against exact values: on a frozen policy every estimator must find `V` and its forecast."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl_plugins.functional.alignment import completion_states, head_targets
from rl_plugins.functional.rewards import terminal_rewards
from rl_plugins.nn import HeadRun, MTPHeads, PolyakTarget, attach_mtp_heads
from rl_plugins.signals import critic_targets, value_loss, value_losses
from rl_plugins.tabular import TokenMDP
from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer

PROMPT = 0  # the one-token prompt of every string
ENOUGH = 0.95

pytestmark = pytest.mark.slow


def election(strings: Tensor) -> Tensor:
    """Win, draw or loss: whether 1s or 2s are in the majority."""
    return torch.sign((strings == 1).sum(1) - (strings == 2).sum(1)).double()


def parity_and_length(strings: Tensor) -> Tensor:
    """Plus or minus a half for the parity of the 1s, and a little for every token."""
    odd = (strings == 1).sum(1) % 2
    return odd.double() - 0.5 + 0.25 * strings.shape[1]


def ordered_pairs(strings: Tensor) -> Tensor:
    """A half for every pair of a 2 after a 1, however far apart, and at most 1."""
    ones_before = (strings == 1).cumsum(1)
    return (ones_before * (strings == 2)).sum(1).clamp(max=2).double() / 2


@dataclass(frozen=True)
class Case:
    reward: Callable[[Tensor], Tensor]
    vocab_size: int
    max_length: int
    eos_token_id: int | None = None
    gamma: float = 1.0
    seed: int = 2
    steps: int = 400


# Rewards that the frozen random trunk's states can tell apart: regression on the exact values themselves stops at 0.75
# to 0.95 where a pattern needs neighbouring tokens, however wide the heads.
CASES = {
    "fixed length": Case(election, vocab_size=4, max_length=6, steps=250),
    "eos": Case(parity_and_length, vocab_size=5, max_length=6, eos_token_id=4, seed=0),
    "eos, discounted": Case(ordered_pairs, vocab_size=6, max_length=6, eos_token_id=5, gamma=0.9),
}


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


def train_heads(model: Qwen3ForCausalLM, heads: MTPHeads, mdp: TokenMDP, *, estimator: str, steps: int) -> None:
    """The package's own pieces in a plain loop; only the heads learn."""
    model.requires_grad_(False)
    heads.requires_grad_(True)
    target = PolyakTarget(heads, tau=0.1)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        tokens, mask, scores = mdp.sample(256, generator)
        run, states = run_heads(model, heads, tokens)
        assert run.values is not None
        goals = critic_targets(
            terminal_rewards(scores.float(), mask),
            run.values.detach(),
            target(states),
            mask,
            estimator=estimator,
            gamma=mdp.gamma,
            lam_value=0.7,
        )
        loss, _, _ = value_loss(
            run.values,
            goals.returns,
            mask,
            num_items=mask.sum(),
            loss=value_losses()["squared"],
            old_values=run.values.detach(),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        target.update(heads.parameters(), step=step)


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


@pytest.mark.parametrize("estimator", ["td", "gae", "mc"])
@pytest.mark.parametrize("name", CASES)
def test_heads_find_the_exact_values(name: str, estimator: str) -> None:
    case = CASES[name]
    model = random_policy(case.vocab_size, case.seed)
    mdp = exact_mdp(model, case)
    heads = attach_mtp_heads(model, 2, inner_size=128)
    assert max(accuracy(model, heads, mdp)) < 0.05, "fresh heads know nothing"
    train_heads(model, heads, mdp, estimator=estimator, steps=case.steps)
    scores = accuracy(model, heads, mdp)
    print(name, estimator, scores)
    assert min(scores) >= ENOUGH, scores


def digits_tokenizer(vocab_size: int, eos_token_id: int | None) -> PreTrainedTokenizerFast:
    """One digit per token, so that the model's vocabulary is the MDP's."""
    vocab = {str(i): i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=str(eos_token_id), pad_token=str(eos_token_id), padding_side="left"
    )


def test_trainer_finds_the_exact_values_and_leaves_the_trunk_alone(tmp_path: Path) -> None:
    case = Case(election, vocab_size=4, max_length=5, eos_token_id=3, gamma=0.9, seed=3)
    model = random_policy(case.vocab_size, case.seed)
    mdp = exact_mdp(model, case)
    trunk = {name: p.clone() for name, p in model.named_parameters()}

    def reward(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
        return [float(case.reward(torch.tensor([ids]))) for ids in completion_ids]

    args = MTPCriticConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        seed=0,
        learning_rate=0.0,
        head_learning_rate=5e-3,
        gamma=case.gamma,
        value_grad_scale=0.0,
        mtp_inner_size=128,
        target_tau=0.1,
        lam_value=0.7,
        max_completion_length=case.max_length,
        per_device_train_batch_size=256,
        num_iterations=2,
        max_steps=200,
    )
    trainer = MTPCriticTrainer(
        model,
        reward,
        args,
        Dataset.from_dict({"prompt": [str(PROMPT)] * 256}),
        processing_class=digits_tokenizer(case.vocab_size, case.eos_token_id),
    )
    trainer.train()
    for name, before in trunk.items():
        assert torch.equal(model.get_parameter(name), before), name
    heads = MTPHeads.of(model)
    assert heads is not None
    scores = accuracy(model.eval(), heads, mdp)
    print("trainer", scores)
    assert min(scores) >= ENOUGH, scores
