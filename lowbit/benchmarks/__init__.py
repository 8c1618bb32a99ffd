"""Measurements: `lowbit bench`, and what the scripts in bench/ share with it.

    shapes.py           linear layers of real models, and how the command line names them
    records.py          one row format, the environment, JSON records
    timing.py           interleaved timing, CUDA graphs, host time, memory, the card's ceilings
    implementations.py  a LoRA linear layer as lowbit and the libraries beside it compute it
    checks.py           results held to float64 before anything is timed
    linear.py           `lowbit bench linear`: check, time, compare with the floor
    linear_backward.py  its --backward: forward and backward, as graphs and eagerly
    plots.py            PNGs of the same
    model.py            `lowbit bench model`: training steps of whole models
    model_configs.py    their shapes
    model_build.py      built and packed layer by layer, by lowbit and by the libraries beside it
    model_profile.py    where the time of a step goes, by kind of kernel

Nothing is imported here: `lowbit --help` must not need torch.
"""
