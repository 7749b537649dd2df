"""From gradients to answers: which labels are wrong, and which training samples made a prediction.

    import resnet_func as rf
    scores = rf.attribution.score_dataset(model, rf.losses.cross_entropy)([(params, state)], batches)
    scores.values["el2n"]    # [N]

All of it goes through `per_sample.over_dataset`: a pass over the data costs about one of training.
"""

from resnet_func.attribution.evaluation import Lds, found_curve, found_share, lds
from resnet_func.attribution.fisher import DiagonalFisher, diagonal_fisher
from resnet_func.attribution.scores import SUSPICIOUS, Scores, ranks, score_dataset, suspicion_order

__all__ = [
    "SUSPICIOUS",
    "DiagonalFisher",
    "Lds",
    "Scores",
    "diagonal_fisher",
    "found_curve",
    "found_share",
    "lds",
    "ranks",
    "score_dataset",
    "suspicion_order",
]
