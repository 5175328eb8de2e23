"""What stands between the network and the reward server: token, sizes, time limits, and how many at once.

Everything here is decided before the request's body is parsed; the routes see only complete, small bodies.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from reward_models.wire import Refused, count_values

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


_VALUE_BYTES = 100  # what a parsed JSON value takes as a Python object, roughly


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """What one request and one client may ask for. Raises ValueError for a limit that is not above 0."""

    max_body_mb: float = _limit(8.0, "size of a request's body (413)")
    max_values: int = _limit(50_000, "JSON values and keys per request, counted before parsing (422)")
    max_samples: int = _limit(1024, "samples per request (422)")
    max_text: int = _limit(100_000, "characters per text (422)")
    max_images: int = _limit(16, "images per request (422)")
    max_megapixels: float = _limit(16.0, "sum over the images of a request, read from their headers (422)")
    max_concurrent: int = _limit(16, "requests at once; more get 429 with Retry-After")
    max_held_mb: float = _limit(16.0, "bodies and values (100 bytes each) of all requests at once; above it, 429")
    max_connections: int = _limit(256, "connections at once; more get 503")
    read_timeout: float = _limit(10.0, "seconds for a request's head, and again for its body (408)")
    score_timeout: float = _limit(120.0, "seconds from the end of the body to the scores (504)")

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 < getattr(self, item.name) < float("inf"):
                raise ValueError(f"{item.name} must be above 0, got {getattr(self, item.name)!r}")
        if self.max_held_mb * 1e6 < self.max_body_mb * 1e6 + _VALUE_BYTES * self.max_values:
            raise ValueError(
                f"max_held_mb is {self.max_held_mb:g}, too little for one body of max_body_mb {self.max_body_mb:g} "
                f"with max_values {self.max_values} of {_VALUE_BYTES} bytes each"
            )


@dataclass
class Counts:
    """What `/metrics` shows, in Prometheus' text format. Only the event loop writes here."""

    requests: Counter[int] = field(default_factory=Counter)
    samples: int = 0
    calls: int = 0
    call_seconds: float = 0.0
    in_flight: int = 0
    held: int = 0  # bytes, estimated

    def text(self) -> str:
        lines = ["# HELP reward_requests_total Answered requests.", "# TYPE reward_requests_total counter"]
        lines += [f'reward_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.requests.items())]
        for name, kind, value, text in (
            ("reward_samples_total", "counter", self.samples, "Samples scored."),
            ("reward_calls_total", "counter", self.calls, "Calls of the rewards; one call may serve many requests."),
            ("reward_call_seconds_total", "counter", round(self.call_seconds, 6), "Time spent in those calls."),
            ("reward_requests_in_flight", "gauge", self.in_flight, "Requests being read or scored."),
            ("reward_held_bytes", "gauge", self.held, "Estimated size of those requests."),
        ):
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
        return "\n".join(lines) + "\n"


class Gate:
    """ASGI middleware. Routes other than `/health` need the token, if there is one; `/score` the limits too."""

    def __init__(self, app: App, limits: Limits, token: str | None, counts: Counts) -> None:
        self.app, self.limits, self.counts = app, limits, counts
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.counts.requests[message["status"]] += 1
            await send(message)

        headers = dict(scope["headers"])
        try:
            if scope["path"] != "/health" and self._expected is not None:
                if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
                    raise Refused(401, "a bearer token is needed")
            if scope["path"] == "/score" and scope["method"] == "POST":
                await self._score(scope, headers, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except Refused as refused:
            await _refuse(refused, counted)

    async def _score(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        # Browsers can send any page's form to this machine, but not as JSON without asking first.
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise Refused(415, "content-type must be application/json")
        most = int(self.limits.max_body_mb * 1e6)
        announced = int(headers.get(b"content-length", b"0"))
        if announced > most:
            raise Refused(413, f"the body is larger than {self.limits.max_body_mb:g} MB")
        if self.counts.in_flight >= self.limits.max_concurrent:
            raise Refused(429, "too many requests at once; try again soon")
        self.counts.in_flight += 1
        held = _Held(self.counts, int(self.limits.max_held_mb * 1e6))
        try:
            held.add(announced)  # at once: bodies that grow side by side would all be refused halfway
            try:
                whole = await asyncio.wait_for(
                    self._read(receive, most, None if announced else held), self.limits.read_timeout
                )
            except TimeoutError:
                raise Refused(408, f"the body took longer than {self.limits.read_timeout:g} s") from None
            if whole["type"] == "http.request":
                held.add(_VALUE_BYTES * self._values(whole["body"]))
                waiting = [whole]
                del whole  # the route takes the body out of the list, and drops it once it is parsed
                await self.app(scope, _replay(waiting, receive), send)
        finally:
            self.counts.in_flight -= 1
            held.release()

    async def _read(self, receive: Receive, most: int, held: _Held | None) -> MutableMapping[str, Any]:
        """One message with the whole body, or the one that says that the client went away."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return message
            part = message.get("body", b"")
            if held is not None:  # chunked: nobody said how long it would be
                held.add(len(part))
            body += part
            if len(body) > most:
                body.clear()  # the exception keeps this frame until the answer is sent
                raise Refused(413, f"the body is larger than {self.limits.max_body_mb:g} MB")
            if not message.get("more_body"):
                return {"type": "http.request", "body": body, "more_body": False}

    def _values(self, body: bytearray) -> int:
        count = count_values(body, self.limits.max_values)
        if count > self.limits.max_values:
            raise Refused(422, f"body: more than {self.limits.max_values} JSON values and keys")
        return count


class _Held:
    """What one request adds to the estimate of the memory that all hold together."""

    def __init__(self, counts: Counts, most: int) -> None:
        self._counts, self._most, self._own = counts, most, 0

    def add(self, size: int) -> None:
        if self._counts.held + size > self._most:
            raise Refused(429, "too much is waiting; try again soon")
        self._counts.held += size
        self._own += size

    def release(self) -> None:
        self._counts.held -= self._own


def _replay(waiting: list[MutableMapping[str, Any]], receive: Receive) -> Receive:
    async def replay() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replay


async def _refuse(refused: Refused, send: Send) -> None:
    body = json.dumps({"detail": str(refused)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 408:
        headers.append((b"connection", b"close"))
    # Otherwise uvicorn reads what is left of the body and throws it away: closing at once would reset the connection,
    # and the client might never see this answer. ImpatientProtocol limits how long that goes on.
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, closing a connection whose request head is not complete in time.

    uvicorn itself only limits the idle time after an answer; a client that sends its head byte by byte, or nothing at
    all, could hold a connection for ever.
    """

    head_timeout = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()  # a request is being answered; the gate has its own clock for the body
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_timeout, self._give_up)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            if self.conn.their_state is not h11.SEND_BODY:  # else it has its answer and will not stop sending
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
