"""FP8 checkpoints in the official layout load as what they stand for, and every pitfall of the layout is seen."""

import json
from dataclasses import replace

import pytest
import torch
from fp8_checkpoints import PREFIX, Official, Release, load, release, wide
from safetensors.torch import load_file
from test_mtp import Sequence

from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.model.parameters import Weight
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.quantization import PRODUCTS

TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=["dense", "moe"])
def released(request, tmp_path_factory) -> Release:
    moe = request.param == "moe"
    return release(tmp_path_factory.mktemp(request.param), moe, **wide(moe))


@pytest.fixture
def official(released, tmp_path):
    """A copy to break, and where to write it."""
    made = released.official
    return replace(made, tensors=dict(made.tensors), not_converted=list(made.not_converted)), tmp_path / "broken"


def weights(model: Qwen3_5) -> dict[str, Weight]:
    """The weights of the products, by stage and name."""
    stages = zip(model.names, model.program, strict=True)
    return {
        f"{name}.{below}": module
        for name, stage in stages
        for below, module in stage.named_modules()
        if isinstance(module, Weight)
    }


def same(a: Qwen3_5, b: Qwen3_5) -> bool:
    def bits(p):
        return p.view(torch.uint8) if p.dtype.itemsize == 1 else p

    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return all(p.dtype == q.dtype and torch.equal(bits(p), bits(q)) for p, q in pairs)


def refused(made: Official, directory, *expected: str, quantization: str = "auto") -> None:
    made.write(directory)
    with pytest.raises(ConfigError) as error:
        load(directory, quantization)
    for word in expected:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_logits_are_those_of_the_dequantised_checkpoint(released):
    """`transformers` computes them, prefill and decode; what is held is e4m3, and only what should be."""
    model = load(released.directory)
    assert (released.run(model) - released.logits).abs().max() <= TOLERANCE
    held = weights(model)
    plain = {name for name, weight in held.items() if weight.format == "fp32"}
    assert plain == {name for name in held if name.endswith("in_proj.1")}, "b and a, the router and the shared gate"
    assert {weight.format for name, weight in held.items() if name not in plain} == {"fp8_block128"}


def test_dequantised_while_loading_it_is_the_checkpoint_dequantised_by_hand(released):
    model = load(released.directory, "none")
    assert same(model, load(released.plain))
    assert {weight.format for weight in weights(model).values()} == {"fp32"}
    assert (released.run(model) - released.logits).abs().max() <= TOLERANCE


def drafts(model: Qwen3_5, ids: torch.Tensor) -> torch.Tensor:
    """Logits and states of the MTP head over a prompt."""
    sequence = Sequence(model)
    output = sequence.head(ids[1:], 0, sequence.trunk(ids[:-1], 0).hidden)
    return torch.cat([output.logits, output.hidden], dim=1)


def test_an_mtp_head_in_fp8_drafts_as_the_one_it_stands_for(released):
    model, plain = load(released.directory, mtp=True), load(released.plain, mtp=True)
    assert same(load(released.directory, "none", mtp=True), plain)
    wanted = drafts(plain, released.ids[:70])
    assert (drafts(model, released.ids[:70]) - wanted).abs().max() <= TOLERANCE
    layer = [module for stage in model.mtp.program for module in stage.modules() if isinstance(module, Weight)]
    assert sum(weight.format == "fp8_block128" for weight in layer) >= 4
    assert model.mtp.program[1].fc.dtype == torch.float32, "fc is not converted"


def test_an_mtp_head_in_bf16_beside_fp8_weights_is_quantised_with_them(released, official):
    """It only drafts: what it says is verified."""
    made, directory = official
    plain = load_file(released.plain / "model.safetensors")
    made.tensors = {n: t for n, t in made.tensors.items() if not n.startswith("mtp.")}
    made.tensors |= {name: tensor for name, tensor in plain.items() if name.startswith("mtp.")}
    model, theirs = load(made.write(directory), mtp=True), load(released.directory, mtp=True)
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in theirs.parameters()]
    wanted = drafts(theirs, released.ids[:70])
    assert (drafts(model, released.ids[:70]) - wanted).norm() / wanted.norm() < 0.05


def test_in_bf16_the_weights_stay_what_they_are(released):
    """Dequantised to bf16 each is rounded once more, so that e4m3 weights are no further from the truth."""
    errors = []
    for quantization in ("auto", "none"):
        logits = released.run(load(released.directory, quantization, torch.bfloat16), torch.bfloat16).float()
        errors.append((logits - released.logits).norm() / released.logits.norm())
    assert errors[0] < 1.1 * errors[1]
    assert errors[1] < 0.15, "a token may go to other experts in bf16"


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_scales_in_fp32_are_kept(moe, tmp_path):
    made = release(tmp_path, moe, tokens=20, scale_dtype=torch.float32, **wide(moe))
    key = f"{PREFIX}layers.0.linear_attn.out_proj.weight_scale_inv"
    made.official.tensors[key] *= 1 + 2**-20  # bf16 would round it off
    model = load(made.official.write(made.directory))
    held = weights(model)["layers.0.linear_attn.out"].scale
    assert torch.equal(held, made.official.tensors[key])
    assert not torch.equal(held, held.bfloat16().float())


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_products_that_do_not_begin_with_a_block_are_dequantised(moe, tmp_path):
    """The sizes of the other tests' models: no part of a joined weight is a multiple of 128 rows."""
    made = release(tmp_path, moe)
    model = load(made.directory)
    assert (made.run(model) - made.logits).abs().max() <= TOLERANCE
    formats = {name: weight.format for name, weight in weights(model).items()}
    assert {formats[name] for name in formats if name.endswith(("qkv", "in_proj.0"))} == {"fp32"}
    assert {formats[name] for name in formats if name.endswith(("out", "down"))} == {"fp8_block128"}


def test_either_prefix_of_names_and_of_the_list_is_the_same_checkpoint(released, official):
    made, directory = official
    short = {name.replace(PREFIX, "model.", 1): tensor for name, tensor in made.tensors.items()}
    replace(made, tensors=short).write(directory)
    assert same(load(directory), load(released.directory))
    bare = [name.replace(PREFIX, "", 1) for name in made.not_converted]
    replace(made, not_converted=bare).write(directory)
    assert same(load(directory), load(released.directory))
    ends = ["lm_head", "embed_tokens", "in_proj_a", "in_proj_b", "conv1d", "mlp.gate", "shared_expert_gate"]
    replace(made, not_converted=ends).write(directory)
    assert same(load(directory), load(released.directory))


def test_experts_in_one_tensor_with_one_scale_load_alike(tmp_path):
    made = release(tmp_path, moe=True, tokens=20, **wide(moe=True, moe_intermediate_size=128))
    tensors = {name: tensor for name, tensor in made.official.tensors.items() if ".experts." not in name}
    for base in {n.split(".experts.")[0] + ".experts." for n in made.official.tensors if ".experts." in n}:
        for end in ("", "_scale_inv"):
            parts = [
                torch.stack([made.official.tensors[f"{base}{e}.{part}_proj.weight{end}"] for e in range(8)])
                for part in ("gate", "up", "down")
            ]
            tensors[f"{base}gate_up_proj{end}"] = torch.cat([p.view(torch.uint8) for p in parts[:2]], 1).view(
                parts[0].dtype
            )
            tensors[f"{base}down_proj{end}"] = parts[2]
    replace(made.official, tensors=tensors).write(tmp_path / "fused")
    assert same(load(tmp_path / "fused"), load(made.directory))
    assert same(load(tmp_path / "fused", "none"), load(made.plain))


def test_a_product_in_fp8_in_some_layers_only_is_dequantised_in_all(released, official):
    made, directory = official
    name = f"{PREFIX}layers.1.linear_attn.out_proj"
    plain = load_file(released.plain / "model.safetensors")
    made.tensors[f"{name}.weight"] = plain[name.replace(PREFIX, "model.") + ".weight"]
    del made.tensors[f"{name}.weight_scale_inv"]
    made.not_converted.append(name)
    model = load(made.write(directory))
    formats = {key: weight.format for key, weight in weights(model).items()}
    assert {form for key, form in formats.items() if key.endswith("linear_attn.out")} == {"fp32"}
    assert (released.run(model) - released.logits).abs().max() <= TOLERANCE


def test_a_joined_product_with_one_part_in_fp8_is_dequantised(released, official):
    made, directory = official
    plain = load_file(released.plain / "model.safetensors")
    for layer in (0, 1, 2):
        name = f"{PREFIX}layers.{layer}.linear_attn.in_proj_z"
        made.tensors[f"{name}.weight"] = plain[name.replace(PREFIX, "model.") + ".weight"]
        del made.tensors[f"{name}.weight_scale_inv"]
        made.not_converted.append(name)
    name = f"{PREFIX}layers.3.self_attn.k_proj"
    made.tensors[f"{name}.weight"] = plain[name.replace(PREFIX, "model.") + ".weight"]
    del made.tensors[f"{name}.weight_scale_inv"]
    made.not_converted.append(name)
    model = load(made.write(directory))
    assert (released.run(model) - released.logits).abs().max() <= TOLERANCE
    formats = {key: weight.format for key, weight in weights(model).items()}
    assert formats["layers.0.linear_attn.in_proj.0"] == "fp8_block128", "q, k and v stay in FP8 without z"
    assert formats["layers.3.self_attn.qkv"] == "fp32"


def test_a_list_that_names_another_checkpoints_modules_is_refused(official):
    made, directory = official
    listed = replace(made, not_converted=[*made.not_converted, f"{PREFIX}layers.0.linear_attn.out_proj"])
    refused(listed, directory, "layers.0.linear_attn.out_proj", "F8_E4M3", "modules_to_not_convert", "has it")
    name = f"{PREFIX}layers.2.linear_attn.out_proj.weight"
    made.tensors[name] = made.tensors[name].float()
    del made.tensors[f"{name}_scale_inv"]
    refused(made, directory, "layers.2.linear_attn.out_proj", "F32", "does not have it")


def test_tensors_decide_where_config_json_says_nothing(released, official):
    made, directory = official
    made.write(directory)
    raw = json.loads((directory / "config.json").read_text())
    del raw["quantization_config"]
    (directory / "config.json").write_text(json.dumps(raw))
    assert same(load(directory), load(released.directory))


def test_a_missing_a_lonely_and_a_misshaped_scale_are_named(official):
    made, directory = official
    name = f"{PREFIX}layers.0.linear_attn.out_proj.weight"
    scale = made.tensors.pop(f"{name}_scale_inv")
    refused(made, directory, name, "F8_E4M3", f"{name}_scale_inv", "not there")
    made.tensors[f"{name}_scale_inv"] = torch.ones(3, 1)
    refused(made, directory, f"{name}_scale_inv", "[3, 1]", str(list(scale.shape)), "128 x 128")
    made.tensors[f"{name}_scale_inv"] = scale.int()
    refused(made, directory, f"{name}_scale_inv", "I32")
    made.tensors[f"{name}_scale_inv"] = scale
    whole = made.tensors.pop(name)
    refused(made, directory, "scales of tensors that are not there", f"{name}_scale_inv")
    made.tensors[name] = whole.float()
    made.not_converted.append(name.removesuffix(".weight"))
    refused(made, directory, name, "F32", "has a scale")
    made.tensors[name] = whole
    made.not_converted.pop()
    norm = f"{PREFIX}norm.weight"
    made.tensors[norm] = made.tensors[norm].to(torch.float8_e4m3fn)
    made.tensors[f"{norm}_scale_inv"] = torch.ones(2)
    refused(made, directory, norm, "F8_E4M3")


def test_another_kind_of_scale_is_named(official):
    made, directory = official
    made.tensors[f"{PREFIX}layers.0.linear_attn.out_proj.input_scale"] = torch.ones(())
    refused(made, directory, "no place for", "out_proj.input_scale")


def test_a_missing_weight_in_fp8_is_named(official):
    made, directory = official
    name = f"{PREFIX}layers.3.self_attn.v_proj.weight"
    del made.tensors[name], made.tensors[f"{name}_scale_inv"]
    refused(made, directory, "lacks", name)


def test_both_layouts_of_experts_at_once_are_refused(tmp_path):
    made = release(tmp_path, moe=True, tokens=20, **wide(moe=True)).official
    name = f"{PREFIX}layers.0.mlp.experts."
    gate, up = ([made.tensors[f"{name}{e}.{part}_proj.weight"].float() for e in range(8)] for part in ("gate", "up"))
    made.tensors[f"{name}gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], 1)
    made.not_converted.append(f"{name}gate_up_proj")
    refused(made, tmp_path / "both", "both layouts")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fmt": "e5m2"}, ["fmt 'e5m2'", "e4m3"]),
        ({"activation_scheme": "static"}, ["activation_scheme 'static'", "dynamic"]),
        ({"weight_block_size": None}, ["weight_block_size None", "[128, 128]"]),
        ({"weight_block_size": [64, 64]}, ["[64, 64]", "[128, 128]"]),
        ({"modules_to_not_convert": "lm_head"}, ["modules_to_not_convert", "lm_head", "list"]),
    ],
)
def test_other_kinds_of_fp8_are_named(official, change, expected):
    made, directory = official
    refused(replace(made, quantization=change), directory, *expected)


def test_every_product_of_the_family_can_be_held_in_fp8(released):
    """And is quantised while a plain checkpoint is loaded: the scales are the same as of quantising by hand, up to the
    rounding of scales to bf16 in the latter."""
    model, theirs = load(released.plain, "fp8"), load(released.directory)
    assert model.config.fp8 == PRODUCTS
    pairs = [(weight, weights(theirs)[name]) for name, weight in weights(model).items()]
    assert all(weight.format == other.format for weight, other in pairs)
    for weight, other in pairs:
        if weight.scale is not None:
            # What is quantised has a largest magnitude of 448 already, so nothing is rounded a second time.
            assert torch.allclose(weight.scale, other.scale, rtol=2**-8)
    logits = released.run(model)
    assert (logits - released.logits).norm() / released.logits.norm() < 0.06


def test_quantising_a_checkpoint_in_fp8_leaves_it_as_it_is(released):
    assert same(load(released.directory, "fp8"), load(released.directory))
