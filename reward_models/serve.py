"""Rewards over HTTP: `python -m reward_models.serve --config rewards.yaml`. What a request looks like: `wire.py`.

`POST /score` scores a batch of samples, `GET /health` says that the server is up, `GET /metrics` counts. Requests
that wait at the same time are scored in one call, which changes no score: a reward never depends on its batch-mates.

Left out: TLS (put a proxy in front), several workers (start several servers), and dense credit.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import ipaddress
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as error:
    raise ImportError(f"the reward server needs FastAPI and uvicorn: pip install 'mmft[serve]' ({error})") from error
from pydantic import ValidationError

from reward_models.gate import Counts, Gate, ImpatientProtocol, Limits
from reward_models.metrics.ngrams import DocumentFrequencies
from reward_models.rewards import RewardScores, WeightedRewards, build_rewards
from reward_models.wire import Refused, ScoreReply, ScoreRequest, check_values, columns_of, read_pictures, request_model

_log = logging.getLogger("reward_models.serve")
_MAX_ROWS_PER_CALL = 1024  # how many rows of waiting requests are put together
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # names and numbers of <malloc.h>


class RewardsFailed(Exception):
    """The rewards raised something, which is the cause of this."""


class _Waiting(NamedTuple):
    columns: dict[str, list[Any]]
    answer: asyncio.Future[RewardScores | BaseException]

    @property
    def rows(self) -> int:
        return len(self.columns["completions"])


class Batcher:
    """One call of the rewards at a time, in a thread, for all requests that wait when it begins.

    Only requests with the same columns go together: a row without a column must not be given one full of None. If a
    common call fails, each request is scored by itself, so that a bad one harms nobody else.
    """

    def __init__(self, rewards: WeightedRewards, counts: Counts) -> None:
        self._rewards, self._counts = rewards, counts
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    async def score(self, columns: dict[str, list[Any]]) -> RewardScores:
        waiting = _Waiting(columns, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        answer = await waiting.answer
        if isinstance(answer, BaseException):
            raise RewardsFailed from answer
        return answer

    async def run(self) -> None:
        """Serve the queue for ever."""
        while True:
            await self._next()  # in a frame of its own: what it knows of a batch must not outlive the batch

    async def _next(self) -> None:
        batch = [await self._queue.get()]
        while not self._queue.empty():
            batch.append(self._queue.get_nowait())
        groups: dict[frozenset[str], list[_Waiting]] = {}
        for waiting in batch:
            groups.setdefault(frozenset(waiting.columns), []).append(waiting)
        for group in groups.values():
            for part in _parts(group):
                await self._together(part)

    async def _together(self, group: list[_Waiting]) -> None:
        group = [waiting for waiting in group if not waiting.answer.done()]  # gave up meanwhile
        if not group:
            return
        merged = {key: [value for waiting in group for value in waiting.columns[key]] for key in group[0].columns}
        began = time.perf_counter()
        scores = await asyncio.get_running_loop().run_in_executor(self._thread, self._call, merged)
        self._counts.calls += 1
        self._counts.call_seconds += time.perf_counter() - began
        if isinstance(scores, BaseException):
            if len(group) > 1:
                for waiting in group:
                    await self._together([waiting])
            elif not group[0].answer.done():
                group[0].answer.set_result(scores)
            return
        start = 0
        for waiting in group:
            own = slice(start, start + waiting.rows)
            start += waiting.rows
            self._counts.samples += waiting.rows
            if not waiting.answer.done():
                waiting.answer.set_result(_cut(scores, own))

    def _call(self, columns: dict[str, list[Any]]) -> RewardScores | BaseException:
        """What the rewards return or raise, as a value: some exceptions (SystemExit) would end the event loop."""
        try:
            return self._rewards(**columns)  # type: ignore[arg-type]
        except BaseException as error:
            return error


def _parts(group: list[_Waiting]) -> list[list[_Waiting]]:
    """Consecutive requests of at most _MAX_ROWS_PER_CALL rows together; a larger one goes alone."""
    parts: list[list[_Waiting]] = [[]]
    for waiting in group:
        if parts[-1] and sum(other.rows for other in parts[-1]) + waiting.rows > _MAX_ROWS_PER_CALL:
            parts.append([])
        parts[-1].append(waiting)
    return parts


def _cut(scores: RewardScores, own: slice) -> RewardScores:
    return scores._replace(
        total=scores.total[own],
        keep=scores.keep[own],
        parts={name: values[own] for name, values in scores.parts.items()},
    )


def create_app(
    rewards: WeightedRewards, limits: Limits | None = None, token: str | None = None, hosts: Sequence[str] = ()
) -> FastAPI:
    """The server as an ASGI application. `hosts`: the names it answers to when there is no token.

    Raises ValueError for rewards whose scores depend on the batch, since requests are scored together.
    """
    limits = limits or Limits()
    for part in rewards.parts:
        if part.normalize in ("batch", "group"):
            raise ValueError(
                f"reward {part.name!r}: normalize {part.normalize} depends on the batch; set it in the run"
            )
    counts = Counts()
    batcher = Batcher(rewards, counts)
    model = request_model(limits.max_samples, limits.max_images)
    reading = ThreadPoolExecutor(1, thread_name_prefix="reading")  # one body at a time: a parser's memory is its peak

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="rewards", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return counts.text()

    body = {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}

    @app.post(
        "/score", response_model=None, responses={200: {"model": ScoreReply}}, openapi_extra={"requestBody": body}
    )
    async def score(request: Request) -> JSONResponse:
        async def scored() -> RewardScores:
            message = [await request.receive()]  # the gate gives the whole body in one
            columns = await asyncio.get_running_loop().run_in_executor(reading, _read, message, model, limits)
            return await batcher.score(columns)

        try:
            scores = await asyncio.wait_for(scored(), limits.score_timeout)
        except Refused as refused:
            return JSONResponse({"detail": str(refused)}, refused.status)
        except TimeoutError:
            return _failure(TimeoutError(f"no scores within {limits.score_timeout:g} s"))
        except RewardsFailed as failed:
            return _failure(failed.__cause__)
        return JSONResponse(_reply(scores, rewards.signature).model_dump())

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "internal error"}, 500)

    if token is None:  # a web page that points its own name at this machine sends that name as the host
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts, "localhost", "127.0.0.1", "[::1]"])
    app.add_middleware(Gate, limits=limits, token=token, counts=counts)
    return app


def _failure(error: BaseException | None) -> JSONResponse:
    """The answer where the rewards failed. Other people's code: its text may hold paths, so it stays in the log."""
    if isinstance(error, TimeoutError):
        _log.warning("request timed out: %s", error)
        return JSONResponse({"detail": "the rewards took too long"}, 504)
    _log.error("the rewards failed", exc_info=error)
    if isinstance(error, ValueError):
        text = "the rewards refused these samples (a missing column?); the server's log says why"
        return JSONResponse({"detail": text}, 422)
    return JSONResponse({"detail": "the rewards failed; the server's log says why"}, 500)


def _read(message: list[MutableMapping[str, Any]], model: type[ScoreRequest], limits: Limits) -> dict[str, list[Any]]:
    """The columns of a request. The message is taken out of its list, so that the body is gone once it is parsed."""
    request: ScoreRequest | Refused
    try:
        request = model.model_validate_json(message.pop()["body"])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        request = Refused(422, f"{where or 'body'}: {first['msg'][:200]}")
    if isinstance(request, Refused):  # raised out here, it does not hold on to an error that may have many lines
        raise request
    check_values(request.samples, limits.max_text)
    return columns_of(request, read_pictures(request.images, limits.max_megapixels * 1e6))


def _reply(scores: RewardScores, signature: str) -> ScoreReply:
    parts = {
        name: [None if math.isnan(value) else value for value in values.tolist()]
        for name, values in scores.parts.items()
    }
    opinion = [any(values[i] is not None for values in parts.values()) for i in range(len(scores.total))]
    total = [
        value if said and kept else None
        for value, said, kept in zip(scores.total.tolist(), opinion, scores.keep.tolist(), strict=True)
    ]
    return ScoreReply(scores=total, parts=parts, signature=signature)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop; 2 with a message on stderr if the options are wrong."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        token = os.environ.get(options.token_env or "REWARD_TOKEN", "").strip() or None
        if token is None and options.token_env:
            raise ValueError(f"--token-env {options.token_env}: that environment variable is not set")
        if token is None and not _is_loopback(options.host):
            raise ValueError(f"--host {options.host} can be reached from outside; set a token in REWARD_TOKEN first")
        limits = Limits(**{item.name: getattr(options, item.name) for item in fields(Limits)})
        app = create_app(_rewards(options), limits, token, [options.host])
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listening = socket.create_server((options.host, options.port), family=family, backlog=128)
        # asyncio sets this only on sockets that name their protocol; without it each answer waits 40 ms for an ACK.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _return_memory()
    ImpatientProtocol.head_timeout = limits.read_timeout
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        timeout_graceful_shutdown=5,
    )
    host, port = listening.getsockname()[:2]
    print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if token is None:
        print("no token: everybody on this machine may ask; set REWARD_TOKEN to change that", file=sys.stderr)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _return_memory() -> None:
    """Have glibc give large blocks back to the system at once; by itself it keeps what one large body took."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
        for parameter, value in ((_M_MMAP_THRESHOLD, 65536), (_M_TRIM_THRESHOLD, 65536), (_M_ARENA_MAX, 1)):
            if mallopt is not None:
                mallopt(parameter, value)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reward_models.serve", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="FILE", help="YAML with `rewards:`, a list as in a recipe, and maybe `df:`")
    which.add_argument("--rewards", metavar="JSON", help="the same list as JSON")
    parser.add_argument("--df", metavar="FILE", help="saved document frequencies, for cider_d and cider")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 = any free one")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable of the token (default REWARD_TOKEN)")
    for item in fields(Limits):
        default: Any = item.default
        parser.add_argument(
            f"--{item.name.replace('_', '-')}", type=type(default), default=default, help=item.metadata["help"]
        )
    return parser.parse_args(arguments)


def _rewards(options: argparse.Namespace) -> WeightedRewards:
    config: Any
    if options.config:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        try:
            config = YAML(typ="safe").load(Path(options.config))
        except YAMLError as error:
            raise ValueError(f"{options.config}: {error}") from None
    else:
        try:
            config = {"rewards": json.loads(options.rewards)}
        except json.JSONDecodeError as error:
            raise ValueError(f"--rewards is not JSON: {error}") from None
    source = options.config or "--rewards"
    if not isinstance(config, dict) or not isinstance(config.get("rewards"), list) or set(config) - {"rewards", "df"}:
        raise ValueError(f"{source}: expected `rewards:`, a list as in a recipe, and maybe `df:`, nothing else")
    file = options.df or config.get("df")
    return build_rewards(config["rewards"], DocumentFrequencies.load(file) if file else None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
