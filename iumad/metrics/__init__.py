"""Metrics of anomaly detection: exact, rank-based, mergeable; and forgetting over incremental steps."""

from iumad.metrics.forgetting import ResultMatrix
from iumad.metrics.image import IMAGE_SCORES, image_auroc, image_score
from iumad.metrics.pixel import PixelMetrics, aupro, aupro_100
from iumad.metrics.ranking import auroc, average_precision, f1_max

__all__ = [
    "IMAGE_SCORES",
    "PixelMetrics",
    "ResultMatrix",
    "aupro",
    "aupro_100",
    "auroc",
    "average_precision",
    "f1_max",
    "image_auroc",
    "image_score",
]
