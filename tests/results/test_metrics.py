import numpy as np
import pytest

from sapt_jax.data.task import Instance
from sapt_jax.results import metrics


def _instance(*outputs, identifier="a"):
    return Instance(id=identifier, input="", outputs=outputs)


def _random_matrix(rng, num_tasks):
    matrix = rng.uniform(0, 100, (num_tasks, num_tasks))
    matrix[np.triu_indices(num_tasks, 1)] = np.nan
    return matrix


@pytest.mark.parametrize(
    "prediction, reference, equal",
    [
        ("The  Cat.", "the cat", 1.0),
        ("a cat", "cat", 0.0),
        ("\tnew-york\n", "NewYork", 0.0),
        ("", "...", 0.0),
        ("...", "...", 1.0),
        ("café", "cafe", 0.0),
        ("cafe\u0301", "café", 1.0),
        ("5", "-5", 0.0),
        ("15", "1.5", 0.0),
        ("5", ".5", 0.0),
        ("1.5.", "1.5", 1.0),
        ("3/4", "34", 0.0),
        ("+", "-", 0.0),
        ("", "+", 0.0),
        ("+", "+", 1.0),
        ("C", "C++", 0.0),
        ("“Positive”。", "positive", 1.0),
        ("'yes'", "Yes", 1.0),
    ],
)
def test_exact_match_leaves_out_case_white_space_and_marks_around_alone(prediction, reference, equal):
    assert metrics.exact_match(prediction, [reference]) == equal


@pytest.mark.parametrize(
    "prediction, reference, equal",
    [("The  Cat.", "the cat", 1.0), ("\tnew-york\n", "NewYork", 1.0), ("", "...", 1.0), ("5", "-5", 1.0)],
)
def test_exact_match_of_words_leaves_out_all_punctuation(prediction, reference, equal):
    assert metrics.exact_match_of_words(prediction, [reference]) == equal


def test_answers_that_a_metric_cannot_tell_apart():
    answers = ("5", "-5", "1.5", "15", "Yes", "yes.", "-5")
    assert metrics.counted_as_one(answers, "exact_match") == [("Yes", "yes.")]
    assert metrics.counted_as_one(answers, "exact_match_of_words") == [("5", "-5"), ("1.5", "15"), ("Yes", "yes.")]
    assert metrics.counted_as_one(("C", "C++", "我", "你", "+", "-"), "rouge_l") == [("C", "C++")]


def test_rouge_l_of_equal_and_empty_answers():
    assert metrics.rouge_l("two red cats", ["two red cats"]) == 1.0
    assert metrics.rouge_l("", ["two red cats"]) == 0.0


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat sat" = 3 of 4 predicted and 6 reference words: P = 3/4, R = 1/2, F = 0.6.
    assert metrics.rouge_l("the cat now sat", ["the black cat sat down there"]) == pytest.approx(0.6)
    # The Porter stemmer maps both to "run".
    assert metrics.rouge_l("running", ["runs"]) == 1.0


def test_every_metric_takes_the_best_reference():
    assert metrics.exact_match("dog", ["cat", "Dog."]) == 1.0
    assert metrics.rouge_l("a brown dog", ["cat", "a brown dog", "dog"]) == 1.0


def test_reference_choices():
    instances = [_instance("x", "y", "z", identifier=str(i)) for i in range(60)]
    predictions = ["y"] * len(instances)

    def scores(references, seed=0):
        return metrics.score_instances(predictions, instances, metric="exact_match", references=references, seed=seed)

    assert scores("best").tolist() == [100.0] * 60
    assert scores("first").tolist() == [0.0] * 60
    random = scores("random")
    assert 0 < random.mean() < 100
    assert np.array_equal(random, scores("random"))
    assert not np.array_equal(random, scores("random", seed=1))


def test_random_reference_does_not_depend_on_the_other_instances():
    instances = [_instance("x", "y", "z", identifier=str(i)) for i in range(20)]
    chosen = [metrics.choose_references(i, references="random", seed=5) for i in instances]
    backwards = [metrics.choose_references(i, references="random", seed=5) for i in reversed(instances)]
    assert chosen == backwards[::-1]


def test_score_task_is_the_mean_in_percent():
    instances = [_instance("cat"), _instance("dog"), _instance("the cat sat"), _instance("x")]
    predictions = ["cat", "cat", "cat", "x"]
    exact = metrics.score_task(predictions, instances, metric="exact_match", references="best", seed=0)
    # ROUGE-L of "cat" against "the cat sat": P = 1, R = 1/3, F = 1/2.
    rouge = metrics.score_task(predictions, instances, metric="rouge_l", references="best", seed=0)
    assert exact == pytest.approx(50.0)
    assert rouge == pytest.approx(100 * 2.5 / 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metric": "bleu"}, "metric='bleu'.*rouge_l"),
        ({"references": "last"}, "references='last'.*first"),
        ({"predictions": []}, "0 predictions for 1"),
        ({"instances": []}, "no instances"),
        ({"instances": [_instance(identifier="q7")]}, "q7.*no reference"),
    ],
)
def test_score_errors_name_the_culprit(change, message):
    arguments = {"predictions": ["a"], "instances": [_instance("a")], "metric": "exact_match", "references": "best"}
    with pytest.raises(ValueError, match=message):
        metrics.score_task(**(arguments | change), seed=0)


def test_two_tasks_by_hand():
    matrix = np.array([[50.0, np.nan], [40.0, 60.0]])
    summary = metrics.summarise(matrix, [52.0, 55.0], [58.0, 61.0])
    # Learned at 50 and 60; alone they reach 52 and 55, together 58 and 61.
    expected = {"AP": 50.0, "F.Ra": 10.0, "FWT": 55.0 - 53.5, "BWT": -10.0, "LA": 55.0, "IM": 59.5 - 55.0}
    assert summary == pytest.approx(expected)


def test_three_tasks_by_hand():
    # Task 1 peaks after task 2, and task 2 only gains:
    # F.Ra = ((70 - 30) + (40 - 55)) / 2, BWT = ((30 - 60) + (55 - 40)) / 2.
    matrix = np.array([[60.0, np.nan, np.nan], [70.0, 40.0, np.nan], [30.0, 55.0, 80.0]])
    summary = metrics.summarise(matrix, None)
    assert summary == {"AP": 55.0, "F.Ra": 12.5, "FWT": None, "BWT": -7.5, "LA": 60.0, "IM": None}
    # After the first task 60, after the second (70 + 40) / 2, after the third (30 + 55 + 80) / 3.
    assert metrics.seen_averages(matrix) == [60.0, 55.0, 55.0]


def test_summary_equals_written_out_sums():
    rng = np.random.default_rng(3)
    for num_tasks in (2, 3, 7):
        a, single, joint = _random_matrix(rng, num_tasks), *rng.uniform(0, 100, (2, num_tasks))
        last = num_tasks - 1
        forgotten = sum(max(a[i, j] for i in range(j, last)) - a[last, j] for j in range(last))
        expected = {
            "AP": sum(a[last]) / num_tasks,
            "F.Ra": forgotten / last,
            "FWT": sum(a[i, i] - single[i] for i in range(num_tasks)) / num_tasks,
            "BWT": sum(a[last, i] - a[i, i] for i in range(last)) / last,
            "LA": sum(a[i, i] for i in range(num_tasks)) / num_tasks,
            "IM": sum(joint[i] - a[i, i] for i in range(num_tasks)) / num_tasks,
        }
        assert metrics.summarise(a, single, joint) == pytest.approx(expected, rel=1e-12)
        seen = [sum(a[i, j] for j in range(i + 1)) / (i + 1) for i in range(num_tasks)]
        assert metrics.seen_averages(a) == pytest.approx(seen, rel=1e-12)


def test_one_task_has_no_forgetting_to_speak_of():
    summary = {"AP": 42.0, "F.Ra": None, "FWT": 2.0, "BWT": None, "LA": 42.0, "IM": None}
    assert metrics.summarise(np.array([[42.0]]), [40.0]) == summary


def test_matrix_is_filled_row_by_row():
    matrix = metrics.empty_matrix(3)
    assert metrics.finished_part(matrix).shape == (0, 0)
    filled = metrics.with_row(metrics.with_row(matrix, 0, [10.0]), 1, [20.0, 30.0])
    assert np.isnan(matrix).all()
    np.testing.assert_array_equal(metrics.finished_part(filled), [[10.0, np.nan], [20.0, 30.0]])
    with pytest.raises(ValueError, match="row 2 .* 3 scores, not 2"):
        metrics.with_row(filled, 2, [1.0, 2.0])


def test_unfinished_or_misshapen_matrices_are_rejected():
    with pytest.raises(ValueError, match="NaN on or below"):
        metrics.summarise(metrics.with_row(metrics.empty_matrix(2), 0, [1.0]), None)
    with pytest.raises(ValueError, match="square"):
        metrics.summarise(np.zeros((2, 3)), None)
    with pytest.raises(ValueError, match="square"):
        metrics.summarise(metrics.empty_matrix(0), None)
    with pytest.raises(ValueError, match="1 scores to compare with for 2"):
        metrics.summarise(np.zeros((2, 2)), [1.0])
    with pytest.raises(ValueError, match="3 scores to compare with for 2"):
        metrics.summarise(np.zeros((2, 2)), None, [1.0, 2.0, 3.0])


def test_mean_by_category():
    scores = {"a": 10.0, "b": 20.0, "c": 50.0, "d": float("nan")}
    categories = {"a": "one", "b": "one", "c": "two", "d": "two"}
    assert metrics.mean_by_category(scores, categories) == {"one": 15.0, "two": 50.0}
    with pytest.raises(ValueError, match="no category for b"):
        metrics.mean_by_category(scores, {"a": "x", "c": "x", "d": "x"})
