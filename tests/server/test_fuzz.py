"""The short form of the fuzzer."""

import sys

from tests.server import fuzz
from tests.server.launch import Server


def test_no_changed_body_makes_the_server_fail():
    server = Server(*fuzz.ARENAS)
    report = fuzz.fuzz(server, fuzz.SHORT, progress=sys.stderr.isatty())
    assert server.stop() == 0, "".join(server.log[-20:])
    assert report.failures == []
    assert {code for _, code in report.statuses} >= {200, 400}
    assert {path for path, code in report.statuses if code == 200} >= fuzz.ANSWERS | {"/tokenize", "/detokenize"}
