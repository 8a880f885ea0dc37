"""The verdict follows from the numbers, whatever they are."""

from __future__ import annotations

import pytest
from made_up import results

from regard.bench.results import Results
from regard.bench.summary import summarize

NOISE = [-0.03, 0.03, -0.02, 0.02, -0.01, 0.01, 0.0, 0.0]
CAUSAL, NONCAUSAL = "causal self", "noncausal self"


def around(score: float, spread: float = 1.0) -> list[list[float]]:
    """One seed whose samples scatter around `score`."""
    return [[score + spread * value for value in NOISE]]


def against(score: float) -> list[list[float]]:
    """As `around`, but sample by sample the other way round: a difference to it is noise."""
    return [[score - value for value in NOISE]]


def sentences(found: Results) -> list[str]:
    return [sentence.text for sentence in found.summary.verdict]


def about(found: Results, words: str) -> str:
    (sentence,) = (text for text in sentences(found) if words in text)
    return sentence


def test_surely_best_is_recommended_though_it_is_slower():
    found = results(
        {"text": {"multi_head": around(2.0), "window": around(2.5)}}, {CAUSAL: {4096: {"multi_head": 9, "window": 3}}}
    )
    assert about(found, "For causal text on this machine use multi_head at 4096 tokens.")
    assert "every other is surely worse" in about(found, "For causal text")


def test_faster_but_worse_one_is_offered_with_its_price():
    found = results(
        {"text": {"multi_head": around(2.0), "window": around(2.5)}}, {CAUSAL: {4096: {"multi_head": 9, "window": 3}}}
    )
    offer = about(found, "If quality may suffer")
    assert "window trains 3.0× as fast as multi_head at 4096 tokens" in offer
    assert "2.50 bits per byte instead of 2.00 bits per byte" in offer


def test_slightly_faster_but_worse_one_is_not_offered():
    found = results(
        {"text": {"multi_head": around(2.0), "window": around(2.5)}}, {CAUSAL: {4096: {"multi_head": 9, "window": 8}}}
    )
    assert not any("If quality may suffer" in text for text in sentences(found))


def test_of_those_that_cannot_be_told_apart_the_fastest_is_recommended():
    found = results(
        {"text": {"multi_head": around(2.0), "window": against(2.003)}},
        {CAUSAL: {4096: {"multi_head": 9, "window": 3}}},
    )
    sentence = about(found, "For causal text on this machine use window at 4096 tokens.")
    assert "cannot be told from the best, multi_head (2.00 bits per byte)" in sentence
    assert "trains 3.0× as fast as exact attention" in sentence


def test_of_equal_scores_and_times_the_better_score_is_recommended():
    found = results(
        {"text": {"multi_head": around(2.001), "gqa": around(2.0), "window": around(2.002)}},
        {CAUSAL: {4096: {"multi_head": 9.0, "gqa": 9.2, "window": 8.9}}},
    )
    assert about(found, "use gqa at 4096 tokens")


def test_recommendation_changes_where_the_times_cross():
    found = results(
        {"text": {"multi_head": around(2.0), "window": around(2.0)}},
        {
            CAUSAL: {
                512: {"multi_head": 1.0, "window": 2.0},
                1024: {"multi_head": 3.0, "window": 4.0},
                2048: {"multi_head": 12.0, "window": 8.0},
                4096: {"multi_head": 48.0, "window": 16.0},
            }
        },
    )
    assert "use multi_head up to 1024 tokens, window from 2048." in about(found, "For causal text")


def test_a_slower_recommendation_says_so():
    found = results(
        {"text": {"multi_head": around(2.5), "sigmoid": around(2.0)}}, {CAUSAL: {512: {"multi_head": 1, "sigmoid": 2}}}
    )
    assert "2.0× slower than exact attention" in about(found, "For causal text")


def test_task_without_a_score_is_named():
    found = results({"text": {"multi_head": around(2.0), "gqa": around(2.0)}})
    assert about(found, "Nothing can be said about images of digits")
    assert about(found, "Nothing can be said about recall")


def test_task_that_was_not_asked_for_is_not_named():
    found = results({"text": {"multi_head": around(2.0), "gqa": around(2.0)}}, tasks=["text"])
    assert not any("Nothing can be said" in text for text in sentences(found))


def test_nothing_measured_gives_no_advice():
    found = results()
    assert len(sentences(found)) == 3
    assert all(text.startswith("Nothing can be said") for text in sentences(found))


def test_one_mechanism_is_compared_with_nothing():
    found = results({"text": {"gqa": around(2.0)}}, {CAUSAL: {512: {"multi_head": 1, "gqa": 1}}}, tasks=["text"])
    assert about(found, "gqa reaches 2.00 bits per byte on causal text; nothing was compared with it.")
    assert not any("use gqa" in text for text in sentences(found))


@pytest.mark.parametrize(("task", "guess", "shown"), [("digits", 0.0, "guessing 10.0%"), ("text", 7.9, "guessing")])
def test_no_advice_follows_where_nothing_was_learned(task: str, guess: float, shown: str):
    samples = [[guess + 0.001 * number for number in range(64)]]
    found = results(
        {task: {"multi_head": samples, "window": samples}}, {NONCAUSAL: {512: {"multi_head": 1}}}, tasks=[task]
    )
    sentence = about(found, "No mechanism learned")
    assert shown in sentence
    assert "No advice follows." in sentence
    assert not any(" use " in text for text in sentences(found))


def test_mechanism_that_learned_nothing_is_not_recommended_for_its_speed():
    right, guesses = [[1.0] * 90 + [0.0] * 10], [[1.0] * 10 + [0.0] * 90]
    found = results(
        {"digits": {"multi_head": right, "eca": guesses}},
        {NONCAUSAL: {512: {"multi_head": 9, "eca": 1}}},
        tasks=["digits"],
    )
    assert not any("eca trains" in text for text in sentences(found))
    assert about(found, "use multi_head")


def test_without_timings_only_quality_is_compared():
    found = results({"text": {"multi_head": around(2.0), "gqa": around(2.0)}}, tasks=["text"])
    assert "gqa cannot be told from it. Speed was not measured." in about(found, "For causal text")


def test_mechanism_that_could_not_be_timed_is_left_out():
    found = results(
        {"text": {"multi_head": around(2.1), "gqa": around(2.0)}}, {CAUSAL: {512: {"multi_head": 1}}}, tasks=["text"]
    )
    assert "Speed was not measured" in about(found, "For causal text")


def test_capacity_says_who_holds_how_much():
    ones = [[1.0] * 40]
    by = {
        "multi_head": {"4": 1.0, "8": 1.0, "16": 0.99},
        "lightning": {"4": 1.0, "8": 0.96, "16": 0.4},
        "eca": {"4": 0.1, "8": 0.96, "16": 0.4},
    }
    found = results({"recall": dict.fromkeys(by, ones)}, by=by, tasks=["recall"])
    assert about(found, "Capacity") == (
        "Capacity: multi_head recalls all 16 pairs; lightning holds up to 8 pairs (40% at 16); "
        "eca does not hold even the fewest pairs (40% at 16)."
    )


def test_efficiency_lengths_are_told_by_pattern():
    found = results(
        milliseconds={
            CAUSAL: {
                1024: {"multi_head": 1.0, "gqa": 0.5, "window": 2.0, "sigmoid": 2.0},
                2048: {"multi_head": 4.0, "gqa": 2.0, "window": 2.0, "sigmoid": 8.0},
            }
        },
        tasks=[],
    )
    assert about(found, "Faster to train") == (
        "Faster to train than exact attention (causal self): gqa at every length measured; window from about 1400 "
        "tokens; not sigmoid, up to 2048 tokens."
    )


def test_decoding_tells_constant_from_growing_memory():
    found = results(
        milliseconds={
            CAUSAL: {1024: {"multi_head": 2.0, "lightning": 1.0}, 2048: {"multi_head": 4.0, "lightning": 1.0}}
        },
        state_bytes={"multi_head": {1024: 2**20, 2048: 2**21}, "lightning": {1024: 65536, 2048: 65536}},
        tasks=[],
    )
    sentence = about(found, "Decoding")
    assert "the memory of lightning (65.5 kB) does not grow" in sentence
    assert "multi_head grows by 1.02 kB a token" in sentence
    assert "a step of lightning is the quickest, 10 µs" in sentence


def test_few_seeds_are_confessed_and_enough_are_not():
    few = results({"text": {"multi_head": around(2.0), "gqa": around(2.0)}}, tasks=["text"])
    assert about(few, "rest on 1 seed:")
    enough = results({"text": {"multi_head": around(2.0) * 3, "gqa": around(2.0) * 3}}, tasks=["text"])
    assert not any("rest on" in text for text in sentences(enough))


def test_times_of_a_busy_machine_are_not_to_be_trusted():
    found = results(milliseconds={CAUSAL: {512: {"multi_head": 1, "gqa": 1}}}, tasks=[])
    assert not any("busy" in text for text in sentences(found))
    for layer in found.timing["causal self 512"].layers.values():
        layer.forward.high = 1.6 * layer.forward.low
    found.summary = summarize(found)
    assert "in 2 of 4 timings the upper quartile is more than 1.5 times the lower" in about(found, "busy")


def test_every_sentence_names_numbers_that_are_there():
    found = results(
        {"text": {"multi_head": around(2.0), "window": around(2.5)}, "digits": {"multi_head": [[1.0] * 9]}},
        {CAUSAL: {512: {"multi_head": 1, "window": 3}, 4096: {"multi_head": 9, "window": 3}}},
        state_bytes={"multi_head": {512: 1, 4096: 8}},
    )
    content = found.model_dump()
    for sentence in found.summary.verdict:
        assert sentence.sources
        for pointer in sentence.sources:
            place = content
            for key in pointer.split("/")[1:]:
                if key not in place:
                    assert sentence.text.startswith("Nothing can be said"), pointer
                    break
                place = place[key]
