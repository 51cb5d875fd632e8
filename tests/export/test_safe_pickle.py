"""The reader of pickled vectors: every way numpy writes one, and nothing else, without running any of it."""

import os
import pickle
import pickletools
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from sapt_jax.export.safe_pickle import read_array


def write(folder, content, name="attention_weights.pkl"):
    file = folder / name
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "u1"])
def test_numeric_arrays(tmp_path, protocol, dtype):
    rng = np.random.default_rng(0)
    for array in (rng.normal(size=5) * 50, np.zeros(0), rng.normal(size=(2, 3)) * 50, np.asfortranarray(np.eye(3) + 1)):
        array = np.array(abs(array), dtype, order="A")
        found = read_array(write(tmp_path, pickle.dumps(array, protocol=protocol)))
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype.newbyteorder("=")


def test_the_module_names_of_numpy_1_and_2(tmp_path):
    new = pickle.dumps(np.arange(3.0), protocol=2)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    for content in {new, old}:
        np.testing.assert_array_equal(read_array(write(tmp_path, content)), np.arange(3.0))


class RunsACommand:
    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class Evaluates:
    def __reduce__(self):
        return eval, (f"open({str(self.mark)!r}, 'w').close()",)


class Builds:
    """Names nothing but numpy, which would itself read a pickle of a file."""

    def __reduce__(self):
        return np.load, (str(self.mark), None, True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [RunsACommand, Evaluates, Builds])
@pytest.mark.parametrize("inside", [lambda x: x, lambda x: [np.arange(2.0), x], lambda x: {"weights": x}])
def test_a_malicious_pickle_does_not_run(tmp_path, kind, protocol, inside):
    kind.mark = tmp_path / "ran"
    content = pickle.dumps(inside(kind()), protocol=protocol)
    with pytest.raises(ValueError, match=r"not a pickle of one numeric numpy array.*it names"):
        read_array(write(tmp_path, content))
    assert not (tmp_path / "ran").exists()
    if kind is RunsACommand:  # the same pickle does run where it is loaded as pickles are
        pickle.loads(content)
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        [1.0, 2.0],
        np.float32(1.0),
        "text",
        np.array(["a", "b"]),
        np.array([object(), None]),
        np.array([1, 2j]),
        np.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.ma.masked_array([1.0], [True]),
        np.dtype("f4"),
    ],
    ids=lambda content: type(content).__name__,
)
def test_nothing_else_is_read(tmp_path, content):
    with pytest.raises(ValueError, match="attention_weights.pkl is not a pickle of one numeric numpy array"):
        read_array(write(tmp_path, pickle.dumps(content)))


def test_broken_files(tmp_path):
    whole = pickle.dumps(np.arange(4.0), protocol=4)
    for content in (b"", b"no pickle", whole[:-20]):
        with pytest.raises(ValueError, match="not a pickle of one numeric numpy array"):
            read_array(write(tmp_path, content))
    # A shape that the data do not fill.
    lies = whole.replace(b"K\x04\x85", b"K\x09\x85")
    assert lies != whole and any(argument == 9 for _, argument, _ in pickletools.genops(lies))
    with pytest.raises(ValueError, match=re.escape("32 bytes do not make an array of f8 (9,)")):
        read_array(write(tmp_path, lies))
    with pytest.raises(ValueError, match="has 16777217 bytes"):
        read_array(write(tmp_path, bytes(2**24 + 1)))


GREEDY = {
    "a place in the memo": b"\x80\x04Nr" + struct.pack("<I", 2**28) + b".",
    "a place as text": b"\x80\x02Np268435456\n.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**32) + b"abc.",
    "a byte array": b"\x80\x05\x96" + struct.pack("<Q", 2**32) + b"abc.",
    "a text": b"\x80\x04\x8d" + struct.pack("<Q", 2**32) + b"abc.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**32) + b"N.",
    "a number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
}


def test_a_few_bytes_do_not_take_gigabytes(tmp_path):
    """In a process of its own, with 300 MiB beyond what it takes to start."""
    for number, content in enumerate(GREEDY.values()):
        write(tmp_path, content, f"{number}.pkl")
    script = (
        "import resource, sys; from pathlib import Path; from sapt_jax.export.safe_pickle import read_array\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)\n"
        f"for number in range({len(GREEDY)}):\n"
        "    try: read_array(Path(sys.argv[1]) / f'{number}.pkl')\n"
        "    except ValueError as error: assert not isinstance(error.__context__, MemoryError), number\n"
        "    else: assert False, number\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
