"""Checkpoints: tensors and JSON in one safetensors file; nothing is ever unpickled.

A checkpoint is any nesting of dicts, lists, tensors, numbers, strings, booleans and None. The tensors go into
the safetensors body, the rest into its metadata. Two kinds are written, told apart by ``kind``: ``model``
(weights and all that prediction needs) and ``state`` (what a killed run needs to go on).
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from iumad.engine.files import write_bytes

FORMAT = 1


def save(path: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Write ``content`` as a checkpoint of the given ``kind``, atomically.

    Raises:
        OSError: naming ``path``; whatever was there before is still there.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(content, "", tensors)
    header = {"iumad": json.dumps({"format": FORMAT, "kind": kind, "tree": tree})}
    write_bytes(path, safetensors.torch.save(tensors, metadata=header))


def load(path: str | Path, kind: str) -> dict[str, Any]:
    """Read what :func:`save` wrote; tensors are on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming ``path``, if it is not a whole checkpoint of this kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such checkpoint", str(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("iumad", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of this program")
    if header["format"] != FORMAT or header["kind"] != kind:
        found = f"{header['kind']!r} of format {header['format']}"
        raise ValueError(f"{path} is a checkpoint of kind {found}; {kind!r} of format {FORMAT} is needed")
    return _unpack(header["tree"], tensors)


def load_weights(path: str | Path, module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Load ``weights`` read from ``path`` into ``module``.

    Raises:
        ValueError: naming ``path`` and the first difference, if they belong to another configuration.
    """
    own = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else "missing"
        wanted = tuple(own[name].shape) if name in own else "not part of this model"
        if found != wanted:
            raise ValueError(
                f"{path} is a checkpoint of another configuration: {name} is {found}, expected {wanted}"
            )
    module.load_state_dict(weights)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Tensors become references, dicts lists of pairs (JSON keys are strings, optimisers use numbers)."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a checkpoint cannot hold {name.lstrip('/')}: a {type(value).__name__}")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "dict" in node:
        return {key: _unpack(item, tensors) for key, item in node["dict"]}
    return [_unpack(item, tensors) for item in node["list"]]
