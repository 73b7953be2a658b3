"""A rank's decode step and its sampling read no tensor on the host, so that they can stand in a CUDA graph.

Fake tensors have shapes and no values: an operation that asks for a value raises.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.executor.batch import Rotary, Tables, decode_batch
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.model.mtp import DraftHead
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.parallel import sampling
from tokenspeed.engine.parallel.comm import Communicator
from tokenspeed.engine.parallel.mesh import Mesh

from . import models


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("tp", [1, 4])
@torch.inference_mode()
def test_a_decode_step_reads_nothing_on_the_host(moe, tp):
    config = ModelConfig.from_dict(models.config(moe, kv_heads=2, mtp_num_hidden_layers=1))
    communicator = Communicator(Mesh(tp, tp if moe else 1))
    with FakeTensorMode():
        model = Qwen3_5.empty(config, torch.float32, models.CPU, communicator, mtp=True)
        memory = Memory(MemoryLayout(model.share, torch.float32), 4, 3, models.CPU)
        tables = Tables(3, 2, models.CPU)
        rotary = Rotary(*model.rotary(models.CPU))
        batch = decode_batch(torch.empty(3, 3, dtype=torch.int32), 1, memory, tables, rotary)
        logits, hidden = model(batch)
        assert logits.shape == (3, models.VOCAB // tp)
        for _ in range(2):
            draft_logits, hidden = model.mtp(batch, hidden)
            assert draft_logits.shape == logits.shape and hidden.shape == (3, config.hidden)
        if tp == 1:
            model.mtp.program[-1] = DraftHead(model.mtp.head, torch.arange(20), fp8=False)
            model.mtp.link()
            assert model.mtp(batch, hidden).logits.shape == logits.shape
        assert sampling.greedy(logits, communicator).shape == (3,)
        floats, integers = torch.empty(3, 3).unbind(0), torch.empty(2, 3, dtype=torch.int64).unbind(0)
        values = (floats[0], torch.empty(3, dtype=torch.int32), *floats[1:], *integers)
        assert sampling.sample(logits, *values, communicator).shape == (3,)


def test_a_host_read_would_be_found():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty(3).sum().item()
