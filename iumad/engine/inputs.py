"""From files to what the model takes: prepared images and backbone features, one image at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from iumad.config import Config
from iumad.data.catalogue import Catalogue, Sample
from iumad.data.preparing import prepare
from iumad.data.reading import RawSample, read_mask, read_sample

# Part of every cache key: raise it when the prepared images or the features of an image change.
VERSION = 1


class InputPipeline:
    """Read, prepare, quantise, and run the frozen backbone.

    Prepared images are rounded to float16 (finer than the 8 bits they come from) before anything else sees
    them, so that cached and fresh inputs are the same bits. The backbone takes one image per call for the
    same reason: features then do not depend on what else is computed.
    """

    def __init__(self, config: Config, backbone: nn.Module, *, device: torch.device | None = None):
        self.modalities = config.model.modalities
        self.size = config.data.image_size
        self.grid = config.grid
        self.depth_mode = config.data.depth_mode
        self.channels: int = backbone.channels  # type: ignore[assignment]
        self.device = device or torch.device("cpu")
        self.identity = f"{VERSION} {self.modalities} {self.size} {self.depth_mode} {backbone.identity}"
        self._backbone = backbone.to(self.device).eval()

    def image_channels(self, name: str) -> int:
        """Channels that are stored: a depth map replicated three times is stored once."""
        return 1 if name == "depth" and self.depth_mode == "z" else 3

    def record_fields(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Names, numpy types and shapes of what is stored of one image."""
        fields: list[tuple[str, str, tuple[int, ...]]] = []
        for name in self.modalities:
            fields.append((name, "<f2", (self.image_channels(name), self.size, self.size)))
            fields.append((f"{name}_features", "<f4", (self.channels, self.grid, self.grid)))
        return fields

    def read(self, sample: Sample) -> RawSample:
        """Decode the files of a sample."""
        return read_sample(sample)

    def image(self, raw: RawSample) -> dict[str, Tensor]:
        """Prepared images by modality, float16 (C, S, S) with C = :meth:`image_channels`."""
        prepared = prepare(raw, self.size, depth_mode=self.depth_mode)
        images: dict[str, Tensor] = {}
        for name in self.modalities:
            image = getattr(prepared, name)
            if image is not None:
                images[name] = image[: self.image_channels(name)].half()
        return images

    def mask(self, sample: Sample) -> NDArray[np.bool_] | None:
        """Ground truth (S, S), True on defects; None for an unlabelled sample."""
        if sample.mask is None:
            return np.zeros((self.size, self.size), dtype=bool) if sample.is_good else None
        raw = RawSample(rgb=None, depth=None, valid=None, xyz=None, mask=read_mask(sample.mask))
        mask = prepare(raw, self.size, depth_mode=self.depth_mode).mask
        assert mask is not None
        return mask.numpy()

    def images(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Prepared images of several samples, float16 (B, C, S, S), of the modalities that all of them have."""
        singles = [self.image(self.read(sample)) for sample in samples]
        present = [name for name in self.modalities if all(name in single for single in singles)]
        return {name: torch.stack([single[name] for single in singles]) for name in present}

    @torch.no_grad()
    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Aligned features float32 (B, C, g, g) of float16 images, by modality."""
        return {name: torch.cat([self._one(image) for image in batch]) for name, batch in images.items()}

    def _one(self, image: Tensor) -> Tensor:
        return self._backbone(self.widen(image)[None].to(self.device)).float().cpu()

    @staticmethod
    def widen(image: Tensor) -> Tensor:
        """Stored image (..., C, S, S) float16 to network input (..., 3, S, S) float32."""
        shape = (*image.shape[:-3], 3, *image.shape[-2:])
        return image.float().expand(shape).contiguous()


def check_modalities(catalogue: Catalogue, config: Config) -> None:
    """Raise ValueError unless the data set has what the model needs."""
    for name, present in (("rgb", catalogue.has_rgb), ("depth", catalogue.has_depth)):
        if name in config.model.modalities and not present:
            other = "depth" if name == "rgb" else "rgb"
            missing = f"data set {catalogue.name} has no {name} for some images"
            raise ValueError(f"{missing}; model.modality = {other!r} would do without")
