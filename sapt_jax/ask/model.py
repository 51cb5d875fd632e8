"""A run that has learned, as an object to ask."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapt_jax import sharding, state
from sapt_jax.ask.answers import Answer, Search, read_answer
from sapt_jax.ask.backbone import Backbone, Placed, Row
from sapt_jax.ask.questions import Asked, Encoded, Form, Question, default_template
from sapt_jax.ask.teaching import own_tasks, teach
from sapt_jax.config import capacity_of
from sapt_jax.data.instructions import read_instructions
from sapt_jax.data.stream import encoding_rules, order_of
from sapt_jax.export.learned import Learned, declared_state, read_run
from sapt_jax.export.to_torch import write_model
from sapt_jax.sharding import AXES
from sapt_jax.state import Task
from sapt_jax.storage import checkpoints
from sapt_jax.storage.paths import as_path

# All devices split the rows of a batch.
_MESH = dict(zip(AXES, (-1, 1, 1), strict=True))


def load(workdir: str | Path, base: str = "", mesh: Mapping[str, int] | None = None) -> "Model":
    """Loads what the run in a workdir has learned so far, to ask it.

    The workdir is only read, but by `Model.learn`, and a training may go on in it meanwhile: `Model.refresh` takes in
    what it has finished.

    Args:
      workdir: that of `sapt_jax.main`: a folder, or a path of gs:// or s3://.
      base: where the base model lies now, if not where the run found it.
      mesh: devices along "data", "fsdp" and "tensor", as config.mesh; by default all split the rows of a batch.

    Raises:
      FileNotFoundError: this is no run's workdir, it has learned nothing yet, or its base model has gone.
      ValueError: the base is another model, a file of the workdir is broken, or the mesh does not fit the devices.

    Example:
      >>> import sapt_jax
      >>> model = sapt_jax.load("runs/mine")
      >>> model.tasks
      ('shout', 'mirror', 'first')
    """
    workdir = as_path(workdir)
    learned = read_run(workdir, base)
    return Model(workdir, Backbone(learned.config, _MESH | dict(mesh or {})), learned)


class Model:
    """What a run has learned: answers inputs, and learns more. Made by `load`.

    Its methods may be called from one thread at a time.
    """

    def __init__(self, workdir: Any, backbone: Backbone, learned: Learned, withdrawn: tuple[str, ...] = ()):
        self._workdir, self._backbone, self._withdrawn = workdir, backbone, withdrawn
        self._take(learned)

    def _take(self, learned: Learned) -> None:
        config, backbone = learned.config, self._backbone
        if own_tasks(self._workdir).is_dir():
            # The workdir may have moved.
            config.own_dir = str(own_tasks(self._workdir))
        enabled = np.array([name not in self._withdrawn for name in learned.slots]) & learned.frozen.enabled
        learned = dataclasses.replace(learned, frozen=learned.frozen.replace(enabled=enabled))
        rules = encoding_rules(config, backbone.tokenizer, backbone.model.padding_side)
        form = Form(backbone.tokenizer, rules, read_instructions(self._workdir), default_template(config))
        with backbone.on_mesh():
            placed = _place(learned, backbone)
        # All or nothing: what cannot be read changes nothing.
        self._learned, self._form, self._placed = learned, form, placed

    # --- What it is ---------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks learned, in order, without those withdrawn by `without`."""
        return tuple(name for name in self._learned.tasks if name not in self._withdrawn)

    @property
    def instructions(self) -> dict[str, str]:
        """The instruction of every task that the run knows one of, by name: what `task` puts before an input."""
        return {name: instruction.definition for name, instruction in self._form.instructions.items()}

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer where a call does not say: the run's config.eval.max_new_tokens."""
        return self._learned.config.eval.max_new_tokens

    @property
    def most_rows(self) -> int:
        """How many inputs are answered at once, at most."""
        return self._backbone.most_rows

    @property
    def _attends(self) -> bool:
        """Whether every task has a block of its own, which the weights of a mixture tell of."""
        method = self._backbone.method
        return method.slot_index(0) != method.slot_index(1)

    # --- Asking -------------------------------------------------------------------------------------------------------

    def generate(
        self, texts: Sequence[Asked], task: str | None = None, definition: str | None = None, **search: Any
    ) -> list[Answer]:
        """Answers n inputs, in order.

        Args:
          texts: [n] texts, or chats as lists of {"role", "content"}, written in the tokenizer's own template where it
            has one.
          task: whose instruction goes before the inputs, as in training; a method that is told the task of an input is
            told this one. None: no instruction.
          definition: an instruction in place of the task's; "" is none.
          search: of `max_new_tokens`, `beams`, `temperature`, `top_p` and `seed`, see `answers.Search`; by default
            those of the run's tests. Input i of a call draws its own random numbers of the seed.

        Returns:
          [n] answers, each with the attention of its input on the tasks.

        Raises:
          ValueError: naming the argument, or the input by its number, and what to do.

        Example:
          >>> answers = model.generate(["abc", "bcd"], task="shout", max_new_tokens=8)
          >>> [answer.new_tokens <= 8 for answer in answers]
          [True, True]
          >>> list(answers[0].attention)
          ['shout', 'mirror', 'first']
        """
        try:
            how = self.search(**search)
        except TypeError as error:
            raise ValueError(f"{error}: there are max_new_tokens, beams, temperature, top_p and seed") from None
        return self.answer(self._rows(texts, task, definition, how))

    def attention(self, texts: Sequence[Asked], task: str | None = None, definition: str | None = None) -> np.ndarray:
        """The weights [n, T] that the blocks of the tasks are mixed with for n inputs; arguments as of `generate`.

        Column j is that of `model.tasks[j]`; a withdrawn task has none.

        Raises:
          ValueError: as `generate`; or the run's method has no block for each task.

        Example:
          >>> weights = model.attention(["abc", "bcd"], task="shout")
          >>> weights.shape, weights.sum(axis=1).round(3).tolist()
          ((2, 3), [1.0, 1.0])
        """
        if not self._attends:
            name = self._learned.config.method
            raise ValueError(f"config.method={name!r} has no block for each task, whose weights could be told")
        rows = [row for row, _ in self._rows(texts, task, definition, self.search())]
        columns = [self._learned.tasks.index(name) for name in self.tasks]
        weights = self._backbone.weights(self._placed, rows) if rows else np.zeros((0, len(self._learned.tasks)))
        return weights[:, columns]

    def without(self, *tasks: str) -> "Model":
        """The model less some of its tasks: their blocks take no part in any mixture. What is loaded is shared.

        Raises:
          ValueError: it has not learned one of them, they share a block with others, or no task would be left.

        Example:
          >>> model.without("mirror").tasks
          ('shout', 'first')
        """
        for name in tasks:
            self._check_learned(name)
        if not self._attends:
            name = self._learned.config.method
            raise ValueError(f"with config.method={name!r} tasks share a block: none of them can be withdrawn")
        if not set(self.tasks) - set(tasks):
            raise ValueError("no task would be left")
        return Model(self._workdir, self._backbone, self._learned, (*self._withdrawn, *tasks))

    # --- Learning and keeping up --------------------------------------------------------------------------------------

    def learn(
        self,
        name: str,
        train: Sequence[Mapping[str, Any]],
        definition: str = "",
        test: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Teaches one more task in the workdir, with the run's own settings, and answers with it from then on.

        The task's rows are written into WORKDIR/own_tasks/NAME. A call that was interrupted goes on where it stopped
        when it is made again with the same rows. The run's earlier data have to lie where they lay.

        Args:
          name: of the task; letters, digits, "_", "-" and ".".
          train: rows {"input": str, "output": str or list of str}, or {"messages": [...]}.
          definition: the instruction that goes before every input.
          test: rows to score it on; by default a tenth of `train`, at least one row, is set aside.

        Returns:
          What WORKDIR/scores.json holds: "matrix" [T, T], "summary", ...

        Raises:
          ValueError: naming the row or argument at fault, or the run has tasks left to learn; nothing is changed then.

        Example:
          >>> rows = [{"input": text, "output": text[-1]} for text in ("abc", "bcd", "cda", "dab", "acb", "bdc")]
          >>> scores = model.learn("last", train=rows, definition="Say the last letter.")  # doctest: +SKIP
          >>> len(scores["matrix"])  # doctest: +SKIP
          4
        """
        if self._withdrawn:
            raise ValueError("a model without some of its tasks cannot learn: call learn of the whole one")
        rows = {"train": train} if test is None else {"train": train, "test": test}
        sizes = dict(self._backbone.mesh.shape)
        # A run loads the base model for itself: two would not fit where one just does.
        scores = teach(self._workdir, name, definition, rows, (self._learned, sizes, self._backbone.release))
        self.refresh()
        return scores

    def refresh(self) -> bool:
        """Takes in the tasks that a running training has finished since; returns whether there were any.

        Raises:
          ValueError or FileNotFoundError: the workdir was damaged or has gone; the model stays as it was.

        Example:
          >>> model.refresh()
          False
        """
        folders = checkpoints.committed_folders(self._workdir)
        if tuple(folder.name.split("-", 1)[1] for folder in folders) == self._learned.tasks:
            return False
        path = self._backbone.config.model.path
        self._take(read_run(self._workdir, path))
        return True

    def to_torch(self, path: str | Path, include_base: bool = True) -> None:
        """Writes a folder that PyTorch loads: `AutoModel.from_pretrained(path, trust_remote_code=True)`.

        Args:
          path: a folder that does not exist.
          include_base: whether it gets the base model's weights; else it says where they lie.

        Raises:
          ValueError or FileExistsError: see `export.to_torch.write_model`.

        Example:
          >>> model.to_torch("exported")  # doctest: +SKIP
        """
        write_model(self._learned, include_base, Path(path))

    def encode(self, asked: Asked, task: str | None = None, definition: str | None = None) -> np.ndarray:
        """The token ids [L] int32 of one input as `generate` puts it: what an exported model takes.

        Raises:
          ValueError: as `generate`.

        Example:
          >>> model.encode("abc", task="shout").dtype
          dtype('int32')
        """
        ((row, _),) = self._rows([asked], task, definition, self.search())
        return row.ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids [L], such as an exported model's answer, up to the end token.

        Example:
          >>> model.decode(model.encode("abc")).endswith("Output:")
          True
        """
        return read_answer(np.asarray(ids), len(ids), self._backbone.tokenizer)[0]

    # --- For those who ask one input at a time ------------------------------------------------------------------------

    def search(self, **search: Any) -> Search:
        """How an answer is looked for; what is not given is as in the run's tests.

        Raises:
          ValueError or TypeError: a value is out of range, or a name is unknown.
        """
        options = self._learned.config.eval
        beams = 1 if search.get("temperature") else options.beams
        wanted = Search(**{"max_new_tokens": options.max_new_tokens, "beams": beams} | search)
        # The first step of a beam search has twice as many candidates of one beam.
        if (most := self._learned.shape.vocab_size // 2) < wanted.beams:
            raise ValueError(f"beams must be at most {most}, half of the model's vocabulary, not {wanted.beams}")
        return wanted

    def row(self, question: Question, search: Search, number: int) -> tuple[Row, Encoded]:
        """What `answer` takes: a question in token ids.

        Args:
          number: tells apart what the rows of one seed draw.

        Raises:
          ValueError: naming what is wrong with the question.
        """
        method, slot = self._backbone.method, None
        if method.needs_task_id:
            if question.task is None:
                raise ValueError(
                    f"config.method={self._learned.config.method!r} is told the task of every input: give task, one of "
                    f"{', '.join(self.tasks)}"
                )
            self._check_learned(question.task)
            slot = method.slot_index(self._learned.tasks.index(question.task))
        encoded = self._form.encode(question)
        return Row(encoded.ids, slot, search, number), encoded

    def answer(self, rows: Sequence[tuple[Row, Encoded]]) -> list[Answer]:
        """Answers rows that `row` made, [n] in order; they may differ in task and search."""
        found = self._backbone.answer(self._placed, [row for row, _ in rows])
        return [self._answer(row, encoded, *result) for (row, encoded), result in zip(rows, found, strict=True)]

    def _rows(
        self, texts: Sequence[Asked], task: str | None, definition: str | None, search: Search
    ) -> list[tuple[Row, Encoded]]:
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ValueError(f"texts must be a list of inputs, not {type(texts).__name__}: write [text] for one")
        rows = []
        for number, asked in enumerate(texts):
            try:
                rows.append(self.row(Question(asked, task, definition), search, number))
            except ValueError as error:
                raise ValueError(f"input {number}: {error}") from None
        return rows

    def _answer(self, row: Row, encoded: Encoded, tokens: np.ndarray, weights: np.ndarray) -> Answer:
        text, length, finished = read_answer(tokens, row.search.max_new_tokens, self._backbone.tokenizer)
        attention = {}
        if self._attends:
            pairs = zip(self._learned.tasks, weights.tolist(), strict=False)
            attention = {name: weight for name, weight in pairs if name not in self._withdrawn}
        return Answer(text, attention, len(row.ids), length, finished, encoded.cut)

    def _check_learned(self, name: str) -> None:
        if name not in self.tasks:
            raise ValueError(
                f"the run has not learned task {name!r}, or it is withdrawn: it has {', '.join(self.tasks)}"
            )


def _place(learned: Learned, backbone: Backbone) -> Placed:
    """What was learned, on the devices, in a bank of the run's own capacity: a task more is then no other shape."""
    config, method = learned.config, backbone.method
    order = order_of(config)
    capacity = capacity_of(config, method, max(len(order), len(learned.tasks)))
    frozen_leaves, trainable_leaves = declared_state(config, learned.shape, capacity)
    frozen = sharding.place(state.grow(learned.frozen, frozen_leaves), frozen_leaves, backbone.mesh)
    trainable = sharding.place(learned.trainables[-1], trainable_leaves, backbone.mesh)
    last = len(learned.tasks) - 1
    task = Task(np.int32(last), np.int32(method.slot_index(last)), np.int32(0))
    return Placed(frozen, trainable, sharding.replicate(task, backbone.mesh))
