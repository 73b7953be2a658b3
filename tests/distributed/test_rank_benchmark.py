"""The benchmark of one rank says what it measured and what it left out."""

import json

import pytest
import torch

from benchmarks import rank


def test_a_rank_alone_is_marked_as_such(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "ROUNDS", 1)
    path = tmp_path / "rows.json"
    arguments = ["--tp", "2", "--ep", "4", "--rank", "3", "--batch", "1", "3", "--context", "70", "--device", "cpu"]
    assert rank.main([*arguments, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "rank 3 of 4 ALONE" in out and "left out" in out and "without the others" in out
    rows = json.loads(path.read_text())
    assert [row["batch"] for row in rows] == [1, 3] and all(row["alone"] and row["ms"] > 0 for row in rows)
    # 8 layers with two sums each and the embedding's: 17 rows of 128 fp32 values a sequence.
    assert [row["payload_bytes"] for row in rows] == [17 * 128 * 4, 3 * 17 * 128 * 4]


def test_sums_of_local_terms_change_nothing_and_are_marked(capsys, monkeypatch):
    monkeypatch.setattr(rank, "ROUNDS", 1)
    assert rank.main(["--tp", "2", "--batch", "1", "--context", "3", "--device", "cpu", "--sums", "local"]) == 0
    assert "ALONE: a sum reads the terms of all ranks" in capsys.readouterr().out
    communicator = rank.LocalSums(rank.Mesh(4, 2))
    x = torch.randn(3, 8)
    for group in ("tp", "ep", "expert_tp", "world"):
        assert torch.equal(communicator.all_reduce(x.clone(), group), x)


def test_one_rank_is_the_whole_model(capsys, monkeypatch):
    monkeypatch.setattr(rank, "ROUNDS", 1)
    assert rank.main(["--batch", "1", "--context", "3", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "one rank" in out and "ALONE" not in out and " 0 collectives" in out


def test_mistakes_are_named(capsys):
    assert rank.main(["--tp", "8", "--ep", "3"]) == 1
    assert "ep 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rank.main(["--size", "5B"])
    assert "'5B'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--size", "397B-A17B"], ["the weights take", "GiB", "are free"]),
        (
            ["--batch", "1", "4000000", "--context", "8000"],
            ["4000000 sequences of 8000 tokens take", "GiB", "are free"],
        ),
    ],
)
def test_what_is_larger_than_memory_is_refused_before_anything_is_allocated(arguments, expected, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(rank, "random_model", lambda *_: made.append(1))
    assert rank.main([*arguments, "--device", "cpu"]) == 1 and not made
    error = capsys.readouterr().err
    assert all(word in error for word in expected), error
