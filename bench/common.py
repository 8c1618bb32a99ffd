"""What every benchmark shares; it lives in lowbit/benchmarks, because `lowbit bench` uses it too.

A benchmark checks its result before it times. All contenders of a case are timed in turn, round by
round, so that a clock change or a noisy neighbour meets all of them alike; a row shows the median
and the 20th and 80th percentile.
"""

from lowbit.benchmarks.records import (
    COLUMNS,
    Row,
    environment,
    geometric_mean,
    print_header,
    short,
    write_json,
)
from lowbit.benchmarks.shapes import LAYERS, Layer
from lowbit.benchmarks.timing import interleaved

__all__ = [
    "COLUMNS",
    "LAYERS",
    "Layer",
    "Row",
    "environment",
    "geometric_mean",
    "interleaved",
    "print_header",
    "short",
    "write_json",
]
