"""Which classes are learned in which step (paper.md 1.2)."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The classes of every step, in the order in which they are learned.

    ``update`` is the update rule this protocol insists on (``finetune`` is the lower bound and needs
    ``plain``), or None for the rule of the configuration.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    update: Literal["plain"] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes in learning order."""
        return tuple(name for step in self.steps for name in step)

    def seen(self, step: int) -> tuple[str, ...]:
        """The classes learned up to and including ``step``."""
        return tuple(name for names in self.steps[: step + 1] for name in names)

    def describe(self) -> str:
        """One line: the steps and their classes."""
        return " -> ".join("{" + ", ".join(names) + "}" for names in self.steps)


def parse_protocol(spec: str, classes: Sequence[str]) -> Protocol:
    """Build the protocol named ``spec`` over ``classes``, given in learning order.

    Args:
        spec: ``X-Y`` (X base classes, then steps of Y classes until none is left; ``10-0`` is one step),
            ``joint`` (all classes in one step: the upper bound), ``finetune:X-Y`` (the same steps with the
            ``plain`` update rule and nothing against forgetting: the lower bound) or ``finetune``
            (= ``finetune:1-1``).
        classes: names, each once.

    Raises:
        ValueError: if the spec does not fit the number of classes.

    >>> parse_protocol("2-1", ["a", "b", "c"]).steps
    (('a', 'b'), ('c',))
    """
    names = tuple(classes)
    total = len(names)
    kind, _, steps = spec.partition(":")
    if kind == "finetune":
        return Protocol(name=spec, steps=parse_protocol(steps or "1-1", names).steps, update="plain")
    if spec == "joint":
        return Protocol(name=spec, steps=(names,))
    match = re.fullmatch(r"(\d+)-(\d+)", spec)
    if match is None:
        raise ValueError(f"protocol must be X-Y (such as 6-1), joint, finetune or finetune:X-Y, not {spec!r}")
    base, increment = int(match[1]), int(match[2])
    rest = total - base
    fits = base >= 1 and (rest == increment == 0 or (rest > 0 and increment > 0 and rest % increment == 0))
    if not fits:
        raise ValueError(
            f"protocol {spec} does not divide the {total} classes ({', '.join(names)}): "
            f"X + N * Y must be {total}, with Y = 0 for a single step"
        )
    chunks = (names[start : start + increment] for start in range(base, total, increment or 1))
    return Protocol(name=spec, steps=(names[:base], *chunks))


def order_classes(classes: Sequence[str], order: str) -> tuple[str, ...]:
    """Return ``classes`` in the order that ``order`` names.

    Args:
        classes: the classes of a data set.
        order: ``random:SEED``, or class names separated by commas (a subset leaves the other classes out).

    Raises:
        ValueError: if the order is malformed or names something unknown.
    """
    if order == "random" or order.startswith("random:"):
        seed = order.partition(":")[2]
        if not seed.isdigit():
            raise ValueError(f"order {order!r} needs a seed: random:SEED with SEED a whole number >= 0")
        shuffled = list(classes)
        random.Random(int(seed)).shuffle(shuffled)
        return tuple(shuffled)
    names = tuple(name.strip() for name in order.split(","))
    unknown = [name for name in names if name not in classes]
    if unknown or len(set(names)) != len(names):
        problem = f"unknown class {unknown[0]!r}" if unknown else "a class is named twice"
        raise ValueError(f"order {order!r}: {problem}; the classes are {', '.join(classes)}")
    return names
