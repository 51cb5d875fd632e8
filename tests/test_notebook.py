"""The notebook is what its source says, and runs from start to end, twice: as after a disconnect."""

import importlib.util
import json

import pytest

from tests.helpers.learned_runs import make_base
from tests.helpers.paths import REPOSITORY
from tests.helpers.tiny import write_tasks

pytestmark = pytest.mark.slow

nbclient = pytest.importorskip("nbclient", reason="the notebook is executed by it")
nbformat = pytest.importorskip("nbformat", reason="the notebook is read by it")
pytest.importorskip("ipykernel", reason="the notebook runs in it")
pytest.importorskip("matplotlib", reason="the notebook draws with it")
FILE = REPOSITORY / "launch/sapt_jax_colab.ipynb"
TINY = """
from tests.helpers.tiny import tiny_config


def get_config():
    changes = {{"model.path": {base!r}, "model.variant": "", "train.epochs": 1, "task_order": "shout,mirror"}}
    return tiny_config({data!r}, **changes)
"""


def test_it_is_what_its_source_says():
    spec = importlib.util.spec_from_file_location("build_notebook", REPOSITORY / "launch/build_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = json.loads(FILE.read_text(encoding="utf-8"))
    assert written == module.notebook(module.SOURCE.read_text(encoding="utf-8"))
    nbformat.validate(nbformat.from_dict(written))
    assert all(not cell.get("outputs") for cell in written["cells"])


def test_it_runs_with_tiny_settings_and_again_after_a_disconnect(tmp_path, monkeypatch):
    make_base("llama of bytes", tmp_path / "base")
    data = write_tasks(tmp_path / "data", train=10, test=2)
    (tmp_path / "tiny.py").write_text(TINY.format(base=str(tmp_path / "base"), data=str(data)))
    settings = {"FOLDER": tmp_path / "drive", "SOURCE": REPOSITORY, "CONFIG": tmp_path / "tiny.py"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SAPT_{name}", str(value))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    curves = tmp_path / "drive/run/metrics.jsonl"
    trained = ""
    for time in range(2):
        book = nbformat.read(FILE, as_version=4)
        nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
        assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
        shown = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
        assert "('shout', 'mirror', 'capitals')" in shown
        (line,) = [line for line in shown.splitlines() if " = " in line]
        theirs, ours = line.split(" = ")
        assert theirs == ours
        # The second time nothing is trained anew.
        assert time == 0 or curves.read_text() == trained
        trained = curves.read_text()
