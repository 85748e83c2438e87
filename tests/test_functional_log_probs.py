"""Log-probabilities and entropies of tokens, the KL estimate of GRPO, and the heads' labels along a completion."""

import math

import pytest
import torch
from torch import Tensor

from rl_plugins.functional.alignment import completion_labels, completion_states, mtp_labels
from rl_plugins.functional.log_probs import kl_k1, kl_k3, kl_to_sampler, token_entropies, token_log_probs


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_two_tokens_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [2.0, 2.0]]])
    logps = token_log_probs(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(logps, torch.tensor([[0.75, 0.5]]).log())
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(token_entropies(logits), torch.tensor([[entropy, math.log(2.0)]]))
    # At temperature 1/2 the odds are squared: 1 to 9.
    hot = token_log_probs(logits, torch.tensor([[1, 0]]), temperature=0.5)
    torch.testing.assert_close(hot, torch.tensor([[0.9, 0.5]]).log())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_equal_to_torch_with_gradient(temperature: float) -> None:
    logits = random_logits(3, 5, 11).requires_grad_()
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
    weights = random_logits(2, 3, 5, seed=2)
    ours = token_log_probs(logits, tokens, temperature=temperature)
    entropies = token_entropies(logits, temperature=temperature)
    (gradient,) = torch.autograd.grad((weights[0] * ours + weights[1] * entropies).sum(), logits)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    theirs, their_entropies = distribution.log_prob(tokens), distribution.entropy()
    (expected,) = torch.autograd.grad((weights[0] * theirs + weights[1] * their_entropies).sum(), logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(entropies, their_entropies)
    torch.testing.assert_close(gradient, expected)
    assert (entropies <= math.log(11)).all() and (entropies >= 0).all()


def test_half_precision_is_computed_in_float32() -> None:
    logits = random_logits(2, 4, 300).bfloat16()
    tokens = torch.randint(300, (2, 4), generator=torch.Generator().manual_seed(1))
    logps, entropies = token_log_probs(logits, tokens, temperature=0.7), token_entropies(logits, temperature=0.7)
    assert logps.dtype == entropies.dtype == torch.float32
    exact = (logits.double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(
        logps.double(), exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(entropies.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=1e-5)
    assert token_log_probs(logits.double(), tokens).dtype == token_entropies(logits.double()).dtype == torch.float64


def test_garbage_at_one_position_stays_there() -> None:
    logits = random_logits(2, 4, 7)
    tokens = torch.zeros(2, 4, dtype=torch.long)
    spoilt = logits.clone()
    spoilt[0, 2], spoilt[1, 0] = torch.nan, torch.inf
    clean = torch.ones(2, 4, dtype=torch.bool)
    clean[0, 2] = clean[1, 0] = False
    for function in (lambda x: token_log_probs(x, tokens), token_entropies):
        torch.testing.assert_close(function(spoilt)[clean], function(logits)[clean], rtol=0.0, atol=0.0)
    # Enormous logits are no garbage.
    assert token_log_probs(torch.tensor([[[1e4, 0.0]]]), torch.tensor([[1]])).item() == -1e4


def test_no_rows() -> None:
    assert token_log_probs(torch.zeros(0, 3, 5), torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3)
    assert token_entropies(torch.zeros(0, 3, 5)).shape == (0, 3)


def test_wrong_arguments() -> None:
    logits, tokens = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"temperature=0\.0: give a positive number"):
        token_log_probs(logits, tokens, temperature=0.0)
    with pytest.raises(ValueError, match="temperature=-1"):
        token_entropies(logits, temperature=-1)
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) must be \(B, T, V\) for tokens \(B, T\) = \(2, 2\)"):
        token_log_probs(logits, tokens[:, :2])
    with pytest.raises(ValueError, match=r"logits \(3, 5\) must be"):
        token_entropies(logits[0])


def test_kl_of_sampled_tokens_is_unbiased() -> None:
    """`E_pi[k3] = KL(pi || ref)`, summed over all tokens of a small vocabulary, and every sample is non-negative."""
    logps, ref_logps = random_logits(2, 9).log_softmax(-1)
    exact = (logps.exp() * (logps - ref_logps)).sum()
    estimates = kl_k3(logps, ref_logps)
    torch.testing.assert_close((logps.exp() * estimates).sum(), exact)
    torch.testing.assert_close((logps.exp() * kl_k1(logps, ref_logps)).sum(), exact)
    assert (estimates >= 0).all()
    assert torch.equal(estimates, kl_to_sampler(ref_logps, logps))
    # By hand: the reference thinks a token twice as likely, r = 2, and then half as likely.
    expected = torch.tensor([2 - 1 - math.log(2.0), 0.5 - 1 + math.log(2.0), 0.0])
    torch.testing.assert_close(
        kl_k3(torch.tensor([0.2, 0.2, 0.2]).log(), torch.tensor([0.4, 0.1, 0.2]).log()), expected
    )


def test_labels_of_the_heads_by_hand() -> None:
    prompt, completion = torch.tensor([[7, 8], [0, 9]]), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = completion_labels(prompt, completion, mask, 2)  # head k at y_t takes y_{t+k}
    assert labels[0].tolist() == [[2, 3], [3, 4], [4, -100], [-100, -100]]
    assert labels[1].tolist() == [[6, -100], [-100, -100], [-100, -100], [-100, -100]]


def test_labels_of_the_heads_equal_a_slow_loop() -> None:
    g = torch.Generator().manual_seed(0)
    prompt, completion = torch.randint(2, 50, (4, 3), generator=g), torch.randint(2, 50, (4, 7), generator=g)
    mask = (torch.rand(4, 7, generator=g) < 0.7).long()  # with holes
    ours = completion_labels(prompt, completion, mask, 3)
    for b in range(4):
        for t in range(7):
            for k in range(1, 4):
                real = t + k < 7 and mask[b, t + k] == 1
                assert ours[b, t, k - 1] == (completion[b, t + k] if real else -100)
    # What the critic trainer did before: whole rows, then the completion's part.
    rows = torch.cat([prompt, torch.where(mask == 1, completion, -100)], dim=1)
    assert torch.equal(ours, completion_states(mtp_labels(rows, 3), 7))
    assert torch.equal(completion_labels(prompt, completion, mask.bool(), 3), ours)
