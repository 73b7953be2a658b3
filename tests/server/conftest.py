import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import Server


@pytest.fixture(scope="session")
def server():
    """One server for all tests that leave it alive."""
    running = Server("--served-model-name", "tiny", "--max-num-seqs", "16")
    yield running
    assert running.stop() == 0, "".join(running.log)
