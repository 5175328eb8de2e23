"""A reward that is served elsewhere (`python -m reward_models.serve`), as just another reward: `http` in recipes."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from reward_models.metrics.text import flag

# The server is there and says "later"; 408 also answers a request that met a kept connection as it was given up.
_RETRIED = (408, 429, 503)
_SLACK = 10_000  # bytes of a body that are neither rows nor pictures


class HttpReward:
    """Scores from `POST url/score`; rows without an opinion come back as None.

    url: such as "http://127.0.0.1:8000", without user or password. token_env: name of the environment variable that
    holds the bearer token; it is read for each connection, and kept nowhere else.
    columns: which columns go along, if they are there. send_images: send the columns `image` or `images` too, as
    image_format png (exact) or jpeg (about a fifth of the size). part: give this part's raw score instead of the total.
    timeout: seconds for one answer. retries: how often a request is tried again after a connection error, 408, 429 or
    503, waiting 0.25 s, 0.5 s, 1 s … or what the server asks for, if that is less than 30 s. Nothing else is.
    A request holds at most batch_size rows, max_images different pictures and max_body_mb; they must not be above what
    the server allows.

    Raises ValueError for wrong options and for columns that JSON cannot hold, RuntimeError where the server is off or
    refuses, TimeoutError where it is too slow: naming reward, url and rows, never the token.
    """

    __name__ = "http"

    def __init__(
        self,
        url: str,
        token_env: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        batch_size: int = 64,
        columns: Sequence[str] = ("references", "ended"),
        *,
        send_images: bool = False,
        image_format: str = "png",
        max_images: int = 16,
        max_body_mb: float = 8.0,
        part: str | None = None,
    ) -> None:
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ValueError("reward http: url must look like 'http://127.0.0.1:8000'")
        if split.username is not None or split.password is not None or split.query or split.fragment:
            raise ValueError("reward http: url must hold no user, password or query; put a token in token_env")
        if isinstance(columns, str):
            raise ValueError(f"reward http: columns must be a list of names, got {columns!r}")
        if image_format not in ("png", "jpeg"):
            raise ValueError(f"reward http: image_format is {image_format!r}, expected png or jpeg")
        limits = {"timeout": timeout, "batch_size": batch_size, "max_images": max_images, "max_body_mb": max_body_mb}
        for what, value in limits.items():
            if not value > 0:
                raise ValueError(f"reward http: {what} must be above 0, got {value!r}")
        self.url, self.token_env, self.timeout, self.retries = url.rstrip("/"), token_env, timeout, retries
        self.batch_size, self.max_images, self.max_body_mb = batch_size, max_images, max_body_mb
        self.columns, self.image_format = tuple(columns), image_format
        self.send_images = flag("http", "send_images", send_images)
        self.part = part
        self._served = ""
        self._connection: Any = None
        self._lock = threading.Lock()

    @property
    def signature(self) -> str:
        """Where the scores come from; after the first answer, also what the served rewards say of themselves."""
        said = " ".join(self._served.split("\n"))
        return f"http|url:{self.url}|part:{self.part or 'total'}" + (f"|served:[{said}]" if said else "")

    def __call__(self, prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> list[float | None]:
        """One score per completion, in as many requests as the limits need."""
        scores: list[float | None] = []
        for body, rows in self._bodies(prompts, completions, columns):
            scores += self._ask(body, rows)
        return scores

    def close(self) -> None:
        """Close the connections; a later call opens others."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __repr__(self) -> str:
        return f"HttpReward({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_connection", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _connection=None, _lock=threading.Lock())

    def _bodies(
        self, prompts: Any, completions: Sequence[Any], columns: dict[str, Any]
    ) -> Iterator[tuple[bytes, range]]:
        """JSON bodies within the limits, and the rows of each. A picture object that rows share is sent once."""
        most = int(self.max_body_mb * 1e6) - _SLACK
        pictures: dict[int, str] = {}  # id of a picture object -> its place in the body, as JSON
        rows: list[str] = []
        size = start = 0
        for i in range(len(completions)):
            own = self._pictures(columns, i)
            row = self._row(prompts, completions, columns, i)
            fresh = {id(picture): picture for picture in own if id(picture) not in pictures}
            encoded = {key: self._encode(picture, i) for key, picture in fresh.items()}
            # 8: an index and its commas, for each picture of the row
            more = len(row.encode()) + sum(map(len, encoded.values())) + 8 * len(own) + 16
            if rows and (
                size + more > most or len(rows) >= self.batch_size or len(pictures) + len(encoded) > self.max_images
            ):
                yield _body(rows, pictures), range(start, i)
                pictures, rows, size, start = {}, [], 0, i
                encoded = {id(picture): encoded.get(id(picture)) or self._encode(picture, i) for picture in own}
                more = len(row.encode()) + sum(map(len, encoded.values())) + 8 * len(own) + 16
            pictures |= encoded
            if own:
                places = {key: place for place, key in enumerate(pictures)}
                row = f'{row[:-1]},"images":{json.dumps([places[id(picture)] for picture in own])}}}'
            rows.append(row)
            size += more
        if rows:
            yield _body(rows, pictures), range(start, len(completions))

    def _pictures(self, columns: dict[str, Any], i: int) -> list[Any]:
        if not self.send_images:
            return []
        if columns.get("images") is not None:
            return list(columns["images"][i] or ())
        one = columns["image"][i] if columns.get("image") is not None else None
        return [] if one is None else [one]

    def _encode(self, picture: Any, i: int) -> str:
        from reward_models.wire import write_picture

        if not hasattr(picture, "save"):
            raise ValueError(f"reward http, row {i}: an image is a {type(picture).__name__}, expected a PIL image")
        return write_picture(picture, self.image_format.upper())

    def _row(self, prompts: Any, completions: Sequence[Any], columns: dict[str, Any], i: int) -> str:
        row: dict[str, Any] = {"completion": _chat(completions[i])}
        if prompts is not None:
            row["prompt"] = _chat(prompts[i])
        others = {key: columns[key][i] for key in self.columns if columns.get(key) is not None}
        if "references" in others:
            references = others.pop("references")
            row["references"] = None if references is None else list(references)
        row["columns"] = others
        try:
            return json.dumps(row, default=_plain, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward http, row {i}: a column of {', '.join(self.columns)} cannot be sent as JSON: {error}"
            ) from None

    def _ask(self, body: bytes, rows: range) -> list[float | None]:
        import httpx

        where = f"reward http at {self.url}, rows {rows.start} to {rows.stop - 1}"
        for attempt in range(self.retries + 1):
            wait = 0.25 * 2**attempt
            try:
                answer = self._connect().post(
                    f"{self.url}/score", content=body, headers={"content-type": "application/json"}
                )
            except (httpx.ReadTimeout, httpx.WriteTimeout):  # it may be busy with it: asking again makes it worse
                raise TimeoutError(f"{where}: no answer within {self.timeout:g} s") from None
            except httpx.TransportError as error:
                if attempt == self.retries:
                    raise RuntimeError(
                        f"{where}: the server cannot be reached ({type(error).__name__}) after {attempt + 1} tries; "
                        "is `python -m reward_models.serve` running there?"
                    ) from None
            else:
                if answer.status_code == 200:
                    return self._read(answer, len(rows), where)
                if answer.status_code not in _RETRIED or attempt == self.retries:
                    raise RuntimeError(f"{where}: {_refusal(answer, self.token_env)}")
                asked = answer.headers.get("retry-after", "")
                wait = max(wait, min(float(asked), 30.0)) if asked.isdigit() else wait
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _connect(self) -> Any:
        with self._lock:
            if self._connection is None:
                import httpx

                headers = {}
                if self.token_env is not None:
                    token = os.environ.get(self.token_env, "").strip()
                    if not token:
                        raise ValueError(f"reward http: environment variable {self.token_env} (token_env) is not set")
                    headers["authorization"] = f"Bearer {token}"
                # No proxy, no ~/.netrc and no redirect: the token goes to this url or nowhere.
                self._connection = httpx.Client(
                    timeout=self.timeout, headers=headers, trust_env=False, follow_redirects=False
                )
            return self._connection

    def _read(self, answer: Any, rows: int, where: str) -> list[float | None]:
        try:
            reply = answer.json()
            scores = reply["scores"] if self.part is None else reply["parts"][self.part]
            self._served = str(reply.get("signature", ""))
        except (ValueError, TypeError, KeyError) as error:
            what = f"no part {self.part!r}" if self.part is not None and isinstance(error, KeyError) else "no scores"
            raise RuntimeError(f"{where}: the answer holds {what}; is it a reward server?") from None
        if not isinstance(scores, list) or len(scores) != rows:
            raise RuntimeError(f"{where}: {rows} scores expected, the answer holds another number")
        for i, score in enumerate(scores):
            number = isinstance(score, (int, float)) and not isinstance(score, bool)
            if score is not None and not (number and math.isfinite(score)):
                raise RuntimeError(f"{where}: score {i} of the answer is no finite number")
        return scores


def _body(rows: Sequence[str], pictures: dict[int, str]) -> bytes:
    return f'{{"samples":[{",".join(rows)}],"images":{json.dumps(list(pictures.values()))}}}'.encode()


def _refusal(answer: Any, token_env: str | None) -> str:
    try:
        detail = " ".join(str(answer.json()["detail"]).split())[:300]
    except (ValueError, TypeError, KeyError):
        detail = ""
    token = os.environ.get(token_env, "").strip() if token_env else ""
    if token and token in detail:  # a server that echoes what it was sent
        detail = ""
    if answer.status_code == 401:
        detail += f" (token_env is {token_env!r})" if token_env else " (set token_env)"
    return f"HTTP {answer.status_code}" + (f": {detail}" if detail else "")


def _chat(text: Any) -> Any:
    """A prompt or completion as it is sent: of chat messages role and content; of picture parts only their place."""
    if not isinstance(text, (list, tuple)):
        return text
    messages = []
    for message in text:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "text", "text": part["text"]} if part.get("type") == "text" else {"type": "image"}
                for part in content
            ]
        messages.append({"role": message["role"], "content": content})
    return messages


def _plain(value: Any) -> Any:
    """numpy and torch values as plain ones."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
