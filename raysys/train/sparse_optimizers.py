"""Optimisers of embedding tables: fused into the backward pass for sharded tables, dense twins for data-parallel ones.

A fused update reads and writes only the rows that a batch looked up. A data-parallel table gets an ordinary gradient,
averaged over the ranks, and needs an optimiser with the same mathematics: what TorchRec fuses never reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torchrec import optim as torchrec_optim

from raysys.errors import UserError
from raysys.train.schedules import Schedule

SparseName = Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"]


@dataclass(frozen=True)
class _Kind:
    """What fbgemm and TorchRec call an optimiser, and the names of its states in the order in which fbgemm has them."""

    fused: EmbOptimType
    torchrec: type[torch.optim.Optimizer]
    states: tuple[str, ...]
    rowwise_states: tuple[str, ...] = ()
    has_weight_decay: bool = True
    on_cpu: bool = False
    has_dense_twin: bool = False


_KINDS: dict[str, _Kind] = {
    "sgd": _Kind(EmbOptimType.EXACT_SGD, torchrec_optim.SGD, (), (), False, True, True),
    "adagrad": _Kind(EmbOptimType.EXACT_ADAGRAD, torchrec_optim.Adagrad, ("sum",), (), False, True, True),
    "rowwise_adagrad": _Kind(
        EmbOptimType.EXACT_ROWWISE_ADAGRAD, torchrec_optim.RowWiseAdagrad, ("sum",), ("sum",), True, True, True
    ),
    "adam": _Kind(EmbOptimType.ADAM, torchrec_optim.Adam, ("exp_avg", "exp_avg_sq")),
    "partial_rowwise_adam": _Kind(
        EmbOptimType.PARTIAL_ROWWISE_ADAM,
        torchrec_optim.PartialRowWiseAdam,
        ("exp_avg", "exp_avg_sq"),
        ("exp_avg_sq",),
    ),
    "lamb": _Kind(EmbOptimType.LAMB, torchrec_optim.LAMB, ("exp_avg", "exp_avg_sq")),
}


@dataclass(frozen=True)
class SparseOptimizer:
    """The optimiser of all embedding tables. Row-wise Adagrad keeps one accumulator per row instead of one per weight.

    weight_decay: on CUDA, an L2 term for row-wise Adagrad, decoupled for adam, partial_rowwise_adam and lamb; it acts on
    the rows that a batch looks up only. betas: adam, partial_rowwise_adam and lamb.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: SparseName = "adagrad"
    lr: NonNegativeFloat = 0.02
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.999)
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The states of a table, by the names under which they are checkpointed."""
        return _KINDS[self.name].states

    @property
    def rowwise_states(self) -> tuple[str, ...]:
        """The states with one value per row."""
        return _KINDS[self.name].rowwise_states

    @property
    def works_by_row(self) -> bool:
        """Whether an update of a column depends on the other columns of its row: such tables cannot be cut by columns."""
        return bool(self.rowwise_states) or self.name == "lamb"  # LAMB scales by the norm of the row

    @property
    def has_dense_twin(self) -> bool:
        """Whether data-parallel tables can have it: a dense Adam moves rows that a fused one leaves alone."""
        return _KINDS[self.name].has_dense_twin

    @property
    def torchrec_class(self) -> type[torch.optim.Optimizer]:
        """TorchRec's class, from which the planner learns the size of the state."""
        return _KINDS[self.name].torchrec

    def state_bytes(self, rows: int, columns: int) -> int:
        """The bytes of the state of a table or of a part of one."""
        return 4 * sum(rows if name in self.rowwise_states else rows * columns for name in self.state_names)

    def check(self, device: str) -> None:
        """Raise UserError for a combination that fbgemm does not have."""
        kind = _KINDS[self.name]
        if device == "cpu" and not kind.on_cpu:
            there = ", ".join(name for name in get_args(SparseName) if _KINDS[name].on_cpu)
            raise UserError(
                f"train.optimizers.sparse.name is {self.name!r}, which fbgemm has on CUDA only", f"on a CPU: {there}"
            )
        if self.weight_decay and (device == "cpu" or not kind.has_weight_decay):
            have = ", ".join(name for name in get_args(SparseName) if _KINDS[name].has_weight_decay)
            raise UserError(
                f"train.optimizers.sparse.weight_decay is {self.weight_decay}, which fused {self.name} ignores on {device}",
                f"set it to 0 (objective.embedding_l2 works everywhere); on CUDA these have it: {have}",
            )

    def fused_params(self) -> dict[str, Any]:
        """The arguments of TorchRec's sharders; an id outside of its table is an error instead of a silent row 0."""
        decay = WeightDecayMode.L2 if self.name == "rowwise_adagrad" else WeightDecayMode.NONE
        return {
            "optimizer": _KINDS[self.name].fused,
            "learning_rate": self.lr,
            "eps": self.eps,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "weight_decay": self.weight_decay,
            "weight_decay_mode": decay if self.weight_decay else WeightDecayMode.NONE,
            "bounds_check_mode": BoundsCheckMode.FATAL,
        }

    def dense_twin(self, tables: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimiser of whole tables with dense gradients that does what the fused one does."""
        assert self.has_dense_twin, self.name
        if self.name == "sgd":
            return torch.optim.SGD(tables, lr=self.lr)
        if self.name == "adagrad":
            return torch.optim.Adagrad(tables, lr=self.lr, eps=self.eps)
        return RowWiseAdagrad(tables, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator per row, the mean of the row's squared gradients; its state `sum` is [rows].

    Weight decay (L2) acts on rows with a gradient only, as in the fused optimiser: a row that no batch looks up stays.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = torch.zeros(parameter.shape[0], device=parameter.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tables that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter]["sum"], group)

    @staticmethod
    def _update(parameter: nn.Parameter, gradient: Tensor, total: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            touched = gradient.ne(0).any(dim=1, keepdim=True)  # [rows, 1]
            gradient = gradient + group["weight_decay"] * parameter * touched
        total += gradient.square().mean(dim=1)  # [rows]
        parameter.addcdiv_(gradient, (total.sqrt() + group["eps"])[:, None], value=-group["lr"])
