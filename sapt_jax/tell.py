"""What a run tells: its instructions, then after each task scores.json and a table, and a closing summary."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sapt_jax.config import protocol_of
from sapt_jax.data.benchmarks import SUPERNI_CATEGORIES
from sapt_jax.data.instructions import write_instructions
from sapt_jax.evaluation import Tested
from sapt_jax.models.families import parameters
from sapt_jax.pseudo_samples.pools import Pools, rows_kept
from sapt_jax.pseudo_samples.writer import WRITER
from sapt_jax.results import metrics, scores, terminal
from sapt_jax.results.cautions import cautions
from sapt_jax.results.figures import style
from sapt_jax.results.figures.catalogue import figures_of
from sapt_jax.results.labels import count_kept, one_line
from sapt_jax.results.record import read_record
from sapt_jax.results.references import References
from sapt_jax.run import Run
from sapt_jax.state import Frozen
from sapt_jax.storage.costs import Costs, read_costs


class Beside(NamedTuple):
    """What is tested after the last task beside the tasks.

    Attributes:
      unseen: scores on tasks never trained on, by name.
      general: the loss on a general text, in nats a token, of the bare model and after all tasks.
    """

    unseen: Mapping[str, float] = {}
    general: tuple[float, float] | None = None


class Tests(NamedTuple):
    """What a task was followed by: the tests of all tasks up to it, and after the last those beside them."""

    seen: list[Tested]
    beside: Beside


@dataclasses.dataclass
class Tale:
    """The scores of a run as they come in.

    Attributes:
      run: the run.
      results: where its scores and predictions go.
      references: what they are compared with.
      matrix: [T, T], NaN where there is no score yet.
      moved: [T, T] as it, in nats: `Method.moved` of each tested task's inputs, NaN for methods that cannot say it.
    """

    run: Run
    results: epath.Path
    references: References
    matrix: np.ndarray = dataclasses.field(init=False)
    moved: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        self.matrix = metrics.empty_matrix(len(self.run.stream.tasks))
        self.moved = metrics.empty_matrix(len(self.run.stream.tasks))

    def opening(self) -> None:
        """Says what the run is about to do, and leaves its tasks' instructions for those who ask it."""
        stream, config = self.run.stream, self.run.config
        write_instructions(self.run.workdir, [task.task for task in stream.tasks + stream.unseen])
        cut = stream.truncated()
        self.run.console.print(
            f"{len(stream.tasks)} tasks, {sum(len(task.train) for task in stream.tasks)} training rows, batch shapes "
            f"{', '.join(f'{source}+{target}' for source, target in stream.buckets)}, "
            f"{stream.padding(config.train.batch_size):.1%} padding, {sum(n for n, _ in cut.values())} prompts and "
            f"{sum(n for _, n in cut.values())} answers cut"
        )
        for task in stream.tasks + stream.unseen:
            for line in cautions(task, self.run.tokenizer):
                self.run.console.print(f"warning: {line}", style="yellow")

    def after_tasks(self, together: Sequence[int], tests: Tests, pools: Pools, frozen: Frozen) -> dict[str, Any]:
        """Takes the tests after the last of some tasks that were learned together, and tells them.

        They have one fit, which stands for what was known after each of them.

        Args:
          pools: the samples that the run has so far.

        Returns:
          What scores.json holds.
        """
        run, names, task_index = self.run, self.run.stream.names, together[-1]
        row = [test.score for test in tests.seen]
        for learned in together:
            self.matrix = metrics.with_row(self.matrix, learned, row[: learned + 1])
        self.moved = metrics.with_row(self.moved, task_index, self._moved(tests.seen, frozen))
        new = False
        if self.results == run.workdir:
            # Beside it lie the scores of another way to test, which are no part of the curves.
            new = run.log.log("scores", task_index=task_index, task=names[task_index], step=0, scores=row)
        told = self._write(tests, pools, frozen)
        if new and run.config.train.figures:
            images = ((name, style.image(drawing)) for name, drawing in figures_of(read_record(run.workdir)))
            run.log.show(task_index, names[task_index], images)
        title, width = f"Scores, {run.config.method}", run.console.width
        run.console.print(terminal.score_table(self.matrix, names, told["metric_per_task"], title=title, width=width))
        run.console.print(f" {one_line(told['labels'])}", style="dim")
        return told

    def closing(self, told: dict[str, Any]) -> None:
        """Says how it ended, and where everything lies."""
        run = self.run
        for category, score in told.get("category_scores", {}).items():
            run.console.print(f"mean of {category}: {terminal.format_score(score)}")
        for name, score in told["unseen"].items():
            run.console.print(f"never trained on: {name} {terminal.format_score(score)}")
        places = {
            "scores": self.results / "scores.json",
            "predictions": self.results / "predictions",
            "curves": run.workdir / "tensorboard",
        }
        run.console.print(terminal.closing_summary(told, places))

    @property
    def _tells_moves(self) -> bool:
        """Whether the weights of the tests are the method's own, and it recorded what they were."""
        return self.run.method.uses("moved") and self.run.config.eval.routing == "method"

    def _moved(self, tests: Sequence[Tested], frozen: Frozen) -> list[float]:
        method, found = self.run.method, [np.nan] * len(tests)
        # Process 0 alone tells.
        if jax.process_index() == 0 and self._tells_moves:
            memory = jax.tree.map(np.asarray, frozen.memory)
            for tested, test in enumerate(tests):
                moved = method.moved(memory, test.weights, method.slot_index(tested))
                found[tested] = np.nan if moved is None else moved
        return found

    def _write(self, tests: Tests, pools: Pools, frozen: Frozen) -> dict[str, Any]:
        run, names = self.run, self.run.stream.names
        finished = metrics.finished_part(self.matrix)
        done = names[: len(finished)]
        compared = [
            [scores[name] for name in done] if scores else None
            for scores in (self.references.single, self.references.joint)
        ]
        extra = {
            "labels": self._labels(len(finished), pools),
            "costs": {name: _costs(run, index) for index, name in enumerate(done)},
            "routing": _routing(done, tests.seen),
            "seen_averages": metrics.seen_averages(finished),
            **run.method.told(frozen.memory),
            "attention_kl": self.moved if self._tells_moves else None,
            "buckets": run.stream.buckets,
            "truncated": run.stream.truncated(),
            "unseen": tests.beside.unseen,
            "general": _general(tests.beside.general),
            "single_task_scores": self.references.single,
            "joint_scores": self.references.joint,
        }
        categories = {name: category for category, members in SUPERNI_CATEGORIES.items() for name in members}
        if set(names) <= set(categories):
            by_task = dict(zip(names, finished[-1], strict=False))
            extra["category_scores"] = metrics.mean_by_category(by_task, categories)
        found = scores.Scores(
            method=run.config.method,
            task_order=names,
            metric_per_task={task.name: task.task.metric for task in run.stream.tasks},
            matrix=self.matrix,
            summary=metrics.summarise(finished, *compared),
            seeds={"seed": run.config.seed, "data.seed": run.config.data.seed},
            protocol=protocol_of(run.config),
            config=run.config,
            extra=extra,
        )
        scores.write_scores(self.results, found)
        return found.told()

    def _labels(self, finished: int, pools: Pools) -> dict[str, Any]:
        """What a score over the first tasks says of itself. The last of them saw the samples of those before."""
        run, method, earlier = self.run, self.run.method, finished - 1
        leaves = method.kept_leaves(parameters(run.model), method.capacity(finished))
        return {
            "needs_task_id": method.needs_task_id,
            "routing": run.config.eval.routing,
            "old_data": method.old_data(run.config.pseudo_samples.source),
            "rows": rows_kept(pools, earlier),
            **count_kept(leaves, (pools[index] for index in range(earlier) if index in pools)),
        }


def _general(losses: tuple[float, float] | None) -> dict[str, float] | None:
    """General ability lost: by how much the loss on a text that no task is about has grown, in nats a token."""
    if losses is None:
        return None
    before, after = losses
    return {"before": before, "after": after, "lost": after - before}


def _costs(run: Run, index: int) -> dict[str, Any] | None:
    """What a task took, and, where the model writes samples, what writing them took; None in an older run."""
    if index not in {together[-1] for together in run.method.lessons(len(run.stream.tasks))}:
        # The last of the tasks that are learned together has the costs of all.
        return dataclasses.asdict(Costs())
    costs, writing = (read_costs(folder) for folder in (run.folder(index), run.folder(index) / WRITER))
    if costs is None:
        return None
    return dataclasses.asdict(costs) | ({"writing_seconds": writing.seconds} if writing else {})


def _routing(names: Sequence[str], tests: list[Tested]) -> dict[str, Any] | None:
    """The shares of test rows whose largest weight is on their own task; None where nothing chooses."""
    routed = {name: test.routed for name, test in zip(names, tests, strict=True) if test.routed is not None}
    if not routed:
        return None
    by_task = {name: float(rows.mean()) for name, rows in routed.items()}
    return {"accuracy": float(np.concatenate(list(routed.values())).mean()), "by_task": by_task}
