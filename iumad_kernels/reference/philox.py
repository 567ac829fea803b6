"""Random numbers by position: Philox4x32-10 (Salmon et al., SC 2011) in integer arithmetic.

A seed (64 bits) names a stream of 32-bit words. Word ``i`` is output ``(i // 16) % 4`` of Philox with the counter
``16 * (i // 64) + i % 16`` (64 bits in the first two counter words, the others 0) and the seed as key. The kernels draw the
same words: csrc/core/philox.h explains the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def signed64(seed: int) -> int:
    """The low 64 bits of the seed as the int64 that has the same bits."""
    return (seed + 2**63) % 2**64 - 2**63


def philox(seed: Tensor | int, counter: Tensor) -> Tensor:
    """The four 32-bit outputs for each 64-bit counter: int64 of shape (4, *counter.shape), values in [0, 2^32).

    >>> [hex(word) for word in philox(0, torch.tensor(0)).tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    if isinstance(seed, int):
        seed = signed64(seed)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=counter.device)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(10):
        # The products wrap modulo 2^64 as unsigned ones do; masks undo the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _LOW) ^ c1 ^ key0, product1 & _LOW
        c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ key1, product0 & _LOW
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return torch.stack((c0, c1, c2, c3))


def random_words(seed: Tensor | int, index: Tensor) -> Tensor:
    """Word ``index`` (int64, any shape) of the stream ``seed``: int64 in [0, 2^32)."""
    words = philox(seed, 16 * (index // 64) + index % 16)
    return words.gather(0, ((index // 16) % 4).unsqueeze(0)).squeeze(0)


def dropout_keep(
    seed: Tensor | int, dropout_p: float, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Which elements of an array of this shape survive dropout (bool).

    Rows (the last dimension) start at multiples of 64 words: element (row, column) draws word
    ``row * roundup(columns, 64) + column``, rows counted in row-major order, and survives if the word is at least
    ``floor(p * 2^32)``.
    """
    *leading, columns = shape
    rows = 1
    for size in leading:
        rows *= size
    first = torch.arange(rows, device=device) * (-(-columns // 64) * 64)
    words = random_words(seed, first[:, None] + torch.arange(columns, device=device))
    return (words >= int(dropout_p * 2**32)).view(shape)


def normals(seed: Tensor | int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers (float64) for an array of this shape: the Box-Muller transform of the stream's words.

    Rows (the last dimension) start at multiples of 64 as in :func:`dropout_keep`; csrc/core/normal.h has the formula, which reads
    the words in pairs 16 apart.
    """
    *leading, columns = shape
    blocks = -(-columns // 64)
    rows = torch.Size(leading).numel()
    words = random_words(seed, torch.arange(rows * blocks * 64, device=device)).view(-1, 2, 2, 16)
    x, y = ((words >> 9).double() / 2**23).unbind(2)
    radius, angle = (-2 * (x + 2**-24).log()).sqrt(), 2 * torch.pi * y
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=2)
    return pairs.view(rows, blocks * 64)[:, :columns].reshape(shape)
