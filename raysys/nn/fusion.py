"""One prediction from those of several models of the same thing, and how far the models are apart.

All functions work on logits [..., M] of M models; for binary predictions p = sigmoid(z).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def negation_entropy(logits: Tensor) -> Tensor:
    """p ln p + (1 - p) ln (1 - p), between -ln 2 and 0: how sure a prediction is. It depends on |z| alone, to the bit."""
    size = logits.abs()
    tail = torch.exp(-size)  # no difference of large numbers: exact for every |z|
    return -(torch.log1p(tail) + size * tail / (1 + tail))


def confidence_log_weights(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logarithms of softmax over the models of (negation entropy / temperature): [..., M]."""
    return F.log_softmax(negation_entropy(logits) / temperature, -1)


def fuse(logits: Tensor, log_weights: Tensor) -> Tensor:
    """The logit of p = Σ w_i p_i: [..., M] → [...]; exactly the logit itself where M is 1.

    p / (1 - p) is the mean of the models' odds e^z under the weights w_i (1 - p_i), normalised: nothing in it overflows.
    """
    shares = F.log_softmax(log_weights + F.logsigmoid(-logits), -1)
    return torch.logsumexp(shares + logits, -1)


def peer_divergence(means: Tensor, natural: Tensor) -> Tensor:
    """The mean over all pairs of models of ½ (μ_i - μ_j)(η_i - η_j), [..., M] → [...]; 0 where M is 1.

    With μ = p and η = z that is ½ [KL(p_i ‖ p_j) + KL(p_j ‖ p_i)] of Bernoulli distributions, without a logarithm; with
    μ = η = a prediction of unit variance its Gaussian form ½ (η_i - η_j)². It is the covariance of μ and η over the models,
    so no pair is written out.
    """
    models = natural.shape[-1]
    centred = (means - means.mean(-1, keepdim=True)) * (natural - natural.mean(-1, keepdim=True))
    return centred.sum(-1) / max(models - 1, 1)


def peer_distance(logits: Tensor) -> Tensor:
    """The mean over all pairs of models of |z_i - z_j|: [..., M] → [...]; 0 where M is 1."""
    models = logits.shape[-1]
    ranks = torch.arange(
        1 - models, models, 2, device=logits.device, dtype=logits.dtype
    )  # how often + less how often -
    return (logits.sort(-1).values * ranks).sum(-1) / max(models * (models - 1) / 2, 1)
