"""The model card: everything in it comes from the run; captions and names are text, whatever they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmft.data.sources import BUNDLED as DRAWN
from mmft.data.sources import CARDS, load_card
from mmft.evaluation import findings
from mmft.evaluation.captioning import metric_info
from mmft.evaluation.curves import is_number

if TYPE_CHECKING:
    from mmft.hub.folder import Run

_TEXT_LENGTH = 300  # characters of a caption
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&$^]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
_TRAINED = {
    "lora": "LoRA adapters, rank {r}",
    "hybrid": "LoRA adapters, rank {r}, and the connector in full",
    "full": "every weight",
    "frozen": "the last layers of the decoder",
}


def write_card(run: Run, samples: list[dict[str, Any]], target: Path, repository: str, licence: str | None) -> None:
    """Writes ``README.md`` into the folder that is published, whose other files lie there already."""
    recipe, summary = run.recipe, run.summary
    data = _data_card(recipe["data"]["name"])
    known = licence or ("apache-2.0" if run.base.kind == "bundled" and recipe["data"]["name"] in DRAWN else None)
    (target / "README.md").write_text(
        _template().render(
            metadata=_metadata(run, repository, known),
            name=plain(repository.partition("/")[2]),
            headline=plain(findings.headline(summary).text),
            base=_base_text(run),
            base_kind="" if run.whole_model else run.base.kind,
            data=plain(f"{data.get('title') or recipe['data']['name']}; split {recipe['data']['train']}"),
            data_name=plain(recipe["data"]["name"]),
            algorithm=plain(_algorithm_text(recipe)),
            algorithm_name=recipe["algorithm"]["name"],
            trained=_TRAINED[recipe["model"]["tune"]].format(r=recipe["model"]["lora"]["r"]),
            rewards="<br>".join(_reward_text(reward) for reward in recipe["rewards"]),
            rows=summary.get("rows"),
            table=[_table_row(summary, name) for name in summary["after"]],
            honesty=[plain(finding.text) for finding in findings.honesty(summary, run.metrics)],
            curves=(target / "curves.png").is_file(),
            pictures=(target / "pictures").is_dir(),
            samples=[{"picture": s["picture"]} | {k: _caption(s.get(k)) for k in ("before", "after")} for s in samples],
            code=loading_code(run.base.name, "model" if run.whole_model else run.base.kind, repository),
            value_head=(target / "value_head.safetensors").is_file(),
            remote_code=recipe["model"]["trust_remote_code"] and run.base.kind != "bundled",
            signatures=[f"{plain(name)}: {_code(text)}" for name, text in (summary.get("signatures") or {}).items()],
            cost=f"{summary['seconds']:,.0f} seconds in all." if is_number(summary.get("seconds")) else "",
            versions=plain(", ".join(f"{name} {text}" for name, text in (summary.get("versions") or {}).items())),
            licence=_licence_text(run, known, data.get("licence")),
        ),
        encoding="utf-8",
        errors="replace",
    )


def loading_code(base: str, kind: str, where: str) -> str:
    """The lines that load a published run.

    Args:
        kind: as `mmft.hub.folder.Base`, or "model" without adapters.
        where: user/name, or a folder with its files.
    """
    source, start = json.dumps(where), f"AutoModelForMultimodalLM.from_pretrained({json.dumps(base)})"
    imports = ["from transformers import AutoModelForMultimodalLM, AutoProcessor"]
    lines = []
    if kind == "here":
        # By folder: given the repository, transformers would find the adapter at its root and ask for its base.
        if not Path(where).is_dir():
            imports.insert(0, "from huggingface_hub import snapshot_download")
            source = f"snapshot_download({source})"
        lines, source = [f"folder = {source}"], "folder"
        start = 'AutoModelForMultimodalLM.from_pretrained(f"{folder}/base_model")'
    elif kind == "bundled":
        imports = ["from mmft.vlm.load import load_model", "from transformers import AutoProcessor"]
        start = f"load_model({json.dumps(base)})[0]"
    elif kind == "model":
        start = f"AutoModelForMultimodalLM.from_pretrained({source})"
    lines += [f"processor = AutoProcessor.from_pretrained({source})", f"model = {start}"]
    if kind != "model":
        imports.insert(-1, "from peft import PeftModel")
        lines.append(f"model = PeftModel.from_pretrained(model, {source})")
    return "\n".join([*imports, "", *lines])


def plain(text: Any) -> str:
    """Any text as one line of Markdown that shows just that text: no markup, link, tag or table cell of its own."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _code(text: Any) -> str:
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


def _caption(text: Any) -> str:
    text = "–" if text is None else str(text)
    return plain(text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "…")


def _metadata(run: Run, repository: str, licence: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    recipe, name = run.recipe, run.recipe["data"]["name"]
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=name,
            dataset_name=name,
            dataset_split=recipe["data"]["eval"],
            metric_type=metric,
            metric_name=metric_info(metric).label,
            metric_value=round(interval["mean"], 6),
        )
        for metric, interval in run.summary["after"].items()
        if is_number(interval.get("mean"))
    ]
    lora = [] if run.whole_model else ["lora"]
    return ModelCardData(
        # An id that the Hub does not know would be an error there.
        base_model=run.base.name if run.base.kind in ("hub", "here") and "/" in run.base.name else None,
        library_name="transformers" if run.whole_model else "peft",
        license=licence,
        pipeline_tag="image-text-to-text",
        tags=["mmft", "reinforcement-learning", recipe["algorithm"]["name"], *lora],
        model_name=repository.partition("/")[2],
        eval_results=results,
    ).to_yaml()


def _base_text(run: Run) -> str:
    kinds = {
        "bundled": f"{_code(run.base.name)}, which comes with mmft",
        "hub": f"[{plain(run.base.name)}](https://huggingface.co/{run.base.name})",
        "here": f"{plain(run.base.name)} after a supervised warm start"
        + ("" if run.whole_model else ": in `base_model/`"),
        "folder": f"a folder called {_code(run.base.name)}, not published",
    }
    quantized = run.recipe["model"]["quantize"]
    return kinds[run.base.kind] + (f"; trained on {quantized} weights" if quantized else "")


def _algorithm_text(recipe: Mapping[str, Any]) -> str:
    rollout, critic = recipe["rollout"], recipe["model"]["critic"]
    return (
        f"{recipe['algorithm']['name'].upper()}, {'a value head as critic' if critic == 'head' else 'leave-one-out'}, "
        f"{recipe['train']['steps']} steps of {rollout['prompts_per_step']} prompts with "
        f"{rollout['num_generations']} responses each, KL coefficient {recipe['algorithm']['kl_coef']:g}"
    )


def _reward_text(reward: Mapping[str, Any]) -> str:
    weight = reward["weight"]
    if isinstance(weight, Mapping):
        weight = ", ".join(f"{key} {value}" for key, value in weight.items())
    said = "logged only" if weight == 0 else f"weight {weight}, credit {reward['credit']}"
    return f"{_code(reward.get('as') or reward['name'])} ({plain(said)})"


def _table_row(summary: Mapping[str, Any], name: str) -> list[str]:
    info = metric_info(name)
    cells = [plain(info.label)]
    for side in ("before", "after", "difference"):
        found, signed = summary[side].get(name) or {}, side == "difference"
        text = info.text(found.get("mean"), signed)
        if is_number(found.get("low")) and is_number(found.get("high")):
            text += f" [{info.text(found['low'], signed)}, {info.text(found['high'], signed)}]"
        cells.append(text)
    return cells


def _licence_text(run: Run, licence: str | None, data: str | None) -> str:
    said = f"{plain(licence)}." if licence else "Not stated by the trainer; the licence of the base model applies."
    return f"{said} Data: {plain(data)}." if data else said


def _data_card(name: str) -> dict[str, str]:
    """Title and licence of the data, where a card tells them."""
    for path in (Path(name), CARDS / f"{name}.yaml"):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            card = load_card(path)
            return {"title": card.title, "licence": card.licence}
    return {}


def _template():
    # No autoescape: Markdown, not HTML; every text from outside goes through `plain` or `_code`.
    environment = Environment(
        loader=PackageLoader("mmft.hub", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("card.md.jinja")
