"""Where self-test kernels run: the emulated device or a card. Arguments: numpy arrays, updated in place, and ints."""

import ctypes
import multiprocessing
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from tools.build_emulator import ROOT, SELF_TESTS, build_self_tests
from tools.cuda_paths import find_nvcc


class KernelError(Exception):
    """A launch failed; the message is the emulator's report or CUDA's error."""


class Golden:
    """What a card computed for each call of each test, to compare other devices with.

    Recording keeps arrays by (test, call, argument). Replaying accepts equal bits for integers, and floats within
    `tolerance` of the largest element: the matrix unit's rounding is not modelled.
    """

    def __init__(self, path: Path, recording: bool):
        self.path = path
        self.recording = recording
        self.arrays: dict[str, np.ndarray] = {}
        self.compared = 0
        if not recording and path.exists():
            with np.load(path) as stored:
                self.arrays = dict(stored)

    def check(self, key: str, array: np.ndarray, tolerance: float) -> None:
        if self.recording:
            self.arrays[key] = array.copy()
            return
        expected = self.arrays.get(key)
        if expected is None:
            return
        self.compared += 1
        if np.issubdtype(array.dtype, np.floating):
            scale = np.nanmax(np.abs(expected.astype(np.float64)), initial=0.0)
            np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance * scale, err_msg=f"golden {key}")
        else:
            np.testing.assert_array_equal(array, expected, err_msg=f"golden {key}")

    def save(self) -> None:
        if self.recording:
            np.savez_compressed(self.path, **self.arrays)


class Device:
    """A library of launchers `extern "C" int name(...)` over plain pointers and ints."""

    library: ctypes.CDLL
    golden: Golden | None = None
    test = ""
    calls = 0

    def call(self, name: str, *arguments: np.ndarray | int, tolerance: float = 1e-5, golden: bool = True) -> None:
        """Runs a launcher; arrays come back as the kernel left them. Raises KernelError with the reason."""
        before = [argument.copy() if isinstance(argument, np.ndarray) else None for argument in arguments]
        self._run(name, arguments)
        self.calls += 1
        if self.golden is None or not golden:
            return
        for position, (argument, old) in enumerate(zip(arguments, before, strict=True)):
            if old is not None and argument.tobytes() != old.tobytes():
                self.golden.check(f"{self.test}/{self.calls}/{position}", argument, tolerance)

    def _run(self, name: str, arguments: tuple[Any, ...]) -> None:
        raise NotImplementedError


class EmulatedDevice(Device):
    def __init__(self, library: Path | None):
        self.library = ctypes.CDLL(str(library or build_self_tests()))
        self.library.emulator_report.restype = ctypes.c_char_p
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]
        self.sanitized = bool(self.library.emulator_sanitized())

    def seed(self, seed: int) -> None:
        self.library.emulator_seed(seed)

    def report(self) -> str:
        return self.library.emulator_report().decode()

    def defer(self, on: bool) -> None:
        self.library.emulator_defer(int(on))

    def synchronize(self) -> None:
        if self.library.emulator_synchronize() != 0:
            raise KernelError(self.report())

    def multiprocessors(self, count: int) -> None:
        self.library.emulator_multiprocessors(count)

    def _run(self, name: str, arguments: tuple[Any, ...]) -> None:
        for argument in arguments:
            assert not isinstance(argument, np.ndarray) or argument.flags.c_contiguous
        converted = [
            ctypes.c_void_p(argument.ctypes.data) if isinstance(argument, np.ndarray) else ctypes.c_int(argument)
            for argument in arguments
        ]
        if getattr(self.library, name)(*converted) != 0:
            raise KernelError(self.report())


class CudaDevice(Device):
    """The same launchers compiled by nvcc, in a process that is replaced when a launch breaks its context or hangs."""

    SECONDS = 60

    def __init__(self, library: Path | None):
        self.path = str(library or build_for_card())
        self.worker: multiprocessing.Process | None = None

    def _run(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.worker is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.worker = context.Process(target=serve_card, args=(self.path, theirs), daemon=True)
            self.worker.start()
            theirs.close()
        self.pipe.send((name, arguments))
        try:
            answered = self.pipe.poll(self.SECONDS)
            error, results = self.pipe.recv() if answered else (f"no answer within {self.SECONDS} s", [])
        except EOFError:
            error, results = "the process died", []
        if error is not None:
            self.worker.kill()
            self.worker = None
            raise KernelError(f"{name}: {error}")
        for argument, result in zip(arguments, results, strict=True):
            if isinstance(argument, np.ndarray):
                argument[...] = result


def serve_card(library: str, pipe: Any) -> None:
    """Runs launches until the pipe closes: receives (name, arguments), answers (error or None, arguments)."""
    import torch

    launchers = ctypes.CDLL(library)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, _launch_on_card(torch, getattr(launchers, name), arguments)))
        except Exception as error:  # the context may be lost: the parent starts another process
            pipe.send((str(error).splitlines()[0], []))
            return


def _launch_on_card(torch: Any, launcher: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments as the launcher leaves them; arrays travel to the card and back."""

    def to_card(argument: Any) -> Any:
        if not isinstance(argument, np.ndarray):
            return None
        return torch.from_numpy(argument.view(np.uint8).reshape(-1).copy()).cuda()

    on_card = [to_card(argument) for argument in arguments]
    torch.cuda.synchronize()
    status = launcher(
        *(
            ctypes.c_int(argument) if tensor is None else ctypes.c_void_p(tensor.data_ptr())
            for argument, tensor in zip(arguments, on_card, strict=True)
        )
    )
    if status != 0:
        raise KernelError(f"CUDA error {status}")
    torch.cuda.synchronize()
    return [
        argument if tensor is None else tensor.cpu().numpy().view(argument.dtype).reshape(argument.shape)
        for argument, tensor in zip(arguments, on_card, strict=True)
    ]


def build_for_card() -> Path:
    """Compiles the self-test kernels for sm_90a, but for the faulty ones, into build/selftest-cuda.so."""
    output = ROOT / "build" / "selftest-cuda.so"
    output.parent.mkdir(exist_ok=True)
    sources = [str(source) for source in sorted(SELF_TESTS.glob("*.cu"))]
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC", "-shared"]
    command = [str(find_nvcc()), *flags, f"-I{ROOT / 'csrc' / 'kernels'}", *sources, "-o", str(output)]
    subprocess.run(command, check=True)
    return output


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, round to nearest even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
