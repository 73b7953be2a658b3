"""The MTP head against an oracle in plain torch: logits and hidden states, fp32, 1e-4."""

import json
import shutil
from dataclasses import replace

import mtp_oracle
import pytest
import torch
from checkpoints import CPU, VOCAB, Shape
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.tiny_agent.config import ModelConfig as TinyAgentConfig
from examples.tiny_agent.mtp import MtpHead
from examples.tiny_agent.train_mtp import add_head, draft_states, load_head, load_trunk
from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import FULL, ModelConfig
from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.model.inputs import Batch, PrefillRows, Rows
from tokenspeed.engine.model.mtp import Output
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import holds_mtp, load_weights
from tokenspeed.ops.fp8 import BLOCK, dequantise, quantise_blocks

# Of what is right (rounding makes 1.1e-4 where a machine sums in another order), and of what a planted bug changes.
TOLERANCE, SHOWS = 5e-4, 1e-2
TOKENS = 75  # more than a page
PAGES = (2, 0, 3)
SHAPES = {
    "dense": Shape(gqa=6, tied=True),
    "moe": Shape(moe=True, gqa=4),
}


def load(directory, mtp: bool = True) -> Qwen3_5:
    config = ModelConfig.from_directory(directory)
    model = Qwen3_5.empty(config, torch.float32, CPU, mtp=mtp and holds_mtp(config, directory))
    load_weights(model, directory, progress=False)
    return model


class Sequence:
    """One sequence in memory of its own: the trunk's forward passes and the head's, and how far they have come."""

    def __init__(self, model: Qwen3_5):
        self.model, self.memory = model, Memory(MemoryLayout(model.share, torch.float32), 4, 1, CPU)

    def batch(
        self, tokens: Tensor, start: int, decode: bool = False, logit_rows: Tensor | None = None, shift: int = 0
    ) -> Batch:
        """shift: from the rows of the pages, `start` the first of them, to positions."""
        count = len(tokens)
        places = torch.arange(start, start + count)
        pages = torch.tensor(PAGES)
        inverse, _ = self.model.rotary(CPU)
        angles = (places + shift)[:, None] * inverse
        slot = torch.zeros(1, dtype=torch.int32)
        rows = (pages[None].int(), torch.tensor([start], dtype=torch.int32), slot, slot)
        ends = torch.tensor([0, count], dtype=torch.int32)
        none = torch.zeros(0, 3, dtype=torch.int32)
        return Batch(
            layers=self.memory.layers,
            tokens=tokens,
            cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1),
            kv_slots=pages[places // 64] * 64 + places % 64,
            logit_rows=torch.arange(count) if logit_rows is None and not decode else logit_rows,
            decode=Rows(*rows) if decode else None,
            decode_tokens=count if decode else 0,
            prefill=None if decode else PrefillRows(*rows, places * 0, places.int(), ends, none, count),
        )

    @torch.inference_mode()
    def trunk(self, ids: Tensor, start: int, **how) -> Output:
        return self.model(self.batch(ids, start, **how))

    @torch.inference_mode()
    def head(self, next_ids: Tensor, start: int, hidden: Tensor, logit_rows: Tensor | None = None) -> Output:
        """Behind positions start and so on, in the rows of the tokens that come next."""
        batch = self.batch(next_ids, start + 1, decode=True, logit_rows=logit_rows, shift=-1)
        return self.model.mtp(batch, hidden)

    @torch.inference_mode()
    def store(self, next_ids: Tensor, start: int, hidden: Tensor) -> None:
        """The same for keys and values alone."""
        self.model.mtp.store(self.batch(next_ids, start + 1, shift=-1), hidden)


@pytest.fixture(scope="module", params=SHAPES)
def case(request, tmp_path_factory):
    return mtp_oracle.write_checkpoint(tmp_path_factory.mktemp(request.param), SHAPES[request.param], TOKENS)


@pytest.fixture
def model(case):
    return load(case.directory)


def distance(output: Output, logits: Tensor, hidden: Tensor) -> float:
    assert output.logits.shape == logits.shape and output.hidden.shape == hidden.shape
    return max((output.logits - logits).abs().max().item(), (output.hidden - hidden).abs().max().item())


def in_chunks(model: Qwen3_5, case: mtp_oracle.Case, ends: list[int]) -> float:
    """How far the head is from the oracle where prompt and drafts come in chunks that end there."""
    sequence, worst, start = Sequence(model), 0.0, 0
    for end in ends:
        trunk = sequence.trunk(case.ids[start:end], start)
        worst = max(worst, distance(trunk, case.logits[start:end], case.hidden[start:end]))
        head = sequence.head(case.ids[start + 1 : end + 1], start, trunk.hidden)
        worst = max(worst, distance(head, case.mtp_logits[start:end], case.mtp_hidden[start:end]))
        start = end
    return worst


def one_by_one(model: Qwen3_5, case: mtp_oracle.Case) -> float:
    """The same where decode batches of one token follow a short prompt."""
    sequence, worst = Sequence(model), 0.0
    sequence.head(case.ids[1:11], 0, sequence.trunk(case.ids[:10], 0).hidden)
    for t in range(10, TOKENS - 1):
        trunk = sequence.trunk(case.ids[t : t + 1], t, decode=True)
        worst = max(worst, distance(trunk, case.logits[t : t + 1], case.hidden[t : t + 1]))
        head = sequence.head(case.ids[t + 1 : t + 2], t, trunk.hidden)
        worst = max(worst, distance(head, case.mtp_logits[t : t + 1], case.mtp_hidden[t : t + 1]))
    return worst


def recursive(model: Qwen3_5, case: mtp_oracle.Case) -> float:
    """The same for three further drafts behind a prompt, each from the head's own state and the draft before it."""
    sequence, oracle = Sequence(model), mtp_oracle.MtpOracle(case.head.weights, case.head.config)
    oracle.run(case.ids[1:64], case.hidden[:63])
    output = sequence.head(case.ids[1:64], 0, sequence.trunk(case.ids[:63], 0).hidden)
    hidden, logits, worst = case.mtp_hidden[62:63], case.mtp_logits[62:63], 0.0
    for depth in range(3):
        draft = logits.argmax(-1)
        logits, hidden = oracle.run(draft, hidden)
        output = sequence.head(draft, 63 + depth, output.hidden[-1:])
        worst = max(worst, distance(output, logits, hidden))
    return worst


WAYS = {
    "at once": lambda model, case: in_chunks(model, case, [TOKENS - 1]),
    "in chunks": lambda model, case: in_chunks(model, case, [1, 2, 30, 64, 65, TOKENS - 1]),
    "one by one": one_by_one,
    "recursive": recursive,
}


@pytest.mark.parametrize("way", WAYS)
def test_logits_and_states_are_the_oracles(model, case, way):
    assert WAYS[way](model, case) <= TOLERANCE


def test_a_chain_of_drafts_is_that_of_the_network_that_was_trained(tmp_path):
    """The tiny agent's trunk with a random head: the drafts of a chain, against those its training computes at once."""
    directory = tmp_path / "model"
    shutil.copytree(SHIPPED, directory)
    trunk, trained = load_trunk(SHIPPED), MtpHead(TinyAgentConfig())
    trained.start_from(trunk)
    add_head(directory, trained)
    sequence, ids = Sequence(load(directory)), torch.arange(3, 113, 5)
    with torch.no_grad():
        _, *states = draft_states(trunk, load_head(directory), ids[None], 3)
    start = 15
    hidden = sequence.head(ids[1 : start + 2], 0, sequence.trunk(ids[: start + 1], 0).hidden).hidden[-1:]
    for draft, expected in enumerate(states):
        if draft:
            at = start + draft
            hidden = sequence.head(ids[at + 1 : at + 2], at, hidden).hidden
        assert (hidden[0] - expected[0, start + draft]).abs().max() <= TOLERANCE


def test_states_of_all_tokens_come_with_the_logits_of_some(model, case):
    rows = torch.tensor([3, 40])
    sequence = Sequence(model)
    trunk = sequence.trunk(case.ids[:-1], 0, logit_rows=rows)
    assert distance(trunk, case.logits[rows], case.hidden[:-1]) <= TOLERANCE
    head = sequence.head(case.ids[1:], 0, trunk.hidden, logit_rows=rows)
    assert distance(head, case.mtp_logits[rows], case.mtp_hidden) <= TOLERANCE


def test_the_heads_keys_and_values_lie_behind_the_trunks(model, case):
    config = model.config
    assert MemoryLayout(config, torch.float32).page_shape[0] == config.layer_types.count(FULL) + 1
    sequence = Sequence(model)
    hidden = sequence.trunk(case.ids[:-1], 0).hidden
    before, view = sequence.memory.kv.clone(), sequence.memory.layers[len(config.layer_types)]
    assert not view.any()
    sequence.head(case.ids[1:], 0, hidden)
    assert torch.equal(before[:, :-1], sequence.memory.kv[:, :-1])
    assert view.data_ptr() == sequence.memory.kv[:, -1].data_ptr()
    assert view[PAGES[0], :, :, 1:].all() and not view[PAGES[0], :, :, 0].any(), "row 0 stays empty"


def test_keys_and_values_alone_are_those_of_the_whole_head(model, case):
    whole, stored = Sequence(model), Sequence(model)
    for sequence in (whole, stored):
        hidden = sequence.trunk(case.ids[:-1], 0).hidden
    whole.head(case.ids[1:], 0, hidden)
    stored.store(case.ids[1:], 0, hidden)
    assert (whole.memory.kv - stored.memory.kv).abs().max() <= TOLERANCE
    stored.memory.layers[len(model.config.layer_types)][PAGES[0], :, :, 0] = torch.nan  # row 0 may hold anything
    head = stored.head(case.ids[-1:], TOKENS - 2, hidden[-1:])
    assert distance(head, case.mtp_logits[-1:], case.mtp_hidden[-1:]) <= TOLERANCE


def test_without_a_head_nothing_is_kept_for_one(case):
    model = load(case.directory, mtp=False)
    assert model.mtp is None and model.config.mtp_layers == 0
    assert MemoryLayout(model.share, torch.float32).page_shape[0] == model.config.full_layers
    output = Sequence(model).trunk(case.ids, 0)
    assert output.hidden is None and (output.logits - case.logits).abs().max() <= TOLERANCE


def test_a_reduced_vocabulary_changes_no_logits_of_its_ids_and_offers_no_others(model, case):
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:50]
    for kept in (ids[10:], ids):
        model.mtp.copy_head(kept)
    others = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, ids, False)
    sequence = Sequence(model)
    hidden = sequence.trunk(case.ids[:-1], 0).hidden
    for output, rows in (
        (sequence.head(case.ids[1:], 0, hidden), slice(None)),
        (sequence.head(case.ids[-1:], TOKENS - 2, hidden[-1:]), slice(-1, None)),
    ):
        expected = case.mtp_logits[rows].masked_fill(others, 0)
        shown = output._replace(logits=output.logits.masked_fill(others, 0))
        assert distance(shown, expected, case.mtp_hidden[rows]) <= TOLERANCE
        assert (output.logits[:, others] == -torch.inf).all()
        assert set(output.logits.argmax(-1).tolist()) <= set(ids.tolist())


@pytest.mark.parametrize("count", [None, 50])
def test_a_head_in_fp8_is_the_product_with_its_dequantised_rows(model, case, monkeypatch, count):
    monkeypatch.setattr("tokenspeed.engine.model.mtp._QUANTISED_ROWS", BLOCK)  # more than once
    ids = None if count is None else torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:count]
    rows = model.mtp.head.weight if ids is None else model.mtp.head.weight[ids]
    model.mtp.copy_head(ids, fp8=True)
    assert model.mtp.drafts_in_fp8 and model.mtp.program[-1].weight.format == "fp8_block128"
    sequence = Sequence(model)
    hidden = sequence.trunk(case.ids[:-1], 0).hidden
    output = sequence.head(case.ids[1:], 0, hidden)
    logits = output.logits if ids is None else output.logits[:, ids]
    assert (logits - output.hidden @ dequantise(*quantise_blocks(rows)).T).abs().max() <= TOLERANCE
    assert (output.hidden - case.mtp_hidden).abs().max() <= TOLERANCE, "the head's own rows are as they were"
    assert 1e-3 < (logits - case.mtp_logits[:, slice(None) if ids is None else ids]).abs().max() < 0.2
    assert (sequence.trunk(case.ids[:-1], 0).logits - case.logits[:-1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        (torch.tensor([3, VOCAB]), str(VOCAB)),
        (torch.tensor([-1, 3]), "-1"),
        (torch.tensor([3, 3]), "distinct"),
        (torch.tensor([], dtype=torch.int64), "[0]"),
        (torch.tensor([[3]]), "[1, 1]"),
        (torch.tensor([3.0]), "float32"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(case, ids, word):
    with pytest.raises(ConfigError) as error:
        load(case.directory).mtp.copy_head(ids)
    assert word in str(error.value)


def rewrite(case, directory, change) -> None:
    tensors = load_file(case.directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text((case.directory / "config.json").read_text())


def test_files_without_the_heads_tensors_load_without_a_head(case, tmp_path):
    rewrite(case, tmp_path, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("mtp.")})
    assert ModelConfig.from_directory(tmp_path).mtp_layers == 1
    assert load(tmp_path).mtp is None


@pytest.mark.parametrize("key", ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.k_norm.weight"])
def test_an_incomplete_head_is_refused_by_what_it_lacks(case, tmp_path, key):
    rewrite(case, tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(ConfigError, match=key):
        load(tmp_path)


def test_a_tensor_too_many_in_the_head_is_refused(case, tmp_path):
    rewrite(case, tmp_path, lambda tensors: tensors | {"mtp.layers.1.norm.weight": torch.ones(2)})
    with pytest.raises(ConfigError, match=r"mtp\.layers\.1\.norm\.weight"):
        load(tmp_path)
    assert load(tmp_path, mtp=False).mtp is None


def test_experts_one_by_one_are_the_fused_ones(tmp_path):
    for fused in (True, False):
        mtp_oracle.write_checkpoint(tmp_path / str(fused), SHAPES["moe"], 5, experts_fused=fused)
    fused, split = (load(tmp_path / name) for name in ("True", "False"))
    assert all(torch.equal(p, q) for p, q in zip(fused.parameters(), split.parameters(), strict=True))


@pytest.mark.parametrize("value", [2, -1, True, "1"])
def test_a_config_with_another_number_of_layers_is_refused(case, value):
    raw = json.loads((case.directory / "config.json").read_text())
    with pytest.raises(ConfigError, match="mtp_num_hidden_layers") as error:
        ModelConfig.from_dict(raw | {"mtp_num_hidden_layers": value})
    assert repr(value) in str(error.value)
    assert ModelConfig.from_dict(raw | {"mtp_num_hidden_layers": 0}).mtp_layers == 0
    assert ModelConfig.from_dict(raw | {"mtp_num_hidden_layers": None}).mtp_layers == 0


class Planted:
    """Bugs that such a head has had elsewhere, each put into a model that was right."""

    def state_before_the_final_norm(self, model):
        head = model.program[-1]
        right = head.forward
        head.forward = lambda x, residual, batch: (right(x, residual, batch)[0], x.x + x.residual)
        model.link()

    def state_first_in_the_join(self, model):
        join = model.mtp.program[1]
        join.fc.copy_(join.fc.roll(join.fc.shape[0], dims=1))

    def norms_of_the_join_swapped(self, model):
        join = model.mtp.program[1]
        join.embedding_norm, join.hidden_norm = join.hidden_norm, join.embedding_norm

    def norms_that_multiply_by_the_weight_alone(self, model):
        join = model.mtp.program[1]
        join.embedding_norm.sub_(1)
        join.hidden_norm.sub_(1)

    def one_position_too_far(self, model):
        right, sequence = model.mtp.forward, Sequence(model)

        def moved(batch, hidden):
            rows = sequence.batch(batch.tokens, int(batch.decode.context_lens) + 1, decode=True, shift=-1)
            return right(replace(rows, layers=batch.layers), hidden)

        model.mtp.forward = moved

    def a_draft_at_the_position_before(self, model):
        right, sequence = model.mtp.forward, Sequence(model)

        def moved(batch, hidden):
            row = int(batch.decode.context_lens) - (len(batch.tokens) == 1)
            rows = sequence.batch(batch.tokens, row, decode=True, shift=-1)
            return right(replace(rows, layers=batch.layers), hidden)

        model.mtp.forward = moved

    def this_token_for_the_next(self, model):
        right = model.mtp.forward
        model.mtp.forward = lambda batch, hidden: right(replace(batch, tokens=batch.tokens.roll(1)), hidden)

    def the_trunks_norm_for_its_own(self, model):
        model.mtp.program[-2].weight = model.program[-2].weight

    def own_norm_forgotten_in_the_state(self, model):
        right = model.mtp.program[-1].forward
        model.mtp._calls[-1] = lambda x, residual, batch: (right(x, residual, batch)[0], x.x + x.residual)

    def keys_in_the_trunks_last_layer(self, model):
        model.mtp.program[3].layer = len(model.config.layer_types) - 1


@pytest.mark.parametrize("bug", [name for name in vars(Planted) if not name.startswith("_")])
def test_a_planted_bug_shows(model, case, bug):
    with torch.no_grad():
        getattr(Planted(), bug)(model)
    assert max(run(model, case) for run in WAYS.values()) > SHOWS
