"""Requests per second of `sapt_jax.serve` under several clients, against PyTorch one request at a time.

    python -m benchmarks.load --run=runs/mine --task=shout --requests=64 --clients=8

Inputs are those that the run was tested on. transformers' `generate` gets the same inputs, on the model that
`Model.to_torch` exports; both are asked each shape once before the clock starts.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

import sapt_jax
from benchmarks.setting import hardware
from sapt_jax.ask.model import Model
from sapt_jax.serve.app import Options, make_app


def inputs_of(workdir: Path, count: int) -> list[str]:
    """So many inputs that the run was tested on, over and over where it has fewer."""
    lines = [line for file in sorted(workdir.glob("predictions/*/*.jsonl")) for line in file.read_text().splitlines()]
    texts = list(dict.fromkeys(json.loads(line)["input"] for line in lines))
    if not texts:
        raise ValueError(f"{workdir} has no predictions, whose inputs would be asked")
    return [texts[number % len(texts)] for number in range(count)]


def measure(ask: Callable[[str], object], texts: Sequence[str], clients: int) -> tuple[float, float, float]:
    """(requests per second, median and 99th percentile of their seconds) of so many clients at once."""

    def timed(text: str) -> float:
        start = time.perf_counter()
        ask(text)
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = sorted(pool.map(timed, texts))
    whole = time.perf_counter() - start
    return len(texts) / whole, statistics.median(seconds), seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def serve(model: Model) -> tuple[uvicorn.Server, str]:
    """A server in a thread of its own, and its address."""
    server = uvicorn.Server(uvicorn.Config(make_app(model, Options(reload=0)), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def ask_server(address: str, task: str, new_tokens: int) -> Callable[[str], object]:
    def ask(text: str) -> object:
        body = json.dumps({"prompt": text, "task": task, "max_tokens": new_tokens}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    return ask


def ask_torch(model: Model, task: str, new_tokens: int, folder: Path) -> Callable[[str], object]:
    import torch
    from transformers import AutoModel

    model.to_torch(folder)
    theirs = AutoModel.from_pretrained(folder, trust_remote_code=True)

    def ask(text: str) -> object:
        ids = torch.tensor(model.encode(text, task))[None].long()
        return theirs.generate(ids, torch.ones_like(ids), max_new_tokens=new_tokens)

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="the --workdir of a finished run")
    parser.add_argument("--task", required=True, help="whose instruction goes before the inputs")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, default=8)
    given = parser.parse_args()
    model = sapt_jax.load(given.run)
    texts, tokens = inputs_of(given.run, given.requests), model.max_new_tokens
    server, address = serve(model)
    served = ask_server(address, given.task, tokens)
    print(f"{len(texts)} requests of at most {tokens} new tokens, {hardware()}")
    with tempfile.TemporaryDirectory() as folder:
        torch = ask_torch(model, given.task, tokens, Path(folder) / "torch")
        for name, ask, clients in (
            ("sapt_jax.serve", served, given.clients),
            ("sapt_jax.serve", served, 1),
            ("transformers", torch, 1),
        ):
            measure(ask, texts, clients)
            speed, median, last = measure(ask, texts, clients)
            print(f"{name:15} {clients:3} clients {speed:7.1f} requests/s  p50 {median:6.3f} s  p99 {last:6.3f} s")
    server.should_exit = True


if __name__ == "__main__":
    main()
