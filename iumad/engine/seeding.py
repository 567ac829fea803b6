"""Random numbers as a function of the position in a run: nothing about them needs to be stored to resume."""

import hashlib
import math

import torch


def derive(seed: int, *position: object) -> int:
    """A 63-bit seed for one place in a run; different places give unrelated seeds.

    >>> derive(0, "order", 1) == derive(0, "order", 1) != derive(0, "order", 2)
    True
    """
    text = repr((seed, *position)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


class BatchPlan:
    """Which images form which batch of a step.

    The images are shuffled anew in every epoch, and the epochs follow each other without a gap, so that every
    batch is full, however few images there are.
    """

    def __init__(self, images: int, epochs: int, batch_size: int, seed: int, step: int):
        self.images, self.batch_size = images, batch_size
        self.iterations = math.ceil(images * epochs / batch_size)
        self._seed, self._step = seed, step
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def epoch(self, iteration: int) -> int:
        """The epoch in which a batch starts."""
        return iteration * self.batch_size // self.images

    def batch(self, iteration: int) -> list[int]:
        """Indices of the images of one batch."""
        start = iteration * self.batch_size
        places = (divmod(place, self.images) for place in range(start, start + self.batch_size))
        return [self._shuffled(epoch, index) for epoch, index in places]

    def _shuffled(self, epoch: int, index: int) -> int:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive(self._seed, "order", self._step, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.images, generator=generator)
        return int(self._order[index])
