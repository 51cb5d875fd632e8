"""The frozen model of a run with its programs: what everything that the run learned is asked through."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from sapt_jax import sharding
from sapt_jax.ask.answers import Search
from sapt_jax.config import make_method
from sapt_jax.data.batching import FILLER, Layout, Share, eval_batches
from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.decoding import answers
from sapt_jax.decoding.answers import Ends, Wishes, make_answer, make_generate
from sapt_jax.models.families import load_params
from sapt_jax.programs import make_apply
from sapt_jax.run import read_model
from sapt_jax.state import Frozen, Task, Trainable, Tree

# The shortest batch shapes; longer ones double.
_LEAST_SOURCE, _LEAST_ANSWER = 16, 8


class Row(NamedTuple):
    """One input to answer.

    Attributes:
      ids: [L] int32, as `questions.Form` encodes it.
      slot: of the task that it is said to be of, for methods that are told.
      search: how its answer is looked for.
      number: tells apart what rows of one seed draw.
    """

    ids: np.ndarray
    slot: int | None
    search: Search
    number: int


class Placed(NamedTuple):
    """What was learned, on the devices: the two trees, the first without its base, and the last task learned."""

    frozen: Frozen
    trainable: Trainable
    task: Task


class Backbone:
    """Answers rows in batches of few shapes, each compiled when it first comes.

    Sources are padded to 16, 32, 64, ... tokens, batches to 1, 2, 4, ... rows for each device that splits them.
    """

    def __init__(self, config: ConfigDict, sizes: dict[str, int]):
        self.config, self.method = config, make_method(config)
        self.mesh = sharding.make_mesh(sizes)
        self.model, self.tokenizer = read_model(config)
        self._apply = make_apply(self.model)
        self._programs: dict[Any, Callable] = {}
        method = self.method
        self._weights = jax.jit(
            lambda frozen, trainable, source, mask, task: method.weights(
                frozen, trainable, method.features(self._apply, frozen.base, source, mask), task, training=False
            )
        )

    @functools.cached_property
    def base(self) -> Tree:
        """The pretrained parameters. `release` frees them; they are read again when they are next needed."""
        options = self.config.model
        with self.on_mesh():
            return load_params(self.model, options.path, options.param_dtype, self.mesh, self.config.seed)

    def release(self) -> None:
        """Frees the pretrained parameters' memory."""
        self.__dict__.pop("base", None)

    @contextlib.contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Everything that builds or calls a program runs under this."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.make_rules(self.config.mesh.rules)):
            yield

    @property
    def most_rows(self) -> int:
        """Rows of the largest batch."""
        return self._rows_of_batch(self.config.eval.batch_size)

    def answer(self, placed: Placed, rows: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens [N], weights [T]) of each row, in order; rows with other searches are answered in other batches."""
        kinds: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            kinds.setdefault(_program_of(row.search), []).append(place)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        with self.on_mesh():
            for kind, places in kinds.items():
                program = self._program(*kind)
                own = [rows[place] for place in places]
                for place, result in zip(places, self._in_batches(program, placed, own), strict=True):
                    found[place] = result
        return [found[place] for place in range(len(rows))]

    def weights(self, placed: Placed, rows: Sequence[Row]) -> np.ndarray:
        """The weights [n, T] of rows; nothing is generated."""

        def program(*arguments: Any) -> tuple[jax.Array, ...]:
            return (self._weights(*arguments[:-1]),)

        with self.on_mesh():
            return np.stack([weights for (weights,) in self._in_batches(program, placed, rows)])

    def _program(self, beams: int, drawn: bool, new_tokens: int) -> Callable:
        """(frozen, trainable, source, source_mask, task, wishes) -> (tokens, weights)."""
        key = (beams, drawn, new_tokens)
        if key not in self._programs:
            ends = Ends(new_tokens, self.tokenizer.eos_id, self.tokenizer.pad_id)
            if beams == 1:
                self._programs[key] = make_answer(self._apply, self.method, ends, drawn)
            else:
                search = answers.Search(beams, self.config.eval.length_penalty)
                generate = make_generate(self._apply, self.method, ends, search)
                self._programs[key] = lambda *arguments: generate(*arguments[:-1])
        return self._programs[key]

    def _in_batches(self, program: Callable, placed: Placed, rows: Sequence[Row]) -> list[tuple[np.ndarray, ...]]:
        """What a program says of each row. All batches are dispatched before the first result is fetched."""
        frozen = placed.frozen.replace(base=self.base)
        sources = Ragged.from_rows(row.ids for row in rows)
        split = EncodedSplit(sources, Ragged.from_rows([[]] * len(rows)), 0, 0)
        layout = Layout(self._buckets(), self._rows_of_batch(len(rows)), self.model.padding_side, self.tokenizer.pad_id)
        parts = []
        for order, batch in eval_batches(split, layout, Share(0, 1)):
            # A row that only fills the batch up wishes what a real one does: its answer is empty at once.
            wishing = [rows[place if place != FILLER else order[0]] for place in order]
            inputs = sharding.place_batch(
                {"source": batch["source"], "source_mask": batch["source_mask"], **_wishes(wishing)}, self.mesh
            )
            task = placed.task.replace(rows=inputs.pop("slots", None))
            source, mask = inputs.pop("source"), inputs.pop("source_mask")
            parts.append((order, program(frozen, placed.trainable, source, mask, task, Wishes(**inputs))))
        found: dict[int, tuple[np.ndarray, ...]] = {}
        for order, outputs in parts:
            fetched = jax.device_get(outputs)
            found |= {int(place): tuple(x[i] for x in fetched) for i, place in enumerate(order) if place != FILLER}
        return [found[place] for place in range(len(rows))]

    def _buckets(self) -> list[tuple[int, int]]:
        longest = self.config.data.max_source_length
        lengths = [_LEAST_SOURCE]
        while lengths[-1] < longest:
            lengths.append(2 * lengths[-1])
        return [(min(length, longest), 1) for length in lengths]

    def _rows_of_batch(self, rows: int) -> int:
        """Rows of the batch that `rows` are answered in, a power of two for each device that splits them."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        size = shards
        while 2 * size <= self.config.eval.batch_size and size < rows:
            size *= 2
        return size


def _program_of(search: Search) -> tuple[int, bool, int]:
    """(beams, whether tokens are drawn, the answers' length) that the program of a search is made for."""
    if search.beams > 1:
        # A beam search depends on where answers end.
        return search.beams, False, search.max_new_tokens
    length = _LEAST_ANSWER
    while length < search.max_new_tokens:
        length *= 2
    return 1, search.temperature > 0, length


def _wishes(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    searches = [row.search for row in rows]
    slots = {} if rows[0].slot is None else {"slots": np.array([row.slot for row in rows], np.int32)}
    return slots | {
        "limits": np.array([search.max_new_tokens for search in searches], np.int32),
        "seeds": np.array([search.seed for search in searches], np.uint32),
        "numbers": np.array([row.number for row in rows], np.uint32),
        "temperatures": np.array([search.temperature or 1.0 for search in searches], np.float32),
        "top_ps": np.array([search.top_p for search in searches], np.float32),
    }
