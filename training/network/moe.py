"""Mixture of experts with expert-choice routing (Zhou et al. 2022, arXiv 2202.09368).

Each expert picks its favourite tokens, the same number for every expert, so the work is
balanced by construction: no auxiliary loss, no dropped overflow, and the experts run as one
batched matrix product. Tokens compete within their own sample only, never across the batch.
"""

import torch
from torch import Tensor, nn

from training.network.layers import INIT_STD, normal_
from training.network.recompute import Normed, experts


def tokens_per_expert(tokens: int, num_experts: int, capacity: float) -> int:
    """k = floor(capacity * tokens / experts), the paper's equation for expert capacity.

    At least 1: at very high mask ratios the floor would be 0 and the layer silently dead.
    """
    return max(1, int(capacity * tokens / num_experts))


def choose(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each expert takes the ``k`` tokens of a sample that score highest for it.

    Args:
        scores: (B, T, E), the softmax over experts of each token.
        k: tokens per expert and sample.

    Returns:
        weight (E, B, k): the scores of the chosen tokens, differentiable.
        rows (E, B, k): their positions in the batch flattened to (B * T).
    """
    batch, tokens, _ = scores.shape
    weight, token = scores.transpose(1, 2).topk(k, dim=-1, sorted=False)  # (B, E, k)
    first = torch.arange(0, batch * tokens, tokens, device=scores.device)
    return weight.transpose(0, 1), (token + first[:, None, None]).transpose(0, 1)


class ExpertChoiceMLP(nn.Module):
    """out_t = sum over the experts e that chose t of score[t, e] * w2_e gelu(w1_e x_t).

    Scores are not renormalised; a token that no expert chose gets 0. Tokens are gathered and
    added back by index: dispatching by one-hot products, as the paper writes it, costs
    4 * E * k * T * d FLOPs a layer and an (E, k, T) tensor for each image.
    """

    def __init__(self, width: int, hidden: int, num_experts: int, capacity: float) -> None:
        super().__init__()
        self.num_experts, self.capacity = num_experts, capacity
        self.w1 = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.gate = nn.Linear(width, num_experts, bias=False)

    def forward(self, x: Normed) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        h = x.value()
        k = tokens_per_expert(h.shape[1], self.num_experts, self.capacity)
        weight, rows = choose(self.gate(h).softmax(dim=-1), k)
        out = experts(h.flatten(0, 1), weight.flatten(1), rows.flatten(1), self.w1, self.w2)
        return out.view_as(h)

    def initialise(self, std_out: float, generator: torch.Generator | None) -> None:
        normal_(self.w1, INIT_STD, generator)
        normal_(self.w2, std_out, generator)
        normal_(self.gate.weight, INIT_STD, generator)
