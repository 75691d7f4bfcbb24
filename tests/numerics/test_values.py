"""Every value that a loss must not meet is found where asked, and named with what was expected."""

import math
from dataclasses import replace

import pytest
import torch

from sparsekd.kernels.targets import NOTHING
from sparsekd.kernels.values import MASS_TOLERANCE, check_values

NAN, INFINITE = math.nan, math.inf
# Of `make_case`: 5 head ids, 6 draws, 53 ids; position 2 has no label, position 3 no weight, position 5 none
# for the cross-entropy and position 6 none for the distillation.
AT, LATER = 1, 4


def check(case, **changes):
    """Checks a case, for its own objective or one with changes."""
    check_values(
        case.targets,
        case.labels,
        case.ce_weights,
        case.kd_weights,
        vocabulary_size=53,
        objective=replace(case.objective, **changes),
    )


def spoiled(case, name, place, value):
    """The case with one value replaced."""
    if name in ("labels", "ce_weights", "kd_weights"):
        tensor = getattr(case, name).clone()
        tensor[place] = value
        return case.change(**{name: tensor})
    tensor = getattr(case.targets, name).clone()
    tensor[place] = value
    return case.change(targets=case.targets._replace(**{name: tensor}))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_true_record_passes(oracle, temperature):
    case = oracle.make_case(temperature=temperature)
    check(case)
    check(case.change(targets=None))
    for k, n in ((0, 6), (5, 0), (53, 0)):
        check(oracle.make_case(k=k, n=n, target_mode="sampled" if n else "tail_bucket"))


@pytest.mark.parametrize(
    ("name", "place", "value", "words"),
    [
        ("ids", (AT, 1), 53, ["targets.ids at position 1, column 1 is 53", "from 0 to 52, or -1"]),
        ("ids", (AT, 7), -2, ["targets.ids at position 1, column 7 is -2", "from 0 to 52, or -1"]),
        ("head_logprobs", (AT, 2), NAN, ["targets.head_logprobs at position 1, column 2 is nan", "<= 0"]),
        (
            "head_logprobs",
            (AT, 2),
            INFINITE,
            ["targets.head_logprobs at position 1, column 2 is inf", "<= 0"],
        ),
        ("head_logprobs", (AT, 0), 0.5, ["targets.head_logprobs at position 1, column 0 is 0.5", "<= 0"]),
        ("log_rest", AT, NAN, ["targets.log_rest at position 1 is nan", "finite", "-inf where the rest"]),
        ("log_rest", AT, INFINITE, ["targets.log_rest at position 1 is inf", "finite"]),
        ("tail_counts", (AT, 3), -1.0, ["targets.tail_counts at position 1, column 3 is -1.0", ">= 0"]),
        ("tail_counts", (AT, 3), NAN, ["targets.tail_counts at position 1, column 3 is nan", ">= 0"]),
        ("tail_counts", (AT, 3), INFINITE, ["targets.tail_counts at position 1, column 3 is inf", ">= 0"]),
        ("entropy", AT, NAN, ["targets.entropy at position 1 is nan", "finite"]),
        ("entropy", AT, -INFINITE, ["targets.entropy at position 1 is -inf", "finite"]),
        ("labels", AT, 53, ["labels at position 1 is 53", "below 53", "negative number to ignore"]),
        ("ce_weights", AT, -0.5, ["ce_weights at position 1 is -0.5", ">= 0"]),
        ("kd_weights", AT, -0.5, ["kd_weights at position 1 is -0.5", ">= 0"]),
        ("ce_weights", AT, NAN, ["ce_weights at position 1 is nan", ">= 0"]),
        ("kd_weights", AT, NAN, ["kd_weights at position 1 is nan", ">= 0"]),
        ("ce_weights", AT, INFINITE, ["ce_weights at position 1 is inf", ">= 0"]),
        ("kd_weights", AT, INFINITE, ["kd_weights at position 1 is inf", ">= 0"]),
    ],
    ids=str,
)
def test_each_wrong_value_is_named(oracle, name, place, value, words):
    case = oracle.make_case()
    with pytest.raises(ValueError) as caught:
        check(spoiled(case, name, place, value))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    # The first position that is wrong is the one that is named.
    later = (LATER, *place[1:]) if isinstance(place, tuple) else LATER
    with pytest.raises(ValueError) as caught:
        check(spoiled(spoiled(case, name, place, value), name, later, value))
    assert words[0] in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [(0, 3), (1, 5), (5, 6)], ids=["head", "both", "draws"])
def test_an_id_that_stands_twice_is_named(oracle, first, second):
    case = oracle.make_case()
    identity = int(case.targets.ids[AT, first])
    case = spoiled(case, "ids", (AT, second), identity)
    with pytest.raises(
        ValueError, match=rf"targets.ids at position 1 holds id {identity} twice, expected distinct"
    ):
        check(case)


def test_padding_may_stand_as_often_as_it_likes(oracle):
    case = oracle.make_case()
    ids, logprobs = case.targets.ids.clone(), case.targets.head_logprobs.clone()
    ids[AT, 2:] = -1
    # What stands beside a padded id is not read.
    logprobs[AT, 2:5] = torch.tensor([NAN, INFINITE, 3.0])
    check(case.change(targets=case.targets._replace(ids=ids, head_logprobs=logprobs)))


def test_an_empty_rest_and_an_impossible_id_are_legal(oracle):
    case = oracle.make_case()
    check(spoiled(case, "log_rest", AT, -INFINITE))
    check(spoiled(case, "head_logprobs", (AT, 4), -INFINITE))


def test_more_probability_than_there_is(oracle):
    """Raw logits in the place of log-probabilities, and a rest of another temperature."""
    case = oracle.make_case()
    logits = case.targets.head_logprobs - case.targets.head_logprobs.amax(1, keepdim=True)
    with pytest.raises(
        ValueError, match=r"probability of the head, exp\(targets.head_logprobs\).* at position 0"
    ):
        check(case.change(targets=case.targets._replace(head_logprobs=logits)), temperature=2.0)
    other = oracle.make_case(temperature=2.0)
    with pytest.raises(ValueError, match=r"and the rest, .*position 0 is \d.*expected at most 1"):
        check(other, temperature=1.0)
    check(other, temperature=2.0)


def test_what_a_coarse_codec_rounds_up_is_not_too_much(oracle):
    """float16 log-probabilities sum to a little more than 1 at some positions; 2 % more is an error."""
    case = oracle.make_case(k=40, count=200, vocabulary=53, spread=0.5)
    rounded = case.targets.head_logprobs.half().float()
    mass = rounded.double().exp().sum(1) + case.targets.log_rest.double().exp()
    assert 1 + 1e-4 < mass.max() < 1 + MASS_TOLERANCE
    check(case.change(targets=case.targets._replace(head_logprobs=rounded)))
    with pytest.raises(ValueError, match="expected at most 1"):
        check(case.change(targets=case.targets._replace(head_logprobs=rounded + 0.02)))


@pytest.mark.parametrize("position", [3, 6])
def test_what_does_not_count_is_not_looked_at(oracle, position):
    case = oracle.make_case()
    for name, place, value in (
        ("ids", (position, 0), 99),
        ("ids", (position, 1), int(case.targets.ids[position, 0])),
        ("head_logprobs", (position, 2), NAN),
        ("log_rest", position, NAN),
        ("tail_counts", (position, 0), -1.0),
        ("entropy", position, NAN),
    ):
        case = spoiled(case, name, place, value)
    case = spoiled(spoiled(case, "labels", 3, 99), "labels", 5, 99)
    check(case)


@pytest.mark.parametrize("mode", ["tail_bucket", "sampled", "renormalized", "truncated"])
def test_nothing_with_a_weight_is_named(oracle, mode):
    """The fill of a position without a record is legal, unless it is to count as a record."""
    case = oracle.make_case(target_mode=mode)
    for name, value in NOTHING.items():
        for position in (AT, 6):
            case = spoiled(case, name, position, value)
    words = "sum of targets.tail_counts" if mode == "sampled" else "number of ids in the head"
    with pytest.raises(
        ValueError, match=rf"the {words}.* at position 1 is 0.*, expected at least .* kd_weights 0"
    ):
        check(case)
    check(spoiled(case, "kd_weights", AT, 0.0))
    check(case, kd_weight=0.0)
