"""What can happen to a cached prefix, one event a scenario. Each builds a lab, lets it happen, and asserts that it did;
whether the logits are right is for the caller to ask."""

from random import Random

import torch
from lab import ENDS, Lab, Qwen3_5, Talk

from tokenspeed.engine.executor.batch import STOPS
from tokenspeed.engine.schedule.cache import Policy
from tokenspeed.engine.schedule.scheduler import State

OPENING = [7, 3, 9]  # what the template puts before an answer


def text(seed: int, count: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(300) for _ in range(count)]


def mid_page_hit(model: Qwen3_5, **settings) -> Lab:
    """A second prompt resumes inside a page that the first has filled further: its rows are copied."""
    lab = Lab(model, **settings)
    system = text(1, 90)
    first = lab.ask(system + text(2, 40), [90])
    second = lab.ask(system + text(3, 50), [90])
    match = lab.admission(second).match
    assert match.state_tokens == match.kv_tokens == match.known_tokens == 90
    assert lab.admission(second).copies == ((lab.admission(first).pages[1], lab.admission(second).pages[1], 26),)
    assert lab.tokens_computed(second) == 50
    return lab


def copy_on_write(model: Qwen3_5, **settings) -> Lab:
    """Three at once go on from one snapshot, and a fourth later: nobody writes the slot that they read."""
    lab = Lab(model, **settings)
    system = text(1, 90)
    lab.ask(system + text(2, 5), [90])
    talks = [lab.submit(system + text(10 + i, 20 + i), []) for i in range(3)]
    lab.run()
    talks.append(lab.ask(system + text(20, 30), []))
    slots = [(lab.admission(talk).read_slot, lab.admission(talk).write_slot) for talk in talks]
    assert len({read for read, _ in slots}) == 1 and slots[0][0] >= 0
    assert all(read != write for read, write in slots)
    return lab


def append_or_copy(model: Qwen3_5, **settings) -> Lab:
    """Two at once go on from the end of an answer, inside a page: one appends to it, the other copies its rows."""
    lab = Lab(model, **settings)
    history = lab.ask(text(1, 70), max_tokens=20).history()
    talks = [lab.submit(history + text(10 + i, 9), []) for i in range(2)]
    lab.run()
    stats = lab.stats()
    assert stats["pages_appended_in_place"] == 1 and stats["page_copies"] == 1
    assert len({lab.admission(talk).pages[1] for talk in talks}) == 2
    return lab


def end_by_length(model: Qwen3_5, **settings) -> Lab:
    """After a length stop the last token was not consumed: the state stands one before the end. Three turns."""
    lab = Lab(model, **settings)
    history = lab.ask(text(1, 70), [], max_tokens=9).history()
    for turn in range(2):
        talk = lab.ask(history + text(10 + turn, 12), [], max_tokens=40)
        assert lab.admission(talk).match.state_tokens == len(history) - 1 == lab.ends[talk.sequences[0].id - 1][-1]
        assert lab.tokens_computed(talk) == 13
        history = talk.history()
    assert lab.stats()["pages_appended_in_place"] >= 1
    return lab


def end_by_token(model: Qwen3_5, **settings) -> Lab:
    """A token that ends the answer is not consumed: the state stands one before the end."""
    lab = Lab(model, **settings)
    talk = lab.ask(text(1, 70), [], max_tokens=200, stop_token_ids=ENDS[:STOPS], temperature=1.0)
    assert talk.reasons[0] == "stop"
    following = lab.ask(talk.history() + text(2, 12), [])
    assert lab.admission(following).match.state_tokens == len(talk.history()) - 1 == lab.ends[talk.sequences[0].id][-1]
    assert lab.tokens_computed(following) == 13
    return lab


def end_that_the_host_finds(model: Qwen3_5, **settings) -> Lab:
    """More ends than the device knows: it has consumed the last token, and maybe more, before the host tells."""
    lab = Lab(model, **settings)
    ends = range(0, 300, 5)
    unsaid = {"logit_bias": dict.fromkeys(ends[:STOPS], -100.0)}
    talk = lab.ask(text(1, 70), [], max_tokens=200, stop_token_ids=ends, temperature=1.0, **unsaid)
    assert talk.reasons[0] == "stop"
    following = lab.ask(talk.history() + text(2, 12), [])
    assert lab.ends[talk.sequences[0].id][-1] == len(talk.history())
    assert lab.admission(following).match.state_tokens in (0, len(talk.history()))
    return lab


def fork(model: Qwen3_5, **settings) -> Lab:
    """Three continuations of a prompt that ends inside a page; each is taken up again."""
    lab = Lab(model, **settings)
    talk = lab.ask(text(1, 83), [], n=3, max_tokens=15, temperature=3.0)
    assert lab.stats()["forks"] == 2 and lab.stats()["page_copies"] == 2
    assert len({tuple(ids) for ids in talk.outputs}) == 3
    for child in range(3):
        following = lab.ask(talk.history(child) + text(5, 6), [])
        assert lab.admission(following).match.state_tokens == len(talk.history(child)) - 1
    return lab


def fork_at_a_snapshot(model: Qwen3_5, **settings) -> Lab:
    """A prompt that ends at a promised snapshot and a page border: the children read that."""
    lab = Lab(model, **settings)
    prompt = text(1, 128)
    talk = lab.ask(prompt, [128], n=3, temperature=1.0)
    slot = dict(lab.admission(talk).snapshots)[128]
    assert [made.child.read_slot for made in lab.forks.values()] == [slot] * 2
    assert lab.stats()["page_copies"] == 0
    following = lab.ask(prompt + text(2, 5), [])
    assert lab.admission(following).match.state_tokens == 128
    return lab


def eviction(model: Qwen3_5, **settings) -> Lab:
    """More conversations than pages and slots hold, in turns."""
    lab = Lab(model, **{"pages": 7, "slots": 3, "policy": Policy.LRU} | settings)
    histories = [text(i, 100 + i) for i in range(4)]
    reasons = set()
    for turn in range(8):
        talk = lab.ask(histories[turn % 4] + text(50 + turn, 8), max_tokens=4)
        histories[turn % 4] = talk.history()
        reasons.add(talk.reuse.reason)
    again = lab.ask(talk.history() + text(60, 8), max_tokens=4)
    stats = lab.stats()
    assert stats["snapshots_evicted"] > 0 and stats["pages_evicted"] > 0
    assert "SNAPSHOT_EVICTED" in reasons and again.reuse.cached_tokens > 100
    return lab


def preemption(model: Qwen3_5, **settings) -> Lab:
    """Three answers outgrow the pages: the youngest gives way, keeps what it can, and goes on."""
    lab = Lab(model, **{"pages": 8} | settings)
    talks = [lab.submit(text(i, 58), [], max_tokens=90) for i in range(3)]
    lab.run()
    assert lab.scheduler.preemptions > 0 and [len(talk.outputs[0]) for talk in talks] == [90] * 3
    again = [a.match.state_tokens for found in lab.admissions.values() for a in found[1:]]
    assert talks[0].sequences[0].preemptions == 0, "the oldest never gives way"
    # With drafts the one that gives way may have come a few tokens further, into a page that the others need.
    assert max(again) > 58 or settings.get("drafts", 0) > 1, "what was generated is not computed again"
    return lab


def consumed(model: Qwen3_5, **settings) -> Lab:
    """The only slot: the next turn goes on in it."""
    lab = Lab(model, **{"slots": 1} | settings)
    history = lab.ask(text(1, 70), []).history()
    talk = lab.ask(history + text(2, 30), [])
    admission = lab.admission(talk)
    assert admission.read_slot == admission.write_slot and admission.match.state_tokens == len(history) - 1
    assert lab.stats()["snapshots_consumed"] == 1
    return lab


def away(model: Qwen3_5, **settings) -> tuple[Lab, Talk]:
    """A conversation that the device has let go, while host memory has it."""
    lab = Lab(model, **{"pages": 10, "slots": 3, "host_pages": 40, "host_slots": 8} | settings)
    first = lab.ask(text(1, 200), max_tokens=20)
    for seed in range(2, 6):
        lab.settle()
        lab.ask(text(seed, 190), max_tokens=4)
    return lab, first


def there_and_back(model: Qwen3_5, **settings) -> Lab:
    """Its next turn brings it back, and computes nothing again."""
    lab, first = away(model, **settings)
    again = lab.ask([*first.history(), *text(9, 30)])
    assert again.reuse.moved_tokens >= 200
    assert lab.tokens_computed(again) == len(again.request.prompt) - again.reuse.cached_tokens < 40
    return lab


def computed_sooner(model: Qwen3_5, **settings) -> Lab:
    """A page takes as long to come back as a thousand tokens to compute."""
    lab, first = away(model, **settings)
    lab.cache.set_costs(1.0, 1.0, 1e-3)
    again = lab.ask([*first.history(), *text(9, 30)])
    assert again.reuse.moved_tokens == 0 and again.reuse.reason == "COMPUTED_SOONER"
    return lab


def arriving(model: Qwen3_5, **settings) -> tuple[Lab, Talk]:
    """It is on its way back, and stays so until `lab.let_moves_finish` is called."""
    lab, first = away(model, **settings)
    lab.hold_moves()
    again = lab.submit([*first.history(), *text(9, 30)])
    for _ in range(3):
        lab.engine.step()
    assert again.sequences[0].state is State.ARRIVING
    return lab, again


def aborted_on_the_way(model: Qwen3_5, **settings) -> Lab:
    lab, again = arriving(model, **settings)
    assert lab.engine.abort(again.request.id)
    for _ in range(3):
        lab.engine.step()
    assert again.finished and lab.stats()["pages_held"] > 0  # the mover still writes there
    lab.let_moves_finish()
    lab.run()
    return lab


def pending(model: Qwen3_5, **settings) -> Lab:
    """Two users arrive at once with one system prompt: the second waits for its state instead of computing it too."""
    lab = Lab(model, **{"max_num_batched_tokens": 64} | settings)
    system = text(1, 200)
    first = lab.submit(system + text(2, 70), [200])
    second = lab.submit(system + text(3, 40), [200])
    lab.run()
    assert 0 < second.sequences[0].waited <= lab.engine.limits.wait_steps
    assert second.reuse.cached_tokens == 200 and lab.tokens_computed(second) == 40
    assert lab.tokens_computed(first) == 270
    return lab


def chunks(model: Qwen3_5, **settings) -> Lab:
    """Snapshots at the end of a chunk and inside one, of two prompts side by side; each is resumed from."""
    lab = Lab(model, **{"max_num_batched_tokens": 320, "slots": 40} | settings)
    prompts, at = [text(1, 230), text(2, 190)], [31, 64, 90, 128, 150]
    for prompt in prompts:
        lab.submit(prompt, at)
    lab.run()
    for prompt in prompts:
        for count in at:
            talk = lab.ask(prompt[:count] + text(count, 10), [], max_tokens=2)
            assert lab.admission(talk).match.state_tokens == count and lab.tokens_computed(talk) == 10
    return lab


def branch(model: Qwen3_5, **settings) -> Lab:
    """Pages are shared further than a state was kept: they are not stored again, and a state is kept for the next."""
    lab = Lab(model, **settings)
    history = lab.ask(text(1, 170), [40]).history()
    for turn in range(2):
        talk = lab.ask(history[:140] + text(10 + turn, 30), [])
        assert lab.admission(talk).match.state_tokens == (40 if turn == 0 else 140)
        assert lab.admission(talk).match.kv_tokens == (128 if turn == 0 else 140)
    return lab


def shared_rows_stay(model: Qwen3_5, **settings) -> Lab:
    """What is computed again below the shared pages' end does not reach them: they hold what they held, to the bit."""
    lab = Lab(model, **settings)
    prompt = text(1, 150)
    first = lab.ask(prompt, [])
    pages = lab.admission(first).pages[:2].tolist()
    lab.memory.kv[pages] += 0.01
    marked = lab.memory.kv[pages].clone()
    second = lab.ask(prompt, [], prompt_logprobs=0)
    assert lab.admission(second).match.kv_tokens == 128 and lab.admission(second).match.state_tokens == 0
    assert second.reuse.reason == "PROMPT_LOGPROBS" and lab.tokens_computed(second) == 150
    assert lab.memory.kv[pages].view(torch.int32).equal(marked.view(torch.int32)), "shared pages were written"
    lab.talks.remove(second)  # it read the marks
    return lab


def prompt_logprobs_after_a_snapshot(model: Qwen3_5, **settings) -> Lab:
    """A state is there, but all of the prompt's logits are wanted: everything is computed, over shared pages."""
    lab = Lab(model, **settings)
    prompt = text(1, 150)
    lab.ask(prompt, [140])
    talk = lab.ask(prompt, [], prompt_logprobs=0)
    assert talk.reuse.reason == "PROMPT_LOGPROBS" and lab.admission(talk).match.kv_tokens == 128
    assert lab.tokens_computed(talk) == 150
    return lab


def aborts(model: Qwen3_5, **settings) -> Lab:
    """One request is cut off while it prefills, one while it decodes; what they had published serves others."""
    lab = Lab(model, **{"max_num_batched_tokens": 64} | settings)
    system = text(1, 100)
    early, late = lab.submit(system + text(2, 150), [100]), lab.submit(text(3, 50), [], max_tokens=100)
    for _ in range(3):
        lab.engine.step()
    lab.engine.abort(early.request.id)
    assert 0 < early.sequences[0].consumed < 250
    for _ in range(10):
        lab.engine.step()
    lab.engine.abort(late.request.id)
    lab.run()
    assert lab.stats()["aborted"] == 2 and 0 < len(late.outputs[0]) < 100
    talk = lab.ask(system + text(4, 20), [])
    assert lab.admission(talk).match.state_tokens == 100
    return lab


def namespaces(model: Qwen3_5, **settings) -> Lab:
    """The same prompt elsewhere is a stranger."""
    lab = Lab(model, **settings)
    prompt = text(1, 100)
    found = [lab.ask(prompt, name_space=name).reuse.cached_tokens for name in ("a", "b", "a", "b")]
    assert found == [0, 0, 99, 99]
    return lab


def long_answer(model: Qwen3_5, **settings) -> Lab:
    """An answer over several pages beside another that starts later; its end is resumed from."""
    lab = Lab(model, **settings)
    long = lab.submit(text(1, 50), [], max_tokens=90)
    lab.run(lab.submit(text(2, 100), [], max_tokens=5))
    lab.run()
    talk = lab.ask(long.history() + text(3, 10), [])
    assert lab.admission(talk).match.state_tokens == 139
    return lab


SCENARIOS = (
    mid_page_hit,
    copy_on_write,
    append_or_copy,
    end_by_length,
    end_by_token,
    end_that_the_host_finds,
    fork,
    fork_at_a_snapshot,
    eviction,
    preemption,
    consumed,
    pending,
    chunks,
    branch,
    shared_rows_stay,
    prompt_logprobs_after_a_snapshot,
    aborts,
    namespaces,
    long_answer,
)
