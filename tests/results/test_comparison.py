"""The table of many runs: its figures against formulas written out, what is absent, and its four formats."""

import csv
import io
import math

import numpy as np
import pytest

from sapt_jax.results import comparison


def run(seed=0, method="sapt", **fields):
    rng = np.random.default_rng(seed)
    matrix = np.where(np.tri(3, dtype=bool), rng.uniform(0, 100, (3, 3)), np.nan)
    known = {"method": method, "task_order": ["a", "b", "c"], "matrix": matrix, "summary": {}, "seeds": {"seed": seed}}
    return known | fields


def test_figures_are_those_of_the_formulas():
    cost = {"seconds": 2.0, "peak_bytes": 1}
    costs = {"a": cost, "b": cost | {"writing_seconds": 5.0}, "c": cost}
    told = run(1, costs=costs, routing={"accuracy": 0.75}, labels={"bytes": 1234})
    a, single = told["matrix"], {"a": 10.0, "b": 20.0, "c": 40.0}
    found = comparison.figures(told, single)
    expected = {
        "ap": (a[2, 0] + a[2, 1] + a[2, 2]) / 3,
        "f_ra": (max(a[0, 0], a[1, 0]) - a[2, 0] + a[1, 1] - a[2, 1]) / 2,
        "bwt": (a[2, 0] - a[0, 0] + a[2, 1] - a[1, 1]) / 2,
        "fwt": (a[0, 0] - 10 + a[1, 1] - 20 + a[2, 2] - 40) / 3,
        "learning_accuracy": (a[0, 0] + a[1, 1] + a[2, 2]) / 3,
        "routing_accuracy": 75.0,
        "seconds": 11.0,
        "kept_bytes": 1234.0,
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_a_run_does_not_say_is_a_dash():
    found = comparison.figures(run(2, costs={"a": {"seconds": 1.0}, "b": None}, routing=None), None)
    absent = {field for field, value in found.items() if math.isnan(value)}
    assert absent == {"fwt", "routing_accuracy", "seconds", "kept_bytes"}
    row = comparison.row("x", [found])
    assert {m.field for m in comparison.MEASURES if comparison.cell(m, row) == "-"} == absent
    # What it says itself counts where there is nothing to compare with.
    assert comparison.figures(run(2, summary={"FWT": 3.0}), None)["fwt"] == 3.0
    nothing = run(3) | {"matrix": np.full((3, 3), np.nan)}
    assert all(math.isnan(value) for value in comparison.figures(nothing, None).values())


def test_a_line_is_the_mean_and_the_sample_deviation():
    values = [61.0, 64.0, 70.0]
    runs = [dict.fromkeys((m.field for m in comparison.MEASURES), value) for value in values]
    mean, deviation = comparison.row("x", runs).cells["ap"]
    assert mean == pytest.approx(65.0) and deviation == pytest.approx(math.sqrt((16 + 1 + 25) / 2))
    assert comparison.cell(comparison.MEASURES[0], comparison.row("x", runs)) == "65.0 ± 4.6"
    assert comparison.cell(comparison.MEASURES[0], comparison.row("x", runs[:1])) == "61.0"


def test_forward_transfer_is_against_the_run_of_the_same_seed_and_order():
    runs = [run(0), run(0, "single_task"), run(1, "single_task"), run(1) | {"task_order": ["c", "b", "a"]}]
    alone = comparison.single_scores(runs[0], runs)
    assert alone == dict(zip("abc", np.diag(runs[1]["matrix"]), strict=True))
    assert comparison.single_scores(runs[3], runs) is None


def rows():
    figures = [comparison.figures(run(seed), None) for seed in range(3)]
    return [comparison.row("100%_a|b", figures[:2]), comparison.row("told", figures[2:])]


def test_the_four_formats_tell_the_same():
    found = rows()
    read = list(csv.DictReader(io.StringIO(comparison.as_csv(found))))
    assert [(line["label"], line["runs"]) for line in read] == [("100%_a|b", "2"), ("told", "1")]
    assert float(read[0]["ap"]) == found[0].cells["ap"][0] and float(read[0]["ap_sd"]) == found[0].cells["ap"][1]
    assert read[1]["ap_sd"] == read[0]["fwt"] == ""
    shown = comparison.cell(comparison.MEASURES[0], found[0])
    markdown = comparison.as_markdown(found).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in markdown}) == 1 and shown in markdown[2]
    latex = comparison.as_latex(found)
    assert r"100\%\_a|b & 2 & " + shown.replace("±", r"$\pm$") in latex
    assert latex.count("\\\\") == 3 and latex.count("&") == 3 * (1 + len(comparison.MEASURES))


def test_one_sentence_names_the_best_the_worst_and_the_bound():
    found = rows()
    text = comparison.sentence(found, ["told"])
    ap, lost = (comparison.cell(measure, found[0]) for measure in comparison.MEASURES[:2])
    bound = comparison.cell(comparison.MEASURES[0], found[1])
    assert text == (
        f"100%_a|b ends with AP {ap} and has lost {lost} points of each task's best; "
        f"told, told each input's task, reaches {bound}."
    )
    assert comparison.sentence([], []) == "No run is finished yet."
