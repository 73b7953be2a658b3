"""Times functions on a device: many rounds, contenders interleaved, inputs rotated; and the ceilings of that run."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ROTATE_BYTES = 512 << 20  # well past the L2 of any card
MAX_SETS = 64
ROUNDS, LEAST_ROUNDS = 21, 5
ROUNDS_US = 4e5  # a contender whose passes are slow gets fewer of them, LEAST_ROUNDS at least


@dataclass(frozen=True, slots=True)
class Ceilings:
    """GB/s of a device copy (bytes read + written) and of a read, TFLOP/s of a bf16 product, all in this run."""

    copy: float
    read: float
    matmul: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and fastest time of one call in microseconds, and how it was started: "graph", "launches" or "host"."""

    median: float
    fastest: float
    method: str


class _Contender:
    """One function over all input sets, ready to be timed again and again."""

    def __init__(self, function: Callable, sets: Sequence[tuple], device: str):
        self.function, self.sets, self.device = function, sets, device
        self.samples: list[float] = []
        self.spent = 0.0  # microseconds in rounds
        self.outputs: list = []  # of the graph
        self.graph = None
        self.function(*sets[0])  # compiles, builds caches
        if device == "cuda":
            torch.cuda.synchronize()
            self.graph = self._capture()
        self.method = "host" if device == "cpu" else "graph" if self.graph else "launches"

    def _pass(self) -> list:
        """Call the function once a set. The results are kept until the pass ends, so that each has memory of its own:
        outputs that all lie in one place would stay in the cache."""
        return [self.function(*arguments) for arguments in self.sets]

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.function(*self.sets[0])
        except RuntimeError:  # it synchronises, so it cannot be captured
            return None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self._pass()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def round(self) -> None:
        if self.device == "cpu":
            start = time.perf_counter()
            self._pass()
            elapsed = (time.perf_counter() - start) * 1e6
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            if self.graph:
                self.graph.replay()
            else:
                self._pass()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end) * 1e3
        self.spent += elapsed
        self.samples.append(elapsed / len(self.sets))

    def timing(self) -> Timing:
        return Timing(statistics.median(self.samples), min(self.samples), self.method)


def input_sets(draw: Callable[[], tuple], device: str) -> list[tuple]:
    """Enough input sets that a pass over them leaves nothing in the L2 cache, at least 4 and at most MAX_SETS."""
    if device == "cpu":
        return [draw()]
    first = draw()
    held = sum(a.numel() * a.element_size() for a in first if isinstance(a, torch.Tensor))
    count = min(max(-(-ROTATE_BYTES // max(held, 1)), 4), MAX_SETS)
    return [first, *(draw() for _ in range(count - 1))]


def time_interleaved(
    contenders: Mapping[str, Callable], sets: Sequence[tuple], device: str, rounds: int = ROUNDS
) -> dict[str, Timing | str]:
    """Time the functions A, B, C, A, B, C, ...; a function that fails gives the reason instead of a timing."""
    ready: dict[str, _Contender] = {}
    results: dict[str, Timing | str] = {}
    for name, function in contenders.items():
        try:
            ready[name] = _Contender(function, sets, device)
        except Exception as error:  # a peer may fail in any way; the row then says how
            results[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    for number in range(rounds if device == "cuda" else LEAST_ROUNDS):
        for contender in ready.values():
            if number < LEAST_ROUNDS or contender.spent < ROUNDS_US:
                contender.round()
    return results | {name: contender.timing() for name, contender in ready.items()}


def measure_ceilings(device: str) -> Ceilings:
    """What this device reaches now: copy and read of a tensor far larger than any cache, product of 8192 x 8192."""
    count, width = (1 << 29, 8192) if device == "cuda" else (1 << 23, 512)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    size = source.numel() * source.element_size()
    functions = {
        "copy": lambda: target.copy_(source),
        "copy by a kernel": lambda: torch.neg(source, out=target),  # a graph's copy node uses a slower engine
        "read": lambda: source.sum(),
        "read by matrix-vector product": lambda: torch.mv(source.view(-1, 8192), target[:8192]),
        "matmul": lambda: a @ b,
    }
    times = {name: t.median for name, t in time_interleaved(functions, [()], device, rounds=11).items()}
    copy = min(times["copy"], times["copy by a kernel"])
    read = min(times["read"], times["read by matrix-vector product"])
    return Ceilings(copy=2 * size / copy / 1e3, read=size / read / 1e3, matmul=2 * width**3 / times["matmul"] / 1e6)


def clock_mhz(device: str) -> int | None:
    """The multiprocessor clock right now, where the driver's library can be asked."""
    if device == "cpu":
        return None
    try:
        return torch.cuda.clock_rate()
    except (RuntimeError, ModuleNotFoundError):
        return None
