"""Data sets of RGB and depth images: catalogues, decoding, preprocessing, a demo set, checks.

``open_dataset(spec)`` gives a `Catalogue` of `Sample`; ``read_sample`` decodes one; ``prepare`` makes
tensors of it.
"""

from iumad.data.catalogue import GOOD, SPLITS, UNLABELLED, Catalogue, DataError, Sample
from iumad.data.opening import open_dataset
from iumad.data.preparing import DEPTH_MODES, Prepared, prepare
from iumad.data.reading import RawSample, read_sample

__all__ = [
    "DEPTH_MODES",
    "GOOD",
    "SPLITS",
    "UNLABELLED",
    "Catalogue",
    "DataError",
    "Prepared",
    "RawSample",
    "Sample",
    "open_dataset",
    "prepare",
    "read_sample",
]
