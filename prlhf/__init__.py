"""Personalized reward models and policies from personalized preference data (P-RLHF, arXiv 2402.05133).

The public names are loaded when they are first used, so `import prlhf` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("prlhf")

_PLACES = {
    "Comparison": "core.comparisons",
    "RowPolicy": "core.comparisons",
    "User": "core.comparisons",
    "load_comparisons": "core.sources.files",
    "find_model": "core.pretrained",
    "load_backbone": "core.pretrained",
    "Ranking": "core.scoring",
    "GenerateRequest": "core.generation",
    "LocalGenerator": "core.generation",
    "Sampling": "core.sampling",
    "ScoreRequest": "core.scoring",
    "Scorer": "core.scoring",
    "each": "core.scoring",
    "SimulationPlan": "core.sources.simulated",
    "World": "core.sources.simulated",
    "simulate": "core.sources.simulated",
    "SplitPlan": "core.splits",
    "split": "core.splits",
    "TextLayout": "core.tokenize",
    "UserIndex": "core.users",
    "HeadConfig": "prm.head_config",
    "PersonalizedRewardModel": "prm.reward_model",
    "fit_reward_model": "prm.fit",
    "train_reward_model": "prm.joint",
    "PersonalizedRewardConfig": "prm.trainer",
    "PersonalizedDPOConfig": "policy.trainer",
    "PersonalizedDPOTrainer": "policy.trainer",
    "PersonalizedPolicy": "policy.policy",
    "train_policy": "policy.train",
    "load_language_model": "core.pretrained",
    "load_run": "runs",
    "PersonalizedRewardTrainer": "prm.trainer",
    "personalize": "core.backbone",
    "evaluate": "eval.preference",
    "regret": "eval.regret",
    "rerank": "bestofn.rerank",
}

__all__ = ["__version__", *sorted(_PLACES)]

if TYPE_CHECKING:
    from .bestofn.rerank import rerank as rerank
    from .core.backbone import personalize as personalize
    from .core.comparisons import Comparison as Comparison
    from .core.comparisons import RowPolicy as RowPolicy
    from .core.comparisons import User as User
    from .core.generation import GenerateRequest as GenerateRequest
    from .core.generation import LocalGenerator as LocalGenerator
    from .core.pretrained import find_model as find_model
    from .core.pretrained import load_backbone as load_backbone
    from .core.pretrained import load_language_model as load_language_model
    from .core.sampling import Sampling as Sampling
    from .core.scoring import Ranking as Ranking
    from .core.scoring import Scorer as Scorer
    from .core.scoring import ScoreRequest as ScoreRequest
    from .core.scoring import each as each
    from .core.sources.files import load_comparisons as load_comparisons
    from .core.sources.simulated import SimulationPlan as SimulationPlan
    from .core.sources.simulated import World as World
    from .core.sources.simulated import simulate as simulate
    from .core.splits import SplitPlan as SplitPlan
    from .core.splits import split as split
    from .core.tokenize import TextLayout as TextLayout
    from .core.users import UserIndex as UserIndex
    from .eval.preference import evaluate as evaluate
    from .eval.regret import regret as regret
    from .policy.policy import PersonalizedPolicy as PersonalizedPolicy
    from .policy.train import train_policy as train_policy
    from .policy.trainer import PersonalizedDPOConfig as PersonalizedDPOConfig
    from .policy.trainer import PersonalizedDPOTrainer as PersonalizedDPOTrainer
    from .prm.fit import fit_reward_model as fit_reward_model
    from .prm.head_config import HeadConfig as HeadConfig
    from .prm.joint import train_reward_model as train_reward_model
    from .prm.reward_model import PersonalizedRewardModel as PersonalizedRewardModel
    from .prm.trainer import PersonalizedRewardConfig as PersonalizedRewardConfig
    from .prm.trainer import PersonalizedRewardTrainer as PersonalizedRewardTrainer
    from .runs import load_run as load_run


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'prlhf' has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
