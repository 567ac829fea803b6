"""`open_dataset`: one string names any data set this program can read."""

from __future__ import annotations

from pathlib import Path

from iumad.data.catalogue import Catalogue, DataError
from iumad.data.eyecandies import is_native, read_eyecandies
from iumad.data.layouts import FOLDER_LAYOUT, Listing, read_folder, read_manifest, read_mvtec3d

_READERS = {
    "folder": read_folder,
    "mvtec3d": read_mvtec3d,
    "eyecandies": read_eyecandies,
    "manifest": read_manifest,
}
_EXPECTED = "folder:PATH, mvtec3d:PATH, eyecandies:PATH, manifest:FILE.csv, demo or demo:seed=0,..."
_SHOWN_PROBLEMS = 5


def open_dataset(spec: str, *, cache_dir: Path | None = None) -> Catalogue:
    """Open the data set named by ``spec``.

    ``folder:PATH`` (``CLASS/{train,validation,test}/KIND/{rgb,depth,xyz,gt}``), ``mvtec3d:PATH``,
    ``eyecandies:PATH`` (native files or the M3DM conversion), ``manifest:FILE.csv``, ``demo`` or
    ``demo:seed=3,train=24,...`` (fields of `iumad.data.demo.DemoConfig`; rendered once into ``cache_dir``, by
    default the user's cache folder).

    Errors: ValueError for a malformed spec; DataError naming what is missing or inconsistent.
    """
    listing = list_dataset(spec, cache_dir=cache_dir)
    problems = listing.problems
    if problems:
        lines = list(problems[:_SHOWN_PROBLEMS])
        if len(problems) > _SHOWN_PROBLEMS:
            lines.append(f"and {len(problems) - _SHOWN_PROBLEMS} more")
        summary = f"{spec}: {len(problems)} problem(s); `iumad data check {spec}` lists all"
        raise DataError("\n  ".join([summary, *lines]))
    return listing.catalogue


def list_dataset(spec: str, *, cache_dir: Path | None = None) -> Listing:
    """Like `open_dataset`, but hands back the problems of the tree instead of raising on them."""
    layout, _, rest = spec.partition(":")
    if layout == "demo":
        from iumad.data.demo import DemoConfig, cached_demo

        return read_folder(cached_demo(DemoConfig.parse(rest), cache_dir), "demo")
    if layout not in _READERS:
        raise ValueError(f"data spec is {spec!r}, expected {_EXPECTED}")
    if not rest:
        raise ValueError(f"data spec is {spec!r}, expected a path after {layout}:")
    return _READERS[layout](Path(rest).expanduser())


def detect_spec(path_or_spec: str) -> str:
    """The spec of a bare path, from what lies there; a spec is returned as it is."""
    path = Path(path_or_spec).expanduser()
    if path_or_spec.partition(":")[0] in (*_READERS, "demo") and not path.exists():
        return path_or_spec
    if path.is_file():
        return f"manifest:{path}"
    if not path.is_dir():
        raise DataError(
            f"{path} does not exist; looked for a folder {FOLDER_LAYOUT}, a CSV manifest, or a data spec"
        )
    return f"eyecandies:{path}" if is_native(path) else f"folder:{path}"
