"""Every public function of `functional` and `signals` on one batch, and the equations as loops over floats."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rl_plugins import functional as F
from rl_plugins import signals as O
from rl_plugins.functional.policy_losses.covariance import token_covariance

GROUP, HEADS, EXPERTS, CHOSEN, VOCABULARY = 3, 3, 4, 2, 5
Batch = SimpleNamespace
Loop = Callable[[Batch], Any]


@dataclass(frozen=True)
class Case:
    """A call with the tensors of a batch, and the same in a loop; `None` where signals only combine functions."""

    call: Callable[[Batch], Any]
    loop: Loop | None
    moves: bool = False
    """Whether it only moves entries, and so keeps half precision."""


def make_batch(rows: int = 6, length: int = 5, *, spread: float = 0.4, empty: bool = False) -> Batch:
    """Tensors of every kind in float64; the mask has holes and a row without tokens, `spread` is that of `ln rho`."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def chosen(*shape: int) -> Tensor:
        return torch.rand(*shape, EXPERTS, generator=g).argsort(-1)[..., :CHOSEN]

    tokens = rows * length
    lengths = torch.tensor([5, 3, 4, 0, 5, 1])[:rows]
    mask = torch.arange(length) < lengths[:, None]
    mask[:1, 1:2] = False  # a hole
    mask[4:5, 0:1] = False  # and one before the first token
    old = -4 * uniform(rows, length) - 0.05
    return Batch(
        mask=mask & (not empty),
        old=old,
        logps=old + spread * (2 * uniform(rows, length) - 1),
        ref=old + 0.3 * normal(rows, length),
        advantages=normal(rows, length),
        row_advantages=normal(rows),
        rewards=normal(rows, length),
        values=normal(rows, length),
        next_values=normal(rows, length),
        ratios=2 * uniform(rows, length),
        weights=0.5 + uniform(rows, length),
        lam=uniform(rows, length),
        entropies=uniform(rows, length),
        head_values=normal(rows, length, HEADS),
        old_head_values=normal(rows, length, HEADS),
        target_values=normal(rows, length, HEADS),
        hidden=normal(rows, length + 1, 2),
        vocabulary_logits=3 * normal(rows, length, VOCABULARY),
        ids=torch.randint(VOCABULARY, (rows, length), generator=g),
        prompt_ids=torch.randint(VOCABULARY, (rows, 2), generator=g),
        scores=normal(rows),
        chances=uniform(rows),
        distances=uniform(rows) / 50,
        many=30 + 40 * uniform(rows),
        lengths=mask.sum(1).double(),
        groups=torch.arange(rows) // GROUP,
        alpha=1 + uniform(rows),
        beta=1 + uniform(rows),
        action_values=normal(rows, 4),
        other_values=normal(rows, 4),
        policy=normal(rows, 4).softmax(-1),
        draft=normal(rows, 4).softmax(-1),
        actions=torch.randint(4, (rows,), generator=g),
        ended=torch.arange(rows) % 3 == 1,
        uniforms=uniform(rows),
        token_mask=mask.flatten() & (not empty),
        router_logits=normal(tokens, EXPERTS),
        router_scores=uniform(tokens, EXPERTS),
        experts=chosen(tokens),
        sequence_logits=normal(rows, length, EXPERTS),
        sequence_experts=chosen(rows, length),
        bias=0.1 * normal(EXPERTS),
        targets=0.1 * normal(EXPERTS),
        counts=torch.tensor([5.0, 1.0, 3.0, 2.0], dtype=torch.float64),
        vector=normal(4),
        matrix=torch.eye(4, dtype=torch.float64) * 3 + 0.3,
    )


# Loops.


def rowwise(x: Batch, f: Callable[..., list[float]], *names: str) -> Tensor:
    """`f` on the lists of a row's real entries; its result is put back, 0 elsewhere."""
    out = torch.zeros(x.mask.shape, dtype=torch.float64)
    for i, row in enumerate(x.mask.tolist()):
        at = [t for t, real in enumerate(row) if real]
        for t, y in zip(at, f(*([getattr(x, name)[i, t].item() for t in at] for name in names)), strict=True):
            out[i, t] = y
    return out


def tokenwise(x: Batch, f: Callable[[float, float, float], float]) -> Tensor:
    """A loss from `ln rho`, `ln pi` and the advantage of each token."""
    return rowwise(
        x,
        lambda new, old, a: [f(p - q, p, b) for p, q, b in zip(new, old, a, strict=True)],
        "logps",
        "old",
        "advantages",
    )


def sequencewise(x: Batch, f: Callable[[list[float], list[float], list[float], int], float]) -> Tensor:
    """A loss from all `ln rho`, `ln pi` and advantages of a row, and the place of the token among them."""

    def row(new: list[float], old: list[float], a: list[float]) -> list[float]:
        steps = [p - q for p, q in zip(new, old, strict=True)]
        return [f(steps, new, a, j) for j in range(len(new))]

    return rowwise(x, row, "logps", "old", "advantages")


def real(x: Batch, name: str) -> list[float]:
    return [float(v) for v in getattr(x, name)[x.mask].flatten().tolist()]


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def mean(xs: list[float]) -> float:
    return math.fsum(xs) / max(len(xs), 1)


def variance(xs: list[float]) -> float:
    return mean([(x - mean(xs)) ** 2 for x in xs])


def pessimistic(x: float, a: float, low: float, high: float) -> float:
    return -min(x * a, clip(x, low, high) * a)


def sapo_loop(step: float, _: float, a: float) -> float:
    tau = 1.0 if a > 0 else 1.05
    return -a * 4 / tau / (1 + math.exp(-tau * (math.exp(step) - 1)))


def vespo_loop(steps: list[float], new: list[float], a: list[float], j: int) -> float:
    k, rate = (2.0, 3.0) if a[j] >= 0 else (3.0, 2.0)
    log_w = clip(math.fsum(steps), math.log(1e-8), 20.0)
    return -math.exp(rate + k * log_w - rate * math.exp(log_w)) * a[j] * new[j]


def gmpo_loop(steps: list[float], new: list[float], a: list[float], j: int) -> float:
    return -a[j] * math.exp(mean([min(s, 0.4) if b > 0 else max(s, -0.4) for s, b in zip(steps, a, strict=True)]))


def dppo_loop(step: float, logp: float, a: float) -> float:
    if step * a > 0 and abs(math.exp(logp) - math.exp(logp - step)) > 0.15:
        return 0.0
    return -math.exp(step) * a


def fipo_loop(steps: list[float], new: list[float], a: list[float], j: int) -> float:
    later = [2 ** (-(k - j) / 32) * steps[k] for k in range(j, len(steps)) if math.exp(steps[k]) <= 10]
    ratio, weight = math.exp(steps[j]), clip(math.exp(math.fsum(later)), 1.0, 1.2)
    return pessimistic(ratio, a[j] * (1.0 if a[j] < 0 and ratio > 10 else weight), 0.8, 1.28)


def bapo_bounds_loop(x: Batch) -> tuple[float, float]:
    tokens = zip(real(x, "logps"), real(x, "old"), real(x, "advantages"), strict=True)
    pairs = [(math.exp(p - q), math.exp(q) * a) for p, q, a in tokens]  # weighed by the sampler's probability
    highs, lows = [1.2 + 0.05 * i for i in range(37)], [0.6 + 0.02 * i for i in range(16)]
    for low, high in [(lows[0], h) for h in highs] + [(low, highs[-1]) for low in lows[1:]]:
        gain = math.fsum(min(r, high) * a for r, a in pairs if a > 0)
        loss = math.fsum(max(r, low) * -a for r, a in pairs if a < 0)
        if gain >= 0.4 * (gain + loss):
            break
    return low, high


def bapo_loop(x: Batch) -> Tensor:
    low, high = bapo_bounds_loop(x)
    return tokenwise(x, lambda step, _, a: pessimistic(math.exp(step), a, low, high))


def covariance_loop(x: Batch) -> Tensor:
    p, a = mean(real(x, "logps")), mean(real(x, "advantages"))
    return tokenwise(x, lambda _, logp, b: (logp - p) * (b - a))


def clip_cov_loop(x: Batch) -> Tensor:
    """All candidates are cut, so that the draw does not matter."""
    covariance = covariance_loop(x)
    out = tokenwise(x, lambda step, _, a: pessimistic(math.exp(step), a, 0.8, 1.2))
    plain = tokenwise(x, lambda step, _, a: -math.exp(step) * a)
    free = (out - plain).abs() < 1e-14
    return torch.where(free & (covariance >= -0.2) & (covariance <= 5.0), 0.0, out)


def kl_cov_loop(x: Batch) -> Tensor:
    places = [(i, t) for i, t in itertools.product(*map(range, x.mask.shape)) if x.mask[i, t]]
    covariance, out = covariance_loop(x), tokenwise(x, lambda step, _, a: -math.exp(step) * a)
    for place in sorted(places, key=lambda at: -covariance[at].item())[: int(0.3 * len(places) + 1e-6)]:
        out[place] += abs(x.logps[place] - x.old[place])
    return out


def gvpo_loop(x: Batch) -> Tensor:
    steps, present = rowwise(x, lambda p, q: [b - c for b, c in zip(p, q, strict=True)], "logps", "old"), x.mask.any(1)
    gap = [0.1 * math.fsum(row) - r for row, r in zip(steps.tolist(), x.row_advantages.tolist(), strict=True)]
    out = torch.zeros_like(x.logps)
    for i in range(len(gap)):
        group = [gap[j] for j in range(len(gap)) if x.groups[j] == x.groups[i] and present[j]]
        out[i] = 0.5 * (gap[i] - mean(group)) ** 2
    return torch.where(x.mask, out, 0.0)


def discounted(rewards: list[float], gamma: float) -> list[float]:
    return [math.fsum(gamma**i * r for i, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def shifted(values: list[float], by: int = 1) -> list[float]:
    return [values[t + by] if 0 <= t + by < len(values) else 0.0 for t in range(len(values))]


def td_loop(rewards: list[float], values: list[float]) -> list[float]:
    return [r + 0.9 * v for r, v in zip(rewards, shifted(values), strict=True)]


def td_errors_loop(rewards: list[float], values: list[float]) -> list[float]:
    return [y - v for y, v in zip(td_loop(rewards, values), values, strict=True)]


def lambda_loop(rewards: list[float], values: list[float], lam: list[float]) -> list[float]:
    out, g, following = [], 0.0, 0.0
    for r, v, decay in list(zip(rewards, values, lam, strict=True))[::-1]:
        g = r + 0.9 * ((1 - decay) * following + decay * g)
        following = v
        out.append(g)
    return out[::-1]


def gae_loop(rewards: list[float], values: list[float], lam: list[float]) -> list[float]:
    out, total = [], 0.0
    for delta, decay in list(zip(td_errors_loop(rewards, values), lam, strict=True))[::-1]:
        total = delta + 0.9 * decay * total
        out.append(total)
    return out[::-1]


def n_step_loop(rewards: list[float], values: list[float]) -> list[float]:
    ends = shifted(values, 2)
    return [
        math.fsum(0.9**i * r for i, r in enumerate(rewards[t : t + 2])) + 0.81 * ends[t] for t in range(len(rewards))
    ]


def vtrace_loop(x: Batch) -> tuple[Tensor, Tensor]:
    def both(rewards: list[float], values: list[float], ratios: list[float]) -> tuple[list[float], list[float]]:
        targets, advantages, later = [], [], 0.0
        errors = td_errors_loop(rewards, values)
        for delta, v, ratio in list(zip(errors, values, ratios, strict=True))[::-1]:
            advantages.append(delta + 0.9 * 0.8 * later)
            later = min(ratio, 1.2) * delta + 0.9 * 0.8 * min(ratio, 1.0) * later
            targets.append(v + later)
        return targets[::-1], advantages[::-1]

    names = ("rewards", "values", "ratios")
    return rowwise(x, lambda *a: both(*a)[0], *names), rowwise(x, lambda *a: both(*a)[1], *names)


def groupwise(x: Batch, f: Callable[[list[float]], list[float]], name: str = "scores") -> list[float]:
    scores = getattr(x, name).tolist()
    return [y for start in range(0, len(scores), GROUP) for y in f(scores[start : start + GROUP])]


def centred(r: list[float]) -> list[float]:
    return [a - mean(r) for a in r]


def pass_at_k_loop(r: list[float]) -> list[float]:
    pairs = list(itertools.combinations(range(len(r)), 2))
    best = [max(r[i], r[j]) for i, j in pairs]
    sigma = math.sqrt(variance(best))
    return [(mean([b for b, p in zip(best, pairs, strict=True) if i in p]) - mean(best)) / (sigma + 1e-6)
            for i in range(len(r))]  # fmt: skip


def kalman_loop(r: list[float]) -> list[float]:
    m, var, out = 0.5, 1.0, []
    for reward in r:
        gain = (var + 1e-5) / (var + 1e-5 + 1e-2)
        m += gain * (reward - m)
        var = (1 - gain) * (var + 1e-5)
        out.append((reward - m) / (math.sqrt(var) + 1e-8))
    return out


def opo_loop(x: Batch) -> list[float]:
    out = []
    for start in range(0, len(x.scores), GROUP):
        r, n = (t[start : start + GROUP].tolist() for t in (x.scores, x.lengths))
        out += [a - math.fsum(b * c for b, c in zip(n, r, strict=True)) / math.fsum(n) for a in r]
    return out


def trace_loop(mask: Tensor) -> Tensor:
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, row in enumerate(mask.tolist()):
        at = [t for t, real in enumerate(row) if real]
        for j, place in enumerate(at):
            out[i, place] = math.fsum(max(0.7 ** (t - j), 0.7**j) for t in range(j, len(at)))
    return out


def turns_of(row: list[bool]) -> list[list[int]]:
    """Places of each turn's tokens: runs of the policy's."""
    runs = itertools.groupby(range(len(row)), key=lambda t: row[t])
    return [list(run) for own, run in runs if own]


def turnwise(x: Batch, f: Callable[[int, int, int, bool], float], otherwise: float = 0.0) -> Tensor:
    """`f(row, place, number of the turn, whether the turn ends there)` at each of the policy's tokens."""
    out = torch.full(x.mask.shape, otherwise, dtype=torch.float64)
    for i, row in enumerate(x.mask.tolist()):
        for k, run in enumerate(turns_of(row)):
            for t in run:
                out[i, t] = f(i, t, k, t == run[-1])
    return out


def turn_sums_of(x: Batch, row: int) -> list[float]:
    return [math.fsum(x.rewards[row, t].item() for t in run) for run in turns_of(x.mask[row].tolist())]


def turn_sums_loop(x: Batch) -> list[list[float]]:
    sums = [turn_sums_of(x, i) for i in range(len(x.mask))]
    return [row + [0.0] * (max(map(len, sums)) - len(row)) for row in sums]


def normalized_at(pairs: dict[Any, float]) -> dict[Any, float]:
    """GRPO's advantages of what is there, 0 where there is only one."""
    r = list(pairs.values())
    std = math.sqrt(variance(r) * len(r) / max(len(r) - 1, 1)) + 1e-4
    return {place: (a - mean(r)) / std for place, a in pairs.items()}


def process_loop(x: Batch) -> Tensor:
    found: dict[tuple[int, int], float] = {}
    for start in range(0, len(x.mask), GROUP):
        places = itertools.product(range(start, start + GROUP), range(x.mask.shape[1]))
        found |= normalized_at({(i, t): x.rewards[i, t].item() for i, t in places if x.mask[i, t] and x.ids[i, t] > 1})
    return turnwise(x, lambda i, t, *_: math.fsum(a for (j, u), a in found.items() if j == i and u >= t))


def turn_levels_loop(x: Batch) -> Tensor:
    sums, found = [turn_sums_of(x, i) for i in range(len(x.mask))], dict[tuple[int, int], float]()
    for start in range(0, len(x.mask), GROUP):
        group = [i for i in range(start, start + GROUP) if sums[i]]
        found |= normalized_at({(i, len(sums[i]) - 1): sums[i][-1] for i in group})
        for k in range(max(len(sums[i]) for i in group)):
            found |= normalized_at({(i, k): sums[i][k] for i in group if k < len(sums[i]) - 1})
    return turnwise(x, lambda i, _, k, *__: math.fsum(0.7 ** (n - k) * found[i, n] for n in range(k, len(sums[i]))))


def per_head(x: Batch, f: Callable[[list[float], int], list[float]], name: str) -> Tensor:
    return torch.stack([rowwise(x, lambda y, k=k: f(y, k), name) for k in range(HEADS)], -1)


def lookahead_loop(x: Batch) -> Tensor:
    out = torch.zeros_like(x.values)
    for i, row in enumerate(x.mask.tolist()):
        at = [t for t, real in enumerate(row) if real]
        for j, t in enumerate(at):
            out[i, t] = mean([x.head_values[i, at[j - k], k].item() for k in range(HEADS) if j >= k])
    return out


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    total = math.fsum(math.exp(a - top) for a in z)
    return [math.exp(a - top) / total for a in z]


def last_dim(f: Callable[[list[float]], Any], x: Tensor) -> Tensor:
    return torch.tensor([f(row) for row in x.reshape(-1, x.shape[-1]).tolist()], dtype=torch.float64)


def balance_loop(logits: Tensor, experts: Tensor, mask: Tensor, scores: Callable[[list[float]], list[float]]) -> float:
    """`sum_i c_i / n P_i` over the rows of one sequence or layer."""
    rows = [i for i, m in enumerate(mask.tolist()) if m]
    p = [scores(logits[i].tolist()) for i in rows]
    n = max(len(rows), 1)
    shares = [sum(e in experts[i].tolist() for i in rows) / n for e in range(EXPERTS)]
    return math.fsum(f * mean([row[e] for row in p]) for e, f in enumerate(shares)) if rows else 0.0


def sigmoid_scores(z: list[float]) -> list[float]:
    s = [1 / (1 + math.exp(-a)) for a in z]
    return [a / math.fsum(s) for a in s]


def sequence_balance_loop(x: Batch) -> float:
    rows = [i for i in range(len(x.mask)) if x.mask[i].any()]
    return mean(
        [
            EXPERTS / CHOSEN * balance_loop(x.sequence_logits[i], x.sequence_experts[i], x.mask[i], sigmoid_scores)
            for i in rows
        ]
    )


def quantile_loop(x: Batch) -> list[float]:
    rows = [i for i, m in enumerate(x.token_mask.tolist()) if m]
    out = []
    for e in range(EXPERTS):
        gaps = []
        for i in rows:
            biased = sorted((s + b for s, b in zip(x.router_scores[i].tolist(), x.bias.tolist(), strict=True)))[::-1]
            gaps.append(x.router_scores[i, e].item() - biased[CHOSEN])
        gaps.sort(reverse=True)
        place = (len(gaps) - 1) * CHOSEN / EXPERTS
        low = int(place)
        after = gaps[min(low + 1, len(gaps) - 1)]
        out.append(-(gaps[low] + (place - low) * (after - gaps[low])))
    return out


def counts_loop(x: Batch) -> list[int]:
    return [sum(e in x.experts[i].tolist() for i, m in enumerate(x.token_mask.tolist()) if m) for e in range(EXPERTS)]


def proportional_loop(x: Batch) -> list[float]:
    m = mean(x.counts.tolist())
    step = [0.1 * (m - c) / m for c in x.counts.tolist()]
    return [b + d - mean(step) for b, d in zip(x.bias.tolist(), step, strict=True)]


def action_loop(x: Batch, f: Callable[[list[float], list[float], list[float], int], float]) -> list[float]:
    rows = zip(x.scores.tolist(), x.action_values.tolist(), x.other_values.tolist(), x.policy.tolist(),
               x.actions.tolist(), x.ended.tolist(), strict=True)  # fmt: skip
    return [r if ended else r + 0.9 * f(q, other, p, a) for r, q, other, p, a, ended in rows]


def elementwise(f: Callable[..., float], *tensors: Tensor) -> Tensor:
    flat = [f(*entries) for entries in zip(*(t.flatten().tolist() for t in tensors), strict=True)]
    return torch.tensor(flat, dtype=torch.float64).reshape(tensors[0].shape)


def k3(p: float, q: float) -> float:
    return math.exp(q - p) - 1 - (q - p)


def quadratic(x: Batch, vector: Tensor) -> Tensor:
    """The gradient of `1/2 v^T M v + sum v^4`, with a graph."""
    return x.matrix.detach().to(vector.dtype).mul(vector).sum(1) + 4 * vector**3


def hessian(x: Batch) -> Tensor:
    vector = x.vector.detach().clone().requires_grad_()
    return F.hessian_product(quadratic(x, vector), [vector], x.advantages.flatten()[:4], damping=0.1)


def slope(x: Batch) -> Tensor:
    leaf = x.head_values.detach().clone().requires_grad_()
    return F.flat_gradient((leaf * x.values[..., None]).sum(), [leaf])


def product(x: Batch) -> Callable[[Tensor], Tensor]:
    return lambda v: (x.matrix.to(v.dtype) * v).sum(1)


def solved(x: Batch) -> Tensor:
    return torch.linalg.solve(x.matrix, x.vector)


def trust_loop(x: Batch) -> Tensor:
    s = solved(x)
    return math.sqrt(2 * 0.01 / math.fsum((s * x.vector).tolist())) * s


def copied(update: Callable[..., Any]) -> Callable[[Batch], Tensor]:
    def call(x: Batch) -> Tensor:
        target = x.values.detach().clone()
        update([target], [x.rewards])
        return target

    return call


def whitened(x: Batch, name: str = "advantages") -> Tensor:
    m, s = mean(real(x, name)), math.sqrt(variance(real(x, name)) + 1e-8)
    return rowwise(x, lambda a: [(b - m) / s for b in a], name)


def to_go_loop(x: Batch, gamma: float) -> Tensor:
    """Sums of what follows, in which each end of a turn counts once, compared with all tokens."""
    sums = torch.zeros_like(x.rewards, dtype=torch.float64)
    for i, row in enumerate(x.mask.tolist()):
        following = 0.0
        for run in reversed(turns_of(row)):
            following *= gamma
            for t in reversed(run):
                following += x.rewards[i, t].item()
                sums[i, t] = following
    return whitened(Batch(mask=x.mask, sums=sums), "sums")


def critic_options(x: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.rewards, x.head_values, x.target_values, x.mask


def value_loss_loop(x: Batch) -> tuple[float, Any, Any]:
    targets, valid = F.head_targets(x.rewards, x.mask, HEADS)
    sums, counts = [0.0] * HEADS, [0] * HEADS
    for i, t, k in itertools.product(*map(range, valid.shape)):
        if valid[i, t, k]:
            v, old, y = (z[i, t, k].item() for z in (x.head_values, x.old_head_values, targets))
            sums[k] += max((v - y) ** 2, (clip(v, old - 0.2, old + 0.2) - y) ** 2)
            counts[k] += 1
    return math.fsum(sums) / (HEADS * 7.0), sums, counts


def loss_call(name: str) -> Callable[[Batch], Tensor]:
    loss = O.PolicyLoss(name, "token")
    return lambda x: O.policy_loss(
        loss,
        x.logps,
        x.old,
        x.row_advantages if name == "gvpo" else x.advantages,
        x.mask,
        weights=x.weights,
        max_length=9,
        batch={"groups": x.groups, "sampler_weights": x.weights},
    )


FUNCTIONAL: dict[str, Case] = {
    # Policy losses
    "vanilla": Case(
        lambda x: F.vanilla(x.logps, x.advantages, x.mask), lambda x: tokenwise(x, lambda _, p, a: -a * p)
    ),
    "ppo_clip": Case(
        lambda x: F.ppo_clip(x.logps, x.old, x.advantages, x.mask),
        lambda x: tokenwise(x, lambda s, _, a: pessimistic(math.exp(s), a, 0.8, 1.2)),
    ),
    "gspo_token": Case(
        lambda x: F.gspo_token(x.logps, x.old, x.advantages, x.mask),
        lambda x: sequencewise(x, lambda s, _, a, j: pessimistic(math.exp(mean(s)), a[j], 1 - 3e-4, 1 + 4e-4)),
    ),
    "gmpo": Case(lambda x: F.gmpo(x.logps, x.old, x.advantages, x.mask), lambda x: sequencewise(x, gmpo_loop)),
    "cispo": Case(
        lambda x: F.cispo(x.logps, x.old, x.advantages, x.mask),
        lambda x: tokenwise(x, lambda s, p, a: -min(math.exp(s), 5.0) * a * p),
    ),
    "sapo": Case(lambda x: F.sapo(x.logps, x.old, x.advantages, x.mask), lambda x: tokenwise(x, sapo_loop)),
    "vespo": Case(lambda x: F.vespo(x.logps, x.old, x.advantages, x.mask), lambda x: sequencewise(x, vespo_loop)),
    "dppo": Case(lambda x: F.dppo(x.logps, x.old, x.advantages, x.mask), lambda x: tokenwise(x, dppo_loop)),
    "fipo": Case(lambda x: F.fipo(x.logps, x.old, x.advantages, x.mask), lambda x: sequencewise(x, fipo_loop)),
    "bapo": Case(lambda x: F.bapo(x.logps, x.old, x.advantages, x.mask), bapo_loop),
    "bapo_bounds": Case(lambda x: F.bapo_bounds(x.logps, x.old, x.advantages, x.mask), bapo_bounds_loop),
    "cpgd": Case(
        lambda x: F.cpgd(x.logps, x.old, x.advantages, x.mask),
        lambda x: tokenwise(
            x,
            lambda s, p, a: pessimistic(s, a, math.log(0.8), math.log(1.2)) + 0.01 * min(math.exp(s) - 1, 2.0) * p,
        ),
    ),
    "clip_cov": Case(
        lambda x: F.clip_cov(x.logps, x.old, x.advantages, x.mask, ratio=1.0, cov_low=-0.2), clip_cov_loop
    ),
    "kl_cov": Case(lambda x: F.kl_cov(x.logps, x.old, x.advantages, x.mask, ratio=0.3), kl_cov_loop),
    "gvpo": Case(lambda x: F.gvpo(x.logps, x.old, x.row_advantages, x.mask, groups=x.groups), gvpo_loop),
    "gpg_scale": Case(lambda x: F.gpg_scale(x.scores, x.groups), lambda x: 1.0),
    "log_ratios": Case(
        lambda x: F.log_ratios(x.logps, x.old), lambda x: elementwise(lambda p, q: p - q, x.logps, x.old)
    ),
    "log_importance_weights": Case(
        lambda x: F.log_importance_weights(F.zero_masked(x.logps, x.mask), x.mask, "sequence"),
        lambda x: rowwise(x, lambda p: [mean(p)] * len(p), "logps"),
    ),
    "aggregate": Case(
        lambda x: F.aggregate(x.logps, x.mask, "token", num_items=8), lambda x: math.fsum(real(x, "logps")) / 8
    ),
    "prompt_weights": Case(
        lambda x: F.prompt_weights(x.many, GROUP),
        lambda x: groupwise(x, lambda n: [GROUP / math.fsum(n)] * GROUP, "many"),
    ),
    # Divergences and log-probabilities
    "kl_k1": Case(lambda x: F.kl_k1(x.logps, x.ref), lambda x: elementwise(lambda p, q: p - q, x.logps, x.ref)),
    "kl_k3": Case(lambda x: F.kl_k3(x.logps, x.ref), lambda x: elementwise(k3, x.logps, x.ref)),
    "kl_to_sampler": Case(lambda x: F.kl_to_sampler(x.logps, x.ref), lambda x: elementwise(k3, x.ref, x.logps)),
    "policy_distance": Case(
        lambda x: F.policy_distance(x.old, x.logps, x.mask),
        lambda x: rowwise(
            x, lambda p, q: [mean([abs(a - b) for a, b in zip(p, q, strict=True)])] * len(p), "old", "logps"
        ).amax(1),
    ),
    "token_log_probs": Case(
        lambda x: F.token_log_probs(x.vocabulary_logits, x.ids, temperature=0.7),
        lambda x: torch.stack(
            [
                last_dim(lambda z: [math.log(p) for p in softmax([a / 0.7 for a in z])], row)
                .gather(1, ids[:, None])
                .squeeze(1)
                for row, ids in zip(x.vocabulary_logits, x.ids, strict=True)
            ]
        ),
    ),
    "token_entropies": Case(
        lambda x: F.token_entropies(x.vocabulary_logits, temperature=0.7),
        lambda x: last_dim(
            lambda z: -math.fsum(p * math.log(p) for p in softmax([a / 0.7 for a in z])), x.vocabulary_logits
        ).view(x.ids.shape),
    ),
    # Masks
    "zero_masked": Case(lambda x: F.zero_masked(x.logps, x.mask), lambda x: rowwise(x, lambda p: p, "logps")),
    "masked_sum": Case(lambda x: F.masked_sum(x.logps, x.mask), lambda x: math.fsum(real(x, "logps"))),
    "masked_mean": Case(lambda x: F.masked_mean(x.logps, x.mask), lambda x: mean(real(x, "logps"))),
    "masked_moments": Case(
        lambda x: F.masked_moments(x.logps, x.mask),
        lambda x: (mean(real(x, "logps")), variance(real(x, "logps")), len(real(x, "logps"))),
    ),
    "masked_whiten": Case(lambda x: F.masked_whiten(x.advantages, x.mask), whitened),
    "explained_variance": Case(
        lambda x: F.explained_variance(x.values, x.rewards, x.mask),
        lambda x: (
            1
            - variance([a - b for a, b in zip(real(x, "values"), real(x, "rewards"), strict=True)])
            / variance(real(x, "rewards"))
        ),
    ),
    # Returns
    "discounted_returns": Case(
        lambda x: F.discounted_returns(x.rewards, x.mask, gamma=0.9),
        lambda x: rowwise(x, lambda r: discounted(r, 0.9), "rewards"),
    ),
    "discount_factors": Case(
        lambda x: F.discount_factors(x.mask, gamma=0.9, dtype=x.rewards.dtype),
        lambda x: rowwise(x, lambda r: [0.9**i for i in range(len(r))], "rewards"),
    ),
    "td_targets": Case(
        lambda x: F.td_targets(x.rewards, x.values, x.mask, gamma=0.9),
        lambda x: rowwise(x, td_loop, "rewards", "values"),
    ),
    "td_errors": Case(
        lambda x: F.td_errors(x.rewards, x.values, x.mask, gamma=0.9),
        lambda x: rowwise(x, td_errors_loop, "rewards", "values"),
    ),
    "n_step_returns": Case(
        lambda x: F.n_step_returns(x.rewards, x.values, x.mask, n=2, gamma=0.9),
        lambda x: rowwise(x, n_step_loop, "rewards", "values"),
    ),
    "lambda_returns": Case(
        lambda x: F.lambda_returns(x.rewards, x.values, x.mask, gamma=0.9, lam=x.lam),
        lambda x: rowwise(x, lambda_loop, "rewards", "values", "lam"),
    ),
    "gae": Case(
        lambda x: F.gae(x.rewards, x.values, x.mask, gamma=0.9, lam=x.lam),
        lambda x: rowwise(x, gae_loop, "rewards", "values", "lam"),
    ),
    "vtrace": Case(
        lambda x: F.vtrace(x.rewards, x.values, x.ratios, x.mask, gamma=0.9, lam=0.8, clip_rho=1.2), vtrace_loop
    ),
    "length_adaptive_lambda": Case(
        lambda x: F.length_adaptive_lambda(x.many, 0.05),
        lambda x: elementwise(lambda n: clip(1 - 1 / (0.05 * n), 0, 1), x.many),
    ),
    "terminal_rewards": Case(
        lambda x: F.terminal_rewards(x.scores, x.mask),
        lambda x: rowwise(
            Batch(mask=x.mask, s=x.scores[:, None].expand_as(x.mask)),
            lambda s: [0.0] * (len(s) - 1) + s[-1:],
            "s",
        ),
    ),
    "kl_shaped_rewards": Case(
        lambda x: F.kl_shaped_rewards(x.rewards, x.logps, x.ref, x.mask, beta=0.3),
        lambda x: rowwise(
            x, lambda r, p, q: [a - 0.3 * (b - c) for a, b, c in zip(r, p, q, strict=True)], "rewards", "logps", "ref"
        ),
    ),
    "overlong_penalty": Case(
        lambda x: F.overlong_penalty(x.lengths, max_length=5, cache=3),
        lambda x: elementwise(lambda n: clip((2 - n) / 3, -1, 0), x.lengths),
    ),
    # Turns
    "turn_ends": Case(lambda x: F.turn_ends(x.mask), lambda x: turnwise(x, lambda i, t, k, end: end)),
    "turn_numbers": Case(lambda x: F.turn_numbers(x.mask), lambda x: turnwise(x, lambda i, t, k, end: k, -1.0)),
    "turn_sums": Case(lambda x: F.turn_sums(x.rewards, x.mask), turn_sums_loop),
    "at_turn_ends": Case(
        lambda x: F.at_turn_ends(x.chances, x.mask, dtype=x.chances.dtype),
        lambda x: turnwise(x, lambda i, t, k, end: x.chances[i].item() if end else 1.0),
    ),
    "in_time_unit": Case(
        lambda x: [F.in_time_unit(0.7, x.mask, time_unit=unit, dtype=x.rewards.dtype) for unit in ("token", "turn")],
        lambda x: [0.7, turnwise(x, lambda i, t, k, end: 0.7 if end else 1.0)],
    ),
    "process_normalized": Case(lambda x: F.process_normalized(x.rewards, x.ids > 1, x.mask, GROUP), process_loop),
    "reward_to_go": Case(
        lambda x: F.reward_to_go(x.rewards, x.mask, gamma=0.7, time_unit="turn"), lambda x: to_go_loop(x, 0.7)
    ),
    # Without gradient, which the spread of a single turn does not have.
    "turn_normalized": Case(
        lambda x: F.turn_normalized(x.rewards.detach(), x.mask, GROUP, gamma=0.7), turn_levels_loop
    ),
    "trace_weights": Case(
        lambda x: F.trace_weights(x.mask.double(), lam=0.7, style="both"), lambda x: trace_loop(x.mask)
    ),
    "lambda_trace": Case(
        lambda x: F.lambda_trace(x.row_advantages, x.mask, lam=0.7, style="both"),
        lambda x: trace_loop(x.mask) * x.row_advantages[:, None],
    ),
    "value_implied_std": Case(
        lambda x: F.value_implied_std(x.chances),
        lambda x: elementwise(lambda v: math.sqrt(max((1 - v) * v, 0.01)), x.chances),
    ),
    "value_scaled": Case(
        lambda x: F.value_scaled(x.advantages, x.chances),
        lambda x: x.advantages / elementwise(lambda v: math.sqrt(max((1 - v) * v, 0.01)), x.chances)[:, None],
    ),
    # Value losses
    "squared_error": Case(
        lambda x: F.squared_error(x.values, x.rewards),
        lambda x: elementwise(lambda v, y: (v - y) ** 2, x.values, x.rewards),
    ),
    "clipped_squared_error": Case(
        lambda x: F.clipped_squared_error(x.values, x.rewards, x.next_values, clip_range=0.3),
        lambda x: elementwise(
            lambda v, y, old: max((v - y) ** 2, (clip(v, old - 0.3, old + 0.3) - y) ** 2),
            x.values,
            x.rewards,
            x.next_values,
        ),
    ),
    "huber": Case(
        lambda x: F.huber(x.values, x.rewards, delta=0.7),
        lambda x: elementwise(
            lambda v, y: (v - y) ** 2 / 2 if abs(v - y) <= 0.7 else 0.7 * (abs(v - y) - 0.35), x.values, x.rewards
        ),
    ),
    # Heads
    "shift_real": Case(
        lambda x: F.shift_real(x.values, x.mask, 1)[0], lambda x: rowwise(x, shifted, "values"), moves=True
    ),
    "next_state_values": Case(
        lambda x: F.next_state_values(x.values, x.mask), lambda x: rowwise(x, shifted, "values"), moves=True
    ),
    "head_targets": Case(
        lambda x: F.head_targets(x.values, x.mask, HEADS),
        lambda x: (
            per_head(x, shifted, "values"),
            per_head(x, lambda y, k: [float(t + k < len(y)) for t in range(len(y))], "values"),
        ),
        moves=True,
    ),
    "lookahead_values": Case(lambda x: F.lookahead_values(x.head_values, x.mask), lookahead_loop),
    "last_real": Case(
        lambda x: F.last_real(x.mask),
        lambda x: rowwise(x, lambda v: [float(t + 1 == len(v)) for t in range(len(v))], "values"),
    ),
    "completion_states": Case(
        lambda x: F.completion_states(x.hidden, x.ids.shape[1]), lambda x: x.hidden[:, :-1], moves=True
    ),
    "mtp_labels": Case(
        lambda x: F.mtp_labels(x.ids, 1),
        lambda x: [[[row[t + 2] if t + 2 < len(row) else -100] for t in range(len(row))] for row in x.ids.tolist()],
    ),
    "completion_labels": Case(
        lambda x: F.completion_labels(x.prompt_ids, x.ids, x.mask, 1),
        lambda x: [
            [[row[t + 1] if t + 1 < len(row) and m[t + 1] else -100] for t in range(len(row))]
            for row, m in zip(x.ids.tolist(), x.mask.tolist(), strict=True)
        ],
    ),
    "predicted_mask": Case(
        lambda x: F.predicted_mask(x.ids, 2), lambda x: [[y != 2 for y in row[1:]] for row in x.ids.tolist()]
    ),
    # Groups
    "group_normalized": Case(
        lambda x: F.group_normalized(x.scores, GROUP),
        lambda x: groupwise(
            x, lambda r: [c / (math.sqrt(variance(r) * len(r) / (len(r) - 1)) + 1e-4) for c in centred(r)]
        ),
    ),
    "group_centered": Case(lambda x: F.group_centered(x.scores, GROUP), lambda x: groupwise(x, centred)),
    "group_min_max": Case(
        lambda x: F.group_min_max(x.scores, GROUP),
        lambda x: groupwise(x, lambda r: [2 * (a - min(r)) / (max(r) - min(r)) - 1 for a in r]),
    ),
    "leave_one_out": Case(
        lambda x: F.leave_one_out(x.scores, GROUP),
        lambda x: groupwise(x, lambda r: [a - mean(r[:i] + r[i + 1 :]) for i, a in enumerate(r)]),
    ),
    "max_likelihood": Case(
        lambda x: F.max_likelihood(x.chances, GROUP),
        lambda x: groupwise(x, lambda r: [c / (mean(r) + 1e-6) for c in centred(r)], "chances"),
    ),
    "length_weighted": Case(lambda x: F.length_weighted(x.scores, GROUP, x.lengths), opo_loop),
    "batch_normalized": Case(lambda x: F.batch_normalized(x.advantages, mask=x.mask), whitened),
    "group_centered_batch_normalized": Case(
        lambda x: F.group_centered_batch_normalized(x.scores, GROUP),
        lambda x: [c / math.sqrt(variance(groupwise(x, centred)) + 1e-8) for c in groupwise(x, centred)],
    ),
    "group_centered_batch_scaled": Case(
        lambda x: F.group_centered_batch_scaled(x.scores, GROUP),
        lambda x: [
            c / (math.sqrt(variance(x.scores.tolist()) * len(x.scores) / (len(x.scores) - 1)) + 1e-4)
            for c in groupwise(x, centred)
        ],
    ),
    "pass_at_k": Case(
        lambda x: F.pass_at_k(x.scores, GROUP, k=2, normalize=True), lambda x: groupwise(x, pass_at_k_loop)
    ),
    "kalman": Case(lambda x: F.kalman(x.scores, GROUP, initial_mean=0.5), lambda x: groupwise(x, kalman_loop)),
    "informative_groups": Case(
        lambda x: F.informative_groups(x.scores, GROUP), lambda x: [True] * (len(x.scores) // GROUP)
    ),
    # Prompts' trackers
    "tracker_value": Case(
        lambda x: F.tracker_value(x.alpha, x.beta), lambda x: elementwise(lambda a, b: a / (a + b), x.alpha, x.beta)
    ),
    "tracker_update": Case(
        lambda x: F.tracker_update(x.alpha, x.beta, x.chances, 0.9),
        lambda x: (
            elementwise(lambda a, r: 0.9 * a + r, x.alpha, x.chances),
            elementwise(lambda b, r: 0.9 * b + 1 - r, x.beta, x.chances),
        ),
    ),
    "forget_factor": Case(
        lambda x: F.forget_factor(x.distances),
        lambda x: elementwise(lambda d: clip(2 ** (-d / 0.06), 0.875, 0.96), x.distances),
    ),
    "initial_counts": Case(
        lambda x: F.initial_counts(x.chances, trials=3, min_forget=0.7),
        lambda x: (
            elementwise(lambda v: (3 * v + 0.5) / 4 / 0.3, x.chances),
            elementwise(lambda v: (1 - (3 * v + 0.5) / 4) / 0.3, x.chances),
        ),
    ),
    # Action values
    "expected_sarsa_targets": Case(
        lambda x: F.expected_sarsa_targets(x.scores, x.action_values, x.policy, x.ended, gamma=0.9),
        lambda x: action_loop(x, lambda q, _, p, a: math.fsum(b * c for b, c in zip(q, p, strict=True))),
    ),
    "sarsa_targets": Case(
        lambda x: F.sarsa_targets(x.scores, x.action_values, x.actions, x.ended, gamma=0.9),
        lambda x: action_loop(x, lambda q, _, p, a: q[int(a)]),
    ),
    "double_q_targets": Case(
        lambda x: F.double_q_targets(x.scores, x.action_values, x.other_values, x.ended, gamma=0.9),
        lambda x: action_loop(x, lambda q, other, p, a: other[q.index(max(q))]),
    ),
    "q_learning_targets": Case(
        lambda x: F.q_learning_targets(x.scores, x.action_values, x.ended, gamma=0.9),
        lambda x: action_loop(x, lambda q, _, p, a: max(q)),
    ),
    "stochastic_update": Case(
        lambda x: F.stochastic_update(x.values, x.rewards, 0.3),
        lambda x: elementwise(lambda q, y: q - 0.3 * (q - y), x.values, x.rewards),
    ),
    "polyak_update": Case(
        copied(lambda target, online: F.polyak_update(target, online, tau=0.3)),
        lambda x: elementwise(lambda v, r: 0.3 * r + 0.7 * v, x.values, x.rewards),
        moves=True,
    ),
    "periodic_update": Case(
        copied(lambda target, online: F.periodic_update(target, online, step=4, period=2)),
        lambda x: x.rewards,
        moves=True,
    ),
    # Natural gradient
    "conjugate_gradient": Case(lambda x: F.conjugate_gradient(product(x), x.vector), solved),
    "trust_region_step": Case(lambda x: F.trust_region_step(product(x), x.vector, max_kl=0.01), trust_loop),
    "flat_gradient": Case(
        slope,
        lambda x: x.values[..., None].expand_as(x.head_values).flatten(),
        moves=True,
    ),
    "hessian_product": Case(
        hessian,
        lambda x: [
            math.fsum(m * v for m, v in zip(row, x.advantages.flatten()[:4].tolist(), strict=True))
            + (12 * x.vector[i].item() ** 2 + 0.1) * x.advantages.flatten()[i].item()
            for i, row in enumerate(x.matrix.tolist())
        ],
        moves=True,  # the caller's graph decides
    ),
    # Speculative sampling
    "acceptance_probs": Case(
        lambda x: F.acceptance_probs(x.policy, x.draft),
        lambda x: elementwise(lambda p, q: min(p / q, 1.0), x.policy, x.draft),
    ),
    "residual_probs": Case(
        lambda x: F.residual_probs(x.policy, x.draft),
        lambda x: torch.stack(
            [
                elementwise(lambda p, q: max(p - q, 0.0), p, q)
                / math.fsum(max(a - b, 0.0) for a, b in zip(p.tolist(), q.tolist(), strict=True))
                for p, q in zip(x.policy, x.draft, strict=True)
            ]
        ),
    ),
    "expected_tokens": Case(
        lambda x: F.expected_tokens(x.chances),
        lambda x: [
            1 + math.fsum(math.prod(x.chances[:j].tolist()) for j in range(1, k + 1))
            for k in range(len(x.chances) + 1)
        ],
    ),
    "count_accepted": Case(
        lambda x: F.count_accepted(x.policy > 0.1),
        lambda x: [len(list(itertools.takewhile(lambda p: p > 0.1, row))) for row in x.policy.tolist()],
    ),
    "inverse_cdf": Case(
        lambda x: F.inverse_cdf(x.policy.double(), x.uniforms.double()),
        lambda x: [
            min(j for j in range(4) if math.fsum(p[: j + 1]) > u)
            for p, u in zip(x.policy.tolist(), x.uniforms.tolist(), strict=True)
        ],
    ),
    # Routers
    "router_probabilities": Case(
        lambda x: F.router_probabilities(x.router_logits, "sigmoid"),
        lambda x: last_dim(sigmoid_scores, x.router_logits),
    ),
    "expert_counts": Case(lambda x: F.expert_counts(x.experts, EXPERTS, x.token_mask), counts_loop),
    "load_fractions": Case(
        lambda x: F.load_fractions(x.counts, CHOSEN), lambda x: [CHOSEN * c / 11 for c in x.counts.tolist()]
    ),
    "switch_balance_loss": Case(
        lambda x: F.switch_balance_loss(
            x.router_logits,
            F.load_fractions(F.expert_counts(x.experts, EXPERTS, x.token_mask).double(), CHOSEN),
            x.token_mask,
        ),
        lambda x: EXPERTS * balance_loop(x.router_logits, x.experts, x.token_mask, softmax),
    ),
    "sequence_balance_loss": Case(
        lambda x: F.sequence_balance_loss(x.sequence_logits, x.sequence_experts, x.mask), sequence_balance_loop
    ),
    "router_z_loss": Case(
        lambda x: F.router_z_loss(x.router_logits, x.token_mask),
        lambda x: mean(
            [
                math.log(math.fsum(math.exp(z) for z in row)) ** 2
                for row, m in zip(x.router_logits.tolist(), x.token_mask.tolist(), strict=True)
                if m
            ]
        ),
    ),
    "selection_bias_update": Case(
        lambda x: F.selection_bias_update(x.bias, x.counts, rate=0.1, rule="proportional"), proportional_loop
    ),
    "selection_bias_quantile": Case(
        lambda x: F.selection_bias_quantile(x.router_scores, x.bias, CHOSEN, x.token_mask), quantile_loop
    ),
    "max_violation": Case(lambda x: F.max_violation(x.counts), lambda x: (5 - 2.75) / 2.75),
    "load_entropy": Case(
        lambda x: F.load_entropy(x.counts),
        lambda x: -math.fsum(c / 11 * math.log(c / 11) for c in x.counts.tolist()) / math.log(EXPERTS),
    ),
}

OF_REWARDS = [name for name, entry in O.ADVANTAGES.items() if entry.of_rewards is not None]

OBJECTIVES: dict[str, Case] = {
    **{f"policy_loss/{name}": Case(loss_call(name), None) for name in O.POLICY_LOSSES},
    "clip_shares": Case(lambda x: O.clip_shares(x.ids > 1, x.advantages, x.mask), None),
    "online_loss": Case(
        lambda x: O.online_loss(
            O.PolicyLoss("grpo", "token"),
            x.logps,
            x.old,
            x.advantages,
            x.mask,
            num_items=8.0,
            max_length=9,
            ref_logps=x.ref,
            beta=0.1,
            correct_kl=True,
            entropies=x.entropies,
            entropy_coef=0.1,
        ),
        None,
    ),
    "critic_targets": Case(lambda x: O.critic_targets(*critic_options(x), gamma=0.9, length_alpha=0.3), None),
    "critic_targets/turns": Case(
        lambda x: O.critic_targets(*critic_options(x), gamma=0.9, time_unit="turn", after=x.scores), None
    ),
    "critic_signal": Case(
        lambda x: O.critic_signal(*critic_options(x), scaling="value", estimator="td", lookahead=True), None
    ),
    "scale_advantages": Case(
        lambda x: [O.scale_advantages(x.advantages, x.values, x.mask, scaling=s) for s in ("whiten", "value")],
        lambda x: [
            whitened(x),
            rowwise(
                x,
                lambda a, v: [b / math.sqrt(max((1 - clip(v[0], 0, 1)) * clip(v[0], 0, 1), 0.01)) for b in a],
                "advantages",
                "values",
            ),
        ],
    ),
    "initial_values": Case(
        lambda x: O.initial_values(x.values, x.mask),
        lambda x: rowwise(x, lambda v: v[:1] + [0.0] * (len(v) - 1), "values").sum(1),
    ),
    "value_loss": Case(
        lambda x: O.value_loss(
            x.head_values,
            x.rewards,
            x.mask,
            num_items=7.0,
            loss=O.value_losses()["clipped"],
            old_values=x.old_head_values,
        ),
        value_loss_loop,
    ),
    "rollout_metrics": Case(
        lambda x: O.rollout_metrics(O.critic_targets(*critic_options(x)), x.head_values, x.target_values, x.mask), None
    ),
    "sequence_means": Case(
        lambda x: O.sequence_means(x.values, x.mask),
        lambda x: rowwise(x, lambda v: [y / len(v) for y in v], "values").sum(1),
    ),
    "per_head_means": Case(lambda x: O.per_head_means("x", x.vector, x.counts), None),
    "advantages_of": Case(
        lambda x: [
            O.advantages_of(
                name,
                x.chances,
                GROUP,
                torch.ones_like(x.mask),
                rewards=x.rewards,
                paid=x.ids > 1,
                options={"k": 2} if name == "pass_at_k" else {},
            )
            for name, entry in O.ADVANTAGES.items()
            if not entry.tracks_prompts and not entry.only_of_rewards
        ],
        None,
    ),
    "advantages_of_rewards": Case(
        lambda x: [O.advantages_of_rewards(name, x.rewards, x.mask, options={}) for name in OF_REWARDS],
        lambda x: [to_go_loop(x, 1.0)] * len(OF_REWARDS),
    ),
    "head_metrics": Case(lambda x: O.head_metrics("x", x.vector, x.counts, lambda t: t), None),
    "gradient_metrics": Case(lambda x: O.gradient_metrics(x.vector[:3]), None),
    "completion_metrics": Case(lambda x: O.completion_metrics(x.many, x.ended), None),
    "draft_metrics": Case(lambda x: O.draft_metrics(x.counts), None),
    "reward_metrics": Case(lambda x: O.reward_metrics(x.policy, x.scores, list("abcd"), GROUP), None),
    "token_covariance": Case(lambda x: token_covariance(x.logps, x.advantages, x.mask), covariance_loop),
}

SETTINGS = {"advantage_options", "check_advantage", "prompt_key", "value_losses"}
"""Names of `signals` that take no tensors."""

CASES = FUNCTIONAL | OBJECTIVES
