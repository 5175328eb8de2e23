"""Hub id, folder or bundled name -> model and processor; quantisation, adapters, what is trainable."""

from __future__ import annotations

import copy
import os
import re
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mmft.vlm.decoder import backbone, text_decoder
from mmft.vlm.families import CONNECTORS, FAMILIES, family_of
from mmft.vlm.model_files import check_model
from mmft.vlm.policy import Policy
from mmft.vlm.quantised import compute_as_in_training, quantisation, read_tensor_by_tensor

BUNDLED = {"scenes-vlm": Path(__file__).parent.parent / "assets" / "scenes_vlm"}

_FAILURES = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError, SafetensorError)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str) -> str:
    """A bundled name -> its folder; anything else (hub id, folder) as it is."""
    return str(BUNDLED.get(name, name))


def load_model(
    name: str,
    quantize: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    processor: str | None = None,
):
    """Loads a model that reads pictures, clips or sounds, and its processor.

    Attention is transformers' own choice: sdpa, but for decoders that it does not trust with it (Gemma 2).

    Args:
        name: bundled name, folder, or hub id.
        quantize: None, "nf4" (4-bit) or "int8", by bitsandbytes; the adapters stay in full precision.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on a GPU, float32 on a CPU.
        device: where quantised weights go; None lets the caller (Accelerate) move the model.
        trust_remote_code: run Python code that comes with the model; without it such a model is refused.
        processor: folder of the processor, where it does not lie beside the model.

    Raises:
        ValueError: the model cannot be loaded, with what was looked for and where; it is no whole model, its weights
            are no safetensors, or its index names files that are not its own (see `check_model`).
    """
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    folder = resolve(name)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model.name: the folder {folder!r} has no config.json; expected a saved transformers model")
    check_model(folder)
    options: dict[str, Any] = {}
    if dtype == "auto":
        options["dtype"] = "auto" if torch.cuda.is_available() else torch.float32
    else:
        options["dtype"] = DTYPES[dtype]
    if quantize is not None:
        options["quantization_config"] = quantisation(quantize, options["dtype"])
        options["device_map"] = {"": device or _own_device()}
    try:
        # Said in words: transformers asks on the terminal where trust_remote_code is left open.
        reader = AutoProcessor.from_pretrained(processor or folder, trust_remote_code=trust_remote_code)
        with read_tensor_by_tensor() if quantize is not None else nullcontext():
            model = AutoModelForMultimodalLM.from_pretrained(
                folder, trust_remote_code=trust_remote_code, use_safetensors=True, **options
            )
    except _FAILURES as error:
        raise ValueError(cannot_load(name, folder, error)) from error
    if quantize is not None:
        compute_as_in_training(model)
    return model, reader


def _own_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def cannot_load(name: str, folder: str, error: Exception) -> str:
    """Why a model cannot be loaded, and the key that mends it."""
    if "orchvision" in str(error):
        return f"model.name: the processor of {name!r} needs torchvision: pip install 'mmft[gpu]'"
    if "trust_remote_code" in str(error):
        return (
            f"model.name: {name!r} brings Python code of its own, which is not run; read it, and set "
            "model.trust_remote_code to true if you trust it, or take a model that transformers knows"
        )
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


def lora_config(
    model: nn.Module,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target: str = "language",
    dora: bool = False,
    rslora: bool = False,
    connector: bool = False,
):
    """A PEFT configuration for the model's family.

    Args:
        target: "language" (the decoder's linear layers), "all" (every linear layer but the head), or a regular
            expression of module names.
        dora: weight-decomposed adapters.
        rslora: scaled by alpha / sqrt(r) in place of alpha / r.
        connector: train what stands between tower and decoder in full, and save it with the adapters.

    Raises:
        ValueError: the model has no connector that is known.
    """
    from peft import LoraConfig

    modules: Any = {"language": family_of(model).lora_target, "all": "all-linear"}.get(target, target)
    whole = connectors(model) if connector else None
    # Its layers are trained in full already.
    apart = rf".*\b(?:{'|'.join(map(re.escape, whole))})\b.*" if whole and target != "language" else None
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=modules,
        exclude_modules=apart,
        modules_to_save=whole,
        use_dora=dora,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )


def connectors(model: nn.Module) -> list[str]:
    """Paths below the backbone of what stands between the model's towers and its decoder.

    Raises:
        ValueError: none is known.
    """
    found = []
    for path in CONNECTORS:
        with suppress(AttributeError):
            module = backbone(model).get_submodule(path)
            # PEFT copies single modules, not lists of them.
            found += [f"{path}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [path]
    if not found:
        raise ValueError(
            f"model.tune: hybrid trains the connector, and a {model.config.model_type!r} model has none of "
            f"{', '.join(CONNECTORS)}; use lora with a lora.target of your own"
        )
    return found


def train_last_layers(model: nn.Module, count: int) -> None:
    """Freezes all weights but those of the decoder's last ``count`` layers and of its last norm.

    Raises:
        ValueError: the decoder has fewer layers, or nobody knows which part of the model it is.
    """
    family = family_of(model)
    if not family.decoder:
        raise ValueError(
            f"model.tune: frozen needs the decoder's layers, which were not found in a {model.config.model_type!r} "
            f"model ({'; '.join(family.notes)}); use lora or full"
        )
    decoder = text_decoder(model, family)
    if count > len(decoder.layers):
        raise ValueError(f"model.trained_layers: got {count}, the model has {len(decoder.layers)} layers")
    model.requires_grad_(False)
    norms = [child for name, child in decoder.named_children() if "norm" in name]
    for module in (*decoder.layers[-count:], *norms):
        module.requires_grad_(True)


def tune(model: nn.Module, options):
    """Makes trainable what a recipe's section ``model`` names.

    Returns:
        A PEFT configuration for `build_policy`; None where it is weights of the model itself that are trained.
    """
    if options.tune == "frozen":
        train_last_layers(model, options.trained_layers)
    if options.tune in ("full", "frozen"):
        return None
    lora = options.lora
    shape = lora.r, lora.alpha, lora.dropout, lora.target, lora.dora, lora.rslora
    return lora_config(model, *shape, connector=options.tune == "hybrid")


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

    With a ``peft_config`` (or "lora", which is `lora_config` as it stands) only the adapters and the value head are
    trained, and the reference is the same weights with adapters off; a configuration without ``target_modules`` gets
    the family's. Without one every weight is trained that is not frozen, and the reference has copies of those and
    shares the frozen ones. So it does for a `PeftModel` whose adapter has learned something: the reference is always
    the model as it starts.
    ``cache`` are `Policy`'s options of that name.

    Raises:
        ValueError: the model has no layer that the adapters' target names.
    """
    if isinstance(model, str):
        model, loaded = load_model(model)
        processor = processor or loaded
    if processor is None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(model.config._name_or_path, trust_remote_code=False)
    without_dropout(model)
    reference = None
    if isinstance(peft_config, str):
        if peft_config != "lora":
            raise ValueError(f"peft_config={peft_config!r}: expected a PEFT configuration, 'lora', or None")
        peft_config = lora_config(model)
    if peft_config is not None:
        from peft import get_peft_model

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
    elif needs_reference and not (hasattr(model, "disable_adapter") and _changes_nothing(model)):
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        # Layers in 8 bits take numbers and scales out of the weight when they are first called.
        shared |= {id(m.state): m.state for m in model.modules() if hasattr(getattr(m, "state", None), "CB")}
        reference = copy.deepcopy(model, shared).requires_grad_(False).eval()
        if hasattr(model, "disable_adapter"):
            from mmft.vlm.adapters import fold_lora

            fold_lora(reference)  # as the policy's own: what is the same gives the same numbers
    return Policy(model, processor, critic, reference, shared_prefix, **cache)


def _changes_nothing(model: nn.Module) -> bool:
    """Whether a `PeftModel` is its base model still: adapters are made with zeros in one matrix of each pair."""
    zeros = ("lora_B.", "lora_embedding_A.")
    return not any(p.any() for name, p in model.named_parameters() if any(part in name for part in zeros))
