"""How the Triton kernels lay out their zeroed words."""

import torch

from attanchor_kernels.backends.triton.arguments import State
from attanchor_kernels.backends.workspace import zeroed


def state(device: torch.device, batch: int, movers: int, tiles: int, scratch: int) -> State:
    """Zeroed state for one launch on the current stream of `device`, and `scratch` float32 that need not be zero."""
    # Every part begins on 16 bytes: an unaligned pointer would be one more kernel to compile.
    keys = _even(batch * movers)
    cuts = _even(batch)
    counters = _even(-(-(1 + 2 * batch + batch * tiles) // 2))
    words = zeroed(device, keys + cuts + counters)
    return State(
        keys=words[:keys].view(torch.uint64),
        cuts=words[keys : keys + cuts].view(torch.uint64),
        counters=words[keys + cuts :].view(torch.int32),
        scratch=torch.empty(scratch, dtype=torch.float32, device=device) if scratch else None,
    )


def _even(count: int) -> int:
    return count + count % 2
