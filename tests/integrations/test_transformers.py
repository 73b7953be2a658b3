"""The operators inside transformers' models: the same logits, the same texts, whatever the cache goes through."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.engine.checkpoints import VOCAB, Shape, oracle
from tokenspeed import ops
from tokenspeed.integrations.transformers import restore, use_operators

DENSE, MOE = Shape(layers=4), Shape(moe=True, layers=4)


@pytest.fixture(scope="module", params=[DENSE, MOE], ids=str)
def models(request):
    """The model as transformers runs it, and a copy that has the operators."""
    model = oracle(request.param)
    swapped = copy.deepcopy(model)
    use_operators(swapped)
    return model, swapped


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def ids(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_every_module_of_a_layer_but_attention_is_swapped():
    swapped = use_operators(oracle(DENSE))
    assert swapped["GatedDeltaNet"] == 3 and swapped["MLP"] == 4
    assert swapped["RMSNorm"] == 4 + 4 + 1 + 2, "two a layer, the last one, and those of q and k"
    assert use_operators(oracle(MOE))["SparseMoeBlock"] == 4
    with pytest.raises(ValueError, match="none of the modules"):
        use_operators(torch.nn.Sequential(torch.nn.ReLU()))


def test_a_whole_prompt_has_the_same_logits(models):
    model, swapped = models
    near(swapped(ids(2, 130)).logits, model(ids(2, 130)).logits)


def test_tokens_behind_a_cached_prompt_have_the_same_logits(models):
    """One by one, and several at once."""
    model, swapped = models
    tokens, expected = ids(2, 90), model(ids(2, 90)).logits
    cache, logits = DynamicCache(config=swapped.config), []
    for start, end in ((0, 3), (3, 70), (70, 71), (71, 72), (72, 80), *((t, t + 1) for t in range(80, 90))):
        logits.append(swapped(tokens[:, start:end], past_key_values=cache, use_cache=True).logits)
    near(torch.cat(logits, 1), expected)


def test_padding_on_the_left_changes_what_transformers_says_it_changes(models):
    model, swapped = models
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    tokens = ids(2, 12)
    near(swapped(tokens, attention_mask=mask).logits[:, 5:], model(tokens, attention_mask=mask).logits[:, 5:])


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_generate_writes_the_same_ids(models, how):
    model, swapped = models
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **how}
    assert torch.equal(swapped.generate(ids(2, 9), **options), model.generate(ids(2, 9), **options))


def test_a_reordered_cache_goes_on_with_the_sequences_it_was_given(models):
    model, swapped = models
    tokens, expected = ids(2, 20), model(ids(2, 20)).logits
    cache = DynamicCache(config=swapped.config)
    swapped(tokens[:, :10], past_key_values=cache, use_cache=True)
    cache.reorder_cache(torch.tensor([1, 0]))
    near(swapped(tokens[[1, 0], 10:11], past_key_values=cache, use_cache=True).logits[:, 0], expected[[1, 0], 10])


def test_a_cache_that_was_reset_starts_anew(models):
    _, swapped = models
    cache = DynamicCache(config=swapped.config)
    first = swapped(ids(1, 5), past_key_values=cache, use_cache=True).logits
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            layer.reset()
    near(
        swapped.model.layers[0].linear_attn(first[..., :64], cache),
        swapped.model.layers[0].linear_attn(first[..., :64]),
    )


def test_weights_are_shared_and_survive_a_move(models):
    """Stacked weights are views of one matrix; moving the model gives each its own memory again."""
    model, swapped = models
    moved = copy.deepcopy(swapped)
    use_operators(moved)
    mlp = next(module for module in moved.modules() if type(module).__name__.endswith("MLP"))
    assert mlp.up_proj.weight.data_ptr() == mlp.gate_proj.weight.data_ptr() + mlp.gate_proj.weight.nbytes
    moved.double().float()
    near(moved(ids(1, 7)).logits, model(ids(1, 7)).logits)
    assert moved.state_dict().keys() == model.state_dict().keys()


def test_restore_gives_the_model_back(models):
    model, swapped = models
    own = copy.deepcopy(swapped)
    restore(own)
    assert "forward" not in vars(own.model.layers[0].mlp)
    near(own(ids(1, 7)).logits, model(ids(1, 7)).logits)


def test_strict_raises_where_no_kernel_serves_the_model():
    model = oracle(DENSE)
    use_operators(model, strict=True)
    with pytest.raises(ops.NoKernel, match=r"(rms_norm|linear): the (compiled extension|tensors are on cpu)"):
        model(ids(1, 3))


def test_assisted_generation_is_refused(models):
    _, swapped = models
    cache = DynamicCache(config=swapped.config)
    cache.layers[0].activate_past_recording()
    with pytest.raises(ValueError, match="records the past"):
        swapped(ids(1, 3), past_key_values=cache, use_cache=True)
