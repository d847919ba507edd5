"""The CUDA kernels of csrc/ as a backend. Importing this needs the binary `attanchor_kernels._C`."""

import attanchor_kernels._C  # noqa: F401  registers torch.ops.attanchor_cuda
from attanchor_kernels.backends.cuda.launch import assemble, assemble_backward, construct, plan

__all__ = ["assemble", "assemble_backward", "construct", "plan"]
