"""The sequential part of a DSpark drafter: Markov head and confidence head.

The bias on the base logits depends on the previous token (`vanilla`), on the hidden state too (`gated`), or on all
drafted tokens (`rnn`). Source: DSpark paper, section 3.1; docs/dspark.md, Markov head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_ray.config import MarkovHeadType
from dspark_ray.model.layers import Weight


class MarkovHead(nn.Module):
    """Low-rank transition bias W2 . W1[previous token]."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = Weight(vocab_size, rank)
        self.markov_w2 = Weight(vocab_size, rank)

    def embed(self, previous: Tensor) -> Tensor:
        """W1 rows of token ids [R]: [R, r]."""
        return self.markov_w1.weight[previous]

    def initial_state(self, num_rows: int, like: Tensor) -> Tensor | None:
        """State before the first position; None for a head without state."""
        return None

    def step(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(bias [R, V] float32, next state) from the previous token's embedding [R, r] and hidden [R, d]."""
        return self._project(embedding), None

    def _project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.markov_w2.weight.float())


class GatedMarkovHead(MarkovHead):
    """Bias of the previous token, gated by the hidden state."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gate = torch.sigmoid(self.gate_proj(torch.cat((hidden, embedding), dim=-1)))
        return self._project(gate * embedding), None


class RNNMarkovHead(MarkovHead):
    """Bias from a recurrent state over the drafted prefix."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, rank)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def initial_state(self, num_rows: int, like: Tensor) -> Tensor | None:
        return like.new_zeros(num_rows, self.rank)

    def step(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert state is not None, "call initial_state() first"
        gate, candidate, out = self.joint_proj(torch.cat((state, embedding, hidden), dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        state = gate * state + (1 - gate) * torch.tanh(candidate)
        return self._project(torch.tanh(out)), state


def build_markov_head(kind: MarkovHeadType, vocab_size: int, rank: int, hidden_size: int) -> MarkovHead:
    """The head that `dspark_markov_head_type` names."""
    if kind == "vanilla":
        return MarkovHead(vocab_size, rank)
    if kind == "gated":
        return GatedMarkovHead(vocab_size, rank, hidden_size)
    return RNNMarkovHead(vocab_size, rank, hidden_size)


class ConfidenceHead(nn.Module):
    """Logit of P(draft accepted | all before it accepted) from [hidden ; W1[previous token]] (paper, 3.2.1)."""

    def __init__(self, hidden_size: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size + rank, 1, bias=bias)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """[..., d], [..., r] -> logits [...] in float32."""
        joined = torch.cat((hidden.float(), embedding.float()), dim=-1)
        bias = None if self.proj.bias is None else self.proj.bias.float()
        return nn.functional.linear(joined, self.proj.weight.float(), bias).squeeze(-1)
