"""A release for serving: `python jobs/release.py retriever=runs/A early_ranker=runs/B final_ranker=runs/C output=releases/v1`."""

from __future__ import annotations

from pathlib import Path

from raysys.bundle import Bundle
from raysys.config import Config, instantiate, run_job
from raysys.data.catalogue import catalogue_of
from raysys.models.retrieval.base import RetrievalModel
from raysys.models.retrieval.hsnn import HSNN
from raysys.models.retrieval.indexes.hierarchical import Hierarchical
from raysys.models.retrieval.indexes.index import Index
from raysys.schema import FeatureSchema
from raysys.serve.bandit.build import build_graph
from raysys.serve.bandit.graph import Graph
from raysys.serve.release import STAGES, build_release
from raysys.serve.stages import user_vectors
from raysys.serve.store import ArrowStore
from raysys.serve.users import user_rows
from raysys.train.export import export_run, open_run


def main(config: Config) -> None:
    """Export the bundles that are not there yet, build the index, write the release, and the user store where it is named."""
    bundles = {}
    for stage in STAGES:
        folder = Path(config[stage])
        is_exported = (folder / "bundle" / "manifest.json").exists()
        bundles[stage] = folder / "bundle" if is_exported else export_run(folder)
    data = config["data"] or open_run(Path(config["retriever"]))[0].config["data"]["folder"]
    output = Path(config["output"])

    def make_index(model: RetrievalModel) -> Index | Hierarchical:
        if isinstance(model, HSNN):
            return Hierarchical(model, beams=config["beams"])
        index: Index = instantiate(config["index"], dim=model.width)
        return index

    if config["users"] is not None or config["graph"] is not None:
        schemas = [FeatureSchema.load(bundles[stage] / "schema.yaml") for stage in STAGES]
        users, key = user_rows(data, schemas, catalogue_of(schemas[0]).key)

    def make_graph(bundle: Bundle, index: Index) -> Graph:
        return build_graph(user_vectors(bundle, users), index, **config["graph"])

    version = config["version"] or output.name
    make = make_graph if config["graph"] is not None else None
    release = build_release(output, version, bundles, data, make_index, config["task"], make)
    print(f"release {release.version}: {release.folder}, {len(release.items()):,} items ordered by {release.task}")
    if config["users"] is not None:
        ArrowStore.create(config["users"], users, key)
        print(f"user store: {config['users']}, {len(users):,} users by {key}")


if __name__ == "__main__":
    run_job(main, "release", __doc__)
