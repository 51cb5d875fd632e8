"""What a run tells after each task: scores.json, the table in the terminal, and the closing summary."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from sapt_jax.config import protocol_of
from sapt_jax.data.benchmarks import SUPERNI_CATEGORIES
from sapt_jax.results import metrics, scores, terminal
from sapt_jax.run import Run
from sapt_jax.state import Frozen


@dataclasses.dataclass
class Tale:
    """The scores of a run as they come in.

    Attributes:
      run: the run.
      results: where its scores and predictions go.
      single_task_scores: what FWT compares with, by task; may be empty.
      matrix: [T, T], NaN where there is no score yet.
    """

    run: Run
    results: epath.Path
    single_task_scores: dict[str, float]
    matrix: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        self.matrix = metrics.empty_matrix(len(self.run.stream.tasks))

    def opening(self) -> None:
        """Says what the run is about to do."""
        stream, config = self.run.stream, self.run.config
        cut = stream.truncated()
        self.run.console.print(
            f"{len(stream.tasks)} tasks, {sum(len(task.train) for task in stream.tasks)} training rows, batch shapes "
            f"{', '.join(f'{source}+{target}' for source, target in stream.buckets)}, "
            f"{stream.padding(config.train.batch_size):.1%} padding, {sum(n for n, _ in cut.values())} prompts and "
            f"{sum(n for _, n in cut.values())} answers cut"
        )

    def after_task(self, task_index: int, row: list[float], unseen: dict[str, float], frozen: Frozen) -> dict[str, Any]:
        """Takes the scores [task_index + 1] after a task, and tells them.

        Returns:
          What scores.json holds.
        """
        run, names = self.run, self.run.stream.names
        self.matrix = metrics.with_row(self.matrix, task_index, row)
        run.log.log("scores", task_index=task_index, task=names[task_index], step=0, scores=row)
        told = self._write(unseen, frozen)
        title, width = f"Scores, {run.config.method}", run.console.width
        run.console.print(terminal.score_table(self.matrix, names, told["metric_per_task"], title=title, width=width))
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
        run.console.print(terminal.closing_summary(told["summary"], places, told["protocol"]))

    def _write(self, unseen: dict[str, float], frozen: Frozen) -> dict[str, Any]:
        run, names = self.run, self.run.stream.names
        finished = metrics.finished_part(self.matrix)
        single = self.single_task_scores
        extra = {
            **run.method.told(frozen.memory),
            "buckets": run.stream.buckets,
            "truncated": run.stream.truncated(),
            "unseen": unseen,
            "single_task_scores": single,
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
            summary=metrics.summarise(finished, [single[name] for name in names[: len(finished)]] if single else None),
            seeds={"seed": run.config.seed, "data.seed": run.config.data.seed},
            protocol=protocol_of(run.config),
            config=run.config,
            extra=extra,
        )
        scores.write_scores(self.results, found)
        return found.told()
