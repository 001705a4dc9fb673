"""A reward model with what it has to beat: the one place where models of `prm` meet the metrics of `eval`."""

from collections.abc import Mapping, Sequence

from prlhf.core.comparisons import Comparison
from prlhf.core.scoring import Scorer
from prlhf.eval.baselines import length_directions
from prlhf.eval.preference import Evaluation, evaluate
from prlhf.prm.reward_model import PersonalizedRewardModel


def evaluate_model(
    model: PersonalizedRewardModel,
    rows: Sequence[Comparison],
    name: str,
    group: str | None = None,
    further: Mapping[str, Scorer] | None = None,
) -> Evaluation:
    """Evaluates a reward model beside its uniform model, where it has one, and the baselines of `evaluate`.

    Args:
        name: the model's in the figures.
        group: column by which Accuracy-average is also given.
        further: other scorers to show beside it.
    """
    uniform = model.uniform_scorer()
    baselines = {**(further or {}), **({} if uniform is None else {"uniform": uniform})}
    return evaluate(name, model.score, list(rows), model.knows, baselines, directions(model), group)


def directions(model: PersonalizedRewardModel) -> dict[str | None, int]:
    """Best fixed length direction per user, from the model's training rows."""
    facts = model.users.facts.items()
    return length_directions({user or None: (f["longer_chosen"], f["shorter_chosen"]) for user, f in facts})
