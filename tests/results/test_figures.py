"""What figures show is read back from their artists, and no state of a workdir makes one fail."""

import numpy as np
import pytest

from sapt_jax.results.figures import catalogue, comparison, style
from sapt_jax.results.figures.comparison import Group
from sapt_jax.results.record import read_record
from tests.helpers.left_behind import HOSTILE, write_quality, write_run

LONG = tuple(f"task{number:04d}_a_name_that_goes_on_for_{'very_' * 8}long_$x_{number}" for number in range(15))
PLATES = {plate.name: plate for plate in (*catalogue.OF_A_RUN, *catalogue.OF_SEVERAL_RUNS)}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    tasks = ("shout", "mirror", "first")
    costs = {task: {"seconds": seconds, "peak_bytes": 1} for task, seconds in zip(tasks, (2.0, 4.0, 8.0), strict=True)}
    extra = {
        "single_task_scores": {"shout": 50.0, "mirror": 60.0, "first": 70.0},
        "category_scores": {"letters": 44.0},
        "unseen": {"last": 12.0},
        "costs": costs,
    }
    matrix = np.array([[90.0, np.nan, np.nan], [60.0, 70.0, np.nan], [50.0, 75.0, 80.0]])
    run = write_run(tmp_path_factory.mktemp("runs") / "run", tasks, matrix=matrix, extra=extra)
    for index, task in enumerate(tasks):
        write_quality(run, index, task)
    return read_record(run)


@pytest.fixture(scope="module")
def drawn(record):
    return {plate.name: catalogue.draw(plate, record) for plate in catalogue.OF_A_RUN}


def test_a_run_that_has_everything_has_every_figure(drawn):
    assert {name: drawing for name, drawing in drawn.items() if isinstance(drawing, str)} == {}
    assert all(len(drawing.alt) > 20 and PLATES[name].caption for name, drawing in drawn.items())


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_score_matrix_shows_its_numbers(drawn):
    assert texts(drawn["score_matrix"].figure.axes[0]) == ["90", "60", "70", "50", "75", "80"]
    assert "shout with 50.0" in drawn["score_matrix"].alt and "first with 80.0" in drawn["score_matrix"].alt
    assert drawn["score_matrix"].table[3] == ["3 first", "50.0", "75.0", "80.0"]


def test_the_average_is_over_the_tasks_so_far(drawn):
    new, seen = drawn["average_so_far"].figure.axes[0].lines
    np.testing.assert_allclose(seen.get_ydata(), [90, 65, 205 / 3])
    np.testing.assert_allclose(new.get_ydata(), [90, 70, 80])


def test_what_is_lost_is_the_best_before_less_the_end(drawn):
    best, final = drawn["lost"].figure.axes[0].lines
    np.testing.assert_allclose(best.get_xdata() - final.get_xdata(), [40, -5])
    assert "17.5 points" in drawn["lost"].alt


def test_a_task_over_time_begins_where_it_is_learned(drawn):
    panels = drawn["scores_over_time"].figure.axes
    _, scores, moment = panels[1].lines
    np.testing.assert_array_equal(scores.get_xdata(), [2, 3])
    np.testing.assert_array_equal(scores.get_ydata(), [70, 75])
    np.testing.assert_array_equal((moment.get_xdata()[0], moment.get_ydata()[0]), (2, 70))


def test_transfer_is_over_single_task_runs(drawn):
    bars = drawn["transfer"].figure.axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], [40, 10, 10])


def test_attention_maps_hold_the_means(record, drawn):
    (mesh,) = drawn["attention_at_test"].figure.axes[0].collections
    means = [np.mean([row["attention_weights"] for row in record.answers(2, task)], axis=0) for task in range(3)]
    np.testing.assert_allclose(mesh.get_array(), means)
    (mesh,) = drawn["attention_in_training"].figure.axes[0].collections
    last = [record.logged("train", task)[-1]["attention"] for task in range(3)]
    np.testing.assert_allclose(mesh.get_array(), last)


def test_rows_are_counted_by_their_attention_on_the_own_slot(record, drawn):
    (mesh,) = drawn["attention_by_row"].figure.axes[0].collections
    for task in range(3):
        own = record.weights(2, task)[:, task]
        counts = [np.sum((own >= low / 10) & ((own < (low + 1) / 10) | (low == 9))) for low in range(10)]
        np.testing.assert_allclose(np.asarray(mesh.get_array())[task], np.array(counts) / len(own))


def test_speed_is_trained_tokens_over_seconds(drawn):
    bars = drawn["speed"].figure.axes[0].patches
    np.testing.assert_allclose([bar.get_height() for bar in bars], 240 * 12 / np.array([2.0, 4.0, 8.0]))


SITUATIONS = {
    "young": {"finished": 0},
    "half": {"finished": 2},
    "one task": {"tasks": ("only",)},
    "no attention": {"attention": False},
    "one row": {"rows": 1},
    "all zero": {"matrix": np.where(np.tri(3, dtype=bool), 0.0, np.nan)},
    "all hundred": {"matrix": np.where(np.tri(3, dtype=bool), 100.0, np.nan)},
    "hostile": {"tasks": ("a<b>&c", "$x$", "日本"), "text": HOSTILE},
}


@pytest.mark.slow
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_situation_gives_a_figure_or_a_reason(situation, tmp_path):
    fields = dict(SITUATIONS[situation])
    run = write_run(tmp_path / "run", *([fields.pop("tasks")] if "tasks" in fields else []), **fields)
    record = read_record(run)
    for plate in catalogue.OF_A_RUN:
        found = catalogue.draw(plate, record)
        assert isinstance(found, style.Drawing) or found.endswith("."), plate.name
        if isinstance(found, style.Drawing):
            assert "nan" not in found.alt, found.alt
    groups = [Group("sapt", "sapt", "model", (record,)), Group("other", "other", "model", (record,))]
    for plate in catalogue.OF_SEVERAL_RUNS:
        found = catalogue.draw(plate, groups)
        assert isinstance(found, style.Drawing) or found.endswith("."), plate.name


def test_logs_without_numbers_are_said_to_be_so(tmp_path):
    run = write_run(tmp_path / "run")
    curves = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(
        curves.replace('"loss": 0', '"loss": null, "was": 0').replace('"loss": 1', '"l": 1')
    )
    drawing = catalogue.draw(PLATES["loss"], read_record(run))
    assert "are no numbers" in drawing.alt


@pytest.mark.slow
def test_fifteen_long_names_leave_room_for_what_they_name(tmp_path):
    record = read_record(write_run(tmp_path / "run", LONG))
    for width in (style.COLUMN, style.TWO_COLUMNS):
        figure = catalogue.draw(PLATES["score_matrix"], record, width).figure
        style.image(style.Drawing(figure, ""))
        (axes,) = figure.axes
        assert axes.get_window_extent().width > 0.5 * figure.bbox.width
        left = min(label.get_window_extent().x0 for label in axes.get_yticklabels())
        assert left >= 0


@pytest.mark.slow
def test_files_embed_their_fonts_and_are_the_same_each_time(record, tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        style.save(catalogue.draw(PLATES["score_matrix"], record), tmp_path / folder / "matrix")
    pdf, svg, png = ((tmp_path / "first" / f"matrix.{ending}").read_bytes() for ending in ("pdf", "svg", "png"))
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert b"<text" not in svg and b"<path" in svg
    assert png.startswith(b"\x89PNG")
    for ending in ("pdf", "svg", "png"):
        first, second = ((tmp_path / folder / f"matrix.{ending}").read_bytes() for folder in ("first", "second"))
        assert first == second, ending


def test_groups_average_over_seeds(tmp_path):
    records = tuple(read_record(write_run(tmp_path / str(seed), seed=seed)) for seed in (1, 2, 3))
    found = [record.scores["summary"]["AP"] for record in records]
    group = Group("sapt", "sapt", "model", records)
    read = comparison.measure("AP")
    np.testing.assert_allclose(group.mean(read), np.mean(found))
    np.testing.assert_allclose(group.deviation(read), np.std(found, ddof=1))
    half = read_record(write_run(tmp_path / "half", finished=1))
    assert np.isnan(Group("half", "sapt", "model", (half,)).mean(read))


def test_models_stand_by_family_and_size():
    names = [
        "t5-v1_1-xxl",
        "Llama-2-13b-hf",
        "t5-v1_1-small",
        "SmolLM2-135M",
        "Llama-2-7b-hf",
        "SmolLM2-1.7B",
        "t5-v1_1-xl",
    ]
    ordered = sorted(names, key=comparison._by_family_and_size)
    assert [name for name in ordered if "t5" in name] == ["t5-v1_1-small", "t5-v1_1-xl", "t5-v1_1-xxl"]
    assert [name for name in ordered if "Llama" in name] == ["Llama-2-7b-hf", "Llama-2-13b-hf"]
    assert [name for name in ordered if "Smol" in name] == ["SmolLM2-135M", "SmolLM2-1.7B"]
    assert len(comparison._families(ordered)) == 3


@pytest.mark.parametrize("most", [1, 5, 12, 40])
def test_a_short_name_keeps_both_ends(most):
    short = style.shorten(LONG[0], most)
    assert len(short) <= most and LONG[0].startswith(short.split("…")[0]) and LONG[0].endswith(short.split("…")[1])
    assert style.shorten("two\n words\x07", 20).isprintable()
