"""`open_dataset`: one string names any data set this program can read."""

from __future__ import annotations

from pathlib import Path

from iumad.data.catalogue import Catalogue, DataError
from iumad.data.layouts import Listing, read_folder, read_manifest, read_mvtec3d

_READERS = {"folder": read_folder, "mvtec3d": read_mvtec3d, "manifest": read_manifest}
_EXPECTED = "folder:PATH, mvtec3d:PATH, eyecandies:PATH, manifest:FILE.csv, demo or demo:seed=0,..."


def open_dataset(spec: str, *, cache_dir: Path | None = None) -> Catalogue:
    """Open the data set named by ``spec``.

    ``folder:PATH`` (``CLASS/{train,validation,test}/KIND/{rgb,depth,xyz,gt}``), ``mvtec3d:PATH``,
    ``eyecandies:PATH`` (native files or the M3DM conversion), ``manifest:FILE.csv``, ``demo`` or
    ``demo:seed=3,train=24,...`` (rendered once into ``cache_dir``, by default the user's cache folder).

    Errors: ValueError for a malformed spec; DataError naming what is missing or inconsistent.
    """
    listing = list_dataset(spec, cache_dir=cache_dir)
    if listing.problems:
        shown = "\n  ".join(listing.problems[:5])
        more = f"\n  and {len(listing.problems) - 5} more" if len(listing.problems) > 5 else ""
        raise DataError(
            f"{spec}: {len(listing.problems)} problem(s); `iumad data check` lists all\n  {shown}{more}"
        )
    return listing.catalogue


def list_dataset(spec: str, *, cache_dir: Path | None = None) -> Listing:
    """Like `open_dataset`, but hands back the problems of the tree instead of raising on them."""
    layout, _, rest = spec.partition(":")
    if layout not in _READERS:
        raise ValueError(f"data spec is {spec!r}, expected {_EXPECTED}")
    if not rest:
        raise ValueError(f"data spec is {spec!r}, expected a path after {layout}:")
    return _READERS[layout](Path(rest).expanduser())
