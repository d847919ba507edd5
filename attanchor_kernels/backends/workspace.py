"""Device memory that a construct kernel finds all zero and leaves all zero.

It is zeroed when it is made, once per device and stream, and every launch puts back what it used. A launch that is
captured into a CUDA graph gets memory of its own: two graphs captured on one stream may be replayed at the same time.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# 512 kB for captured launches. At B = 8, N = 50, M = 576 one takes 5 kB; with keep 23 kB by Triton and 45 kB by CUDA.
ARENA_WORDS = 2**16


class _Arena:
    """Zeroed words given out once each, since nothing says when a graph is no longer replayed."""

    def __init__(self, device: torch.device) -> None:
        self.words = _made(device, ARENA_WORDS)
        self.used = 0
        # Graphs replay on any stream, and know nothing of the one that zeroes this. Once per device and process.
        torch.cuda.current_stream(device).synchronize()

    def take(self, count: int) -> Tensor | None:
        start, end = self.used, self.used + count
        if end > len(self.words):
            return None
        self.used = -(-end // 16) * 16
        return self.words[start:end]


_words: dict[tuple[torch.device, int], Tensor] = {}
_arenas: dict[torch.device, _Arena] = {}
_lock = threading.Lock()


def zeroed(device: torch.device, count: int) -> Tensor:
    """At least `count` int64 zeros for one launch on the current stream of `device`, aligned to 16 bytes.

    The same tensor for every launch on a stream, until one needs more.
    """
    with _lock:
        if device.type != "cuda":
            return _grown((device, 0), count)
        if not torch.cuda.is_current_stream_capturing():
            if device not in _arenas:
                _arenas[device] = _Arena(device)
            return _grown((device, torch.cuda.current_stream(device).cuda_stream), count)
        words = _arenas[device].take(count) if device in _arenas else None
    # Without a warm-up before the capture, or after very many captures, the graph zeroes its own memory at each replay.
    return torch.zeros(count, dtype=torch.int64, device=device) if words is None else words


def held(device: torch.device) -> list[Tensor]:
    """Everything that is kept for `device`; all zero whenever no kernel runs."""
    own = [words for (kept, _), words in _words.items() if kept == device]
    return own + ([_arenas[device].words] if device in _arenas else [])


def forget_captures(arena_words: int | None = None) -> None:
    """Give captured launches a new arena, of `arena_words` words or the usual number.

    For programs that know that no graph captured so far will be replayed again.
    """
    global ARENA_WORDS
    with _lock:
        _arenas.clear()
        ARENA_WORDS = _USUAL_WORDS if arena_words is None else max(_USUAL_WORDS, arena_words)


_USUAL_WORDS = ARENA_WORDS


def _grown(key: tuple[torch.device, int], count: int) -> Tensor:
    words = _words.get(key)
    if words is None or words.numel() < count:
        words = _words[key] = _made(key[0], -(-count // 1024) * 1024)
    return words


def _made(device: torch.device, count: int) -> Tensor:
    """Zeros that outlive the call, zeroed on the current stream.

    Made by another thread: inductor's CUDA graphs and `torch.cuda.use_mem_pool` send what a thread allocates to a pool
    whose memory they reuse when the run is over.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device)

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(count, dtype=torch.int64, device=device)

    with ThreadPoolExecutor(1) as outside:
        return outside.submit(make).result()
