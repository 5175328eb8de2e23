"""A vLLM server through TRL's client: pictures and tokens over HTTP, adapters by path."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from mmft.batch import PromptBatch
from mmft.training.vllm_engine import VLLM, Answers, pictures_of, placeholders
from mmft.vlm.policy import Policy

_AT_ONCE = 64  # requests under way together, as many as TRL's client keeps connections for
_SERVE = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank R --enable-scale-out "
    "--logprobs-mode processed_logprobs"
)


class VLLMServer(VLLM):
    """A server, started as docs/generation.md says; it must see ``folder`` under the same path.

    Args:
        url: of the server.
        timeout: seconds for it to come up, and for each answer.

    Raises:
        ValueError: vLLM is not installed here, or there is no server at ``url``.
    """

    def __init__(self, url: str, folder: str | Path, timeout: float = 240.0, tolerance: float = 0.1):
        super().__init__(folder, tolerance)
        from trl.generation.vllm_client import VLLMClient

        self.url, self.timeout = url, timeout
        try:
            self.client = VLLMClient(base_url=url, connection_timeout=timeout)
        except ImportError as error:
            raise ValueError(f"rollout.engine: vllm: TRL's client needs vLLM installed beside it: {error}") from None
        except requests.RequestException as error:
            raise ValueError(f"rollout.vllm.url: no server at {url} ({error}); start one: {_SERVE}") from None
        # TRL's client waits forever, and asks again after errors whose text it then loses.
        retry = Retry(3, read=False, status=0, backoff_factor=1, respect_retry_after_header=False)
        for scheme in ("http://", "https://"):
            self.client.session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=_AT_ONCE))
        self.client.session.request = partial(self.client.session.request, timeout=timeout)

    @property
    def where(self) -> str:
        return f"rollout.vllm.url: the server at {self.url} (model {self.adapter or self.client.model!r})"

    def ask(self, policy, prompts, ids, options, seeds):
        self.client.model = self.adapter
        features = self._features(policy, prompts, ids)
        named = {name: options[name] for name in ("n", "temperature", "max_tokens", "logprobs")}
        rest = {name: value for name, value in options.items() if name not in named}

        def one(i: int) -> dict[str, Any]:
            return self.client.generate(
                [ids[i]], features=[features[i]], **named, generation_kwargs=rest | {"seed": seeds[i]}
            )

        with self._asked("to sample"), ThreadPoolExecutor(min(_AT_ONCE, len(prompts))) as pool:
            answers = list(pool.map(one, range(len(prompts))))
        return [_told(answer) for answer in answers]

    def load(self, name, folder):
        with self._asked(f"to load the adapter in {folder}"):
            answer = self._lora("load", lora_name=name, lora_path=str(folder))
            if answer.status_code != 200 and "already been loaded" not in answer.text:
                raise RuntimeError(f"{answer.status_code}, {answer.text}; it has to be started with {_SERVE}")
            if self.adapter is not None:
                self._lora("unload", lora_name=self.adapter)

    def _lora(self, verb: str, **what: str) -> requests.Response:
        return self.client.session.post(f"{self.client.base_url}/v1/{verb}_lora_adapter", json=what)

    def _features(self, policy: Policy, prompts: PromptBatch, ids: list[list[int]]) -> list[dict[str, Any] | None]:
        """What the server made of each row's pictures, laid on the places that the row's own tokens hold for them."""
        with self._asked("to process the pictures"):
            found = self.client.image_features([pictures_of(row) or None for row in prompts.rows])
        token = policy.pictures.token_ids["image"]
        for row_id, row_ids, features in zip(prompts.row_ids, ids, found, strict=True):
            if features is not None:
                lengths = [place["length"] for place in features["mm_placeholders"]["image"]]
                features["mm_placeholders"]["image"] = placeholders(row_ids, token, lengths, row_id)
        return found

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Errors of the client, told with the server and what it was asked."""
        try:
            yield
        except requests.Timeout:
            raise TimeoutError(
                f"{self.where} was asked {what} and gave no answer within rollout.vllm.timeout: {self.timeout:g} s"
            ) from None
        except requests.RequestException as error:
            raise RuntimeError(f"{self.where} was asked {what} and is gone: {error}") from None
        except Exception as error:  # TRL's client raises these, with the server's words in them
            raise RuntimeError(f"{self.where} was asked {what} and refused: {error}") from error


def _told(answer: dict[str, Any]) -> Answers:
    """The answer of TRL's client to one prompt."""
    nan = float("nan")
    found = []
    for g, tokens in enumerate(answer["completion_ids"]):
        ids, logprobs = (answer[key][g] if answer[key] else [] for key in ("logprob_token_ids", "logprobs"))
        said = [dict(zip(*step, strict=True)).get(token) for token, *step in zip(tokens, ids, logprobs, strict=False)]
        said = [nan if value is None else value for value in said] + [nan] * (len(tokens) - len(said))
        found.append((tokens, said))
    return found
