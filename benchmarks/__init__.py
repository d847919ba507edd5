"""What anchors cost: rooflines of the operators, overhead in whole models, and the tables made of stored rows.

cases      the shapes, the least bytes, and whether a result is right
timing     medians of device time, cold caches; two calls by turns
floor      a copy of exactly the least bytes
baselines  what a user would write without these kernels
rows       results as JSON lines, and the run that writes them
roofline, overhead, training, cpu_reference     the runs
host        what a call takes on the host, its launch left out
smoke, sanitize     every kernel before it is measured: is it right, does it end
tune       a search for faster launch configurations
phases, schedule_model     what the phases of a CUDA launch take: measured by a build of its own; predicted
compare, targets, report, plots, store_demo     what is made of their rows
gpu        all of it on a machine with a GPU, by one command
"""

import sys
from pathlib import Path

# From a checkout that is not installed, too.
sys.path.append(str(Path(__file__).resolve().parent.parent / "integration"))
