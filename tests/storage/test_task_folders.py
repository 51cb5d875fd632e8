"""What of a workdir is a run's own."""

import pytest

from sapt_jax.storage.task_folders import begun_tasks, check_order, numbered_folders, task_folder


def begin(workdir, index, name, part="committed"):
    (task_folder(workdir, index, name) / part).mkdir(parents=True)


@pytest.mark.parametrize("place", ["run", "[lr=0.01] first try", "a*b", "back\\slash"])
def test_an_order_may_only_grow_at_its_end(tmp_path, place):
    workdir, names = tmp_path / place, ("first", "with-dash")
    check_order(workdir, names)
    for index, name in enumerate(names):
        begin(workdir, index, name, ("committed", "steps")[index])
    check_order(workdir, names)
    check_order(workdir, (*names, "third"))
    for order, wrong in ((names[::-1], "00-first"), (names[:1], "01-with-dash"), (("new", *names), "00-first")):
        with pytest.raises(ValueError, match=f"{wrong}: task . of this run is"):
            check_order(workdir, order)


def test_what_is_not_the_runs_own_is_passed_over(tmp_path):
    begin(tmp_path, 0, "first")
    begin(tmp_path, 100, "hundredth", "steps")
    begin(tmp_path, 1, "[x]*?")
    for name in ("my-notes", "0-short", "000-long", "x-01", "-", "01-", "02-empty", "\u0663\u0663-digits"):
        (tmp_path / "tasks" / name).mkdir()
    (tmp_path / "tasks" / "03-file").write_text("")
    assert [entry[:2] for entry in begun_tasks(tmp_path)] == [(0, "first"), (1, "[x]*?"), (100, "hundredth")]
    assert (2, "empty") in [entry[:2] for entry in numbered_folders(tmp_path / "tasks")]
    assert numbered_folders(tmp_path / "nowhere") == []


def test_a_task_has_a_folder_of_its_own(tmp_path):
    for name in ("../x", "a/b", ".."):
        with pytest.raises(ValueError, match="task: "):
            task_folder(tmp_path, 0, name)
