"""Runs all tests in two processes side by side.

    python tools/run_tests.py [pytest options]

One process has the tests that compute and wait for nobody: they keep one core busy. The other has the rest, which start
servers and ranks and wait for them; the two take about as long. The output of the latter appears as it comes, that of
the former behind it. The exit status is 0 where both pass.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Kernels and operators both build the emulator's library, so they stay in one process.
COMPUTING = ("tests/kernels", "tests/ops", "tests/engine")


def main() -> int:
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # more threads would wait for each other's cores
    with tempfile.TemporaryFile() as output:
        # Its record of failures would overwrite that of the other process.
        computing = subprocess.Popen(
            [*pytest, "-p", "no:cacheprovider", *COMPUTING],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            others = subprocess.call(
                [*pytest, "tests", *(f"--ignore={folder}" for folder in COMPUTING)], cwd=ROOT, env=environment
            )
            print(f"\n{', '.join(COMPUTING)}:", flush=True)
            status = computing.wait()
        finally:
            computing.kill()
            computing.wait()
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    return others or status


if __name__ == "__main__":
    sys.exit(main())
