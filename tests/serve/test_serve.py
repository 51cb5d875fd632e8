"""A server on a real socket: OpenAI's own client, what is refused and how, and clients that misbehave."""

import contextlib
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

import sapt_jax
from sapt_jax.ask.answers import Answer, Search
from sapt_jax.serve.app import Options, make_app
from tests.helpers.paths import REPOSITORY

PAGE = (REPOSITORY / "docs/asking.md").read_text(encoding="utf-8")


@contextlib.contextmanager
def served(model, **options):
    """The address of a server with this model."""
    config = uvicorn.Config(make_app(model, Options(**options)), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


class Slow:
    """Stands for a model: answers with the input in capitals, when it is let."""

    most_rows, tasks = 4, ("only",)

    def __init__(self):
        self.let, self.begun, self.batches = threading.Event(), threading.Event(), []

    def search(self, **search):
        return Search(**{"max_new_tokens": 8} | search)

    def row(self, question, search, number):
        return question.asked

    def answer(self, rows):
        self.begun.set()
        assert self.let.wait(20)
        self.batches.append(list(rows))
        if "fail" in rows:
            raise RuntimeError("no memory")
        return [Answer(text.upper(), {"only": 1.0}, 1, 1, True, False) for text in rows]

    def refresh(self):
        if "broken" in self.tasks:
            raise ValueError("broken")
        self.tasks = (*self.tasks, "new") if len(self.tasks) == 1 else (*self.tasks, "broken")
        return True


def post(address, body, path="/v1/completions", **headers):
    """(status, body) of a response."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def get(address, path):
    with urllib.request.urlopen(address + path, timeout=30) as response:
        return response.read().decode()


def metric(address, name, **labels):
    families = text_string_to_metric_families(get(address, "/metrics"))
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def wait_for(happened):
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_queue_refuses_and_recovers():
    model = Slow()
    with served(model, queue=2, reload=0) as address, ThreadPoolExecutor(8) as pool:
        first = pool.submit(post, address, {"prompt": "a"})
        assert model.begun.wait(20)
        others = [pool.submit(post, address, {"prompt": text}) for text in "bc"]
        wait_for(lambda: json.loads(get(address, "/health"))["waiting"] == 2)
        status, body = post(address, {"prompt": "d"})
        assert status == 429 and body["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0).completions.create(
                model="sapt", prompt="d"
            )
        model.let.set()
        assert [one.result()[1]["choices"][0]["text"] for one in (first, *others)] == ["A", "B", "C"]
        # What waited while the device was busy was answered together.
        assert [sorted(batch) for batch in model.batches] == [["a"], ["b", "c"]]
        assert post(address, {"prompt": "e"})[0] == 200
        assert metric(address, "sapt_requests_total", status="429") == 2
        assert metric(address, "sapt_batch_rows_sum") == 4


def test_requests_that_take_too_long_or_leave_are_dropped():
    model = Slow()
    with served(model, timeout=0.5, reload=0) as address:
        assert post(address, {"prompt": "a"})[0] == 504
        host, port = address.removeprefix("http://").split(":")
        body = b'{"prompt": "gone"}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        for sent in (head + body, head + body[:5], b"POST /v1/comp", b"\x00\xff" * 50):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(sent)
        wait_for(lambda: metric(address, "sapt_requests_total", status="499") == 2)
        model.let.set()
        assert post(address, {"prompt": "b"})[1]["choices"][0]["text"] == "B"
        assert model.batches == [["a"], ["b"]]


def test_a_batch_that_fails_fails_alone():
    model = Slow()
    model.let.set()
    with served(model, reload=0) as address:
        status, body = post(address, {"prompt": "fail"})
        assert status == 500 and "no memory" in body["error"]["message"]
        assert post(address, {"prompt": "a"})[0] == 200


def test_new_tasks_are_taken_in_and_a_broken_workdir_is_told():
    model = Slow()
    model.let.set()
    with served(model, reload=0.05) as address:
        wait_for(lambda: metric(address, "sapt_reloads_total", result="failed") > 0)
        assert json.loads(get(address, "/health"))["tasks"] == ["only", "new", "broken"]
        assert post(address, {"prompt": "a"})[0] == 200


def test_a_token_is_asked_for():
    model = Slow()
    model.let.set()
    with served(model, token="secret", reload=0) as address:
        assert (
            post(address, {"prompt": "a"})[0] == post(address, {"prompt": "a"}, Authorization="Bearer s\xe9")[0] == 401
        )
        assert post(address, {"prompt": "a"}, Authorization="Bearer secret")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        assert json.loads(get(address, "/health"))["status"] == "ok"


@pytest.fixture(scope="module")
def quick():
    model = Slow()
    model.let.set()
    with served(model, reload=0, most_tokens=100) as address:
        yield address


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", None),
        (b"[1]", None),
        (b"[" * 100_000, None),
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a", "heat": 1}, "heat"),
        ({"prompt": "a", "n": 65}, "n"),
        ({"prompt": "a", "n": True}, "n"),
        ({"prompt": "a", "max_tokens": 101}, "max_tokens"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "stream": True}, "stream"),
        ({"prompt": "a", "stop": 3}, "stop"),
        ({"prompt": "a", "task": 3}, "task"),
    ],
)
def test_a_bad_field_is_named(quick, body, field):
    status, told = post(quick, body)
    assert (status, told["error"]["param"]) == (400, field)
    assert field is None or field in told["error"]["message"]
    assert post(quick, {"prompt": "a"})[0] == 200


def test_a_body_of_ten_megabytes_is_refused(quick):
    host, port = quick.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(10):
                connection.sendall(b"x" * 1_000_000)
        with contextlib.suppress(ConnectionResetError):
            assert b" 413 " in connection.recv(100)
    assert metric(quick, "sapt_requests_total", status="413") >= 1
    assert post(quick, {"prompt": "a"})[0] == 200


def test_a_stop_and_several_choices(quick):
    told = post(quick, {"prompt": ["ab.cd", "x"], "n": 2, "stop": ["."]})[1]
    assert [one["text"] for one in told["choices"]] == ["AB", "AB", "X", "X"]
    assert told["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


@pytest.mark.slow
def test_the_example_of_the_page_runs(asked_run, capsys):
    (code,) = re.findall(r"^```python serve\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    with served(sapt_jax.load(asked_run)) as address:
        exec(code.replace("http://localhost:8000", address), {})
    assert "'shout':" in capsys.readouterr().out


@pytest.mark.slow
def test_the_official_client_gets_what_the_model_says(asked_run):
    model, own = sapt_jax.load(asked_run), sapt_jax.load(asked_run)
    with served(model, name="mine") as address, ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        assert [one.id for one in client.models.list()] == ["mine"]
        texts = ["abcd", "dcba", "a", "bbbb", "cdab"]
        tasks = ["shout", "mirror", "first", "shout", "mirror"]

        def ask(text, task):
            return client.completions.create(model="mine", prompt=text, max_tokens=6, extra_body={"task": task})

        for text, task, found in zip(texts, tasks, pool.map(ask, texts, tasks), strict=True):
            (expected,) = own.generate([text], task=task, max_new_tokens=6)
            (choice,) = found.choices
            assert choice.text == expected.text
            assert choice.attention == pytest.approx(expected.attention, abs=1e-5)
            assert found.usage.prompt_tokens == expected.prompt_tokens
            assert choice.finish_reason == ("stop" if expected.finished else "length")
        turns = [{"role": "user", "content": "abcd"}]
        drawn = client.chat.completions.create(model="mine", messages=turns, temperature=0.9, seed=4, n=2)
        expected = own.generate([turns, turns], temperature=0.9, seed=4)
        assert [one.message.content for one in drawn.choices] == [one.text for one in expected]
        with pytest.raises(openai.BadRequestError, match="'nothing'"):
            client.completions.create(model="mine", prompt="a", extra_body={"task": "nothing"})
