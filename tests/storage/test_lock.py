"""One process at a time in a workdir."""

import os
import subprocess
import sys

import pytest

from sapt_jax.storage import lock


def test_the_second_is_told_who_holds_it(tmp_path):
    with lock.hold(tmp_path / "run"):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()} on .*, since 2") as error:
                with lock.hold(tmp_path / "run"):
                    raise AssertionError("held twice")
        assert "another --workdir" in str(error.value) and "\n" not in str(error.value)
    with lock.hold(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_a_killed_process_holds_nothing(tmp_path):
    script = (
        "import os, sys\nfrom sapt_jax.storage import lock\n"
        "with lock.hold(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on"), lock.hold(tmp_path):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / "lock").exists()
    with lock.hold(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nothing_was_written_to_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with lock.hold(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), lock.hold(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == ""
