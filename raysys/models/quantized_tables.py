"""Embedding tables of 8- or 4-bit rows for serving on a CPU, looked up without ever being expanded.

A row of D weights w has its own scale and bias, w ≈ scale · q + bias: bias = min w and scale = (max w - min w) / (2^bits - 1),
so that no weight is off by more than half a scale (Guan et al. 2019, arXiv 1911.02079). The layouts are fbgemm's:

int8    D bytes of q, then scale and bias in float32: D + 8 bytes a row
int4    D / 2 bytes of q, then scale and bias in float16: D / 2 + 4 bytes a row; the bias itself may be off by 2^-11 of it

TorchRec's own quantised collections (`torchrec.quant`) have scale and bias of int8 rows in float16 as well. That is too coarse
where the weights of a row are close to each other and far from 0, and one look-up takes longer than torch's (docs/checkpoints.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from raysys.errors import UserError, nearest


@dataclass(frozen=True)
class RowFormat:
    """How a row is stored: what makes rows [N, bytes] uint8 of weights [N, D], and what looks them up."""

    bits: int
    constants: int
    """Bytes of scale and bias."""
    width_multiple: int
    """What D must be a multiple of."""
    quantize: Callable[[Tensor], Tensor]
    look_up: Callable[..., Tensor]

    def row_bytes(self, width: int) -> int:
        """The bytes of a row of `width` weights."""
        return width * self.bits // 8 + self.constants


FORMATS = {
    "int8": RowFormat(
        bits=8,
        constants=8,
        width_multiple=1,
        quantize=torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized,
        look_up=torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
    ),
    "int4": RowFormat(
        bits=4,
        constants=4,
        width_multiple=4,
        quantize=lambda weight: torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weight, 4),
        look_up=torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
    ),
}


def quantize_tables(model: nn.Module, kind: str) -> None:
    """Put quantised tables in place of every TorchRec collection of a model; what they return keeps its form.

    kind: a key of `FORMATS`. A model on "meta" gets tables without memory, for `load_state_dict(…, assign=True)`.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown kind of quantised tables {kind!r}", nearest(kind, FORMATS))
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, EmbeddingBagCollection):
            bags, weights = module.embedding_bag_configs(), _weights(module.embedding_bags)
            model.get_submodule(parent).add_module(name, QuantizedBags(bags, weights, FORMATS[kind]))
        elif isinstance(module, EmbeddingCollection):
            configs, weights = module.embedding_configs(), _weights(module.embeddings)
            model.get_submodule(parent).add_module(name, QuantizedIds(configs, weights, FORMATS[kind]))


class StackedTables(nn.Module):
    """Tables of one width, one below the other, so that all their features are looked up by one call.

    weights: [num_embeddings, D] by table. features: the keys to look up, table by table, as in the configs.
    """

    rows: Tensor  # [sum of num_embeddings, bytes] uint8
    first_row: Tensor  # [F], of each feature's table

    def __init__(
        self, configs: Sequence[BaseEmbeddingConfig], weights: Mapping[str, Tensor], row_format: RowFormat
    ) -> None:
        super().__init__()
        self.features = [feature for config in configs for feature in config.feature_names]
        self.width, self.row_format = configs[0].embedding_dim, row_format
        if self.width % row_format.width_multiple:
            raise UserError(
                f"table {configs[0].name!r} has embedding_dim {self.width}, which {row_format.bits}-bit rows cannot have",
                f"quantize to int8, or train with a multiple of {row_format.width_multiple}",
            )
        device = weights[configs[0].name].device
        total = sum(config.num_embeddings for config in configs)
        rows = torch.empty(total, row_format.row_bytes(self.width), dtype=torch.uint8, device=device)
        first_rows, first = [], 0
        for config in configs:
            if device.type != "meta":
                weight = weights[config.name].detach()
                rows[first : first + config.num_embeddings] = row_format.quantize(weight)
            first_rows += [first] * len(config.feature_names)
            first += config.num_embeddings
        self.register_buffer("rows", rows)
        self.register_buffer("first_row", torch.tensor(first_rows), persistent=False)

    def select(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features of these tables, in their order."""
        keys = features.keys()
        return features if keys == self.features else features.permute([keys.index(name) for name in self.features])

    def forward(self, features: KeyedJaggedTensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """[len(offsets) - 1, D]: the sums of what `offsets` puts together of the N ids, weighted by `weights` [N]."""
        counts = features.lengths().view(len(self.features), -1).sum(1)
        ids = features.values() + self.first_row.repeat_interleave(counts, output_size=features.values().numel())
        return self.row_format.look_up(
            self.rows, ids, offsets.to(ids.dtype), per_sample_weights=weights, include_last_offset=True
        )


class QuantizedBags(nn.Module):
    """What stands for an `EmbeddingBagCollection`."""

    def __init__(
        self, configs: Sequence[EmbeddingBagConfig], weights: Mapping[str, Tensor], row_format: RowFormat
    ) -> None:
        super().__init__()
        widths = sorted({config.embedding_dim for config in configs})
        groups = [[config for config in configs if config.embedding_dim == width] for width in widths]
        self.stacks = nn.ModuleList(StackedTables(group, weights, row_format) for group in groups)
        names = dict(zip((config.name for config in configs), get_embedding_names_by_table(configs), strict=True))
        self.names = [name for group in groups for config in group for name in names[config.name]]
        self.widths = [config.embedding_dim for group in groups for config in group for _ in config.feature_names]
        self.means = [
            torch.tensor([config.pooling == PoolingType.MEAN for config in group for _ in config.feature_names])
            for group in groups
        ]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Sums, weighted where the features are, or means: [B, width] of each feature."""
        columns = []
        for stack, mean in zip(self.stacks, self.means, strict=True):
            assert isinstance(stack, StackedTables)
            part = stack.select(features)
            pooled = stack(part, part.offsets(), part.weights_or_none()).view(len(stack.features), -1, stack.width)
            if mean.any():
                lengths = part.lengths().view(len(stack.features), -1).clamp(min=1)  # [F, B]
                pooled = pooled / torch.where(mean[:, None], lengths, 1)[:, :, None]
            columns.append(pooled.transpose(0, 1).flatten(1))  # [B, F * width]
        return KeyedTensor(self.names, self.widths, torch.cat(columns, 1))


class QuantizedIds(nn.Module):
    """What stands for an `EmbeddingCollection`."""

    def __init__(
        self, configs: Sequence[BaseEmbeddingConfig], weights: Mapping[str, Tensor], row_format: RowFormat
    ) -> None:
        super().__init__()
        self.tables = StackedTables(configs, weights, row_format)
        self.names = [name for names in get_embedding_names_by_table(configs) for name in names]

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """One vector for each id, by feature."""
        part = self.tables.select(features)
        vectors = self.tables(part, torch.arange(part.values().numel() + 1))  # [N, width]
        lengths = part.lengths().view(len(self.names), -1)
        counts = lengths.sum(1).tolist()
        parts = zip(self.names, vectors.split(counts), lengths.unbind(), strict=True)
        return {name: JaggedTensor(values, lengths=length) for name, values, length in parts}


def _weights(tables: nn.ModuleDict) -> dict[str, Tensor]:
    return {name: table.get_parameter("weight") for name, table in tables.items()}
