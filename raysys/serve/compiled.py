"""The part of a ranker that follows the look-up, compiled ahead of time by AOTInductor where it is deployed.

A compiled artefact is native code, and hashes say nothing about who wrote it. So bundles hold none: the process that serves builds it
from the verified weights, in folders of its own that are deleted, and takes nothing from a compiler cache (ours).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_cache

from raysys.bundle import Bundle
from raysys.data.batch import Batch
from raysys.errors import UserError, first_line
from raysys.models.flops import full_batch
from raysys.models.outputs import Embedded, Output
from raysys.schema import FeatureSchema

Outputs = tuple[Tensor, Tensor, Tensor]
_NO_SHARED_HEADERS = {"cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False}
"""Precompiled headers are kept in a folder of a known name in /tmp, and making them takes longer than all the rest."""
_ROWS = 32  # of the batch that is traced; the code takes any number


class DensePart(nn.Module):
    """`interact` and `predict` of a ranking model as a function of tensors.

    names: of the tokens. sequences: the names of those of `Embedded`, each with its events and its mask among the inputs.
    """

    def __init__(self, model: Any, names: tuple[str, ...], sequences: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model, self.names, self.sequences = model, names, sequences

    def forward(self, tokens: Tensor, dense: Tensor, *events: Tensor) -> Outputs:
        """Tokens [B, F, D], dense columns [B, Dd], and [B, L, D] and [B, L] of each sequence → logits, shared, hidden."""
        pairs = zip(events[::2], events[1::2], strict=True)
        sequences = dict(zip(self.sequences, pairs, strict=True))
        output = self.model.predict(self.model.interact(Embedded(tokens, self.names, sequences, dense)))
        return output.logits, output.shared, output.hidden


@torch.no_grad()
def compile_part(part: DensePart, inputs: Sequence[Tensor]) -> Callable[..., Outputs]:
    """The part as native code for any number of rows, on as many threads as torch has now.

    inputs: of at least two rows, to trace it with. A `UserError` where torch cannot export it or finds no C++ compiler.
    """
    name = type(part.model).__name__
    rows = {0: torch.export.Dim.DYNAMIC}
    shapes: list[Any] = [rows, rows]
    if len(inputs) > 2:
        shapes.append((rows,) * (len(inputs) - 2))
    patch = torch._inductor.config.patch(_NO_SHARED_HEADERS)
    with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder), patch:
        try:
            exported = torch.export.export(part.eval(), tuple(inputs), dynamic_shapes=shapes)
            path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/dense.pt2")
        except torch._dynamo.exc.UserError as error:
            raise UserError(f"{name} cannot be compiled: {first_line(error)}", "serve it as it is") from error
        except InvalidCxxCompiler as error:
            raise UserError(
                f"{name} cannot be compiled: no C++ compiler", "install g++, or serve it as it is"
            ) from error
        return torch._inductor.aoti_load_package(path)


class CompiledRanker(nn.Module):
    """A ranking model of which `interact` and `predict` are one compiled call; `Output.extra` is left out."""

    def __init__(self, model: Any, schema: FeatureSchema) -> None:
        super().__init__()
        self.embed: Callable[[Batch], Embedded] = model.embed
        embedded = self.embed(full_batch(schema, _ROWS))
        if embedded.members:
            raise UserError(
                f"{type(model).__name__} cannot be compiled: its members look up tokens of their own",
                "serve it as it is",
            )
        part = DensePart(model, embedded.names, tuple(embedded.sequences))
        self._compiled = compile_part(part, _tensors(embedded))

    def forward(self, batch: Batch) -> Output:
        """What the model gives for a batch of any size."""
        embedded = self.embed(batch)
        logits, shared, hidden = self._compiled(*_tensors(embedded))
        return Output(logits, shared, hidden, embedded)


def compile_bundle(bundle: Bundle) -> Bundle:
    """A bundle that predicts with a `CompiledRanker`."""
    return dataclasses.replace(bundle, model=CompiledRanker(bundle.model, bundle.schema))


def _tensors(embedded: Embedded) -> list[Tensor]:
    return [embedded.tokens, embedded.dense, *(tensor for pair in embedded.sequences.values() for tensor in pair)]
