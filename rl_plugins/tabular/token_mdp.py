"""A finite language: short strings over a small vocabulary, with the exact value of every prefix.

Shapes: `B` sequences, `T` completion tokens, `V` vocabulary, `N` any number of strings, `d` depth (tokens so
far). A table at depth d has one row for each of the V^d prefixes; the row number is the prefix read as a
base-V number.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rl_plugins.tabular.mdp import MDP

MAX_STRINGS = 20_000_000  # 160 MB for each float64 table of the last depth
CHUNK = 1 << 16  # strings for one call of `policy` or `reward`


class TokenMDP:
    """Exact values of a policy over token strings, by backward induction over all prefixes.

        Q(s, a) = R(sa)                  if the string sa ends: a is eos, or sa has `max_length` tokens
                  r(sa) + gamma * V(sa)  otherwise
        V(s)    = sum_a pi(a | s) Q(s, a)

    The prompt is fixed: the state s_t is y_{<t}. Everything is float64 on the CPU. Rows of ended prefixes
    hold V = Q = 0, and there the policy repeats eos.

    Sutton and Barto, Reinforcement Learning (2018), equation 4.4; on a tree one sweep from the end is exact.

    Args:
        policy: maps prefixes `(N, d)` to next-token probabilities `(N, V)`, for d = 0 .. max_length - 1; it is called
            only with prefixes that have not ended.
        reward: maps finished strings `(N, d)`, eos included, to the reward `(N,)` paid after their
            last token.
        step_reward: maps strings `(N, d)` that have not ended to the reward `(N,)` paid after their newest token;
            by default there is none.
        vocab_size: V, eos included.
        max_length: tokens after which a string ends without eos.
        eos_token_id: token that ends a string; None if only the length ends strings.
        gamma: discount per token.

    Attributes:
        probabilities: for d = 0 .. max_length - 1, `(V^d, V)`.
        rewards: r or R of the string that a token makes, for d = 0 .. max_length - 1, `(V^d, V)`.
        action_values: Q, for d = 0 .. max_length - 1, `(V^d, V)`.
        values: V, for d = 0 .. max_length, `(V^d,)`; the last one is 0.

    Raises:
        ValueError: there are too many strings, a size or a token id makes no sense, or the policy returns
            something other than probabilities.
    """

    def __init__(
        self,
        policy: Callable[[Tensor], Tensor],
        reward: Callable[[Tensor], Tensor],
        *,
        step_reward: Callable[[Tensor], Tensor] | None = None,
        vocab_size: int,
        max_length: int,
        eos_token_id: int | None = None,
        gamma: float = 1.0,
    ) -> None:
        _check_sizes(vocab_size, max_length, eos_token_id)
        self.vocab_size, self.max_length = vocab_size, max_length
        self.eos_token_id, self.gamma = eos_token_id, gamma
        self._exists = self._existing_states()
        with torch.no_grad():
            self.probabilities = [self._policy_table(policy, depth) for depth in range(max_length)]
            self.rewards = [self._reward_table(reward, step_reward, depth) for depth in range(max_length)]
            self.values, self.action_values = self._backward_induction()

    def prefixes(self, index: Tensor, depth: int) -> Tensor:
        """Turn row numbers of a table into prefixes: `(N,)` -> `(N, depth)`."""
        powers = self.vocab_size ** torch.arange(depth - 1, -1, -1)
        return index[:, None] // powers % self.vocab_size

    def completion_mask(self, tokens: Tensor) -> Tensor:
        """Mark the tokens up to the end of each string, eos included: `(B, T)` -> `(B, T)`."""
        before_limit = torch.arange(tokens.shape[1]) < self.max_length
        if self.eos_token_id is None:
            return before_limit.expand_as(tokens)
        is_eos = (tokens == self.eos_token_id).long()
        return (is_eos.cumsum(1) - is_eos == 0) & before_limit

    def state_values(self, tokens: Tensor) -> Tensor:
        """Look up the exact V(s_t) along given strings.

        Args:
            tokens: completions y `(B, T)`; what follows the end of a string is ignored.

        Returns:
            `(B, T)`, 0 after the end.
        """
        return self._look_up(self.values, tokens)

    def advantages(self, tokens: Tensor) -> Tensor:
        """Compute the exact A_t = Q(s_t, y_t) - V(s_t) along given strings: `(B, T)` -> `(B, T)`, 0 after the end."""
        tokens, index = self._locate(tokens)
        advantages = torch.zeros(tokens.shape, dtype=torch.float64)
        for t in range(min(tokens.shape[1], self.max_length)):
            row = index[:, t]
            advantages[:, t] = self.action_values[t][row, tokens[:, t]] - self.values[t][row]
        return advantages

    def token_rewards(self, tokens: Tensor) -> Tensor:
        """Look up the reward paid after each token of given strings: `(B, T)` -> `(B, T)`, 0 after the end."""
        real = self.completion_mask(tokens)
        tokens, index = self._locate(tokens)
        rewards = torch.zeros(tokens.shape, dtype=torch.float64)
        for t in range(min(tokens.shape[1], self.max_length)):
            rewards[:, t] = self.rewards[t][index[:, t], tokens[:, t]]
        return rewards * real

    def forecast(self, tokens: Tensor, k: int, continuing: bool = True) -> Tensor:
        """Compute the best forecast that head k can make: the expected value k - 1 tokens ahead.

            continuing:      E[ V(s_{t+k-1}) | s_t, s_{t+k-1} exists ]
            not continuing:  E[ V(s_{t+k-1}) | s_t ],  V = 0 where the string has ended

        Targets of head k are masked past the end, so the head learns the first forecast. With k = 1 it is
        `state_values`.

        Args:
            tokens: completions y `(B, T)`.
            k: head, from 1.
            continuing: whether to condition on the string not having ended before token t+k-1.

        Returns:
            `(B, T)`, 0 where no string reaches t+k-1.
        """
        if k < 1:
            raise ValueError(f"heads are numbered from 1, got k={k}")
        expected = self._look_ahead(self.values, k - 1)
        if continuing:
            chance = self._look_ahead([exists.double() for exists in self._exists], k - 1)
            expected = [torch.where(c > 0, e / c, 0.0) for e, c in zip(expected, chance, strict=True)]
        return self._look_up(expected, tokens)

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Draw strings from the policy.

        Returns:
            tokens `(B, T)` with T = max_length, padded with eos; completion mask `(B, T)`; sums of rewards `(B,)`.
        """
        tokens = torch.zeros(batch, self.max_length, dtype=torch.long)
        index = torch.zeros(batch, dtype=torch.long)
        rewards = torch.zeros(batch, dtype=torch.float64)
        for t in range(self.max_length):
            action = torch.multinomial(self.probabilities[t][index], 1, generator=generator).squeeze(1)
            rewards += self.rewards[t][index, action]
            tokens[:, t], index = action, index * self.vocab_size + action
        return tokens, self.completion_mask(tokens), rewards

    def to_mdp(self) -> tuple[MDP, Tensor]:
        """Rewrite the process as a general MDP, with a state for every prefix and one for the end.

        The states are the prefixes, depth by depth in the order of the tables, so their values are
        `torch.cat([*self.values[:-1], torch.zeros(1)])`.

        Returns:
            the MDP of `S` states, and the policy `(S, V)`.
        """
        sizes = [self.vocab_size**depth for depth in range(self.max_length)]
        end = sum(sizes)
        goes_on = torch.cat([exists.view(-1, self.vocab_size) for exists in self._exists[1:]])
        # In the order of their parents, children are the prefixes from depth 1 on, or the end where a string has
        # ended.
        children = torch.arange(1, end * self.vocab_size + 1).view(-1, self.vocab_size)
        children = torch.cat([children.where(goes_on, end), torch.full((1, self.vocab_size), end)])
        rewards = torch.cat([*self.rewards, torch.zeros(1, self.vocab_size, dtype=torch.float64)])
        start = torch.zeros(end + 1, dtype=torch.float64).index_fill(0, torch.tensor([0]), 1.0)
        states = torch.arange(end + 1)[:, None].expand_as(children)
        tokens = torch.arange(self.vocab_size).expand_as(children)
        index = torch.stack([states, tokens, children]).flatten(1)
        shape = (end + 1, self.vocab_size, end + 1)
        sure = torch.ones(index.shape[1], dtype=torch.float64)
        transitions = torch.sparse_coo_tensor(index, sure, shape, check_invariants=True)
        uniform = torch.full((1, self.vocab_size), 1 / self.vocab_size, dtype=torch.float64)
        return MDP(transitions, rewards, self.gamma, start=start), torch.cat([*self.probabilities, uniform])

    def _existing_states(self) -> list[Tensor]:
        """Tell for d = 0 .. max_length whether a token is still drawn after a prefix: `(V^d,)`."""
        goes_on = torch.ones(self.vocab_size, dtype=torch.bool)
        if self.eos_token_id is not None:
            goes_on[self.eos_token_id] = False
        exists = [torch.ones(1, dtype=torch.bool)]
        for _ in range(self.max_length - 1):
            exists.append((exists[-1][:, None] & goes_on).flatten())
        return [*exists, torch.zeros(self.vocab_size**self.max_length, dtype=torch.bool)]

    def _policy_table(self, policy: Callable[[Tensor], Tensor], depth: int) -> Tensor:
        """Compute the next-token probabilities of all prefixes `(V^d, V)`; ended prefixes repeat eos."""
        states = self._exists[depth].nonzero().squeeze(1)
        rows = self._call(policy, states, depth)
        if rows.shape != (len(states), self.vocab_size):
            raise ValueError(f"policy returned {tuple(rows.shape)}, not (N, V) = {len(states), self.vocab_size}")
        total = rows.sum(-1, keepdim=True)
        if not ((total - 1).abs() < 1e-4).all() or (rows < 0).any():
            raise ValueError(f"policy rows at depth {depth} are not probabilities that sum to 1; apply a softmax")
        table = torch.zeros(len(self._exists[depth]), self.vocab_size, dtype=torch.float64)
        if self.eos_token_id is not None:
            table[:, self.eos_token_id] = 1.0
        table[states] = rows / total  # a float32 softmax is off by 1e-7
        return table

    def _reward_table(
        self, reward: Callable[[Tensor], Tensor], step_reward: Callable[[Tensor], Tensor] | None, depth: int
    ) -> Tensor:
        """Compute the reward after each token that may follow the prefixes of a depth `(V^d, V)`; 0 after the end."""
        paid = torch.zeros(self.vocab_size ** (depth + 1), dtype=torch.float64)
        exists = self._exists[depth].repeat_interleave(self.vocab_size)
        for function, strings in ((reward, exists & ~self._exists[depth + 1]), (step_reward, self._exists[depth + 1])):
            chosen = strings.nonzero().squeeze(1)
            if function is not None and len(chosen):
                paid[chosen] = self._call(function, chosen, depth + 1)
        return paid.view(-1, self.vocab_size)

    def _backward_induction(self) -> tuple[list[Tensor], list[Tensor]]:
        """Compute V `(V^d,)` for d = 0 .. max_length and Q `(V^d, V)` for d = 0 .. max_length - 1."""
        values = [torch.zeros(self.vocab_size**self.max_length, dtype=torch.float64)]
        action_values: list[Tensor] = []
        for depth in reversed(range(self.max_length)):
            action_values.insert(0, self.rewards[depth] + self.gamma * values[0].view(-1, self.vocab_size))
            values.insert(0, (self.probabilities[depth] * action_values[0]).sum(-1))
        return values, action_values

    def _call(self, function: Callable[[Tensor], Tensor], index: Tensor, depth: int) -> Tensor:
        """Apply `function` to the strings of the given rows, a chunk at a time."""
        outputs = [function(self.prefixes(chunk, depth)) for chunk in index.split(CHUNK)]
        return torch.cat([output.to("cpu", torch.float64) for output in outputs])

    def _look_ahead(self, tables: Sequence[Tensor], steps: int) -> Sequence[Tensor]:
        """Compute E[ tables[d + steps](s_{t+steps}) | s_t ] for every prefix; the last table `(V^d,)` must be 0."""
        for _ in range(steps):
            children = [table.view(-1, self.vocab_size) for table in tables[1:]]
            expected = [(p * c).sum(-1) for p, c in zip(self.probabilities, children, strict=True)]
            tables = [*expected, tables[-1]]
        return tables

    def _look_up(self, tables: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Read tables `(V^d,)` at every state of the strings: `(B, T)`, 0 from `max_length` on."""
        tokens, index = self._locate(tokens)
        out = torch.zeros(tokens.shape, dtype=torch.float64)
        for t in range(min(tokens.shape[1], self.max_length)):
            out[:, t] = tables[t][index[:, t]]
        return out

    def _locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens with their padding cleared, and the rows of the states s_t: `(B, T)` both."""
        tokens = tokens.masked_fill(~self.completion_mask(tokens), 0)
        if ((tokens < 0) | (tokens >= self.vocab_size)).any():
            raise ValueError(f"tokens must lie in 0 .. {self.vocab_size - 1}")
        index = torch.zeros_like(tokens)
        for t in range(1, min(tokens.shape[1], self.max_length)):
            index[:, t] = index[:, t - 1] * self.vocab_size + tokens[:, t - 1]
        return tokens, index


def _check_sizes(vocab_size: int, max_length: int, eos_token_id: int | None) -> None:
    if vocab_size < 2 or max_length < 1:
        raise ValueError(f"need vocab_size >= 2 and max_length >= 1, got {vocab_size} and {max_length}")
    if vocab_size**max_length > MAX_STRINGS:
        raise ValueError(
            f"vocab_size ** max_length = {vocab_size}**{max_length} strings exceed {MAX_STRINGS:,}: "
            "reduce max_length, or else vocab_size"
        )
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"eos_token_id must lie in 0 .. {vocab_size - 1}, got {eos_token_id}")
