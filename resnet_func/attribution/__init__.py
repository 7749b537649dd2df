"""From gradients to answers: which labels are wrong, and which training samples made a prediction.

    import resnet_func as rf
    scores = rf.attribution.score_dataset(model, rf.losses.cross_entropy)([(params, state)], batches)
    scores.values["el2n"]    # [N]

All of it goes through `per_sample.over_dataset`: a pass over the data costs about one of training.
"""

from resnet_func.attribution.evaluation import Lds, Planted, found_curve, found_share, lds, plant_wrong_labels
from resnet_func.attribution.features import Features, Sketch, make_features, sketch_tree
from resnet_func.attribution.fisher import DiagonalFisher, diagonal_fisher, sampled_ekfac
from resnet_func.attribution.in_run import in_run_values
from resnet_func.attribution.influence import Curvature, influence
from resnet_func.attribution.scores import (
    SUSPICIOUS,
    Scores,
    forgetting,
    ranks,
    score_dataset,
    suspicion_order,
)
from resnet_func.attribution.store import Store, StoreError, fingerprint, open_store
from resnet_func.attribution.tracin import cosine_scores, tracin, tracin_scores
from resnet_func.attribution.trak import gram_factor, trak, trak_scores

__all__ = [
    "SUSPICIOUS",
    "Curvature",
    "DiagonalFisher",
    "Features",
    "Lds",
    "Planted",
    "Scores",
    "Sketch",
    "Store",
    "StoreError",
    "cosine_scores",
    "diagonal_fisher",
    "fingerprint",
    "forgetting",
    "found_curve",
    "found_share",
    "gram_factor",
    "in_run_values",
    "influence",
    "lds",
    "make_features",
    "open_store",
    "plant_wrong_labels",
    "ranks",
    "sampled_ekfac",
    "score_dataset",
    "sketch_tree",
    "suspicion_order",
    "tracin",
    "tracin_scores",
    "trak",
    "trak_scores",
]
