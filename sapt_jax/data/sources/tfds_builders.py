"""TFDS builders of the two benchmarks: prepared once, checked, and random-access afterwards, without TensorFlow.

    python -m sapt_jax.data.sources.tfds_builders --benchmark=superni --source_dir=DATA --tfds_dir=DATA/tfds

reads the CL_Benchmark layout under DATA and writes ArrayRecord files; `config.data_source="tfds"` then reads them
from `{data_dir}/tfds`.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags

from sapt_jax.data.sources.task_files import BenchmarkFolder, find_folder, nearest_name, read_cl_benchmark
from sapt_jax.data.task import Instance, Task, read_instances

# (train, test) as published with the SAPT paper.
PUBLISHED_SIZES: dict[str, tuple[int, int]] = {
    "task002_quoref_answer_generation": (1000, 100),
    "task073_commonsenseqa_answer_generation": (975, 100),
    "task1290_xsum_summarization": (1000, 100),
    "task1510_evalution_relation_extraction": (1000, 100),
    "task1572_samsum_summary": (160, 20),
    "task1590_diplomacy_text_generation": (126, 16),
    "task1687_sentiment140_classification": (1000, 100),
    "task1729_personachat_generate_next": (1000, 100),
    "task181_outcome_extraction": (338, 43),
    "task363_sst2_polarity_classification": (1000, 100),
    "task511_reddit_tifu_long_text_summarization": (1000, 100),
    "task591_sciq_answer_generation": (1000, 100),
    "task639_multi_woz_user_utterance_generation": (142, 18),
    "task748_glucose_reverse_cause_event_detection": (1000, 100),
    "task875_emotion_classification": (1000, 100),
    "yelp": (5000, 7600),
    "amazon": (5000, 7600),
    "mnli": (3000, 7600),
    "cb": (250, 56),
    "copa": (400, 100),
    "qqp": (2000, 7600),
    "rte": (2000, 277),
    "imdb": (2000, 7600),
    "sst2": (2000, 872),
    "dbpedia": (14000, 7600),
    "agnews": (4000, 7600),
    "yahoo": (10000, 7600),
    "multirc": (2000, 4848),
    "boolq": (2000, 3270),
    "wic": (2000, 638),
}


class _BenchmarkBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One builder config for each task; the manual folder is the one that holds CL_Benchmark."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The folder that holds CL_Benchmark, as manual_dir of the DownloadConfig."
    FOLDER: str

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Continual-learning benchmark of the SAPT paper, in the CL_Benchmark layout.",
            features=tfds.features.FeaturesDict(
                {"id": text(), "input": text(), "output": tfds.features.Sequence(text())}
            ),
            metadata=tfds.core.MetadataDict({"definition": "", "labels": []}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        # Faulty rows are stored as they are: the setting of the run that reads them decides.
        task = read_cl_benchmark(
            self.builder_config.name,
            BenchmarkFolder(self.FOLDER),
            root=Path(dl_manager.manual_dir),
            on_bad_instance="keep",
        )
        self.info.metadata.update(definition=task.definition, labels=list(task.labels))
        return {split: self._generate_examples(getattr(task, split)) for split in ("train", "test")}

    def _generate_examples(self, instances: Sequence[Instance]) -> Iterator[tuple[int, dict]]:
        for row, instance in enumerate(instances):
            yield row, {"id": instance.id, "input": instance.input, "output": list(instance.outputs)}


def _configs(prefix: str, numbered: bool) -> list[tfds.core.BuilderConfig]:
    names = [name for name in PUBLISHED_SIZES if name.startswith("task") == numbered]
    return [tfds.core.BuilderConfig(name=name, description=f"{prefix} task {name}") for name in names]


class SaptSuperni(_BenchmarkBuilder):
    """The 15 SuperNI tasks."""

    FOLDER = "SuperNI"
    BUILDER_CONFIGS = _configs("SuperNI", True)


class SaptLongSequence(_BenchmarkBuilder):
    """The 15 Long Sequence tasks."""

    FOLDER = "Long_Sequence"
    BUILDER_CONFIGS = _configs("Long Sequence", False)


BUILDERS = {"SuperNI": SaptSuperni, "Long_Sequence": SaptLongSequence}


def prepare(folder: str, task_name: str, *, source_dir: Path, tfds_dir: Path) -> dict[str, int]:
    """Prepares one task (at once if it is there already) and returns the size of its splits.

    Args:
      folder: "SuperNI" or "Long_Sequence".
      source_dir: the folder that holds CL_Benchmark. tfds_dir: where the prepared data go.
    """
    builder = BUILDERS[folder](config=task_name, data_dir=str(tfds_dir), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(source_dir)),
    )
    return {name: split.num_examples for name, split in builder.info.splits.items()}


def open_prepared(dataset: str, *, root: Path) -> Any:
    """Opens the newest version of a prepared dataset, `{root}/{dataset}/{version}`, without its builder's code.

    Raises FileNotFoundError if it was not prepared, ValueError if it is not in the ArrayRecord format.
    """
    folder = find_folder(root, ["tfds", ""], "TFDS data")
    try:
        builder = tfds.core.read_only_builder.builder_from_files(dataset, data_dir=str(folder))
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{folder / dataset}: no prepared dataset there. Prepare it with `python -m "
            f"sapt_jax.data.sources.tfds_builders` (the benchmarks) or `tfds build {dataset} "
            "--file_format=array_record` (public datasets)."
        ) from error
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{builder.data_path}: is in the {builder.info.file_format.value} format, which has no random access. "
            "Prepare it with --file_format=array_record."
        )
    return builder


def read_prepared(name: str, *, root: Path, folder: str, known: Sequence[str], on_bad_instance: str) -> Task:
    """Reads a task that `prepare` wrote; arguments and result as of `task_files.read_cl_benchmark`."""
    if name not in known:
        raise ValueError(f"unknown task {name!r} of the TFDS source. {nearest_name(name, known)}")
    builder = open_prepared(f"{BUILDERS[folder].name}/{name}", root=root)
    problems: list[str] = []
    splits = {}
    for split in ("train", "test"):
        rows = builder.as_data_source(split=split)
        entries = ((f"{builder.data_path}: {split} row {i}", _plain(row)) for i, row in enumerate(rows))
        splits[split] = read_instances(
            entries, prefix=f"{name}-{split}", on_bad_instance=on_bad_instance, problems=problems
        )
    about = builder.info.metadata
    return Task(
        name, about["definition"], splits["train"], (), splits["test"], labels=tuple(about["labels"]),
        problems=tuple(problems),
    )  # fmt: skip


def _plain(row: dict) -> dict:
    return {
        "id": row["id"].decode(),
        "input": row["input"].decode(),
        "output": [output.decode() for output in row["output"]],
    }


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    folder = {"superni": "SuperNI", "long_sequence": "Long_Sequence"}[options.benchmark]
    tfds.disable_progress_bar()
    try:
        for config in BUILDERS[folder].BUILDER_CONFIGS:
            sizes = prepare(folder, config.name, source_dir=Path(options.source_dir), tfds_dir=Path(options.tfds_dir))
            published = PUBLISHED_SIZES[config.name]
            note = "" if tuple(sizes.values()) == published else f"  (published: {published[0]} and {published[1]})"
            print(f"{config.name}: {sizes['train']} train, {sizes['test']} test{note}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_enum("benchmark", None, ["superni", "long_sequence"], "Which benchmark to prepare.")
    flags.DEFINE_string("source_dir", None, "The folder that holds CL_Benchmark.")
    flags.DEFINE_string("tfds_dir", None, "Where the prepared data go.")
    flags.mark_flags_as_required(["benchmark", "source_dir", "tfds_dir"])
    app.run(main)
