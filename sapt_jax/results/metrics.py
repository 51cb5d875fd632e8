"""Scores of answers, and what a sequence of tasks adds up to.

An answer is scored by ROUGE-L or exact match. The score matrix a [T, T] holds in a[i, j] the score, 0 to 100, on the
test set of task j after training task i; entries above the diagonal are NaN, because task j was not trained yet.
With tasks counted from 1 to T:

    AP   = 1/T     sum_j      a[T, j]
    F.Ra = 1/(T-1) sum_{j<T}  max_{i<T} a[i, j] - a[T, j]
    FWT  = 1/T     sum_i      a[i, i] - single[i]
    BWT  = 1/(T-1) sum_{i<T}  a[T, i] - a[i, i]
    LA   = 1/T     sum_i      a[i, i]
    IM   = 1/T     sum_i      joint[i] - a[i, i]
    seen[i] = 1/i  sum_{j<=i} a[i, j]

Formulas: Zhao et al., "SAPT", ACL 2024. `single[i]` is the score of a model trained on task i alone; the paper's code
puts a constant in its place and divides BWT by T. LA is learning accuracy (Riemer et al., arXiv 1810.11910). IM is
intransigence (Chaudhry et al., ECCV 2018), whose reference for task i is trained on tasks 1 to i together; here
`joint[i]` is the score of one model that was trained on all T together. seen[i] is the average over what was seen so
far after each task.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sapt_jax.data.task import Instance
from sapt_jax.results.words import Words, plain_form, word_form

REFERENCE_CHOICES = ("best", "first", "random")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals any reference up to case, spaces, quotes and a full stop at the end, else 0.0."""
    return float(plain_form(prediction) in map(plain_form, references))


def exact_match_of_words(prediction: str, references: Sequence[str]) -> float:
    """As `exact_match`, with all ASCII punctuation left out: the rule of the published Long Sequence scores."""
    return float(word_form(prediction) in map(word_form, references))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The best ROUGE-L F-measure over the references, 0 to 1, Porter-stemmed, over `Words` (package rouge-score)."""
    # Imported on use: it brings NLTK and SciPy's statistics, which take seconds.
    from rouge_score.rouge_scorer import RougeScorer

    scorers = {reference: RougeScorer(["rougeL"], tokenizer=Words(reference, prediction)) for reference in references}
    return max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference, scorer in scorers.items())


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "exact_match_of_words": exact_match_of_words,
    "rouge_l": rouge_l,
}
# What each takes an answer for: answers that are equal in it score alike.
_FORMS: dict[str, Callable[[str], Any]] = {
    "exact_match": plain_form,
    "exact_match_of_words": word_form,
    "rouge_l": lambda text: Words(text, text).tokenize(text),
}


def counted_as_one(answers: Iterable[str], metric: str) -> list[tuple[str, ...]]:
    """The groups of different answers that score as if they were the same one."""
    groups: dict[str, list[str]] = {}
    for answer in dict.fromkeys(answers):
        groups.setdefault(str(_FORMS[metric](answer)), []).append(answer)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def choose_references(instance: Instance, *, references: str, seed: int) -> tuple[str, ...]:
    """The references that an instance is scored against.

    "best" keeps all (a metric takes the best of them); "first" keeps the first; "random" keeps one that depends on
    (seed, instance.id) alone, as the paper's code, which draws one per instance when it reads the data.
    """
    if not instance.outputs:
        raise ValueError(f"instance {instance.id}: no reference answer to score against")
    if references == "best":
        return instance.outputs
    if references == "first":
        return instance.outputs[:1]
    if references == "random":
        return (random.Random(f"{seed}/{instance.id}").choice(instance.outputs),)
    raise ValueError(f"references={references!r}: choose from {', '.join(REFERENCE_CHOICES)}")


def score_instances(
    predictions: Sequence[str], instances: Sequence[Instance], *, metric: str, references: str, seed: int
) -> np.ndarray:
    """Scores [N] float64, 0 to 100, of one prediction for each instance.

    Raises:
        ValueError: unknown metric or reference choice, lengths that differ, an instance without a reference.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: choose from {', '.join(METRICS)}")
    if len(predictions) != len(instances):
        raise ValueError(f"{len(predictions)} predictions for {len(instances)} instances")
    score = METRICS[metric]
    return np.array(
        [
            100.0 * score(prediction, choose_references(instance, references=references, seed=seed))
            for prediction, instance in zip(predictions, instances, strict=True)
        ]
    )


def score_task(
    predictions: Sequence[str], instances: Sequence[Instance], *, metric: str, references: str, seed: int
) -> float:
    """The mean of score_instances, 0 to 100. Raises ValueError for an empty task too."""
    if not instances:
        raise ValueError("no instances to score: the task's split is empty")
    scores = score_instances(predictions, instances, metric=metric, references=references, seed=seed)
    return float(scores.mean())


def empty_matrix(num_tasks: int) -> np.ndarray:
    """A score matrix [T, T] of NaN, to be filled row by row."""
    return np.full((num_tasks, num_tasks), np.nan)


def with_row(matrix: np.ndarray, task_index: int, scores: Sequence[float]) -> np.ndarray:
    """A copy of matrix with the scores on tasks 0 to task_index written into row task_index."""
    if len(scores) != task_index + 1:
        raise ValueError(f"row {task_index} of the score matrix takes {task_index + 1} scores, not {len(scores)}")
    matrix = matrix.copy()
    matrix[task_index, : task_index + 1] = scores
    return matrix


def finished_part(matrix: np.ndarray) -> np.ndarray:
    """The leading square [t, t] of the tasks that are trained and scored so far; [0, 0] if none is."""
    complete = [not np.isnan(row[: index + 1]).any() for index, row in enumerate(matrix)]
    finished = complete.index(False) if False in complete else len(complete)
    return matrix[:finished, :finished]


def _check(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"a score matrix is square with at least one task, not of shape {matrix.shape}")
    if finished_part(matrix).shape != matrix.shape:
        raise ValueError("the score matrix has NaN on or below its diagonal: take finished_part(matrix) first")
    return matrix


def average_performance(matrix: np.ndarray) -> float:
    """AP = 1/T sum_j a[T, j]: the mean score over all tasks after the last one."""
    return float(_check(matrix)[-1].mean())


def forgetting_rate(matrix: np.ndarray) -> float | None:
    """F.Ra = 1/(T-1) sum_{j<T} (max_{i<T} a[i, j] - a[T, j]); None for one task. Negative where tasks improved."""
    matrix = _check(matrix)
    if len(matrix) == 1:
        return None
    best_before = np.nanmax(matrix[:-1, :-1], axis=0)
    return float((best_before - matrix[-1, :-1]).mean())


def forward_transfer(matrix: np.ndarray, single_task_scores: Sequence[float] | None) -> float | None:
    """FWT = 1/T sum_i (a[i, i] - single[i]).

    Args:
        matrix: [T, T].
        single_task_scores: [T] scores of models trained on each task alone, with the same protocol, in the same order;
            None if there are none, and then FWT is None.
    """
    matrix = _check(matrix)
    if single_task_scores is None:
        return None
    return _mean_gain(matrix, single_task_scores)


def _mean_gain(matrix: np.ndarray, scores: Sequence[float]) -> float:
    """1/T sum_i (a[i, i] - scores[i])."""
    if len(scores) != len(matrix):
        raise ValueError(f"{len(scores)} scores to compare with for {len(matrix)} tasks")
    return float((np.diag(matrix) - np.asarray(scores, dtype=np.float64)).mean())


def backward_transfer(matrix: np.ndarray) -> float | None:
    """BWT = 1/(T-1) sum_{i<T} (a[T, i] - a[i, i]); None for one task."""
    matrix = _check(matrix)
    if len(matrix) == 1:
        return None
    return float((matrix[-1, :-1] - np.diag(matrix)[:-1]).mean())


def learning_accuracy(matrix: np.ndarray) -> float:
    """LA = 1/T sum_i a[i, i]: the mean score of tasks just after they were learned."""
    return float(np.diag(_check(matrix)).mean())


def intransigence(matrix: np.ndarray, joint_scores: Sequence[float] | None) -> float | None:
    """IM = 1/T sum_i (joint[i] - a[i, i]): what learning in sequence costs; negative where it helps.

    Args:
        matrix: [T, T].
        joint_scores: [T] scores of one model trained on all tasks together; None if there is none, and then IM is None.
    """
    matrix = _check(matrix)
    return None if joint_scores is None else -_mean_gain(matrix, joint_scores)


def seen_averages(matrix: np.ndarray) -> list[float]:
    """[T] of seen[i] = 1/i sum_{j<=i} a[i, j]: after each task, the mean score over it and those before it."""
    return [float(row[: index + 1].mean()) for index, row in enumerate(_check(matrix))]


def summarise(
    matrix: np.ndarray, single_task_scores: Sequence[float] | None, joint_scores: Sequence[float] | None = None
) -> dict[str, float | None]:
    """{"AP", "F.Ra", "FWT", "BWT", "LA", "IM"} of a finished matrix [T, T]; None stands for what is not defined."""
    return {
        "AP": average_performance(matrix),
        "F.Ra": forgetting_rate(matrix),
        "FWT": forward_transfer(matrix, single_task_scores),
        "BWT": backward_transfer(matrix),
        "LA": learning_accuracy(matrix),
        "IM": intransigence(matrix, joint_scores),
    }


def mean_by_category(scores: Mapping[str, float], categories: Mapping[str, str]) -> dict[str, float]:
    """The mean score of each category's tasks.

    Args:
        scores: task -> score, for instance the last row of the matrix; NaN scores are left out.
        categories: task -> category; a task of `scores` that it lacks raises ValueError.
    """
    missing = sorted(set(scores) - set(categories))
    if missing:
        raise ValueError(f"no category for {', '.join(missing)}")
    grouped: dict[str, list[float]] = {}
    for task, score in scores.items():
        if not math.isnan(score):
            grouped.setdefault(categories[task], []).append(score)
    return {category: float(np.mean(values)) for category, values in grouped.items()}
