"""The Triton backend: CUDA and ROCm tensors, and CPU tensors in Triton's interpreter.

launch      from a `Problem` to launches
schedule    launch configurations by shape
kernels     the three kernels: construct, assemble, transpose
match       image tile x texts -> best host of each mover, in one 64-bit key
plan        keys -> places, fields, copies
copy        copying, zeroing, adding rows
slots       roles and counts of a sample's slots
state       what programs tell each other, kept zero between launches
types       what travels through the kernels
"""

from attanchor_kernels.backends.triton.launch import assemble, assemble_backward, construct, match, plan

__all__ = ["assemble", "assemble_backward", "construct", "match", "plan"]
