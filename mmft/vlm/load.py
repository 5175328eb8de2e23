"""Hub id, folder or bundled name -> model and processor; quantisation, adapters, what is trainable."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mmft.vlm.families import FAMILIES, family_of
from mmft.vlm.policy import Policy

BUNDLED = {"scenes-vlm": Path(__file__).parent.parent / "assets" / "scenes_vlm"}

# Not quantised: the head, whose logits are the policy, and the eyes, which are small and run once per picture.
_IN_FULL = [
    rf".*\b{n}" for n in ("lm_head", "vision_tower", "vision_model", "visual", "multi_modal_projector", "connector")
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str) -> str:
    """A bundled name -> its folder; anything else (hub id, folder) as it is."""
    return str(BUNDLED.get(name, name))


def load_model(name: str, quantize: str | None = None, dtype: str = "auto", device: str | None = None):
    """Loads a model that reads pictures, clips or sounds, and its processor.

    Attention is transformers' own choice: sdpa, but for decoders that it does not trust with it (Gemma 2).

    Args:
        name: bundled name, folder, or hub id.
        quantize: None, "nf4" (4-bit) or "int8", by bitsandbytes; the adapters stay in full precision.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on a GPU, float32 on a CPU.
        device: where quantised weights go; None lets the caller (Accelerate) move the model.

    Raises:
        ValueError: the model cannot be loaded, with what was looked for and where.
    """
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    folder = resolve(name)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model.name: the folder {folder!r} has no config.json; expected a saved transformers model")
    options: dict[str, Any] = {}
    if dtype == "auto":
        options["dtype"] = "auto" if torch.cuda.is_available() else torch.float32
    else:
        options["dtype"] = DTYPES[dtype]
    if quantize is not None:
        options["quantization_config"] = _quantisation(quantize, options["dtype"])
        options["device_map"] = {"": device or _own_device()}
    try:
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForMultimodalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(_cannot_load(name, folder, error)) from error
    if quantize == "nf4":
        keep_gradients(model)
    return model, processor


def keep_gradients(model) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for a faster product on CPUs with AVX-512 bf16.

    It does so at the first pass without gradient and never unpacks them, and that product has no gradient: after one
    rollout nothing would flow back through the base layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _own_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _quantisation(kind: str, dtype: Any):
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_IN_FULL)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=_IN_FULL,  # read for 4 bits as well, in spite of its name
    )


def _cannot_load(name: str, folder: str, error: Exception) -> str:
    if "orchvision" in str(error):
        return f"model.name: the processor of {name!r} needs torchvision: pip install 'mmft[gpu]'"
    if Path(folder).is_dir():
        return f"model.name: the model in {folder!r} could not be loaded: {error}"
    if os.sep in name and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return f"model.name: there is no folder {name!r}"
    offline = " (HF_HUB_OFFLINE is set, so only what was downloaded before can be used)"
    return (
        f"model.name: cannot load {name!r}: it is no bundled model ({', '.join(BUNDLED)}), there is no such folder, "
        f"and it could not be had from the Hub{offline if os.environ.get('HF_HUB_OFFLINE') == '1' else ''}: "
        f"{str(error).splitlines()[0]}"
    )


def lora_config(model: nn.Module, r: int = 16, alpha: int = 32, dropout: float = 0.0, target: str = "language"):
    """A PEFT configuration for the model's family.

    Args:
        target: "language" (the decoder's linear layers), "all" (every linear layer but the head), or a regular
            expression of module names.
    """
    from peft import LoraConfig

    modules: Any = {"language": family_of(model).lora_target, "all": "all-linear"}.get(target, target)
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, task_type="CAUSAL_LM")


def without_dropout(model: nn.Module) -> None:
    """Switches the model's own dropout off, that of adapters excepted.

    OPT and the Q-Formers of BLIP come with 0.1. Training would then be of another distribution than was sampled from,
    and features that are kept across steps would hold the zeros of one draw.
    """
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def build_policy(
    model: nn.Module | str,
    processor=None,
    peft_config=None,
    critic: str = "head",
    needs_reference: bool = True,
    shared_prefix: bool | None = None,
    **cache: Any,
) -> Policy:
    """Model (or name) + adapters + value head -> the trainable policy.

    With a ``peft_config`` (or a `PeftModel`) only the adapters and the value head are trained, and the reference is
    the same weights with adapters off; a configuration without ``target_modules`` gets the family's. Without one
    every weight is trained, and the reference is a frozen copy. ``cache`` are `Policy`'s options of that name.

    Raises:
        ValueError: the model has no layer that the adapters' target names.
    """
    if isinstance(model, str):
        model, loaded = load_model(model)
        processor = processor or loaded
    if processor is None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(model.config._name_or_path)
    without_dropout(model)
    reference = None
    if peft_config is not None:
        from peft import get_peft_model, prepare_model_for_kbit_training

        if getattr(model, "is_quantized", False):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if getattr(peft_config, "target_modules", None) is None and family_of(model).lora_target:
            peft_config.target_modules = family_of(model).lora_target
        known = ", ".join(FAMILIES)
        try:
            with warnings.catch_warnings():
                # PEFT asks transformers for a name that is about to change; nothing a user could mend.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ValueError(
                f"model.lora.target: nothing to adapt in a {model.config.model_type!r} model ({error}); families with "
                f"a target of their own: {known}; give a regular expression of module names for others"
            ) from error
    elif not hasattr(model, "disable_adapter") and needs_reference:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    return Policy(model, processor, critic, reference, shared_prefix, **cache)
