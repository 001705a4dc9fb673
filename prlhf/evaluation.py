"""A reward model with what it has to beat: the one place where models meet the metrics of `eval`."""

from collections.abc import Mapping, Sequence

from prlhf.core.comparisons import Comparison
from prlhf.core.personal import PersonalizedModel
from prlhf.core.scoring import Scorer
from prlhf.eval.baselines import length_directions
from prlhf.eval.preference import SHUFFLES, Evaluation, evaluate


def evaluate_model(
    model: PersonalizedModel,
    rows: Sequence[Comparison],
    name: str,
    group: str | None = None,
    further: Mapping[str, Scorer] | None = None,
    shuffles: int = SHUFFLES,
) -> Evaluation:
    """Evaluates a reward model, or a policy by its implicit reward, beside the baselines of `evaluate`.

    A uniform model that was trained with it is one of them.

    Args:
        name: the model's in the figures.
        group: column by which Accuracy-average is also given.
        further: other scorers to show beside it.
        shuffles: of the shuffled-user control; see `evaluate`.
    """
    uniform = model.uniform_scorer()
    baselines = {**(further or {}), **({} if uniform is None else {"uniform": uniform})}
    return evaluate(name, model.score, list(rows), model.knows, baselines, directions(model), group, shuffles)


def directions(model: PersonalizedModel) -> dict[str | None, int]:
    """Best fixed length direction per user, from the model's training rows."""
    facts = model.users.facts.items()
    return length_directions({user or None: (f["longer_chosen"], f["shorter_chosen"]) for user, f in facts})
