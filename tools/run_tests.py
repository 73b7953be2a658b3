"""Runs all tests in two processes side by side.

    python tools/run_tests.py [pytest options]

One process has the tests that use the emulated device, which keep one core busy; the other has the rest. The output of
the latter appears as it comes, that of the former behind it. The exit status is 0 where both pass.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMULATED = ("tests/kernels", "tests/ops")  # both build the emulator's library, so they stay in one process


def main() -> int:
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile() as output:
        # Its record of failures would overwrite that of the other process.
        emulated = subprocess.Popen(
            [*pytest, "-p", "no:cacheprovider", *EMULATED], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            others = subprocess.call([*pytest, "tests", *(f"--ignore={folder}" for folder in EMULATED)], cwd=ROOT)
            print(f"\n{' and '.join(EMULATED)}:", flush=True)
            status = emulated.wait()
        finally:
            emulated.kill()
            emulated.wait()
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    return others or status


if __name__ == "__main__":
    sys.exit(main())
