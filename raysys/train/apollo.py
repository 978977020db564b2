"""APOLLO and APOLLO-Mini: AdamW's steps from moments of a low-rank random projection of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.adamw import adamw

from raysys.errors import UserError
from raysys.nn.random import hash64

_KEPT_NUMBERS = 1_000_000  # a larger projection is drawn anew in each step instead of kept: time for memory
_TINY = 1e-8


@dataclass(frozen=True)
class LowRank:
    """What APOLLO does to the matrices that it covers.

    rank: rows of the projection, at most those of the matrix (None: a quarter of the smaller dimension, at least 4;
        apollo_mini has 1). scale: factor of the update (None: 1, √128 for apollo_mini).
    update_gap: steps between projections. reset_on_redraw: whether the moments begin anew with each, as nothing of them
        belongs to the new one. norm_growth: the most by which the norm of an update may exceed that of the one before.
    min_dim: matrices with a smaller dimension, and all that is no matrix, get AdamW.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    rank: PositiveInt | None = None
    scale: PositiveFloat | None = None
    update_gap: PositiveInt = 200
    norm_growth: Annotated[float, Field(gt=1)] = 1.01
    min_dim: PositiveInt = 64
    reset_on_redraw: bool = False


class Apollo(torch.optim.Optimizer):
    """Scales each gradient G [m, n], m ≤ n (transposed otherwise), by what Adam would do to P G [r, n], P random.

        R = P G,   R̃ = Adam(R),   s_j = |R̃_j| / |R_j| for each column,   W ← (1 - lr · decay) W - lr · scale · G diag(s)

    APOLLO-Mini (`mini`) has r = 1 and one s for the whole matrix. The norm of G diag(s) grows by at most `norm_growth` a
    step. A step of norm 0 sets no limit: no step could ever leave it. Everything else gets AdamW.

    The state of a matrix is 2 r n + 2 numbers beside the step: moments, the norm of the last update, and the seed of P,
    which is drawn on the CPU and so the same on every rank and device. `dense_parallel: ddp` only.

    Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270; written from its equations. Unlike the
    authors' code: moments are bias-corrected before the norms are taken, `eps` is added to the corrected root, `scale` is
    the factor itself and not its square, and the columns of a square matrix are its channels. All published evidence is of
    language models. There is no momentum, and low rank makes updates smaller by about √(r / m): its learning rate is not
    AdamW's, but 3 to 10 times that.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        low_rank: LowRank | None = None,
        mini: bool = False,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.low_rank, self.mini = low_rank or LowRank(), mini
        self._projections: dict[nn.Parameter, tuple[int, Tensor]] = {}
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, parameter in enumerate(members):
            self.state[parameter] = self._initial_state(parameter, place)

    def covers(self, parameter: Tensor) -> bool:
        """Whether it is a matrix that is projected; the others get AdamW."""
        return parameter.dim() == 2 and min(parameter.shape) >= self.low_rank.min_dim

    def rank(self, parameter: Tensor) -> int:
        """The rows r of the projection of a covered matrix."""
        rows = min(parameter.shape)
        return 1 if self.mini else min(self.low_rank.rank or max(4, rows // 4), rows)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if any(parameter.grad.is_sparse for parameter in present):
                raise UserError("apollo has no updates for sparse gradients", "train.optimizers.dense.name: adagrad")
            self._adamw([p for p in present if not self.covers(p)], group)
            for parameter in present:
                if self.covers(parameter):
                    self._update(parameter, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, but states keep their types: it would turn seeds and moments into the type of the weights."""
        types = {p: {name: value.dtype for name, value in state.items()} for p, state in self.state.items()}
        super().load_state_dict(state_dict)
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, members, strict=True):
            for name, value in state_dict["state"][key].items():
                device = self.state[parameter][name].device
                self.state[parameter][name] = value.detach().clone().to(device, types[parameter][name])

    def _initial_state(self, parameter: nn.Parameter, place: int) -> dict[str, Tensor]:
        device = parameter.device
        shape = (self.rank(parameter), max(parameter.shape)) if self.covers(parameter) else parameter.shape
        state = {name: torch.zeros(shape, device=device) for name in ("exp_avg", "exp_avg_sq")}
        if not self.covers(parameter):
            return state | {"step": torch.zeros((), device=device)}
        seed = torch.tensor(hash64(f"apollo/{place}"))
        return state | {"step": torch.zeros(()), "seed": seed, "norm": torch.zeros((), device=device)}

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        wide = parameter.shape[0] <= parameter.shape[1]
        weight, gradient = (parameter, parameter.grad) if wide else (parameter.T, parameter.grad.T)  # [m, n]
        state = self.state[parameter]
        steps = self._begin_step(state)
        projected = self._projection(parameter) @ gradient.float()  # [r, n]
        normalized = _adam(projected, state, steps, group)
        axes = (0, 1) if self.mini else 0
        factor = _norm(normalized, axes) / (_norm(projected, axes) + _TINY)  # [n], a scalar for mini
        norm = (factor * _norm(gradient.float(), axes)).norm()  # that of G diag(s), which itself is never made
        limit = self.low_rank.norm_growth * state["norm"]
        shrink = torch.where((limit > 0) & (norm > limit), limit / norm, 1.0)
        state["norm"].copy_(norm * shrink)
        scale = self.low_rank.scale or (math.sqrt(128) if self.mini else 1.0)
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcmul_(gradient, (factor * shrink).to(weight.dtype), value=-group["lr"] * scale)

    def _begin_step(self, state: dict[str, Tensor]) -> int:
        """Count the step, move to the next seed where it is time, and return the steps that the moments have seen."""
        done, gap = int(state["step"]), self.low_rank.update_gap
        redraw = done > 0 and done % gap == 0
        state["step"] += 1
        state["seed"] += int(redraw)
        if redraw and self.low_rank.reset_on_redraw:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        return done % gap + 1 if self.low_rank.reset_on_redraw else done + 1

    def _projection(self, parameter: nn.Parameter) -> Tensor:
        """P [r, m] with entries N(0, 1 / r), a function of the seed in the state."""
        seed = int(self.state[parameter]["seed"])
        if parameter in self._projections and self._projections[parameter][0] == seed:
            return self._projections[parameter][1]
        rank = self.rank(parameter)
        drawn = torch.randn(rank, min(parameter.shape), generator=torch.Generator().manual_seed(seed))
        projection = (drawn / math.sqrt(rank)).to(parameter.device)
        if projection.numel() <= _KEPT_NUMBERS:
            self._projections[parameter] = (seed, projection)
        return projection


def _adam(gradient: Tensor, state: dict[str, Tensor], steps: int, group: dict[str, Any]) -> Tensor:
    """Adam's bias-corrected direction for `gradient` after its moments have taken it in."""
    first, second = group["betas"]
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (state["exp_avg_sq"] / (1 - second**steps)).sqrt_().add_(group["eps"])
    return state["exp_avg"] / (1 - first**steps) / root


def _norm(value: Tensor, axes: int | tuple[int, int]) -> Tensor:
    if axes == 0 and value.stride(0) != 1:
        return value.square().sum(0).sqrt()  # vector_norm takes 10 times as long across rows on a CPU
    return torch.linalg.vector_norm(value, dim=axes)
