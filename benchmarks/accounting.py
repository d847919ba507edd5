"""Floating-point operations and bytes of a language model, counted from its sizes: what a measurement should be near.

Attention counts what causality leaves, half of the square. Norms, activations and rotary positions are left out.
"""

from __future__ import annotations

from typing import NamedTuple

BYTES = 2  # of a bfloat16


class Language(NamedTuple):
    """Sizes of a decoder: L layers of grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Entries of the matrices that every token is multiplied by, the output head left out."""
        attention = 2 * self.hidden * self.heads * self.head + 2 * self.hidden * self.kv_heads * self.head
        return self.layers * (attention + 3 * self.hidden * self.inner)

    def prefill_flops(self, batch: int, length: int) -> int:
        """One forward of `length` tokens, logits of the last one alone."""
        attention = self.layers * 2 * self.heads * self.head * length * (length + 1)
        return batch * (2 * self.weights * length + attention + 2 * self.hidden * self.vocabulary)

    def prefill_bytes(self, batch: int, length: int) -> int:
        """Weights once, the cache written once; activations are left to the caches of the device."""
        return BYTES * (self.weights + self.hidden * self.vocabulary) + self.cache_bytes(batch, length)

    def decode_flops(self, batch: int, length: int) -> int:
        """One new token behind `length` others."""
        attention = self.layers * 4 * self.heads * self.head * (length + 1)
        return batch * (2 * self.weights + attention + 2 * self.hidden * self.vocabulary)

    def decode_bytes(self, batch: int, length: int) -> int:
        """Weights and the whole cache, read once."""
        return BYTES * (self.weights + self.hidden * self.vocabulary) + self.cache_bytes(batch, length)

    def cache_bytes(self, batch: int, length: int) -> int:
        return BYTES * batch * length * self.layers * 2 * self.kv_heads * self.head


def construction_flops(batch: int, image: int, text: int, hidden: int) -> int:
    """Every image token times every text token."""
    return 2 * batch * image * text * hidden
