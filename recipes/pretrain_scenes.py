"""Make the bundled model from nothing: cross-entropy pretraining on the built-in scenes.

    python recipes/pretrain_scenes.py --out mmft/assets/scenes_vlm
    python recipes/pretrain_scenes.py --resume-from mmft/assets/scenes_vlm --steps 1200 --out runs/more

A SigLIP tower and a small Llama inside `LlavaForConditionalGeneration`, both from random weights, learn
together. Each picture is encoded once per step and its prompt is read once; the five reference captions
follow in one row, side by side, behind a block mask, so that each sees the prompt and itself alone.
Words alone teach a small tower shapes only slowly. So a linear head also names what covers each patch
(shape, colour, size) from the scene's ground truth; its weight falls to zero over the first 60 % of the
run, it is thrown away afterwards, and a resumed run does without it.
Plain torch on purpose: this script is how the weights came about, not a trainer. Supervised training of
an existing model is `recipes/caption_sft.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from mmft.data.scenes import (
    COLOURS,
    PROMPT,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    SceneRows,
    attribute_claims,
    scene_rows,
)
from reward_models import CiderD, DocumentFrequencies

PATCH = 12
LABELS = (list(SHAPES), list(COLOURS), list(SIZES))  # what a patch can show
IMAGE, START, END, PAD = "<image>", "<|im_start|>", "<|im_end|>", "<|pad|>"
WORDS = Path(__file__).resolve().parents[1] / "mmft" / "assets" / "words.txt"
FUNCTION_WORDS = frozenset(
    "a an the of on in at to and with is are by from for as that this it its or than there which".split()
)

# ChatML with pictures. A content string is text alone; a list may hold {"type": "image"} parts. The
# generation block marks what an assistant said, for trainers that mask the rest.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


# --- building ----------------------------------------------------------------------------------------


def build_tokenizer(texts: Iterable[str], words: Sequence[str], vocab_size: int = 1460) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text comes back unchanged. `words` are everyday words (most wanted first)
    that the scenes lack: with them, real photo captions take about one token a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, IMAGE, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frame = [f"user\n{PROMPT}\n", "assistant\n", PROMPT, *("a an the there this two".split())]

    def corpus() -> Iterator[str]:
        yield from texts
        yield from frame * 2000
        for rank, word in enumerate(dict.fromkeys(words)):
            yield from [f" {word}"] * (200 // (1 + rank // 100))

    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "start_token": START},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Any picture becomes 96 x 96 RGB (stretched, not cropped: a caption may speak of the edges)."""
    pictures = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """About 1.4 million parameters, random (from torch's global seed)."""
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=32
    )
    return model


# --- batches and loss --------------------------------------------------------------------------------


def prompt_text(processor: Any) -> str:
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def tokenise_captions(tokenizer: Any, references: list[list[str]]) -> torch.Tensor:
    """Captions with their EOS, padded: (rows, captions of a row, longest) int64."""
    flat = tokenizer([text + END for row in references for text in row], add_special_tokens=False)["input_ids"]
    width = max(map(len, flat))
    out = torch.full((len(flat), width), tokenizer.pad_token_id)
    for k, ids in enumerate(flat):
        out[k, : len(ids)] = torch.tensor(ids)
    return out.view(len(references), -1, width)


def draw_pictures(rows: SceneRows, indices: Sequence[int], processor: Any) -> torch.Tensor:
    """Pixel values (rows, 3, 96, 96). The image processor on a picture of the right size is this one line."""
    mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
    pixels = np.stack([np.asarray(rows[i]["image"]) for i in indices])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def block_layout(prompt: int, captions: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (1, 1, L, L), True = may look, and positions (1, L), for a prompt followed by captions side by side.

    A caption token sees the prompt and its own caption up to itself; every caption starts at the position
    after the prompt, as if it stood there alone.
    """
    owner = torch.cat([torch.zeros(prompt), torch.arange(1, captions + 1).repeat_interleave(width)])
    causal = torch.ones(len(owner), len(owner)).tril().bool()
    mask = causal & ((owner[:, None] == owner[None, :]) | (owner[None, :] == 0))
    positions = torch.cat([torch.arange(prompt), prompt + torch.arange(width).repeat(captions)])
    return mask[None, None], positions[None]


def patch_labels(scene: Scene) -> torch.Tensor:
    """What covers each patch, seen from above: (64, 3) int64, shape, colour, size; 0 = nothing."""
    side = SIDE // PATCH
    centres = (np.arange(side) + 0.5) * PATCH
    x, y = np.meshgrid(centres, centres)
    labels = np.zeros((side, side, 3), dtype=np.int64)
    for o in scene.objects:
        # A little beyond the outline: a small object may miss the centre of every patch it touches.
        covered = np.hypot(x - o.x, y - o.y) < o.radius + PATCH / 4
        labels[covered] = [1 + names.index(name) for names, name in zip(LABELS, (o.shape, o.colour, o.size))]
    return torch.from_numpy(labels.reshape(-1, 3))


def patch_loss(head: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the three mean cross-entropies; `features (B, 64, D)`, `labels (B, 64, 3)`."""
    parts = head(features).split([len(names) + 1 for names in LABELS], dim=-1)
    return sum(
        torch.nn.functional.cross_entropy(part.flatten(0, 1), labels[..., k].flatten()) for k, part in enumerate(parts)
    )


def encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Features (B, 64, D) in the language model's space of pixel values (B, 3, 96, 96)."""
    return torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))


def caption_loss(model: Any, prompt_ids: torch.Tensor, features: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over caption tokens, EOS included.

    `prompt_ids (P,)`, `features (B, 64, D)` of the pictures, `captions (B, K, T)` padded with the pad token.
    """
    rows, number, width = captions.shape
    embed = model.get_input_embeddings()
    prompt = embed(prompt_ids).expand(rows, -1, -1)
    where = (prompt_ids == model.config.image_token_id).nonzero()[:, 0]
    prompt = prompt.index_copy(1, where, features)
    inputs = torch.cat([prompt, embed(captions.flatten(1))], dim=1)
    mask, positions = block_layout(len(prompt_ids), number, width)
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=mask.expand(rows, -1, -1, -1),
        position_ids=positions.expand(rows, -1),
        use_cache=False,
    ).last_hidden_state
    # The last prompt position foretells every caption's first token, each token the one after it.
    first = hidden[:, len(prompt_ids) - 1][:, None, None].expand(-1, number, -1, -1)
    rest = hidden[:, len(prompt_ids) :].unflatten(1, (number, width))[:, :, :-1]
    real = captions != model.config.text_config.pad_token_id
    logits = model.lm_head(torch.cat([first, rest], dim=2)[real])
    return torch.nn.functional.cross_entropy(logits, captions[real])


# --- evaluation --------------------------------------------------------------------------------------


@torch.no_grad()
def write(model: Any, processor: Any, rows: SceneRows, sample: bool = False, batch: int = 125) -> list[str]:
    """One caption per row: greedy, or sampled at temperature 1."""
    model.eval()
    texts: list[str] = []
    how = {"do_sample": True, "top_k": 0, "temperature": 1.0} if sample else {"do_sample": False}
    for start in range(0, len(rows), batch):
        indices = range(start, min(start + batch, len(rows)))
        inputs = processor(
            text=[prompt_text(processor)] * len(indices),
            images=[rows[i]["image"] for i in indices],
            return_tensors="pt",
        )
        out = model.generate(**inputs, **how, max_new_tokens=28)
        texts += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return texts


def measure(texts: list[str], rows: SceneRows, cider: CiderD) -> dict[str, float]:
    """CIDEr-D against the references, share of true claims, mean words, share that ends in a function word."""
    claims = np.array([attribute_claims(text, rows.scene(i)) for i, text in enumerate(texts)])
    words = [re.findall(r"[a-z]+", text) or [""] for text in texts]
    return {
        "cider_d": float(np.mean(cider.score(texts, rows.references()))),
        "attributes": float(claims[:, 0].sum() / max(1, claims[:, 1].sum())),
        "words": float(np.mean([len(w) for w in words])),
        "function_word_end": float(np.mean([w[-1] in FUNCTION_WORDS for w in words])),
        "distinct": len(set(texts)) / len(texts),
    }


# --- training ----------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warmup, then a half cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: Any, processor: Any, args: argparse.Namespace, log: Any) -> None:
    rows, validation = scene_rows("train", args.scenes), scene_rows("validation", args.eval_rows)
    references = rows.references()
    cider = CiderD(DocumentFrequencies.from_references(references), eos=False)
    captions = tokenise_captions(processor.tokenizer, references)
    one = processor(text=prompt_text(processor), images=rows[0]["image"], return_tensors="pt")
    prompt_ids = one["input_ids"][0]
    head = torch.nn.Linear(model.config.text_config.hidden_size, sum(len(names) + 1 for names in LABELS))
    # Muon for the matrices inside the layers (fewer steps to the same loss), AdamW for the rest.
    inner = {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    matrices = [p for n, p in model.named_parameters() if n in inner]
    others = [p for n, p in model.named_parameters() if n not in inner] + list(head.parameters())
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    order: list[int] = []
    rng = np.random.default_rng(args.seed)
    eval_at = {round(args.steps * k / args.evals) for k in range(1, args.evals + 1)}
    started, running = time.time(), 0.0
    model.train()
    for step in range(args.steps):
        if len(order) < args.batch:
            order = rng.permutation(len(rows)).tolist()
        chosen, order = order[: args.batch], order[args.batch :]
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate, args.warmup)
        chosen_captions = captions[chosen]
        longest = int((chosen_captions != processor.tokenizer.pad_token_id).sum(-1).max())
        features = encode(model, draw_pictures(rows, chosen, processor))
        loss = caption_loss(model, prompt_ids, features, chosen_captions[:, :, :longest])
        share = 0.0 if args.resume_from else max(0.0, 1 - step / (0.6 * args.steps))
        labels = torch.stack([patch_labels(rows.scene(i)) for i in chosen]) if share else None
        extra = share * patch_loss(head, features, labels) if share else torch.zeros(())
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss.item()} at step {step}; lower --learning-rate")
        model.zero_grad()
        head.zero_grad()
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 in eval_at:
            entry = {"step": step + 1, "seconds": round(time.time() - started, 1), "loss": round(running, 4)}
            if share:
                entry["patch_loss"] = round(extra.item() / share, 4)
            if step + 1 in eval_at:
                texts = write(model, processor, validation)
                entry |= {k: round(v, 4) for k, v in measure(texts, validation, cider).items()}
                entry["samples"] = texts[:3]
            log.write(json.dumps(entry) + "\n")
            log.flush()
            print(json.dumps(entry), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the bundled model on the built-in scenes.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, processor and training_log.jsonl")
    parser.add_argument("--resume-from", type=Path, help="continue from this folder instead of random weights")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32, help="pictures per step, five captions each")
    parser.add_argument("--scenes", type=int, default=24_000, help="training scenes, the first of the split")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--evals", type=int, default=8, help="evaluations over the run, the last at its end")
    parser.add_argument("--eval-rows", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # the first steps are several times slower without
    torch.manual_seed(args.seed)
    if args.resume_from:
        processor = AutoProcessor.from_pretrained(args.resume_from)
        model = AutoModelForImageTextToText.from_pretrained(args.resume_from, dtype=torch.float32)
    else:
        references = scene_rows("train", min(args.scenes, 8000)).references()
        tokenizer = build_tokenizer((text for row in references for text in row), WORDS.read_text().split())
        processor, model = build_processor(tokenizer), build_model(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    with (args.out / "training_log.jsonl").open("w") as log:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out",)}
        log.write(json.dumps({"settings": settings, "torch": torch.__version__}) + "\n")
        train(model, processor, args, log)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
