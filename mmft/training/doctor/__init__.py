"""`mmft doctor`: what is wrong with a machine or a recipe, found before a run costs anything. See docs/doctor.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmft.training.doctor.machine import look_at_machine
from mmft.training.doctor.page import Page, Section
from mmft.training.doctor.parts import Parts
from mmft.training.doctor.recipe import look_at_recipe

# What needs torch and transformers is imported where it is used: a library that is missing is itself a finding.

PROBED = 32  # held-out rows that rewards are probed on, where the whole page is wanted
# A way to cheat is sure to be found if it pays more in so many rows, or by so much of an honest caption's score.
# CIDEr-D, for one, pays for listed words in about half of all photos, and by little.
CLEAR, MUCH = 2 / 3, 0.25


def doctor_rewards(recipe, rows: int = 64):
    """Probes every reward of a recipe with adversarial responses to held-out rows; no model is loaded.

    Returns:
        a `reward_models.probes.RewardReport`.

    Raises:
        ValueError: data or rewards of the recipe are missing or wrong.
    """
    from mmft.training.run import rewards_of, rows_of
    from reward_models import DocumentFrequencies
    from reward_models.probes import probe_rewards

    train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
    corpus = train.references()
    functions = rewards_of(recipe, DocumentFrequencies.from_references(corpus))
    return probe_rewards(functions, [held_out[i] for i in range(min(rows, len(held_out)))], corpus)


def examine(
    recipe=None,
    then: str = "",
    quick: bool = False,
    say: Callable[[str], None] = lambda title: None,
    supervised: bool = False,
) -> Page:
    """Looks at the machine and, where there is one, at a recipe: everything that a run will need, in its order.

    Args:
        then: the command that comes next, once nothing stands in the way.
        quick: nothing that loads the model or plans its memory.
        say: is told what is being looked at.
        supervised: the recipe is trained on captions alone, by recipes/caption_sft.py.

    Returns:
        the page; whatever failed is a finding of its section.
    """
    page = Page(then, say=say)
    with page.section("Machine") as section:
        look_at_machine(section, Path(recipe.output.dir if recipe is not None else "."))
    if recipe is not None:
        _examine_recipe(page, recipe, quick, supervised)
    return page


def _examine_recipe(page: Page, recipe, quick: bool, supervised: bool) -> None:
    parts, fits = Parts(), True
    with page.section("Recipe") as section:
        look_at_recipe(section, recipe, supervised)
    with page.section("Data") as section:
        from mmft.training.doctor.data import look_at_rows
        from mmft.training.doctor.trial import caption_lengths, complete

        look_at_rows(section, recipe, parts, supervised)
        own = parts.references
        recipe = complete(section, recipe, parts)
        caption_lengths(section, recipe, own)
    if not supervised:
        with page.section("Rewards") as section:
            _rewards(section, recipe, parts)
    if quick:
        return
    with page.section("Memory") as section:
        from mmft.training.doctor import supervised as alone
        from mmft.training.doctor.trial import memory

        fits = (alone.least_memory if supervised else memory)(section, recipe)
    with page.section("Model") as section:
        from mmft.training.doctor.trial import try_model

        if fits:
            (alone.try_captions if supervised else try_model)(section, recipe, parts)
        else:
            section.note("not loaded: it would not fit")


def _rewards(section: Section, recipe, parts: Parts) -> None:
    from mmft.training.run import rewards_of
    from reward_models import DocumentFrequencies
    from reward_models.probes import probe_rewards

    parts.frequencies = DocumentFrequencies.from_references(parts.references)
    parts.rewards = rewards_of(recipe, parts.frequencies)
    rows = [parts.held_out[i] for i in range(min(PROBED, len(parts.held_out)))]
    if sum(len(row["references"]) > 1 for row in rows) < 2:
        section.note("not probed: that takes held-out pictures with two captions or more")
        return
    report = probe_rewards(parts.rewards, rows, parts.references)
    section.numbers |= report.as_dict()
    for finding in report.flagged:
        said = f"{finding.probe!r} than for an honest caption, in {finding.outscores:.0%} of {finding.rows} rows"
        if finding.outscores >= CLEAR or finding.difference > MUCH * abs(report.honest.get(finding.reward, 0.0)):
            section.wrong(
                f"the reward pays more for {said}: that is what the model will learn",
                "mmft doctor rewards shows every part; docs/guards.md says what helps",
            )
        else:
            section.warn(
                f"the reward pays a little more for {said}: look for it in the report's captions",
                "mmft doctor rewards shows every part; docs/guards.md says what watches for it during training",
            )
    if not report.flagged:
        section.fine(f"none of {len({f.probe for f in report.findings})} ways to cheat pays more than honesty")
