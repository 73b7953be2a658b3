"""What nvcc makes of host code: a call of a function for the device alone, out of a template, is no error there but the
end of the process."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import tokenspeed

BUILT = sorted(Path(tokenspeed.__file__).parent.glob("_C*.so"))


@pytest.mark.skipif(not BUILT, reason="the extension is not built")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_no_host_function_ends_the_process():
    exported = subprocess.run(["nm", "-C", "--defined-only", BUILT[0]], capture_output=True, text=True, check=True)
    ours = {line.split(" T ")[1] for line in exported.stdout.splitlines() if " T tokenspeed::" in line}
    assert ours, "the extension has no symbols to look at"
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", "--section=.text", BUILT[0]]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"^[0-9a-f]+ <(.*)>:$", listing, flags=re.MULTILINE)
    bodies = dict(zip(functions[1::2], functions[2::2], strict=True))
    assert [name for name in sorted(ours) if "<exit@plt>" in bodies.get(name, "")] == []
