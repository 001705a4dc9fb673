"""Runs of any kind: the one place that knows which class reads which."""

from pathlib import Path

from prlhf.core.artefact import kind_of
from prlhf.core.personal import PersonalizedModel


def load_run(
    folder: str | Path, device: str | None = None, show: bool = False, model: str | None = None
) -> PersonalizedModel:
    """Loads a reward model or a policy; both score, rank and take new users alike.

    Args:
        model: where the backbone is, if not where training found it; its weights are checked either way.

    Raises:
        ArtefactError: the folder holds no complete run; names the file.
    """
    if kind_of(Path(folder)) == "policy":
        from prlhf.policy.policy import PersonalizedPolicy

        return PersonalizedPolicy.from_pretrained(folder, device, show, model)
    from prlhf.prm.reward_model import PersonalizedRewardModel

    return PersonalizedRewardModel.from_pretrained(folder, device, show, model)
