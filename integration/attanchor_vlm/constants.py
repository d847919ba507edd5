"""What the rooms share and nobody may redefine."""

from __future__ import annotations

IGNORE_INDEX = -100  # the label that losses skip, as in PyTorch and transformers
