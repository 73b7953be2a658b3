"""The command line as a user meets it."""

import io
import json

import pytest

from tokenspeed.engine.__main__ import main


def test_generate_streams_the_answer_and_reports_its_speed(capsys):
    assert main(["generate", "Hello!", "--max-tokens", "12", "--no-thinking"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "tok/s" in err and "prompt tokens" in err


def test_generate_reads_a_file_or_standard_input_alike(capsys, monkeypatch, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Hello!")
    texts = []
    for arguments, stdin in ((["Hello!"], ""), (["--file", str(path)], ""), ([], "Hello!")):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        assert main(["generate", *arguments, "--max-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_generate_offers_tools_to_the_model(capsys, tmp_path):
    parameters = {"type": "object", "properties": {"a": {"type": "number"}}}
    tools = [{"type": "function", "function": {"name": "calc", "description": "x", "parameters": parameters}}]
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(tools))
    assert main(["generate", "Hello!", "--max-tokens", "1"]) == 0
    without = int(capsys.readouterr().err.split(" prompt tokens")[0].split()[-1])
    assert main(["generate", "Hello!", "--tools", str(path), "--max-tokens", "1"]) == 0
    assert int(capsys.readouterr().err.split(" prompt tokens")[0].split()[-1]) > without


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "./nowhere"], ["nowhere"]),
        (["generate", "x", "--file", "also.txt"], ["--file"]),
        (["generate", "--file", "missing.txt"], ["missing.txt"]),
        (["generate", "x", "--tools", "missing.json"], ["missing.json"]),
        (["generate", "x", "--temperature", "-1"], ["temperature", "-1"]),
        (["generate", "--raw", ""], ["empty"]),
        (["generate", "x", "--device", "tpu"], ["tpu"]),
        (["generate", "x", "--device", "cuda:77"], ["cuda:77"]),
        (["generate", "x", "--threads", "0"], ["threads", "0"]),
        (["info", "--size", "5B"], ["5B", "35B-A3B"]),
    ],
)
def test_mistakes_end_with_one_line_that_names_them(capsys, arguments, words):
    assert main(arguments) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    for word in words:
        assert word in err


def test_info_states_published_figures(capsys):
    assert main(["info", "--size", "35B-A3B", "--dtype", "bfloat16", "--memory-gib", "139"]) == 0
    out = capsys.readouterr().out
    assert "34.6" in out.split("G parameters")[0]
    assert "20.00 KiB" in out and "60.00 MiB fp32" in out
    assert "131072 tokens" in out


def test_info_says_when_the_weights_do_not_fit(capsys):
    assert main(["info", "--size", "397B-A17B", "--dtype", "bfloat16", "--memory-gib", "100"]) == 0
    assert "none" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["generate"], ["info"]])
def test_help_is_complete(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage" in capsys.readouterr().out
