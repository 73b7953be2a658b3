"""Plans as text: stored for every published size, and what `info` prints."""

from pathlib import Path

import pytest
import torch

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.commands.info import weight_bytes
from tokenspeed.engine.executor.memory import MemoryLayout
from tokenspeed.engine.parallel.program import traffic
from tokenspeed.engine.sizes import PUBLISHED

from .programs import DIRECTORY, RANKS, empty_model, program_lines, stored


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", PUBLISHED)
def test_the_program_is_the_stored_one(size, ranks):
    """A change of the program shows as a diff of these files; `python -m tests.distributed.programs` writes them."""
    assert "\n".join(program_lines(size, ranks)) + "\n" == stored(size, ranks).read_text(encoding="utf-8")


def test_every_stored_program_is_tested():
    assert sorted(DIRECTORY.iterdir()) == sorted(stored(size, ranks) for size in PUBLISHED for ranks in RANKS)


def test_info_prints_the_program(capsys, monkeypatch):
    monkeypatch.setattr("tokenspeed.engine.commands.info.free_memory", lambda device: 139 << 30)
    arguments = ["info", "--size", "397B-A17B", "--tp", "8", "--ep", "8", "--dtype", "bfloat16", "--device", "cpu"]
    assert main([*arguments, "--program"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert set(program_lines("397B-A17B", 8)) <= set(printed)
    assert main(arguments) == 0
    without = capsys.readouterr().out.splitlines()
    assert _fixed(without) == _fixed(printed[: printed.index("")])


def _fixed(lines):
    """Without what depends on how much memory is free just now."""
    return [line for line in lines if not line.startswith(("memory", "sequences", "prefix cache"))]


def test_info_names_what_does_not_split(capsys):
    assert main(["info", "--size", "9B", "--tp", "3"]) == 1
    assert "vocab_size 248320" in capsys.readouterr().err
    assert main(["info", "--size", "9B", "--ep", "2"]) == 1
    assert "ep is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "ranks", "lines"),
    [
        # 15 attention layers of 2 kv heads, of which a rank holds one: 15 x 2 x 256 x 2 bytes.
        ("397B-A17B", 8, ["KV per token       15.00 KiB", "121 collectives", "on 4 ranks"]),
        # 16 attention layers of 4 kv heads over 4 ranks; 48 GDN layers of 12 value heads x 128 x 128 x 4 bytes.
        ("27B", 4, ["KV per token       16.00 KiB", "36.00 MiB fp32", "129 collectives"]),
        ("0.8B", 1, ["KV per token       12.00 KiB", "18.00 MiB fp32"]),
    ],
)
def test_stored_figures_follow_from_the_architecture(size, ranks, lines):
    text = stored(size, ranks).read_text(encoding="utf-8")
    for line in lines:
        assert line in text


def test_the_table_of_the_documentation_is_what_the_code_gives():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.split("|")[1].strip() in PUBLISHED]
    assert rows == [table_row(size) for size in PUBLISHED]


def table_row(size: str) -> str:
    cells = []
    for ranks in RANKS:
        model = empty_model(size, ranks)
        layout = MemoryLayout(model.share, torch.bfloat16)
        figures = layout.kv_token_bytes / 2**10, layout.recurrent_bytes / 2**20
        cells.append(f"{weight_bytes(model) / 2**30:.2f} / {figures[0]:g} / {figures[1]:g}")
    sent = traffic(model.compiled, model.mesh, 2 * model.config.hidden, 2 * model.share.vocab)
    return f"| {size} | {' | '.join(cells)} | {sent.collectives} | {(sent.token + sent.logit_row) / 2**10:g} |"
