"""Protocols: names, orders, and the mistakes a user can make."""

import pytest

from iumad.incremental.protocol import order_classes, parse_protocol

TEN = [f"c{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("10-0", [10]),
        ("joint", [10]),
        ("9-1", [9, 1]),
        ("6-4", [6, 4]),
        ("6-1", [6, 1, 1, 1, 1]),
        ("1-1", [1] * 10),
        ("finetune", [1] * 10),
        ("finetune:6-2", [6, 2, 2]),
    ],
)
def test_step_sizes(spec, sizes):
    protocol = parse_protocol(spec, TEN)
    assert [len(step) for step in protocol.steps] == sizes
    assert protocol.classes == tuple(TEN)
    assert (protocol.update == "plain") == spec.startswith("finetune")


def test_seen_grows():
    protocol = parse_protocol("2-1", ["a", "b", "c"])
    assert [protocol.seen(t) for t in range(2)] == [("a", "b"), ("a", "b", "c")]
    assert protocol.describe() == "{a, b} -> {c}"


def test_orders():
    assert order_classes(TEN, "c3,c1,c2") == ("c3", "c1", "c2")
    first, again, other = (order_classes(TEN, f"random:{s}") for s in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == TEN


@pytest.mark.parametrize(
    "spec", ["", "6", "6-", "6-3", "11-0", "0-1", "10-1", "joined", "finetune:6-3", "-1-1"]
)
def test_impossible_protocols_are_refused(spec):
    with pytest.raises(ValueError, match=r"protocol"):
        parse_protocol(spec, TEN)


@pytest.mark.parametrize("order", ["random", "random:x", "c0,c0", "c0,zebra"])
def test_impossible_orders_are_refused(order):
    with pytest.raises(ValueError, match="order"):
        order_classes(TEN, order)
