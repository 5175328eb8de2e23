"""The reward server and its client, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from reward_models.client import HttpReward  # noqa: E402
from reward_models.metrics.bleu import Bleu  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKEN = "s3cret-token-of-the-tests"
REWARDS = """
import sys, time

def length(completions, **columns):
    if "boom" in completions: raise RuntimeError("/secret/path in the message")
    if "sleep" in completions: time.sleep(0.4)
    if "long" in completions: time.sleep(2.2)
    if "exit" in completions: sys.exit("never")
    if "stop" in completions: raise StopIteration
    if "inf" in completions: return [float("inf")] * len(completions)
    return [None if not text else float(len(text)) for text in completions]

def seen(completions, image=None, ended=None, **columns):
    if image is not None: return [None if p is None else p.getpixel((0, 0))[0] for p in image]
    return [None if ended is None else float(flag) for flag in ended or completions]
"""


class Server:
    """A server process; `say()` stops it and returns what it printed."""

    def __init__(self, folder: Path, rewards: list[dict], *options: str, token: str | None = TOKEN) -> None:
        (folder / "served.py").write_text(REWARDS)
        self.log = (folder / "log").open("w+")
        environment = {key: value for key, value in os.environ.items() if key != "REWARD_TOKEN"}
        if token:
            environment["REWARD_TOKEN"] = token
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reward_models.serve", "--rewards", json.dumps(rewards), "--port", "0", *options],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("serving on http://"), line + (folder / "log").read_text()
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def post(self, body, token: str | None = TOKEN, **keywords) -> httpx.Response:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
        content = body if isinstance(body, (bytes, Iterator)) else json.dumps(body).encode()
        return httpx.post(
            f"{self.url}/score", content=content, headers=headers, timeout=20, trust_env=False, **keywords
        )

    def score(self, *texts: str) -> httpx.Response:
        return self.post({"samples": [{"completion": text} for text in texts]})

    def rss(self) -> int:
        """Resident memory in bytes."""
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())[1]) * 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.process.stdout.close()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    own = f"{folder}/served.py:"
    specs = [
        {"name": f"{own}length", "as": "length"},
        {"name": f"{own}seen", "as": "seen", "weight": 0.0},
    ]
    limits = ["--max-body-mb", "2", "--max-images", "4", "--max-megapixels", "2", "--max-samples", "200"]
    running = Server(
        folder,
        specs,
        *limits,
        "--max-held-mb",
        "10",
        "--read-timeout",
        "1",
        "--score-timeout",
        "1.5",
        "--max-concurrent",
        "4",
    )
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTS_TOKEN", TOKEN)


def client(server: Server, **options) -> HttpReward:
    return HttpReward(server.url, token_env="TESTS_TOKEN", **{"timeout": 5.0, "retries": 0, **options})


def png(width: int, height: int, value: int = 0) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def with_images(*images: str) -> dict:
    return {"samples": [{"completion": "a", "images": list(range(len(images)))}], "images": list(images)}


# ------------------------------------------------------------------------------------------------------ answers


def test_scores_parts_and_none(server):
    reply = server.score("abc", "").json()
    assert reply["scores"] == [3.0, None]
    assert reply["parts"]["length"] == [3.0, None]
    assert reply["signature"].startswith("length x 1")


def test_client_is_a_reward_in_batches(server):
    """Batches must come back in order, None must stay None, chat messages must pass."""
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "abc"}]}]
    texts = ["x" * n for n in range(7)]
    with_parts = client(server, batch_size=3, part="length")
    assert with_parts(prompts=["p"] * 7, completions=texts) == [None, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert with_parts(completions=[chat]) == [1.0], "a list of one message has length 1: it must arrive as it was"
    assert "served:[length x 1" in with_parts.signature


def test_client_sends_chosen_columns_only(server):
    import numpy as np

    assert client(server, part="seen")(completions=["a", "b"], ended=np.array([True, False])) == [1.0, 0.0]
    assert client(server, part="seen", columns=[])(completions=["a"], ended=[True]) == [None]
    with pytest.raises(ValueError, match="row 1.*cannot be sent as JSON"):
        client(server, columns=["thing"])(completions=["a", "b"], thing=[1, object()])


def test_pictures_go_once_and_in_order(server):
    """Rows that share a picture send it once; more pictures than one request may hold are spread over several."""
    pictures = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (10, 20, 30, 40, 50, 60)]
    rows = [pictures[i // 4] for i in range(24)]
    reward = client(server, part="seen", send_images=True, max_images=4)
    assert [len(rows) for _, rows in reward._bodies(None, ["a"] * 24, {"image": rows})] == [16, 8]
    assert reward(completions=["a"] * 24, image=rows) == [10.0 * (1 + i // 4) for i in range(24)]
    small = client(server, part="seen", send_images=True, max_images=4, max_body_mb=0.0106)
    assert len(list(small._bodies(None, ["a"] * 24, {"image": rows}))) > 2
    assert small(completions=["a"] * 24, image=rows) == [10.0 * (1 + i // 4) for i in range(24)]
    assert client(server, part="seen")(completions=["a"] * 24, image=rows) == [None] * 24, "only when asked"


def test_served_bleu_equals_local_bleu(tmp_path):
    running = Server(tmp_path, [{"name": "bleu"}], token=None)
    try:
        texts = ["a dog runs", "a cat sits on the mat", "\u2028 odd \x85 text"]
        references = [["a dog runs fast"], ["the cat sat on the mat"], ["odd text"]]
        served = HttpReward(running.url)(completions=texts, references=references, ended=[True] * 3)
        assert served == list(Bleu()(completions=texts, references=references, ended=[True] * 3))
        other_host = httpx.get(f"{running.url}/metrics", headers={"host": "evil.example"}, trust_env=False)
        assert other_host.status_code == 400, "without a token, a rebound name must not get in"
    finally:
        running.stop()


def test_waiting_requests_are_scored_in_one_call():
    """Each gets its own rows; only requests with the same columns go together."""
    from reward_models.gate import Counts
    from reward_models.rewards import WeightedRewards
    from reward_models.serve import Batcher

    started, release = threading.Event(), threading.Event()
    calls: list[tuple[int, bool]] = []

    def length(completions, references=None, **columns):
        calls.append((len(completions), references is not None))
        started.set()
        assert release.wait(10)
        return [float(len(text)) for text in completions]

    async def scenario() -> list[list[float]]:
        batcher = Batcher(WeightedRewards([("length", length, 1.0)]), Counts())
        running = asyncio.create_task(batcher.run())
        tasks = [asyncio.create_task(batcher.score({"completions": ["first"]}))]
        await asyncio.to_thread(started.wait, 10)
        rows = [{"completions": ["y" * n, "z"]} for n in range(1, 7)]
        rows.append({"completions": ["other"], "references": [["r"]]})
        tasks += [asyncio.create_task(batcher.score(columns)) for columns in rows]
        await asyncio.sleep(0)
        release.set()
        answers = await asyncio.gather(*tasks)
        running.cancel()
        return [answer.total.tolist() for answer in answers]

    assert asyncio.run(scenario()) == [[5.0], *([float(n), 1.0] for n in range(1, 7)), [5.0]]
    assert calls == [(1, False), (12, False), (1, True)]


def test_a_failing_request_harms_no_neighbour(server):
    with ThreadPoolExecutor(4) as pool:
        slow = pool.submit(server.score, "sleep")
        time.sleep(0.2)
        bad, good = pool.submit(server.score, "boom"), pool.submit(server.score, "fine")
        assert (slow.result().status_code, bad.result().status_code, good.result().json()["scores"]) == (
            200,
            500,
            [4.0],
        )
    assert "secret" not in bad.result().text and "Traceback" not in bad.result().text
    assert server.score("inf").status_code == 422


@pytest.mark.parametrize("text", ["exit", "stop"])
def test_a_reward_that_exits_does_not_end_the_server(server, text):
    """SystemExit in the event loop ends it, and StopIteration cannot be the exception of a future."""
    assert server.score(text).status_code == 500
    assert server.score("x").json()["scores"] == [1.0]


# ------------------------------------------------------------------------------------------------------- access


def test_everything_but_health_needs_the_token(server):
    assert httpx.get(f"{server.url}/health", trust_env=False).json() == {"status": "ok"}
    for path in ("/metrics", "/score", "/openapi.json", "/docs", "/nothing", "/health/", "//health"):
        assert httpx.get(server.url + path, trust_env=False).status_code == 401, path
    for wrong in (None, "", TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
        answer = server.post({"samples": []}, token=wrong)
        assert answer.status_code == 401 and TOKEN not in answer.text
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{server.url}/nothing", headers=headers, trust_env=False).status_code == 404
    text = httpx.get(f"{server.url}/metrics", headers=headers, trust_env=False).text
    assert re.search(r'^reward_requests_total\{status="401"\} \d+$', text, re.M)
    assert re.search(r"^reward_requests_in_flight 0$", text, re.M)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "set a token"),
        (["--token-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--max-images", "0"], "max_images"),
        (["--max-held-mb", "9"], "too little for one body"),
    ],
)
def test_wrong_options_are_refused_before_listening(options, said, monkeypatch, capsys):
    from reward_models.serve import main

    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    assert main(["--rewards", '[{"name": "bleu"}]', "--port", "0", *options]) == 2
    assert said in capsys.readouterr().err


def test_rewards_that_depend_on_the_batch_are_refused(tmp_path, capsys):
    from reward_models.serve import main

    (tmp_path / "rewards.yaml").write_text("rewards:\n  - {name: bleu, normalize: batch}\n")
    assert main(["--config", str(tmp_path / "rewards.yaml"), "--port", "0"]) == 2
    assert "depends on the batch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- limits


def bomb(width: int, height: int) -> str:
    """A PNG whose header promises width x height, and nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    return base64.b64encode(file).decode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"samples": []}, "samples"),
        ({"samples": [{"completion": 3}]}, "samples.0.completion"),
        ({"samples": [{"completion": "a", "unknown": 1}]}, "unknown"),
        ({"samples": [{"completion": "a"}] * 201}, "at most 200"),
        ({"samples": [{"completion": "a" * 100_001}]}, "100000 characters"),
        ({"samples": [{"completion": "a", "columns": {"deep": [["b" * 100_001]]}}]}, "100000 characters"),
        ({"samples": [{"completion": "a", "columns": {"training": True}}]}, "not the name of a column"),
        ({"samples": [{"completion": "a", "columns": {"self": 1}}]}, "not the name of a column"),
        ({"samples": [{"completion": "a", "columns": {"x": [[]] * 50_000}}]}, "more than 50000 JSON values"),
        (with_images(*[png(1, 1)] * 5), "at most 4"),
        (with_images(png(1500, 1500)), "megapixels"),
        (with_images(png(1200, 1000), png(1200, 1000)), "images.1.*megapixels"),
        (with_images(bomb(20_000, 20_000)), "images.0"),
        (with_images(bomb(1000, 1000)), "images.0: broken"),
        (with_images("http://127.0.0.1:1/x.png"), "URLs are not fetched"),
        (with_images("file:///etc/passwd"), "URLs are not fetched"),
        (with_images(base64.b64encode(b"<html>").decode()), "neither PNG nor JPEG"),
        ({"samples": [{"completion": "a", "images": [0]}]}, "0 images"),
        (
            {"samples": [{"completion": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]}]},
            "samples.0.completion",
        ),
        (b'{"samples": [{"completion": "a", "columns": {"x": NaN}}]}', "not finite"),
        (b'{"samples": [{"completion": "a", "columns": {"x": [1e999]}}]}', "not finite"),
        (b'{"samples": [{"completion": "\\ud800"}]}', ""),
        (b'{"samples": [{"completion": "a", "columns": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}]}", ""),
        (b"\xff\xfe", ""),
        (b"", ""),
    ],
)
def test_refused_with_422(server, body, said):
    answer = server.post(body)
    assert answer.status_code == 422, answer.text
    assert re.search(said, answer.json()["detail"]), answer.text
    assert "/" not in re.sub(r"PNG/JPEG", "", answer.json()["detail"]) and len(answer.text) < 600


def test_large_bodies_are_refused_unread(server):
    """Announced and unannounced (chunked): 413, and the server does not grow by what it was sent."""
    server.score("x")
    before = server.rss()

    def chunks() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 100_000

    assert server.post(b" " * 20_000_000).status_code == 413
    assert server.post(chunks()).status_code == 413
    with socket.create_connection(("127.0.0.1", server.port)) as raw:  # the answer comes before any of the body
        head = f"POST /score HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n"
        raw.sendall((head + "content-length: 99999999999999\r\n\r\n").encode())
        raw.settimeout(2)
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    assert server.rss() - before < 10e6
    assert server.score("x").status_code == 200


def test_slow_clients_get_408(server):
    head = f"POST /score HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n"
    starts = {"silent": "", "slow head": head, "slow body": head + "content-length: 100\r\n\r\n{"}
    for what, start in starts.items():
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.settimeout(4)
            raw.sendall(start.encode())
            time.sleep(0.7)
            if start:
                raw.sendall(b"x")  # a byte now and then must not buy more time
            began = time.monotonic()
            assert raw.recv(100).startswith(b"HTTP/1.1 408"), what
            assert time.monotonic() - began < 1.0, what


def test_too_many_at_once_get_429_and_the_client_waits(server):
    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda _: server.score("sleep").status_code, range(12)))
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    retrying = client(server, retries=6, timeout=20)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda _: retrying(completions=["sleep"]), range(6))) == [[5.0]] * 6


def test_a_slow_reward_gets_504(server):
    assert server.score("long").status_code == 504
    time.sleep(0.9)
    assert server.score("x").status_code == 200


def test_values_are_counted_as_the_parser_sees_them():
    """Commas and brackets in a text are no values; an open string must not make the count read the rest again."""
    from reward_models.wire import count_values

    value = {"a, [b": ['x,]y\\"{', 1, -2.5e3, None, {}, []], "c": "d"}
    # the object, 2 keys, the list and its 6 items, "d"
    assert count_values(json.dumps(value).encode(), 99) == count_values(json.dumps(value, indent=3).encode(), 99) == 11
    began = time.monotonic()
    for body in (b'"' + b'\\"' * 1_000_000, b'"' * 2_000_000, b" " * 2_000_000, b"]" * 2_000_000):
        count_values(body, 10**9)
    assert time.monotonic() - began < 5


def fuzzed(seed: int, count: int) -> Iterator[bytes]:
    """A good body with bytes changed, cut out or doubled."""
    import random

    chance = random.Random(seed)
    good = json.dumps({**with_images(png(2, 2)), "samples": [{"completion": "ab", "columns": {"x": [1, "y"]}}]})
    for _ in range(count):
        body = bytearray(good.encode())
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(body))
            body[at : at + chance.randint(0, 3)] = chance.choice(
                (b"", b'"', b"{", b"[", b"1e9", b"\xff", body[at:][:40])
            )
        yield bytes(body)


def test_it_survives_all_at_once(tmp_path):
    """With the default limits: documented answers, memory within 50 MB, and it goes on."""
    running = Server(tmp_path, [{"name": f"{tmp_path}/served.py:length"}], "--read-timeout", "5")
    peak = [0]

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], running.rss())

    def column(item: bytes, count: int) -> bytes:
        return b'{"samples":[{"completion":"a","columns":{"x":[' + item * count + b"1]}}]}"

    done = threading.Event()
    watching = threading.Thread(target=watch)
    try:
        running.score("x")
        before = running.rss()
        watching.start()
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            slow.settimeout(10)
            head = f"host: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n"
            slow.sendall(f"POST /score HTTP/1.1\r\n{head}content-length: 100\r\n\r\n{{".encode())
            refused = {
                b" " * 20_000_000: 413,
                json.dumps(with_images(*[png(1, 1)] * 50)).encode(): 422,
                json.dumps({"samples": [{"completion": "a" * 1_000_000}]}).encode(): 422,
                b'{"samples":[' + b'{"completion":""},' * 438_888 + b'{"completion":""}]}': 422,
                column(b"[],", 2_600_000): 422,
                b'{"samples":[{"completion":[' + b"{}," * 49_000 + b"{}]}]}": 422,
                b'{"samples":[' + b'{"completion":""},' * 15_000 + b'{"completion":""}]}': 422,
            }
            assert [running.post(body).status_code for body in refused] == list(refused.values())
            with httpx.Client(trust_env=False, timeout=20, headers={"authorization": f"Bearer {TOKEN}"}) as one:
                post = {"url": f"{running.url}/score", "headers": {"content-type": "application/json"}}
                statuses = {one.post(content=body, **post).status_code for body in fuzzed(0, 300)}
            assert {422} <= statuses <= {200, 422}
            for body in (column(b"{},", 48_000), json.dumps({"samples": [{"completion": "a" * 78_000}] * 50}).encode()):
                with ThreadPoolExecutor(50) as pool:
                    statuses = set(pool.map(lambda _, body=body: running.post(body).status_code, range(50)))
                assert statuses == {200, 429}
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert running.score("x").status_code == 200
    finally:
        done.set()
        watching.join()
        running.stop()
    assert peak[0] - before < 50e6, f"grew by {(peak[0] - before) / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------ client errors


def answering(*answers: bytes) -> tuple[str, list[bytes]]:
    """A server that gives each connection the next of the answers; and the requests it got."""
    listening = socket.create_server(("127.0.0.1", 0))
    got: list[bytes] = []

    def serve() -> None:
        for answer in answers:
            connection, _ = listening.accept()
            with connection:
                got.append(connection.recv(65536))
                connection.sendall(answer)
        listening.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}", got


def http(status: str, body: str = "{}", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n{extra}\r\n{body}".encode()


def test_client_says_when_the_server_is_off():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(RuntimeError, match=rf"127.0.0.1:{port}, rows 0 to 1: .*cannot be reached.* 1 tries"):
        HttpReward(f"http://127.0.0.1:{port}", retries=0)(completions=["a", "b"])


def test_client_retries_503_and_closed_connections_only():
    url, got = answering(http("503 Busy"), b"", http("200 OK", '{"scores": [2.5], "parts": {}}'))
    assert HttpReward(url)(completions=["a"]) == [2.5] and len(got) == 3
    url, got = answering(http("422 No", '{"detail": "samples: too odd"}'), http("200 OK", '{"scores": [1.0]}'))
    with pytest.raises(RuntimeError, match="rows 0 to 0: HTTP 422: samples: too odd"):
        HttpReward(url)(completions=["a"])
    assert len(got) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"scores": [1.0, 2.0]}', "1 scores expected"),
        ('{"scores": ["a"]}', "no finite number"),
        ('{"scores": [NaN]}', "no finite number"),
        ("[]", "no scores"),
        ("<html>", "no scores"),
    ],
)
def test_client_refuses_odd_answers(body, said):
    url, _ = answering(http("200 OK", body))
    with pytest.raises(RuntimeError, match=said):
        HttpReward(url)(completions=["a"])


def test_client_never_shows_its_token():
    url, got = answering(http("401 No", json.dumps({"detail": f"you sent {TOKEN}"})))
    reward = HttpReward(url, token_env="TESTS_TOKEN")
    with pytest.raises(RuntimeError, match="HTTP 401") as caught:
        reward(completions=["a"])
    assert TOKEN.encode() in got[0]
    shown = f"{caught.value}{reward!r}{vars(reward)}{reward.signature}".encode() + pickle.dumps(reward)
    assert TOKEN.encode() not in shown


def test_client_follows_no_redirect():
    """A redirect could carry the token elsewhere."""
    elsewhere, got = answering(http("200 OK", '{"scores": [1.0]}'))
    url, _ = answering(http("307 Moved", extra=f"location: {elsewhere}/score\r\n"))
    with pytest.raises(RuntimeError, match="HTTP 307"):
        HttpReward(url, token_env="TESTS_TOKEN")(completions=["a"])
    assert got == []


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://user:pass@host", "http://host?token=x"])
def test_client_refuses_odd_urls_without_repeating_them(url):
    with pytest.raises(ValueError) as caught:
        HttpReward(url)
    assert "pass" not in str(caught.value).replace("password", "") and "token=x" not in str(caught.value)
