"""Click logs that are made, not collected: every row's true probability, and so the best possible NE, is known."""

from raysys.data.synthetic.bayes import bayes_metrics
from raysys.data.synthetic.criteo_shaped import prepare_criteo_shaped
from raysys.data.synthetic.log import prepare
from raysys.data.synthetic.planted import planted_interactions, true_probabilities
from raysys.data.synthetic.spec import SyntheticSpec

__all__ = [
    "SyntheticSpec",
    "bayes_metrics",
    "planted_interactions",
    "prepare",
    "prepare_criteo_shaped",
    "true_probabilities",
]
