"""The command line as a user meets it."""

import argparse
import gzip
import io
import json
import re
import signal
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file, save_file

from tokenspeed.engine.__main__ import build_parser, main
from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.commands.interrupts import interruptible
from tokenspeed.engine.commands.options import add_sampling_options, chosen_sampling
from tokenspeed.engine.core import Engine
from tokenspeed.engine.debug.ranges import add_ranges
from tokenspeed.engine.errors import EngineError
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams


def test_generate_streams_the_answer_and_reports_its_speed(capsys):
    assert main(["generate", "Hello!", "--max-tokens", "12", "--no-thinking"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "tok/s" in err and "prompt tokens" in err
    assert "tokens a step, drafts right by position: " in err
    assert main(["generate", "Hello!", "--max-tokens", "12", "--no-thinking", "--draft-tokens", "0"]) == 0
    plain, err = capsys.readouterr()
    assert plain == out and "a step" not in err


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_draft_options_reach_the_engine_and_change_no_text(capsys, tmp_path, temperature):
    found = {}
    for options in ("--draft-tokens 0", "--draft-tokens auto", "--draft-tokens 7", "--draft-vocabulary 90"):
        log = tmp_path / "log"
        arguments = ["generate", "What is 12 plus 30?", "--temperature", temperature, "--log-steps", str(log)]
        assert main([*arguments, *options.split()]) == 0
        header, *steps = map(json.loads, log.read_text().splitlines())
        drafted = header["draft_tokens"], header["draft_vocabulary"], {step["step"]["drafts"] for step in steps}
        found[options] = capsys.readouterr().out, len(steps), drafted
        assert main(["bench", "replay", str(log), "--quiet"]) == 0
        assert "bit for bit" in capsys.readouterr().out
    assert len({text for text, *_ in found.values()}) == 1
    plain, auto, deep, few = (steps for _, steps, _ in found.values())
    assert deep <= auto < few < plain, "fewer steps the more is drafted well"
    assert [drafted for *_, drafted in found.values()] == [(0, None, {0}), (3, None, {3}), (7, None, {7}), (3, 90, {3})]


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
    ("arguments", "expected"),
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
        (["generate", "x", "--logprobs", "1"], ["--json"]),
        (["generate", "x", "--output", "out"], ["--jsonl"]),
        (["generate", "x", "--jsonl", "in"], ["prompt"]),
        (["generate", "--jsonl", "missing.jsonl"], ["missing.jsonl"]),
        (["generate", "x", "--max-num-seqs", "0"], ["max_num_seqs", "0"]),
        (["generate", "x", "--gpu-memory-utilization", "2"], ["gpu_memory_utilization", "2"]),
        (["generate", "x", "--log-steps", "/"], ["/", "cannot be written"]),
        (["generate", "x", "--max-tokens", "9000"], ["9000", "8192"]),
        (["generate", "x", "--draft-tokens", "8"], ["draft_tokens", "8", "'auto' or 0 to 7"]),
        (["serve", "--draft-tokens", "some"], ["draft_tokens", "'some'", "'auto' or 0 to 7"]),
        (["generate", "x", "--draft-vocabulary", "0"], ["draft_vocabulary", "0", "at least 1"]),
        (["generate", "x", "--draft-vocabulary", "641"], ["draft_vocabulary", "641", "640"]),
        (["generate", "x", "--draft-vocabulary", "9", "--draft-tokens", "0"], ["draft_vocabulary", "9", "MTP head"]),
        (["bench", "--draft-vocabulary", "9", "--tp", "2"], ["draft_vocabulary", "9", "tensor_parallel_size is 2"]),
        (["chat", "--n", "2"], ["n is 2"]),
        (["chat", "--load", "missing.json"], ["missing.json"]),
        (["bench", "--input-len", "0"], ["--input-len", "0"]),
        (["bench", "--prefix-len", "128"], ["--prefix-len", "128"]),
        (["bench", "--input-len", "9000"], ["9032", "8192"]),
        (["bench", "--concurrency", "65"], ["65", "--max-num-seqs 64"]),
        (["bench", "replay", "missing.jsonl"], ["missing.jsonl"]),
        (["info", "--size", "5B"], ["5B", "35B-A3B"]),
    ],
)
def test_mistakes_end_with_one_line_that_names_them(capsys, arguments, expected):
    assert main(arguments) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    for word in expected:
        assert word in err


def test_info_states_published_figures(capsys):
    assert main(["info", "--size", "35B-A3B", "--dtype", "bfloat16", "--memory-gib", "139"]) == 0
    out = capsys.readouterr().out
    assert "34.6" in out.split("G parameters")[0]
    assert "20.00 KiB" in out and "60.00 MiB fp32" in out
    assert "131072 tokens" in out


def test_info_for_a_gpu_plans_the_dtype_and_the_ring_that_one_would_use(capsys):
    assert main(["info", "--size", "35B-A3B", "--memory-gib", "139"]) == 0
    out = capsys.readouterr().out
    assert "in bfloat16" in out and "ring of 8 updates" in out and "20.00 KiB" in out
    assert main(["info", "--size", "2B", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "in float32" in out and "ring" not in out


def info(capsys, *arguments):
    """Its lines without the alignment."""
    assert main(["info", *arguments]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_info_says_what_an_mtp_head_costs_and_what_drafts_need(capsys):
    gpu = ["--size", "35B-A3B", "--memory-gib", "139"]
    lines = info(capsys, *gpu, "--draft-tokens", "3")
    # fc 2 H^2, three norms and two of the layer, attention of 16:2 heads of 256 with gates, a router, 257 experts.
    attention = 2048 * (2 * 16 + 2 * 2) * 256 + 16 * 256 * 2048 + 2 * 256
    experts = 257 * 3 * 2048 * 512 + 2048 * 256 + 2048
    parameters = 2 * 2048**2 + 5 * 2048 + attention + experts
    head = lines.index(f"MTP head {parameters / 1e9:.3f} G parameters, {parameters * 2 / 2**30:.2f} GiB")
    assert lines[head + 1] == "adds 2.00 KiB to the KV of a token and 4.00 KiB to the state of a sequence"
    assert lines[head + 2] == "drafts 3 behind each token, by the MTP head"
    assert any("3 behind each token where up to 4 sequences decode, 2 up to 16" in line for line in info(capsys))
    assert "drafts 3 behind each token where up to 64 sequences decode, else none, by the MTP head" in info(
        capsys, *gpu
    )
    # Two more entries of the window for each of 30 layers with 2 x 16 x 128 + 32 x 128 channels of 2 bytes.
    assert "6 entries" in lines[head + 3] and f"{30 * 2 * 8192 * 2 / 2**10:.2f} KiB more" in lines[head + 3]
    (each,) = [line for line in lines if "of 4096 tokens" in line and line.startswith("sequences")]
    assert each.split("(")[1].split()[0] == f"{(67.54 * 2**20 + 4096 * 22 * 2**10 + 4096 + 960 * 2**10) / 2**20:.2f}"
    lines = info(capsys, *gpu, "--draft-tokens", "0")
    assert "drafts none (--draft-tokens 0)" in lines and any("nothing is drafted" in line for line in lines)
    (each,) = [line for line in lines if "of 4096 tokens" in line and line.startswith("sequences")]
    assert each.endswith(f"({67.54 + 80:.2f} MiB each)")
    lines = info(capsys, *gpu, "--draft-tokens", "7", "--draft-vocabulary", "32768")
    assert "drafts 7 behind each token, by the MTP head" in lines
    assert any("32768 lowest ids" in line and "in FP8" in line and "64.02 MiB" in line for line in lines)
    # A byte for each weight of the head and 4 for each 128 x 128 of them; the weights that are held grow by as much.
    (copied,) = [line for line in info(capsys, *gpu) if "copy of the head" in line]
    assert "among all ids" in copied and f"{248320 * 2048 * (1 + 4 / 128**2) / 2**20:.2f} MiB more" in copied
    for arguments, word in ((["--draft-tokens", "0"], "MTP head"), ([], "at most 248320")):
        assert main(["info", *gpu, *arguments, "--draft-vocabulary", "248321"]) == 1
        said = capsys.readouterr()
        assert word in said.err and not said.out


def test_info_tells_a_head_by_its_tensors(capsys, tmp_path):
    assert any(line.startswith("MTP head 0.") for line in info(capsys))
    for file in SHIPPED.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(SHIPPED / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("mtp.")}, tmp_path / "model.safetensors")
    lines = info(capsys, "--model", str(tmp_path), "--program")
    assert "MTP head none: the checkpoint has no mtp.* tensors, though its config.json names a head" in lines
    assert "drafts none: auto drafts with an MTP head" in lines and "join_tokens" not in "".join(lines)
    lines = info(capsys, "--model", str(tmp_path), "--draft-tokens", "2")
    assert "drafts 2 behind each token, looked up in the sequence" in lines


def test_the_plan_has_the_heads_program(capsys):
    lines = info(capsys, "--program")
    program = lines[next(i for i, line in enumerate(lines) if line.startswith("MTP head, once a draft")) :]
    stages = [line.split(" Replicate")[0] for line in program if line.endswith("Replicate -> Replicate")]
    assert stages[:3] == ["embed_tokens", "join_tokens", "input_layernorm"] and stages[-2:] == ["norm", "lm_head"]
    assert not any("join_tokens" in line for line in info(capsys, "--program", "--draft-tokens", "0"))
    assert "lm_head are the ones above" in program[0] and "fp8" not in "".join(program)
    lines = info(capsys, "--program", "--memory-gib", "80")
    assert "MTP head, once a draft; embed_tokens is the one above" in lines
    assert lines[-1] == "weight [640, 128] Replicate, fp8_block128"


def test_info_says_when_the_weights_do_not_fit(capsys):
    assert main(["info", "--size", "397B-A17B", "--dtype", "bfloat16", "--memory-gib", "100"]) == 0
    assert "none" in capsys.readouterr().out


def test_info_says_how_many_agent_turns_the_prefix_cache_keeps(capsys):
    arguments = ["info", "--size", "35B-A3B", "--dtype", "bfloat16", "--memory-gib", "139", "--max-num-seqs", "32"]
    assert main(arguments) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prefix cache")]
    pages, spare, slots = map(int, re.search(r"\((\d+) pages, (\d+) of (\d+) slots\)", line).groups())
    kept = {int(tokens): int(turns) for turns, tokens in re.findall(r"(\d+) of (\d+) tokens", line)}
    assert slots - spare == 32
    assert kept == {tokens: min(spare, pages * 64 // tokens) for tokens in (512, 4096, 32_768)}
    assert pages * 64 * 20 * 2**10 + slots * 62 * 2**20 < 0.9 * (139 - 64) * 2**30, "more than the memory holds"
    assert main([*arguments, "--no-enable-prefix-caching"]) == 0
    assert "kept: 0 of 512 tokens" in capsys.readouterr().out


def parsers(parser, name=""):
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child, inner in action.choices.items():
                yield from parsers(inner, f"{name} {child}")


@pytest.mark.parametrize(("name", "parser"), list(parsers(build_parser())))
def test_help_names_the_default_of_every_option(name, parser):
    assert parser.format_help().startswith("usage")
    for action in parser._actions:
        if action.option_strings and not {"--help", "--version"} & set(action.option_strings):
            assert "default" in action.help, f"{name} {action.option_strings[0]}"
            shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
            if isinstance(action, argparse.BooleanOptionalAction):
                shown = "on" if action.default else "off"
            assert not action.default or shown in action.help, f"{name} {action.option_strings[0]}: {shown}"


def test_every_sampling_parameter_is_a_flag():
    parser = argparse.ArgumentParser()
    add_sampling_options(parser, max_tokens=5)
    flags = (
        "--n 2 --presence-penalty 1 --frequency-penalty -1 --repetition-penalty 1.5 --temperature .5 --top-p .9 "
        "--top-k 3 --min-p .1 --stop a --stop b --stop-token-ids 1 2 --bad-words c --include-stop-str-in-output "
        "--ignore-eos --max-tokens 9 --min-tokens 2 --logprobs 1 --prompt-logprobs 0 --no-skip-special-tokens "
        "--logit-bias 4=-5 --allowed-token-ids 6 7 --thinking-token-budget 8"
    )
    chosen = chosen_sampling(parser.parse_args(flags.split()))
    assert chosen.keys() == SamplingParams.__dataclass_fields__.keys() - {"seed"}
    params = SamplingParams(**chosen)
    default = SamplingParams()
    assert not [name for name in chosen if getattr(params, name) == getattr(default, name)]
    assert params.logit_bias == ((4, -5.0),) and params.stop == ("a", "b")
    assert chosen_sampling(parser.parse_args([])) == {"max_tokens": 5}


def test_json_holds_what_the_text_cannot(capsys):
    arguments = ["generate", "Hello!", "--json", "--logprobs", "2", "--prompt-logprobs", "0", "--n", "2", "--quiet"]
    assert main([*arguments, "--max-tokens", "3", "--log-steps", "/dev/null"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert err == "" and record["usage"]["completion_tokens"] == 6
    assert [len(output["logprobs"]) for output in record["outputs"]] == [3, 3]
    assert len(record["prompt_logprobs"]) == record["usage"]["prompt_tokens"]


def test_a_profile_names_the_phases_and_the_stages(capsys, tmp_path):
    arguments = ["generate", "Hello!", "--raw", "--max-tokens", "2", "--nvtx", "--quiet"]
    arguments += ["--profile", str(tmp_path / "new")]
    assert main(arguments) == 0
    assert "CUDA" in capsys.readouterr().err
    trace = json.loads(gzip.decompress((tmp_path / "new" / "generate.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"plan", "launch", "forward", "sample", "reconcile"} <= names
    assert {"embed_tokens", "layers.0.linear_attn", "layers.3.self_attn", "layers.7.mlp", "norm", "lm_head"} <= names


@pytest.fixture(scope="module")
def llm():
    return LLM(progress=False, max_num_seqs=4, validate=True)


def test_ranges_nest_and_close_and_leave_the_results_alone():
    opened, seen = [], set()

    @contextmanager
    def recorded(name):
        seen.add((opened[-1] if opened else None, name))
        opened.append(name)
        yield
        assert opened.pop() == name

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    plain, ranged = (LLM(progress=False, max_num_seqs=1) for _ in range(2))
    add_ranges(ranged.engine, recorded)
    texts = [llm.generate([[1, 2, 3]], params, progress=False)[0].outputs[0].token_ids for llm in (plain, ranged)]
    assert texts[0] == texts[1] and not opened
    assert {("forward", name) for name in ranged.engine.runner.model.names} <= seen
    assert {(None, "plan"), (None, "launch"), (None, "reconcile"), (None, "sample"), (None, "forward")} <= seen


def in_use(llm):
    stats = llm.engine.cache.stats()
    return stats["running"], stats["pages_held"], stats["slots_working"], llm.engine.cache.check()


def test_an_interrupt_waits_for_the_step_and_leaves_nothing_running(llm):
    launch, handler = llm.engine.runner.launch, signal.getsignal(signal.SIGINT)
    launched = []

    def launch_interrupted(step):
        signal.raise_signal(signal.SIGINT)  # in the middle of a step
        launched.append(launch(step))
        return launched[-1]

    llm.engine.runner.launch = launch_interrupted
    try:
        with interruptible(llm.engine), pytest.raises(KeyboardInterrupt):
            llm.generate([[1, 2, 3]] * 3, SamplingParams(max_tokens=50), progress=False)
    finally:
        llm.engine.runner.launch = launch
    assert len(launched) == 1 and in_use(llm) == (0, 0, 0, "")
    assert signal.getsignal(signal.SIGINT) is handler
    assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), progress=False)[0].finished


def test_a_second_interrupt_does_not_wait_and_the_engine_says_that_it_has_stopped():
    llm = LLM(progress=False, max_num_seqs=1)

    def hang(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    llm.engine.runner.launch = hang
    with interruptible(llm.engine), pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=50), progress=False)
    with pytest.raises(EngineError, match="stopped: KeyboardInterrupt"):
        llm.generate([[1, 2, 3]], progress=False)


def test_control_c_ends_a_command_with_one_line_and_130(capsys, monkeypatch):
    step, engines = Engine.step, []

    def interrupted(engine):
        engines.append(engine)
        if len(engines) == 4:
            signal.raise_signal(signal.SIGINT)
        step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    assert main(["generate", "Hello!", "--quiet", "--ignore-eos"]) == 130
    assert capsys.readouterr().err.strip() == "stopped."
    assert engines[0].cache.stats()["running"] == 0 and not engines[0].has_work


def test_info_says_what_host_memory_keeps_beside_the_device(capsys):
    arguments = ["info", "--size", "35B-A3B", "--dtype", "bfloat16", "--memory-gib", "139"]
    assert main([*arguments, "--host-memory", "100"]) == 0
    found = re.search(r"in host memory (\d+) tokens and (\d+) states more", capsys.readouterr().out)
    tokens, states = int(found[1]), int(found[2])
    # 20 KiB of keys and values a token and about 63 MiB a state: 8192 tokens beside each
    assert 8192 * states <= tokens < 8400 * states and 90 < (tokens * 20 * 2**10 + states * 63 * 2**20) / 2**30 < 101
    assert main(arguments) == 0 and "host memory" not in capsys.readouterr().out
