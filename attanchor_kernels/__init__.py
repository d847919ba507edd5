"""AttAnchor sequence construction (arXiv 2509.23109) as PyTorch operators."""

from attanchor_kernels.api import AnchoredSequence, build_sequence, merge_sequence, place_sequence, plan_sequence
from attanchor_kernels.problem import Role

__all__ = [
    "AnchoredSequence",
    "Role",
    "__version__",
    "build_sequence",
    "merge_sequence",
    "place_sequence",
    "plan_sequence",
]
__version__ = "0.1.0"
