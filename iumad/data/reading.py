"""From files to arrays: decode the images of a sample without losing range, sign or validity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from iumad.data.catalogue import GOOD, UNLABELLED, DataError, Sample

_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """Decoded images of one sample, all of one size H x W.

    ``rgb`` uint8 (H, W, 3); ``depth`` float32 (H, W), in the unit of the file, 0 where not ``valid``;
    ``valid`` bool (H, W); ``xyz`` float32 (H, W, 3) if the depth file holds coordinates; ``mask`` bool (H,
    W), True on defects, None for an unlabelled sample.
    """

    rgb: NDArray[np.uint8] | None
    depth: NDArray[np.float32] | None
    valid: NDArray[np.bool_] | None
    xyz: NDArray[np.float32] | None
    mask: NDArray[np.bool_] | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        image = self.rgb if self.rgb is not None else self.depth
        assert image is not None
        return image.shape[0], image.shape[1]


def read_sample(sample: Sample) -> RawSample:
    """Decode the files of a sample.

    Errors: DataError, naming the file, if one is missing, truncated or of an unexpected type, if the images
    differ in size, or if a defective sample has no mask.
    """
    rgb = None if sample.rgb is None else read_rgb(sample.rgb)
    depth = valid = xyz = None
    if sample.depth is not None:
        depth, valid, xyz = read_depth(sample.depth, sample.depth_range)
    reference, size = next(
        (path, image.shape[:2])
        for path, image in ((sample.rgb, rgb), (sample.depth, depth))
        if image is not None
    )
    if depth is not None and depth.shape != size:
        raise DataError(f"{sample.depth} is {_size(depth.shape)}, but {reference} is {_size(size)}")
    if sample.mask is not None:
        mask = read_mask(sample.mask)
        if mask.shape != size:
            raise DataError(f"{sample.mask} is {_size(mask.shape)}, but {reference} is {_size(size)}")
    elif sample.kind == GOOD:
        mask = np.zeros(size, dtype=bool)
    elif sample.kind == UNLABELLED:
        mask = None
    else:
        raise DataError(f"sample {sample.id!r} is of kind {sample.kind!r} but has no mask file")
    return RawSample(rgb=rgb, depth=depth, valid=valid, xyz=xyz, mask=mask)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """An 8-bit image as uint8 (H, W, 3); grey is replicated, transparency dropped."""
    with _open_image(path) as image:
        if image.mode not in _EIGHT_BIT_MODES:
            raise DataError(f"{path}: pixel type is {image.mode}, expected an 8-bit colour or grey image")
        return np.array(_decode(image, path).convert("RGB"))


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A defect mask as bool (H, W): every value above 0 is a defect, whether 1, 255 or a class id."""
    with _open_image(path) as image:
        if image.mode in ("RGBA", "LA", "PA"):
            raise DataError(f"{path}: the mask has a transparency channel, expected one grey channel")
        pixels = np.asarray(_decode(image, path))
    defect: NDArray[np.bool_] = pixels > 0
    return defect if defect.ndim == 2 else np.any(defect, axis=2)


def read_depth(
    path: Path, depth_range: tuple[float, float] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32] | None]:
    """A depth file as (depth float32 (H, W), valid bool (H, W), xyz float32 (H, W, 3) or None).

    Not valid: NaN, infinite, and exactly 0 (for xyz: all three 0). Negative values are measurements:
    coordinates have signs. With ``depth_range`` every pixel is valid and ``depth = min + value / 65535 *
    (max - min)``.
    """
    values = _read_numbers(path)
    if depth_range is not None:
        if values.dtype != np.uint16 or values.ndim != 2:
            raise DataError(f"{path}: {values.dtype} {values.shape}, expected a 16-bit grey PNG")
        low, high = depth_range
        depth = (low + values.astype(np.float64) / 65535 * (high - low)).astype(np.float32)
        return depth, np.ones(depth.shape, dtype=bool), None
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        raise DataError(f"{path}: shape is {values.shape}, expected (H, W) depth or (H, W, 3) coordinates")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is not a measurement
        numbers = values.astype(np.float32)
    finite = np.isfinite(numbers)
    if numbers.ndim == 2:
        valid = finite & (numbers != 0)
        return np.where(valid, numbers, np.float32(0)), valid, None
    valid = finite.all(axis=2) & (numbers != 0).any(axis=2)
    xyz = np.where(valid[..., None], numbers, np.float32(0))
    return np.ascontiguousarray(xyz[..., 2]), valid, xyz


def _read_numbers(path: Path) -> NDArray[np.generic]:
    if path.suffix.lower() in (".tif", ".tiff"):
        import tifffile

        try:
            values = np.asarray(tifffile.imread(path))
        except Exception as error:  # tifffile raises many types on damaged files
            raise DataError(f"cannot read {path}: {type(error).__name__}: {error}") from error
        values = np.squeeze(values)
    else:
        with _open_image(path) as image:
            if not (image.mode in ("L", "I", "F") or image.mode.startswith("I;16")):
                raise DataError(f"{path}: pixel type is {image.mode}, expected a grey depth image of 16 bits")
            values = np.array(_decode(image, path))
    if values.dtype.kind not in "fiu":
        raise DataError(f"{path}: values are {values.dtype}, expected numbers")
    return values


def _open_image(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise DataError(f"cannot read {path}: not an image of a known format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _decode(image: Image.Image, path: Path) -> Image.Image:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return image


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} (width x height)"
