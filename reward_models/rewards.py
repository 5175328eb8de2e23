"""Several rewards as one: named parts, weights, and the checks that stop a broken reward before it trains anything.

A reward function has TRL's form, `f(prompts=..., completions=..., **columns) -> list[float | None]`; `columns` are the
columns of the data set as lists aligned with the completions, plus `ended`. None means: no opinion on this row.

The way of one part's score: raw -> nonfinite policy -> normalised -> clipped -> times its weight -> summed.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reward_models.credit import PartScores, per_token
from reward_models.named import load_reward
from reward_models.normalisation import Moments, group_affine, moments_of
from reward_models.parts import RewardFunction, RewardPart
from reward_models.returned import Scored, Values, read_values, row_name, wait_for
from reward_models.weights import ByColumn, Reduce, Scheduled, Share, Shares, When

if TYPE_CHECKING:
    from reward_models.metrics.ngrams import DocumentFrequencies

__all__ = ["RewardFunction", "RewardPart", "RewardScores", "Scored", "WeightedRewards", "build_rewards"]


class RewardScores(NamedTuple):
    """The scores of N responses, of T_i tokens each.

    total: (N,) float64, always finite: the whole score, dense parts included.
    parts: name -> (N,) raw scores, NaN where the part had no opinion; also logged-only columns, as NAME/KEY.
    weighted: name -> (N,) what the part adds to total.
    keep: (N,) bool, False for rows that a `drop` policy leaves out of the update.
    plain: (N,) the weighted sum of the raw scores, without any normalisation: it depends on the row and the weights
        alone, so it can be compared between rows, calls and held-out rows of one step. A part's clip counts where it
        has no normalisation, for else its limits are in other units.
    last: (N,) what of total belongs to the last token: total without what `dense` gives.
    dense: per response (T_i,) token rewards with total = last + dense.sum(); None without pieces or dense parts.
    potentials: per response (T_i,) potentials of the prefixes up to and including each token; None likewise.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    weighted: dict[str, np.ndarray]
    keep: np.ndarray
    plain: np.ndarray
    last: np.ndarray
    dense: list[np.ndarray] | None = None
    potentials: list[np.ndarray] | None = None


class WeightedRewards:
    """Weighted sum of named rewards: `WeightedRewards([RewardPart("cider_d", CiderD(df)), ...])`.

    Parts may also be given as (name, function, weight). A part that returns None for a row adds nothing there.
    `reduce`, if set, sums a numpy array over processes; moments and shares of training calls then cover all of them.
    Raises ValueError at once for a repeated name, a wrong weight or option, or no parts at all; and when called, for
    a part that returns the wrong number or type, or a non-finite value under `raise`, naming the reward and the row.
    """

    def __init__(self, parts: Sequence[RewardPart | tuple[str, RewardFunction, Any]]) -> None:
        if not parts:
            raise ValueError("no rewards given; name at least one, for example ('cider_d', CiderD(df), 1.0)")
        self.parts = [part if isinstance(part, RewardPart) else RewardPart(*part) for part in parts]
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"reward name {name!r} is used {self.names.count(name)} times; names must differ")
        self.reduce: Reduce | None = None
        self._moments = {part.name: Moments() for part in self.parts if part.normalize == "running"}
        shares = {part.name: part.weight.share for part in self.parts if isinstance(part.weight, Share)}
        self._shares = Shares(shares, [p.name for p in self.parts if p.name not in shares and p.weight != 0.0])
        self._step = 0  # the last training step; held-out calls between steps use its weights
        self._warned: set[tuple[str, str]] = set()

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def signature(self) -> str:
        """One line per part."""
        return "\n".join(part.signature for part in self.parts)

    def __call__(
        self,
        prompts: Any = None,
        completions: Sequence[Any] = (),
        *,
        pieces: Sequence[Sequence[str]] | None = None,
        step: int | None = None,
        group_size: int | None = None,
        training: bool = False,
        **columns: Any,
    ) -> RewardScores:
        """Score N completions. Columns whose length is not N are refused, for they would be misaligned silently.

        pieces: per completion its response tokens as text, for dense credit. step: the training step, for scheduled
        weights. group_size: responses per prompt, which lie together. training: False for held-out rows, which leave
        running moments and adapted weights as they are.
        """
        rows = len(completions)
        for key, column in {"prompts": prompts, "pieces": pieces, **columns}.items():
            if isinstance(column, list | tuple | np.ndarray) and len(column) != rows:
                raise ValueError(f"column {key!r} has {len(column)} rows but there are {rows} completions")
        if training:
            self._check_training(pieces, step, group_size)
            self._step = self._step if step is None else step
        samples = {"prompts": prompts, "completions": completions, **columns}
        values, logged = self._ask(samples, rows)
        keep = np.ones(rows, dtype=bool)
        for part in self.parts:
            if part.nonfinite == "drop":
                keep &= ~values[part.name].bad
        counted = {name: np.where(keep, value.values, np.nan) for name, value in values.items()}
        affine = {part.name: self._affine(part, counted[part.name], group_size, training) for part in self.parts}
        scored = {part.name: _apply(part, values[part.name].values, *affine[part.name]) for part in self.parts}
        weights = self._weights(samples, keep, scored, step, group_size, training)
        weighted, total = _sum(weights, scored, samples)
        raw = {name: value.values for name, value in values.items()}
        _, plain = _sum(
            weights, {p.name: scored[p.name] if not p.normalize else raw[p.name] for p in self.parts}, samples
        )
        raw |= logged
        if pieces is None or all(part.credit == "last" for part in self.parts):
            return RewardScores(total, raw, weighted, keep, plain, total)
        detail = {name: PartScores(*values[name], *affine[name], weights[name], weighted[name]) for name in self.names}
        return RewardScores(total, raw, weighted, keep, plain, *per_token(self.parts, detail, pieces, samples))

    def _check_training(self, pieces: Any, step: int | None, group_size: int | None) -> None:
        for part in self.parts:
            for missing, needed, what in (
                (step is None, isinstance(part.weight, Scheduled), "a scheduled weight needs step=..."),
                ((group_size or 0) < 2, part.normalize == "group", "normalize group needs group_size=... of 2 or more"),
                (pieces is None, part.credit != "last", f"credit {part.credit} needs pieces=... (text per token)"),
            ):
                if missing and needed:
                    raise ValueError(f"reward {part.name!r}: {what}")

    def _ask(self, samples: dict[str, Any], rows: int) -> tuple[dict[str, Values], dict[str, np.ndarray]]:
        """Every part's answer, read and checked; and the logged-only columns."""
        answers: dict[str, Any] = {}
        try:
            for part in self.parts:
                try:
                    answers[part.name] = part.function(**samples)
                except Exception as error:
                    error.add_note(f"in reward {part.name!r}")
                    if (row := _failing_row(part.function, samples)) is not None:
                        error.add_note(row_name(samples, row))
                    raise
        except BaseException:
            for answer in answers.values():
                if inspect.iscoroutine(answer):
                    answer.close()
            raise
        values, logged = {}, {}
        for part, answer in zip(self.parts, wait_for(answers).values(), strict=True):
            if isinstance(answer, Scored):
                for key, column in answer.logged.items():
                    name = f"{part.name}/{key}"
                    if name in self.names:
                        raise ValueError(f"reward {part.name!r} logs {name!r}, which is also the name of a reward")
                    logged[name] = read_values(name, column, rows, samples, "drop").values
                answer = answer.values
            values[part.name] = read_values(part.name, answer, rows, samples, part.nonfinite)
        self._warn(values, samples, rows)
        return values, logged

    def _warn(self, values: dict[str, Values], samples: Mapping[str, Any], rows: int) -> None:
        """What happened for the first time and would otherwise be silent."""

        def once(kind: str, name: str, text: str) -> None:
            if (kind, name) not in self._warned:
                self._warned.add((kind, name))
                warnings.warn(text + " (said once)", stacklevel=5)

        nothing = np.all([np.isnan(value.values) & ~value.bad for value in values.values()], axis=0)
        if nothing.any() and not nothing.all():
            where = row_name(samples, int(np.flatnonzero(nothing)[0]))
            once("nothing", "", f"{where}: no reward has an opinion on this row, so its score is 0")
        for part in self.parts:
            bad = np.flatnonzero(values[part.name].bad)
            if len(bad):
                done = {"drop": "left out of the update", "zero": "counted as 0"}[part.nonfinite]
                where = row_name(samples, int(bad[0]))
                once("bad", part.name, f"reward {part.name!r}: {len(bad)} non-finite values, first in {where}; {done}")
            if rows and not len(bad) and np.isnan(values[part.name].values).all():
                once("none", part.name, f"reward {part.name!r} had no opinion on any of {rows} rows; it added nothing")

    def _affine(
        self, part: RewardPart, values: np.ndarray, group_size: int | None, training: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """shift (N,) and scale (N,) of the part's normalisation; values are NaN where they do not take part."""
        moments = Moments()  # of nothing: changes nothing
        try:
            if part.normalize == "group" and group_size:
                return group_affine(values, group_size)
            if part.normalize == "running":
                moments = self._moments[part.name]
                if training:
                    moments.add(moments_of(values, self.reduce))
            elif part.normalize == "batch":
                moments = moments_of(values, self.reduce if training else None)
            shift, scale = moments.affine()
        except ValueError as error:
            raise ValueError(f"reward {part.name!r}: {error}") from None
        return np.full(len(values), shift), np.full(len(values), scale)

    def _weights(
        self,
        samples: Mapping[str, Any],
        keep: np.ndarray,
        scores: Mapping[str, np.ndarray],
        step: int | None,
        group_size: int | None,
        training: bool,
    ) -> dict[str, np.ndarray]:
        """Part -> (N,) weights. Rows that are not kept take no part in the shares."""
        rows, weights = len(keep), {}
        for part in self.parts:
            if isinstance(part.weight, ByColumn | When):
                try:
                    weights[part.name] = part.weight.of(samples, rows)
                except ValueError as error:
                    raise ValueError(f"reward {part.name!r}: {error}") from None
            elif isinstance(part.weight, Scheduled):
                weights[part.name] = np.full(rows, part.weight.at(self._step if step is None else step))
            elif not isinstance(part.weight, Share):
                weights[part.name] = np.full(rows, part.weight)
        if self._shares.shares:
            if training:
                moved = {name: weights.get(name, 1.0) * np.where(keep, s, np.nan) for name, s in scores.items()}
                self._shares.update(moved, group_size, self.reduce)
            for name in self._shares.shares:
                weights[name] = np.full(rows, self._shares.weights.get(name, 0.0))
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Moments, adapted weights and the last step, as plain JSON data; floats survive JSON bit by bit."""
        return {
            "parts": [part.kind for part in self.parts],
            "step": self._step,
            "moments": {name: moments.state() for name, moments in self._moments.items()},
            "shares": self._shares.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. Raises ValueError if it belongs to parts of another kind."""
        kinds = [part.kind for part in self.parts]
        if list(state["parts"]) != kinds:
            raise ValueError(
                f"the saved rewards were {', '.join(state['parts'])}; these are {', '.join(kinds)}; "
                "resume with the recipe that the run was started with"
            )
        self._step = int(state["step"])
        self._moments = {name: Moments.from_state(state["moments"][name]) for name in self._moments}
        self._shares.load_state(state["shares"])


def _failing_row(function: Any, samples: Mapping[str, Any]) -> int | None:
    """The row that made a reward of the user's own raise. Ours name it themselves, or are slow to ask again."""
    if not inspect.isfunction(function) and type(function).__module__.startswith("reward_models."):
        return None
    from reward_models.own import failing_row  # here: it takes as long to import as half of numpy

    return failing_row(function, samples, seconds=5.0)


def _apply(part: RewardPart, raw: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(N,) normalised and clipped; NaN stays."""
    score = (raw - shift) * scale if part.normalize else raw
    return np.clip(score, *part.clip) if part.clip else score


def _sum(
    weights: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray], samples: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each part's (N,) score times its weight, NaN as 0; and their sum. ValueError naming a row whose sum overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = {name: weights[name] * np.nan_to_num(score, nan=0.0) for name, score in scores.items()}
        total = np.sum(list(weighted.values()), axis=0)
    if not np.isfinite(total).all():
        row = int(np.flatnonzero(~np.isfinite(total))[0])
        raise ValueError(f"{row_name(samples, row)}: the weighted sum is {total[row]}; scale the rewards down")
    return weighted, total


_PART_KEYS = ("credit", "normalize", "clip", "nonfinite")
_KEYS = ("name", "weight", "as", "timeout", "options", *_PART_KEYS)


def build_rewards(specs: Sequence[Mapping[str, Any]], df: DocumentFrequencies | None = None) -> WeightedRewards:
    """Rewards from plain data, as a recipe holds them: `[{"name": "cider_d", "weight": 1.0}, {"name": "bleu"}]`.

    name: one of `reward_models.named.BUILT_IN`, or a function or class of your own as `package.module:name` or
    `path/to/file.py:name`. Options go under `options`, those of built-in rewards also beside the name; they are the
    keyword arguments of the class, or of every call of a function. weight (default 1), credit, normalize, clip and
    nonfinite: see `RewardPart`. `as` renames the part in logs (default: the name, or the function's name). timeout:
    seconds per call, in a child process. None stands for the default of any of them.
    Raises ValueError naming the entry, with the nearest name for a mistyped one.
    """
    parts = []
    for i, spec in enumerate(specs):
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise ValueError(f"rewards[{i}]: expected a mapping with a 'name', got {spec!r}")
        name = spec["name"]
        counts = {key: spec[key] for key in ("weight", *_PART_KEYS) if spec.get(key) is not None}
        try:
            function = load_reward(name, _options(spec), df, spec.get("timeout"))
            parts.append(RewardPart(spec.get("as") or name.rpartition(":")[2], function, **counts))
        except (TypeError, ValueError) as error:
            raise ValueError(f"rewards[{i}] ({name}): {error}") from error
    return WeightedRewards(parts)


def _options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one entry, from beside the name and from under `options`."""
    beside = {key: value for key, value in spec.items() if key not in _KEYS}
    if beside and ":" in spec["name"]:  # a function may swallow a mistyped key by its **columns
        near = difflib.get_close_matches(next(iter(beside)), _KEYS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown key {next(iter(beside))!r}; {hint}Options of a reward of your own go under 'options'"
        )
    under = {} if spec.get("options") is None else spec["options"]
    if not isinstance(under, Mapping):
        raise ValueError(f"options: expected a mapping of names to values, got {under!r}")
    for key in under:
        if key in beside:
            raise ValueError(f"option {key!r} is given twice, beside the name and under 'options'")
    return {**beside, **under}
