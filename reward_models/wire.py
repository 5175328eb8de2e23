"""What goes over HTTP between `client.py` and `serve.py`: the typed request and reply, and pictures.

Pictures stand once per request, as base64 of a PNG or JPEG file, and samples point at them by index, because the
responses to one prompt share its picture. There is no way to name a picture by path or URL: nothing is ever fetched.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, create_model

if TYPE_CHECKING:
    from PIL.Image import Image

# Keywords of a reward call that a sample's own columns must not replace.
RESERVED = frozenset(
    {"self", "prompt", "prompts", "completion", "completions", "references", "image", "images"}
    | {"pieces", "step", "group_size", "training"}
)

# The group is a JSON value or key; only at the end is there none. Nothing in it can fail after it has read ahead (a
# string may lack its closing quote), so that any bytes take time in proportion to their number.
_VALUE = re.compile(rb'[\s,:\]}]*+("[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[^\s\[\]{},:"]++)?', re.DOTALL)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


_FIRST = Field(fail_fast=True)  # of a list with many errors one is enough: each takes more memory than the item


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ImagePart(_Model):
    """Where a picture stands in a message. Which one is in the sample's `images`; a URL is refused."""

    type: Literal["image"]


class Message(_Model):
    role: str
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], _FIRST]


class Sample(_Model):
    """One row: what a reward is given. `images` are indices into the request's; `columns` are any other columns."""

    prompt: str | Annotated[list[Message], _FIRST] | None = None
    completion: str | Annotated[list[Message], _FIRST]
    references: Annotated[list[str], _FIRST] | None = None
    images: Annotated[list[Annotated[int, Field(ge=0)]], _FIRST] | None = None
    columns: dict[str, JsonValue] = {}


class ScoreRequest(_Model):
    samples: list[Sample] = Field(min_length=1)
    images: list[str] = []


def request_model(max_samples: int, max_images: int) -> type[ScoreRequest]:
    """ScoreRequest with limits on its lists; reading a longer list ends at the limit."""
    return create_model(
        "ScoreRequest",
        __base__=ScoreRequest,
        samples=(list[Sample], Field(min_length=1, max_length=max_samples, fail_fast=True)),
        images=(list[str], Field(default=[], max_length=max_images, fail_fast=True)),
    )


class ScoreReply(_Model):
    """scores: one per sample; null where no reward had an opinion or a value was dropped. parts: raw, by name."""

    scores: list[float | None]
    parts: dict[str, list[float | None]]
    signature: str


class Refused(Exception):
    """A request that breaks a limit or cannot be understood: status and a text that is safe to send."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def count_values(body: bytes | bytearray, most: int) -> int:
    """How many JSON values and keys the body holds, found without parsing it; counting ends above `most`.

    An object costs the parser several hundred bytes, however few characters it is written in.
    """
    count = 0
    for match in _VALUE.finditer(body):
        count += match.lastindex or 0
        if count > most:
            break
    return count


def columns_of(request: ScoreRequest, pictures: list[Image]) -> dict[str, list[Any]]:
    """The request as the keyword arguments of a reward call: lists of N, None where a sample has no such column.

    Raises Refused for a reserved column or an index without picture.
    """
    samples = request.samples
    columns: dict[str, list[Any]] = {
        "prompts": [_plain(sample.prompt) for sample in samples],
        "completions": [_plain(sample.completion) for sample in samples],
    }
    for key in dict.fromkeys(key for sample in samples for key in sample.columns):
        if key in RESERVED:
            raise Refused(422, f"columns: {key[:40]!r} is not the name of a column of your own")
        columns[key] = [sample.columns.get(key) for sample in samples]
    if any(sample.references is not None for sample in samples):
        columns["references"] = [sample.references for sample in samples]
    if any(sample.images is not None for sample in samples):
        for i, sample in enumerate(samples):
            if any(index >= len(pictures) for index in sample.images or ()):
                raise Refused(422, f"samples.{i}.images: there are {len(pictures)} images in the request")
        rows = [[pictures[index] for index in sample.images or ()] for sample in samples]
        if all(len(row) <= 1 for row in rows):
            columns["image"] = [row[0] if row else None for row in rows]
        else:
            columns["images"] = rows
    return columns


def _plain(text: str | list[Message] | None) -> Any:
    return [message.model_dump() for message in text] if isinstance(text, list) else text


def check_values(value: Any, max_text: int) -> None:
    """Refuse texts of more than max_text characters (keys too) and non-finite numbers (1e999 is one)."""
    if isinstance(value, str):
        if len(value) > max_text:
            raise Refused(422, f"samples: a text has more than {max_text} characters")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise Refused(422, "samples: a number is not finite; send null")
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            check_values(getattr(value, name), max_text)
    elif isinstance(value, dict):
        check_values([*value, *value.values()], max_text)
    elif isinstance(value, list):
        for item in value:
            check_values(item, max_text)


def read_pictures(encoded: list[str], max_pixels: float) -> list[Image]:
    """Decode base64 PNG or JPEG files; max_pixels limits their sum and is checked on the headers.

    Raises Refused naming the index.
    """
    import PIL.Image

    opened: list[Image] = []
    pixels = 0
    for i, text in enumerate(encoded):
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(422, f"images.{i}: not base64 of a PNG or JPEG file (URLs are not fetched)") from None
        try:
            picture: Image = PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        except PIL.Image.DecompressionBombError:
            raise Refused(422, f"images.{i}: too many pixels") from None
        except Exception:  # Pillow raises many kinds for broken files, and none of them is for the client
            raise Refused(422, f"images.{i}: neither PNG nor JPEG, or broken") from None
        pixels += picture.width * picture.height
        if pixels > max_pixels:
            raise Refused(422, f"images.{i}: the request's images have more than {max_pixels / 1e6:g} megapixels")
        opened.append(picture)
    for i, picture in enumerate(opened):  # only now, when all headers are known to be within the limit
        try:
            picture.load()
        except Exception:
            raise Refused(422, f"images.{i}: broken or cut off") from None
    return opened


def write_picture(picture: Image, format: str = "PNG") -> str:
    """Base64 of the picture as a PNG (exact) or JPEG (smaller; scores may differ) file."""
    buffer = io.BytesIO()
    if format == "JPEG":
        picture.convert("RGB").save(buffer, format, quality=95)
    else:
        if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            picture = picture.convert("RGB")
        picture.save(buffer, format, compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
