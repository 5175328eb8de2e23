"""What both kinds of recipe are: sections with combinations that cannot work, written out whole."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationInfo, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.nodes import SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from mmft.recipe.secrets import redacted
from mmft.recipe.strict_yaml import Key, Section, dotted

Impossible = tuple[Key, list[Key], str]  # key to blame, other keys looked at, what was got and expected


class Root(Section):
    """A whole recipe. Immutable; ``dump`` writes it with every default filled in."""

    launched_by: ClassVar[str]

    seed: int = Field(
        0, ge=0, lt=2**32, description="of sampling, order of rows and new weights; another number gives another run"
    )

    def impossible(self) -> list[Impossible]:
        """Combinations of keys that cannot work."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Self:
        if not info.context:  # `read_recipe` reports combinations itself, with their lines
            problems = [f"{dotted(key)}: {text}" for key, _, text in self.impossible()]
            if problems:
                raise ValueError("; ".join(problems))
        return self

    def as_yaml(self) -> str:
        """The resolved recipe, a line for each value, without secrets; reading that text gives an equal recipe."""
        yaml, stream = YAML(typ="safe", pure=True), StringIO()
        yaml.Representer = _Lines
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.width = 1_000_000
        yaml.dump(redacted(self.model_dump()), stream)
        return stream.getvalue()

    def dump(self, path: str | Path) -> None:
        """Write `as_yaml` to a file."""
        Path(path).write_text(self.as_yaml(), encoding="utf-8")


class _Lines(SafeRepresenter):
    """Lists of plain values on one line; else a line for every item."""

    def represent_list(self, data: list[Any]) -> SequenceNode:
        node = super().represent_list(data)
        node.flow_style = not any(isinstance(item, dict | list) for item in data)
        return node


_Lines.add_representer(list, _Lines.represent_list)
