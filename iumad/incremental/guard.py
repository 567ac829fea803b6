"""The leak guard: a step sees its own classes' training images and nothing else.

Training code gets its images from :meth:`LeakGuard.open` only. What that returns refuses every sample that is
not a normal training image of the step's classes, and refuses everything once the step is over (no replay).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from iumad.data.catalogue import Catalogue, Sample
from iumad.incremental.protocol import Protocol


class LeakError(ValueError):
    """Training asked for, or a data set offers for training, an image that a step must not see."""


class LeakGuard:
    """Decides what each step of ``protocol`` may train on and calibrate with.

    Args:
        catalogue: the data set.
        protocol: the classes of every step.
        include_validation: train on the normal validation images too (paper.md 1.3); calibration images are
        then held out
            of both.
        holdout: share of a class's training images kept for calibration where no validation split is left for
        it;
            0 = none.
        digest: content hash of a sample.

    Raises:
        LeakError: if a training image is also a test image, by path or by content.
        ValueError: if a class of the protocol has no normal training image.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        protocol: Protocol,
        *,
        include_validation: bool,
        holdout: float,
        digest: Callable[[Sample], str],
    ):
        self.protocol = protocol
        self._training: dict[str, list[Sample]] = {}
        self._calibration: dict[str, list[Sample]] = {}
        for name in protocol.classes:
            samples = catalogue.training(name, include_validation=include_validation)
            if not samples:
                raise ValueError(f"class {name} of {catalogue.name} has no normal training image")
            validation = (
                [] if include_validation else catalogue.select(cls=name, split="validation", good=True)
            )
            kept = _held_out(samples, 0 if validation else holdout, digest)
            self._training[name] = [sample for sample in samples if sample not in kept]
            self._calibration[name] = validation or kept
        self._refuse_shared_images(catalogue, digest)

    def calibration(self, name: str) -> list[Sample]:
        """Normal images of a class that no step trains on; thresholds come from these."""
        return list(self._calibration[name])

    def training(self, step: int) -> list[Sample]:
        """The training images of a step, class by class."""
        return [sample for name in self.protocol.steps[step] for sample in self._training[name]]

    def open(self, step: int) -> "StepAccess":
        """Grant access to the training images of ``step``, until ``close`` is called on the result."""
        return StepAccess(step, self.training(step))

    def _refuse_shared_images(self, catalogue: Catalogue, digest: Callable[[Sample], str]) -> None:
        """Stop lists that train on test images, as the released Eyecandies lists do (paper.md 1.4)."""
        tests = catalogue.select(split="test")
        by_path = {path: sample for sample in tests for path in _images(sample)}
        by_content = {digest(sample): sample for sample in tests}
        for samples in (*self._training.values(), *self._calibration.values()):
            for sample in samples:
                shared = [by_path[path] for path in _images(sample) if path in by_path]
                twin = shared[0] if shared else by_content.get(digest(sample))
                if twin is not None:
                    how = "is the same file as" if shared else "has the same content as"
                    raise LeakError(
                        f"training image {sample.paths[0]} {how} test image {twin.paths[0]}; "
                        "`iumad data check` lists all such pairs"
                    )


class StepAccess:
    """The right to read the training images of one step; see :class:`LeakGuard`."""

    def __init__(self, step: int, samples: Sequence[Sample]):
        self.step = step
        self.samples = tuple(samples)
        self._allowed = set(self.samples)
        self._closed = False

    def check(self, samples: Sequence[Sample]) -> None:
        """Raise LeakError unless every one of ``samples`` may be read now."""
        if self._closed:
            raise LeakError(f"step {self.step} is over: its training images are not available any more")
        for sample in samples:
            if sample not in self._allowed:
                what = f"{sample.split} image {sample.id} of class {sample.cls}"
                raise LeakError(f"step {self.step} must not see the {what}")

    def close(self) -> None:
        """End the step."""
        self._closed = True


def _images(sample: Sample) -> list[Path]:
    return [path.resolve() for path in (sample.rgb, sample.depth) if path is not None]


def _held_out(samples: list[Sample], share: float, digest: Callable[[Sample], str]) -> list[Sample]:
    """A share of the samples, at least three where that leaves three quarters; chosen by content hash.

    The choice depends on neither the order of files nor the seed of a run, so that runs calibrate on the same
    images.
    """
    if share == 0:
        return []
    count = min(max(int(np.ceil(share * len(samples))), 3), len(samples) // 4)
    return sorted(samples, key=digest)[:count]
