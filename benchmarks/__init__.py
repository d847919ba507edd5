"""What anchors cost: rooflines of the operators, overhead in whole models, and the tables made of stored rows.

cases      the shapes, the least bytes, and whether a result is right
timing     medians of device time, cold caches
floor      a copy of exactly the least bytes
baselines  what a user would write without these kernels
rows       results as JSON lines
roofline, overhead, training, cpu_reference     the runs
tune       a search for faster launch configurations
compare, targets, report, plots                 what is made of their rows
sanitize   every kernel under compute-sanitizer
gpu        all of it on a machine with a GPU, by one command
"""
