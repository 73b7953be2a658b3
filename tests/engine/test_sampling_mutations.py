"""Planted bugs of sampling: the test that claims to guard the rule must fail, on every run."""

from functools import partial

import pytest
import test_sampling as sampling
from planting import Bug, must_be_noticed, must_pass_without

from tokenspeed.engine.executor.sampling import Sampler, Vocabulary

distribution = partial(partial, sampling.test_ids_follow_the_exact_distribution)
side_by_side = partial(partial, sampling.test_a_sequence_gets_its_ids_in_any_batch_at_any_row_and_after_any_preemption)
behind_drafts = partial(partial, sampling.test_ids_behind_drafts_that_are_right_are_those_of_one_step_after_the_other)

BUGS = (
    Bug(
        "noise is tied to the row",
        Sampler.parameters,
        "Parameters(temperature, self._top_k, top_p, min_p, self._seed, index)",
        "Parameters(temperature[index], self._top_k[index], top_p[index], min_p[index], "
        "self._seed[index] + torch.arange(len(index)), None)",
        side_by_side(0),
    ),
    Bug(
        "noise of one output",
        Sampler.draw_by,
        "parameters, output)",
        "parameters, output * 0)",
        sampling.test_the_noise_of_one_output_says_nothing_about_the_next,
    ),
    Bug(
        "noise of a step's first output",
        Sampler.choose,
        "self.draw(x, choices.index, choices.output)",
        "self.draw(x, choices.index, choices.output[:: choices.width].repeat_interleave(choices.width))",
        behind_drafts(0),
    ),
    Bug(
        "neighbouring seeds are one",
        Sampler.parameters,
        "self._seed, index)",
        "self._seed // 2, index)",
        sampling.test_neighbouring_seeds_are_independent,
    ),
    Bug(
        "parameters of the predecessor",
        Sampler.begin,
        "self._begins[begin.index] = begin",
        "self._begins.setdefault(begin.index, begin)",
        side_by_side(1),
    ),
    Bug(
        "the temperature of the predecessor",
        Sampler.begin,
        "self._floats[:, index] = to_device",
        "self._floats.clone()[:, index] = to_device",
        sampling.test_a_new_sequence_at_an_index_brings_its_own_parameters,
    ),
    Bug(
        "outputs are not counted",
        Sampler.count,
        "self._counts.index_put_((choices.index[rows], local), here.int(), accumulate=True)",
        "pass",
        sampling.test_penalties_count_what_was_generated_since,
    ),
    Bug(
        "counts of the predecessor",
        Sampler._count_from_start,
        "self._counts[begin.index].zero_()",
        "self._counts[begin.index]",
        side_by_side(1),
    ),
    Bug("penalties count rejected drafts", Sampler.count, "here &= place < accepted[sample]", "pass", behind_drafts(0)),
    Bug("penalties count one id a step", Sampler.count, "place < accepted[sample]", "place < 1", behind_drafts(0)),
    Bug("penalties forget the drafts before a row", Sampler._penalise, "if drafted:", "if False:", behind_drafts(0)),
    Bug(
        "penalties count the drafts behind a row",
        Sampler._penalise,
        "for k in range(place)",
        "for k in range(choices.width - 1)",
        behind_drafts(0),
    ),
    Bug(
        "penalties count another sequence's drafts",
        Sampler._penalise,
        "choices.drafts[sample, k]",
        "choices.drafts[sample - 1, k]",
        behind_drafts(1),
    ),
    Bug("outputs are not seen", Sampler._penalise, " | (counts > 0)", "", distribution("repetition")),
    Bug(
        "presence counts each",
        Sampler._penalise,
        "presence * (counts > 0)",
        "presence * counts",
        distribution("presence"),
    ),
    Bug(
        "repetition of negatives",
        Sampler._penalise,
        "before * repetition",
        "before / repetition",
        distribution("repetition"),
    ),
    Bug(
        "the prompt is not seen",
        Sampler._count_from_start,
        "seen[self._local(begin.prompt)] = True",
        "pass",
        distribution("repetition"),
    ),
    Bug(
        "biases of all rows are added to the first",
        Sampler._adjust,
        "places += [(row, id) for id, _ in begin.bias]",
        "places += [(choices.rows(i)[0], id) for id, _ in begin.bias]",
        behind_drafts(0),
    ),
    Bug(
        "what is allowed is allowed once a sample",
        Sampler._adjust,
        "if begin.allowed:",
        "if begin.allowed and row == choices.rows(i)[0]:",
        behind_drafts(0),
    ),
    Bug(
        "penalties before biases",
        Sampler._adjust,
        "if places:\n",
        "if places and not penalised:\n",
        distribution("penalties come after biases"),
    ),
    Bug(
        "end ids are always banned",
        Sampler._adjust,
        "choices.output[rows] < end",
        "end >= 0",
        lambda: sampling.test_end_ids_are_forbidden_for_as_many_outputs_as_asked_and_then_no_more(2),
    ),
    Bug(
        "end ids by a step's first output",
        Sampler._adjust,
        "choices.output[rows] < end",
        "choices.output[rows // choices.width * choices.width] < end",
        behind_drafts(5),
    ),
    Bug(
        "end ids are never banned",
        Sampler._adjust,
        "choices.output[rows] < end",
        "end < 0",
        distribution("end ids before min_tokens"),
    ),
    Bug(
        "a mask is forgotten",
        Sampler._adjust,
        "if masked:",
        "if False:",
        lambda: sampling.test_what_the_host_decides_is_kept(sampling.Edit(0, sampling.BITS)),
    ),
    Bug(
        "scores after penalties",
        Sampler.choose,
        "self._vocabulary.scores(logits, ids, logprobs)",
        "self._vocabulary.scores(x, ids, logprobs)",
        sampling.test_log_probabilities_are_those_of_the_models_own_logits,
    ),
    Bug(
        "scores of another row",
        Sampler.choose,
        "self._vocabulary.scores(logits, ids, logprobs)",
        "self._vocabulary.scores(logits.roll(1, 0), ids, logprobs)",
        sampling.test_log_probabilities_come_for_every_row_of_drafts,
    ),
    Bug(
        "rank from 0",
        Vocabulary.scores,
        "rank = (logprobs > own).sum(-1) + 1",
        "rank = (logprobs > own).sum(-1)",
        sampling.test_log_probabilities_are_those_of_the_models_own_logits,
    ),
    Bug(
        "logits are spoiled",
        Sampler._adjust,
        "logits.float().clone()",
        "logits.float()",
        sampling.test_sampling_leaves_the_logits_as_they_are,
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name.replace(" ", "-") for bug in BUGS])
def test_a_planted_bug_is_found(bug):
    must_be_noticed(bug)


def test_without_them_nothing_is_found():
    must_pass_without(BUGS)
