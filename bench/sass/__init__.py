"""A static, modelled cost of compiled NVIDIA code: what a kernel would take, with no GPU to run it.

Reads a cubin and gives three figures for every loop and for the whole kernel:

* overlap: the slowest single pipe; no schedule is faster;
* simulated: in-order issue of all resident warps of one SM sub-partition, under the stall counts,
  scoreboards, copy groups and barriers that the machine code itself carries;
* serial: the sum of all pipes; nothing overlaps.

None of it is measured. Against published measurements the simulated figure errs by 14 % on tensor
kernels (up to 54 % on warp-specialised ones) and by 8 % on streaming kernels.
"""

from .gpus import ASSUMPTIONS, GPUS, SOURCES, Gpu
from .predict import predict, traffic_bytes
from .report import LoopReport, Report, analyse, occupancy

__all__ = [
    "ASSUMPTIONS",
    "GPUS",
    "SOURCES",
    "Gpu",
    "LoopReport",
    "Report",
    "analyse",
    "occupancy",
    "predict",
    "traffic_bytes",
]
