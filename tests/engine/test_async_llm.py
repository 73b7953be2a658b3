"""The engine behind an event loop: concurrent callers, callers that leave, and its end."""

import asyncio
from contextlib import aclosing

import pytest

from tokenspeed.engine.errors import EngineError, RequestError
from tokenspeed.engine.llm import LLM, AsyncLLM
from tokenspeed.engine.request import SamplingParams

SIZES = {"progress": False, "kv_pages": 24, "state_slots": 8, "max_num_seqs": 4, "validate": True}
PROMPTS = ["The price of kelp is", "Hello!", "One two three four", "Find the owner of onyx."]


def greedy(tokens: int, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **more)


@pytest.fixture(scope="module")
def llm():
    found = AsyncLLM(**SIZES)
    yield found
    found.close()


@pytest.fixture
def fresh():
    found = AsyncLLM(**SIZES)
    yield found
    found.close()


async def last(outputs):
    async for output in outputs:
        found = output
    return found


async def idle(llm: AsyncLLM) -> dict:
    """The cache's gauges once nothing runs."""
    while llm.engine.has_work:
        await asyncio.sleep(0.001)
    return llm.engine.cache.stats()


def test_concurrent_callers_get_what_they_get_alone(llm):
    alone = LLM(**SIZES).generate(PROMPTS, greedy(12), progress=False)

    async def all_at_once():
        return await asyncio.gather(*(last(llm.generate(prompt, greedy(12))) for prompt in PROMPTS * 2))

    together = asyncio.run(all_at_once())
    for got, wanted in zip(together, alone * 2, strict=True):
        assert got.finished and got.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert got.outputs[0].text == wanted.outputs[0].text


def test_the_result_grows_token_by_token_and_earlier_ones_stay_as_they_were(llm):
    async def collect():
        return [output async for output in llm.generate(PROMPTS[0], greedy(6, logprobs=1))]

    seen = asyncio.run(collect())
    assert [len(output.outputs[0].token_ids) for output in seen] == list(range(1, 7))
    assert [len(output.outputs[0].logprobs) for output in seen] == list(range(1, 7))
    assert [output.finished for output in seen] == [False] * 5 + [True]


def test_leaving_the_loop_aborts_the_request_and_returns_its_memory(llm):
    async def leave():
        async with aclosing(llm.generate(PROMPTS[0], greedy(500), "left")) as outputs:
            async for _ in outputs:
                break
        stats = await idle(llm)
        assert stats["running"] == stats["pages_held"] == stats["slots_working"] == 0
        assert llm.engine.cache.check() == ""
        assert (await last(llm.generate(PROMPTS[1], greedy(3)))).finished

    asyncio.run(leave())


def test_a_cancelled_caller_aborts_its_request(llm):
    async def cancel():
        task = asyncio.create_task(last(llm.generate(PROMPTS[0], greedy(900), "cancelled")))
        while not llm.engine.request_ids:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await idle(llm))["running"] == 0

    asyncio.run(cancel())


def test_a_wrong_request_raises_and_harms_nobody(llm):
    async def wrong():
        good = asyncio.create_task(last(llm.generate(PROMPTS[0], greedy(20), "good")))
        with pytest.raises(RequestError, match="empty"):
            await last(llm.generate([], greedy(3)))
        while "good" not in llm.engine.request_ids:
            await asyncio.sleep(0)
        with pytest.raises(RequestError, match=r"'good' is in use"):
            await last(llm.generate(PROMPTS[1], greedy(3), "good"))
        assert len((await good).outputs[0].token_ids) == 20, "its namesake was refused, not this one"

    asyncio.run(wrong())


def test_an_event_loop_that_is_gone_stops_nobody_else(llm):
    async def begin():
        outputs = llm.generate(PROMPTS[0], greedy(900), "orphan")
        await anext(outputs)
        return outputs

    loop = asyncio.new_event_loop()
    orphan = loop.run_until_complete(begin())
    loop.close()
    assert len(asyncio.run(last(llm.generate(PROMPTS[1], greedy(5)))).outputs[0].token_ids) == 5
    del orphan


def test_closing_tells_who_is_waiting_and_refuses_who_comes_later(fresh):
    async def close():
        running = [asyncio.create_task(last(fresh.generate(prompt, greedy(900)))) for prompt in PROMPTS]
        while len(fresh.engine.request_ids) < len(PROMPTS):
            await asyncio.sleep(0.001)
        await asyncio.to_thread(fresh.close)
        for output in await asyncio.wait_for(asyncio.gather(*running), timeout=30):
            assert output.outputs[0].finish_reason == "abort"
        with pytest.raises(EngineError, match="closed"):
            await last(fresh.generate(PROMPTS[0], greedy(3)))

    asyncio.run(close())
    stats = fresh.engine.cache.stats()
    assert stats["pages_held"] == stats["slots_working"] == 0
    fresh.close()


def test_a_failed_device_is_told_to_everyone_who_waits_or_comes(fresh):
    async def fail():
        running = [asyncio.create_task(last(fresh.generate(prompt, greedy(900)))) for prompt in PROMPTS]
        while len(fresh.engine.request_ids) < len(PROMPTS):
            await asyncio.sleep(0.001)

        def lost(step):
            raise MemoryError("lost the device")

        fresh.engine.runner.forward = lost
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(outcome, EngineError) and "lost the device" in str(outcome)
        with pytest.raises(EngineError, match="lost the device"):
            await last(fresh.generate(PROMPTS[0], greedy(3)))

    asyncio.run(fail())
