"""Measurements: `lowbit bench`, and what the scripts in bench/ share with it.

    shapes.py           linear layers of real models, and how the command line names them
    records.py          one row format, the environment, JSON records
    timing.py           interleaved timing, CUDA graphs, host time, memory, the card's ceilings
    implementations.py  a LoRA linear layer as lowbit and the libraries beside it compute it
    linear.py           `lowbit bench linear`: check, time, compare with the floor
    plots.py            PNGs of the same

Nothing is imported here: `lowbit --help` must not need torch.
"""
