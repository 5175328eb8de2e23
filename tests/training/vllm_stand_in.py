"""A server with the part of vLLM's protocol that TRL's client and `VLLMServer` speak, and a real model behind it.

Paths, fields and refusals are those of vLLM 0.31. What is not vLLM's is the sampler (`model.generate`) and what goes
back and forth as `kwargs_data`: the picture as PNG instead of processed tensors.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from types import SimpleNamespace

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from trl.generation.vllm_client import pil_to_base64

# Of vLLM's SamplingParams; another name is refused, as a misspelt one would be.
_PARAMETERS = (
    "n repetition_penalty temperature top_p top_k min_p max_tokens logprobs seed stop_token_ids ignore_eos logit_bias "
    "detokenize output_kind"
).split()


class StandIn:
    """Serves the model in ``folder`` on a free port of this machine until `close`.

    Attributes:
        loads: names of the adapters that were loaded, in order.
        faults: what to do wrong: "deaf" (adapters are accepted and not used), "blind" (every picture is grey),
            "raw" (log-probs before temperature and bias), "slow" (seconds before an answer), "tokens" (a function of
            a response's token ids that is applied to what is sent), "fixed" (no adapters at all), "layout" (in this
            process: another picture token in the prompt).
    """

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.image_token = self.model.config.image_token_index
        self.picture_tokens = self.model.config.image_seq_length
        self.adapters: list[str] = []
        self.loads: list[str] = []
        self.faults: dict = {}
        self.busy = threading.Lock()
        self.closed = False
        answers = {
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/v1/chat/completions/render": self.render,
            "/inference/v1/generate": self.generate,
        }

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                known = {"/health": {}, "/v1/models": {"object": "list", "data": [{"id": "base", "object": "model"}]}}
                self.send(*((200, known[self.path]) if self.path in known else (404, {"detail": "Not Found"})))

            def do_POST(handler):
                if self.closed:
                    handler.close_connection = True  # as a process that was killed: no answer
                    return
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                answer = answers.get(handler.path)
                if answer is None or ("lora" in handler.path and "fixed" in self.faults):
                    handler.send(404, {"detail": "Not Found"})
                    return
                with self.busy:
                    handler.send(*answer(body))

            def send(self, code, body):
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.closed = True
        self.server.shutdown()
        self.server.server_close()
        with self.busy:  # a thread still at work in torch would abort the interpreter's end
            pass

    def load(self, body):
        name = body["lora_name"]
        if name in self.adapters:
            return refusal(f"The lora adapter '{name}' has already been loaded. If you want to load the adapter ...")
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(body["lora_path"], adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.model, body["lora_path"], adapter_name=name).eval()
        self.adapters.append(name)
        self.loads.append(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body):
        if body["lora_name"] not in self.adapters:
            return refusal(f"The lora adapter '{body['lora_name']}' cannot be found.", 404)
        self.adapters.remove(body["lora_name"])
        if "deaf" not in self.faults:
            self.model.delete_adapter(body["lora_name"])
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def render(self, body):
        (message,) = body["messages"]
        data = [part["image_url"]["url"].removeprefix("data:image/png;base64,") for part in message["content"]]
        features = {
            "mm_hashes": {"image": [hashlib.sha256(d.encode()).hexdigest() for d in data]},
            "mm_placeholders": {
                "image": [
                    {"offset": 3 + i * self.picture_tokens, "length": self.picture_tokens} for i in range(len(data))
                ]
            },
            "kwargs_data": {"image": data},
            "mm_metadata": None,
        }
        return 200, {"token_ids": [], "features": features}

    @torch.no_grad()
    def generate(self, body):
        ids, features, wanted = body["token_ids"], body["features"], body["sampling_params"]
        if odd := set(wanted) - set(_PARAMETERS):
            return refusal(f"unknown sampling parameters {odd}")
        if body["model"] not in ["base", *self.adapters]:
            return refusal(f"The model `{body['model']}` does not exist.", 404)
        if wanted["temperature"] == 0 and wanted["n"] > 1:
            return refusal(f"n must be 1 when using greedy sampling, got {wanted['n']}.")
        time.sleep(self.faults.get("slow", 0))
        pixels = {}
        if features is not None:
            for place in features["mm_placeholders"]["image"]:
                part = ids[place["offset"] : place["offset"] + place["length"]]
                if part != [self.image_token] * self.picture_tokens:
                    return refusal(f"no picture at {place}", 500)
            pictures = [Image.open(BytesIO(base64.b64decode(d))) for d in features["kwargs_data"]["image"]]
            if "blind" in self.faults:
                pictures = [Image.new("RGB", p.size, (128, 128, 128)) for p in pictures]
            pixels = self.processor.image_processor(pictures * wanted["n"], return_tensors="pt")
        if isinstance(self.model, PeftModel) and "deaf" not in self.faults:
            self.model.set_adapter(body["model"])
        hot = wanted["temperature"] > 0
        torch.manual_seed(wanted["seed"] % 2**63)
        found = self.model.generate(
            input_ids=torch.tensor([ids] * wanted["n"]),
            attention_mask=torch.ones(wanted["n"], len(ids), dtype=torch.long),
            **pixels,
            generation_config=GenerationConfig(
                **({"do_sample": True, "temperature": wanted["temperature"], "top_k": 0} if hot else {}),
                max_new_tokens=wanted["max_tokens"],
                suppress_tokens=[int(token) for token in wanted["logit_bias"]] or None,
                eos_token_id=wanted["stop_token_ids"],
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
            ),
        )
        steps = found.logits if "raw" in self.faults else found.scores
        logprobs = torch.stack([step.float().log_softmax(-1) for step in steps], 1)
        choices = []
        for index, (row, scores) in enumerate(zip(found.sequences[:, len(ids) :].tolist(), logprobs, strict=True)):
            ends = [t for t, token in enumerate(row) if token in wanted["stop_token_ids"]]
            row = row[: ends[0] + 1] if ends else row
            row, said = self.faults.get("tokens", lambda row: row)(row), row
            content = [said_of(token, float(scores[t, token])) for t, token in enumerate(said)]
            choices.append(
                {"index": index, "token_ids": row, "logprobs": {"content": content}, "finish_reason": "stop"}
            )
        return 200, {"request_id": body["request_id"], "model": body["model"], "choices": choices}


def modules(stand_in: StandIn) -> dict[str, SimpleNamespace]:
    """Modules with what is used of vLLM inside a process, over the same model."""

    class LLM:
        def __init__(self, **options):
            self.options = options

        def generate(self, prompts, sampling_params, use_tqdm, lora_request):
            if lora_request.lora_name not in stand_in.adapters:
                stand_in.load({"lora_name": lora_request.lora_name, "lora_path": lora_request.lora_path})
            pairs = zip(prompts, sampling_params, strict=True)
            return [self.one(prompt, wanted, lora_request.lora_name) for prompt, wanted in pairs]

        def one(self, prompt, wanted, model):
            ids, places = [], []
            for token in prompt["prompt_token_ids"]:
                repeats = stand_in.picture_tokens if token == stand_in.image_token else 1
                if repeats > 1:
                    places.append({"offset": len(ids), "length": repeats})
                ids += [token] * repeats
            pictures = prompt.get("multi_modal_data", {}).get("image", [])
            if len(pictures) != len(places):
                raise ValueError(f"{len(pictures)} pictures for {len(places)} places")
            data = [pil_to_base64(picture) for picture in pictures]
            features = {"mm_placeholders": {"image": places}, "kwargs_data": {"image": data}} if data else None
            body = {"request_id": "", "model": model, "token_ids": ids, "features": features}
            code, answer = stand_in.generate(body | {"sampling_params": vars(wanted)})
            if code != 200:
                raise ValueError(answer["error"]["message"])
            outputs = []
            for choice in answer["choices"]:
                said = [entry["logprob"] for entry in choice["logprobs"]["content"]]
                steps = [{t: SimpleNamespace(logprob=x)} for t, x in zip(choice["token_ids"], said, strict=True)]
                outputs.append(SimpleNamespace(token_ids=choice["token_ids"], logprobs=steps))
            ids = [*ids, stand_in.image_token] if "layout" in stand_in.faults else ids
            return SimpleNamespace(prompt_token_ids=ids, outputs=outputs)

    def lora_request(lora_name, lora_int_id, lora_path):
        return SimpleNamespace(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)

    return {
        "vllm": SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace),
        "vllm.lora": SimpleNamespace(),
        "vllm.lora.request": SimpleNamespace(LoRARequest=lora_request),
    }


def said_of(token: int, logprob: float) -> dict:
    name = f"token_id:{token}"
    return {"token": name, "logprob": logprob, "top_logprobs": [{"token": name, "logprob": logprob}]}


def refusal(message: str, code: int = 400):
    return code, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}
