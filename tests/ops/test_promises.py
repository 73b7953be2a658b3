"""What a caller promises and a tensor alone tells: the torch implementations look where that costs nothing."""

import pytest
import torch

import tokenspeed.ops

from .backends import make_backend
from .samples import SAMPLES


@pytest.fixture(scope="module")
def host():
    return make_backend("torch-fp32")


def call(host, name: str, **changes):
    """The operator's sample with some of its arguments changed by functions of them."""
    operator = getattr(torch.ops.tokenspeed, name)
    names = [argument.name for argument in operator.default._schema.arguments]
    arguments = dict(zip(names, SAMPLES[name](host), strict=False))
    return operator(*(changes[key](value) if key in changes else value for key, value in arguments.items()))


def test_the_samples_keep_them(host):
    assert tokenspeed.ops.__all__
    for name in ("paged_attention_prefill", "gated_delta_rule_prefill", "causal_conv1d", "moe_route"):
        call(host, name)


@pytest.mark.parametrize("name", ["paged_attention_prefill", "gated_delta_rule_prefill"])
def test_a_max_seqlen_below_a_sequence_is_refused(host, name):
    with pytest.raises(ValueError, match=r"max_seqlen is 1, and a sequence of the batch has \d+ tokens"):
        call(host, name, max_seqlen=lambda _: 1)


@pytest.mark.parametrize("name", ["paged_attention_prefill", "paged_attention_decode"])
def test_a_page_table_without_room_for_a_sequence_is_refused(host, name):
    with pytest.raises(ValueError, match=r"page_table has \d+ pages of \d+ tokens, and a sequence has \d+"):
        call(host, name, page_table=lambda table: table[:, :1], context_lens=lambda lens: lens.clamp(min=200))


@pytest.mark.parametrize("name", ["causal_conv1d", "gated_delta_rule_prefill", "gated_delta_rule_decode"])
def test_a_slot_that_is_written_twice_is_refused(host, name):
    with pytest.raises(ValueError, match="one of them twice"):
        call(host, name, write_slot=lambda slots: torch.full_like(slots, 1))


@pytest.mark.parametrize("name", ["causal_conv1d", "gated_delta_rule_prefill"])
def test_a_snapshot_in_a_slot_that_is_written_is_refused(host, name):
    with pytest.raises(ValueError, match="one of them twice"):
        call(host, name, snapshots=lambda rows: torch.cat([rows[rows[:, 2] >= 0]] * 2))


@pytest.mark.parametrize("top_k", [0, -1, 10_000])
def test_more_experts_than_there_are_cannot_be_chosen(host, top_k):
    with pytest.raises(ValueError, match=rf"top_k is {top_k}; it must be from 1 to \d+"):
        call(host, "moe_route", top_k=lambda _: top_k)
