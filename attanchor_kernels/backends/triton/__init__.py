"""The Triton backend: CUDA and ROCm tensors, and CPU tensors in Triton's interpreter.

launch      from a `Problem` to launches
schedule    launch configurations by shape
workspace   what programs tell each other, kept zero between launches
kernels     the three kernels: construct, assemble, transpose
match       image tile x texts -> best host of each mover
barrier     one program tells another that work is done
arrange     keys -> places, fields, copies
rows        copying, zeroing, adding rows
slots       roles and counts of a sample's slots
convert     float32 and back
keys        scores and indices in one 64-bit word
"""

from attanchor_kernels.backends.triton.launch import assemble, assemble_backward, construct, match, plan

__all__ = ["assemble", "assemble_backward", "construct", "match", "plan"]
