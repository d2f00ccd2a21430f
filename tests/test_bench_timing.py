"""The clock, against a simulated stream whose kernels take known times."""

import random
import time

import pytest
from simulated_gpu import KERNEL, LAUNCH, SimulatedDevice

from fastlm.bench.timing import ClockState, Timing, measure, parse_clock_state


@pytest.fixture
def device():
    return SimulatedDevice()


# --- what goes wrong without the engine ---------------------------------------------------------


def test_a_host_clock_reads_the_launch_alone(device):
    start = device.now()
    device.kernel()
    assert device.now() - start == pytest.approx(LAUNCH)


def test_a_host_clock_with_synchronisation_reads_launch_and_kernel(device):
    device.synchronize()
    start = device.now()
    device.kernel()
    device.synchronize()
    assert device.now() - start == pytest.approx(LAUNCH + KERNEL)


def test_a_flush_in_the_window_is_counted(device):
    start = device.now()
    device.flush()
    device.kernel()
    device.synchronize()
    assert device.now() - start > 120e-6


def test_events_on_an_empty_queue_expose_the_launch(device):
    start, end = device.event(), device.event()
    start.record()
    device.kernel()
    end.record()
    assert start.elapsed_time(end) * 1e-3 == pytest.approx(LAUNCH + KERNEL, rel=0.1)


# --- the engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [2e-6, 20e-6, 3e-3])
@pytest.mark.parametrize("cold", [True, False])
def test_the_engine_reads_the_kernel(device, seconds, cold):
    timing = measure({"k": lambda: device.kernel(seconds)}, device, cold=cold)["k"]
    assert timing.median == pytest.approx(seconds, rel=1e-3)
    assert timing.noise < 1e-3
    assert timing.host == pytest.approx(LAUNCH)


def test_the_engine_reads_many_launches(device):
    """A call of many short kernels: the host is slower than the device, and still hidden."""

    def call():
        for _ in range(30):
            device.kernel(1e-6)

    timing = measure({"k": call}, device)["k"]
    assert timing.median == pytest.approx(30e-6, rel=1e-3)
    assert timing.host == pytest.approx(30 * LAUNCH)


def test_cold_and_warm_caches_differ(device):
    call = {"k": lambda: device.kernel(20e-6, warm=5e-6)}
    assert measure(call, device, cold=True)["k"].median == pytest.approx(20e-6, rel=1e-3)
    assert measure(call, device, cold=False)["k"].median == pytest.approx(5e-6, rel=1e-3)


def test_a_drifting_clock_meets_contenders_alike(device):
    def call():
        device.slowdown *= 1.002
        device.kernel()

    timings = measure({"a": call, "b": call}, device, noise=0, budget=0.05)
    assert timings["a"].median == pytest.approx(timings["b"].median, rel=0.05)
    assert max(timings["a"].samples) > 1.3 * min(timings["a"].samples)


def test_it_stops_when_quiet_and_takes_more_when_noisy(device):
    chance = random.Random(0)
    quiet = measure({"k": device.kernel}, device)["k"]
    noisy = measure({"k": lambda: device.kernel(KERNEL * chance.uniform(0.8, 1.2))}, device)["k"]
    assert len(quiet.samples) == 30
    assert 30 < len(noisy.samples) <= 200
    assert noisy.noise > 0.05


def test_the_budget_ends_it(device):
    chance = random.Random(0)
    call = {"k": lambda: device.kernel(1e-2 * chance.uniform(0.5, 1.5))}
    started = device.now()
    timing = measure(call, device, budget=0.5)["k"]
    assert len(timing.samples) >= 30
    assert device.now() - started < 1.5


def test_quantiles():
    timing = Timing([float(x) for x in range(1, 102)], host=0.0)
    assert (timing.quantile(0.2), timing.median, timing.quantile(0.8)) == (21, 51, 81)
    assert Timing([3.0], host=0.0).quantile(0.8) == 3


def test_throttling_is_read_from_the_driver():
    assert parse_clock_state("1980, 1980, 0x0000000000000000, 45\n") == ClockState(
        1980, 1980, 0, 45
    )
    assert not parse_clock_state("1980, 1980, 0x0000000000000001, 45").throttled
    assert parse_clock_state("1200, 1980, 0x0000000000000004, 85").throttled
    assert parse_clock_state("[N/A], 1980, [N/A], 45") == ClockState(None, 1980, None, 45)
    assert parse_clock_state("") == ClockState()


def test_the_tests_themselves_take_no_real_time():
    device, start = SimulatedDevice(), time.perf_counter()
    measure({"k": lambda: device.kernel(1.0)}, device, budget=60)
    assert time.perf_counter() - start < 5
