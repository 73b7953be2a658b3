"""What cannot be loaded is refused with its numbers before anything is allocated."""

import platform
from dataclasses import replace

import pytest
import torch

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import EngineConfig, ModelConfig, YarnScaling
from tokenspeed.engine.errors import CapacityError, ConfigError
from tokenspeed.engine.executor import loading
from tokenspeed.engine.executor.memory import MemoryLayout
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.model.layers import GatedDeltaNet, MoE
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import load_weights
from tokenspeed.engine.sizes import PUBLISHED


@pytest.mark.parametrize(
    ("size", "dtype", "expected"),
    [("27B", torch.bfloat16, "50.10 GiB as bfloat16"), ("397B-A17B", torch.float32, "1476.51 GiB as float32")],
)
def test_a_model_larger_than_memory_is_refused_with_the_numbers(size, dtype, expected):
    empty = Qwen3_5.empty(PUBLISHED[size], dtype, torch.device("meta"))
    with pytest.raises(CapacityError, match=f"take {expected}, and 10.00 GiB of cpu memory are free"):
        loading.check_weights(empty, 10 << 30, "cpu")
    loading.check_weights(empty, 2000 << 30, "cpu")


def test_weights_are_not_loaded_where_they_do_not_fit(monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(CapacityError, match=r"and 0.00 GiB of cpu memory are free"):
        LLM(progress=False, device="cpu")


def test_the_copy_of_a_head_counts_as_weights_before_they_are_loaded(monkeypatch):
    model = Qwen3_5.empty(ModelConfig.from_directory(SHIPPED), torch.float32, torch.device("meta"), mtp=True)
    held = sum(p.nbytes for p in model.parameters()) + 100 * model.config.hidden * 4
    monkeypatch.setattr(loading, "free_memory", lambda device: held - 1)
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(CapacityError, match="the weights take"):
        LLM(progress=False, device="cpu", draft_vocabulary=100)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_is_copied_in_fp8_where_a_kernel_multiplies_bf16_by_it(dtype, kernel):
    for mtp in (False, True):
        model = Qwen3_5.empty(ModelConfig.from_directory(SHIPPED), dtype, torch.device("cpu"), mtp=mtp)
        loading.copy_head_to_draft(model, None, kernel)
        assert bool(model.mtp) == mtp and (not mtp or model.mtp.drafts_in_fp8 == (kernel and dtype == torch.bfloat16))
        assert not mtp or model.mtp.drafts_in_fp8 == (model.mtp.program[-1] is not model.mtp.head)


def test_weights_count_as_held_where_others_free_more_than_they_take(monkeypatch):
    free = iter([1 << 30, 100 << 30, 100 << 30, 100 << 30])
    monkeypatch.setattr(loading, "free_memory", lambda device: next(free))
    with pytest.raises(CapacityError, match=r"0\.00 GiB are there for KV pages and state slots"):
        LLM(progress=False, device="cpu", gpu_memory_utilization=1e-9)


def test_a_context_beyond_the_model_s_needs_yarn():
    plain = PUBLISHED["0.8B"]
    with pytest.raises(ConfigError, match="max_model_len is 1000000; the model's context is 262144 tokens"):
        loading.check_context(plain, EngineConfig(max_model_len=1_000_000))
    loading.check_context(plain, EngineConfig(max_model_len=262_144))
    with pytest.raises(ConfigError, match="max_model_len is 5000000"):
        LLM(progress=False, device="cpu", max_model_len=5_000_000)
    yarn = YarnScaling(4.0, 262_144, None, 32.0, 1.0, None, None, True)
    stretched = replace(plain, rope=replace(plain.rope, yarn=yarn), max_context=4 * 262_144)
    loading.check_context(stretched, EngineConfig(max_model_len=1_000_000))


def test_utilization_is_what_one_engine_takes_weights_included():
    """A card of 100 GiB, of which weights take 40 and others 30: what is asked for is this engine's own share."""
    model = PUBLISHED["0.8B"]
    layout = MemoryLayout(model, torch.bfloat16)

    def used(device_type, **settings):
        sizes = 30 << 30, 40 << 30, 100 << 30
        return loading.fit_memory(model, layout, EngineConfig(**settings), *sizes, device_type).bytes / 2**30

    assert used("cuda") == pytest.approx(20, abs=0.1), "all but a tenth of the card"
    assert used("cuda", gpu_memory_utilization=0.65) == pytest.approx(25, abs=0.1)
    assert used("cuda", gpu_memory_utilization=0.5) == pytest.approx(10, abs=0.1)
    assert used("cpu", max_num_seqs=512) == pytest.approx(15, abs=0.1), "half of what is free"
    with pytest.raises(CapacityError, match="raise gpu_memory_utilization"):
        used("cuda", gpu_memory_utilization=0.4)
    with pytest.raises(
        CapacityError, match=r"80.00 GiB of this device, of which others leave 70.00 GiB.* at most 0.70"
    ):
        used("cuda", gpu_memory_utilization=0.8)


def test_freed_memory_is_kept_where_the_library_is_glibc():
    assert loading.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


@pytest.mark.parametrize(("dtype", "by_columns"), [("float32", True), ("bfloat16", False)])
def test_a_cpu_has_the_weights_of_fp32_products_by_columns(dtype, by_columns):
    """What few rows are multiplied with: an input's outputs are neighbours. Their values are what they were."""
    model = LLM(progress=False, device="cpu", dtype=dtype, draft_tokens=0).engine.runner.model
    mixer, experts = (next(s for s in model.program if isinstance(s, kind)) for kind in (GatedDeltaNet, MoE))
    for weight in (
        mixer.in_proj[0].data,
        mixer.out.data,
        mixer.conv,
        experts.shared_down.data,
        model.program[-1].weight,
    ):
        assert (weight.t().is_contiguous(), weight.is_contiguous()) == (by_columns, not by_columns)
    for weight, order in ((experts.gate_up.data, (2, 0, 1)), (experts.down.data, (0, 2, 1))):
        assert weight.permute(order).is_contiguous() == by_columns
    as_loaded = Qwen3_5.empty(model.config, getattr(torch, dtype), torch.device("cpu"))
    load_weights(as_loaded, SHIPPED, progress=False)
    for (name, one), other in zip(as_loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), name
