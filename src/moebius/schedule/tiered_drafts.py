"""A scheduler beside a second tier of the prefix cache whose requests draft."""

from moebius.schedule.drafts import DraftingScheduler
from moebius.schedule.tiers import TieredScheduler


class TieredDraftingScheduler(DraftingScheduler, TieredScheduler):
    """Both at once: drafts come last in a step, and a tier has its turn between two."""
