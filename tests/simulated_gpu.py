"""A host and a stream with clocks of their own, whose kernels take known times."""

import struct

import torch

from fastlm.bench.timing import ClockState

KERNEL, LAUNCH, FLUSH = 20e-6, 4e-6, 100e-6


class SimulatedEvent:
    """A point in the simulated queue."""

    def __init__(self, stream):
        self.stream, self.at = stream, None

    def record(self):
        self.stream.host += 1e-6
        self.at = max(self.stream.busy_until, self.stream.host)

    def elapsed_time(self, end):
        milliseconds = (end.at - self.at) * 1e3
        return struct.unpack("f", struct.pack("f", milliseconds))[0]  # float32, as CUDA gives it


class SimulatedDevice:
    """A host and a stream with clocks of their own: work queues up, and takes known times."""

    def __init__(self):
        self.host = 0.0
        self.busy_until = 0.0
        self.flushed = True
        self.slowdown = 1.0
        self.captured = None

    def launch(self, seconds):
        if self.captured is not None:
            self.captured += seconds
            return
        self.host += LAUNCH
        self.busy_until = max(self.busy_until, self.host) + seconds

    def kernel(self, seconds=KERNEL, warm=None):
        self.launch((seconds if self.flushed or warm is None else warm) * self.slowdown)
        self.flushed = False

    def now(self):
        return self.host

    def event(self):
        return SimulatedEvent(self)

    def synchronize(self):
        self.host = max(self.host, self.busy_until)

    def flush(self):
        self.launch(FLUSH)
        self.flushed = True

    def hold(self, seconds):
        self.launch(seconds)

    # What the suite asks for beside times.
    place = torch.device("cpu")
    name = "simulated"
    side = 16
    queued = 10

    def peak_bytes(self, call):
        call()
        return 1 << 20

    def clocks(self):
        return ClockState(1980, 1980, 0, 45)

    def graphed(self, call):
        """Notes how long the kernels of a call take, and replays them behind one launch."""
        self.captured = 0.0
        kept = call()
        taken, self.captured = self.captured, None

        def replay():
            self.launch(taken)
            return kept

        return replay
