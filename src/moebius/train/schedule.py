"""The learning rate of a step."""

from __future__ import annotations

import math

from moebius.train.recipe import TrainingRecipe


def learning_rate(recipe: TrainingRecipe, step: int) -> float:
    """Linear warm-up, then a half cosine (arXiv 1608.03983, eq 5) that reaches its end at the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - 1 - recipe.warmup_steps)
    share = recipe.final_share + (1 - recipe.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * share
