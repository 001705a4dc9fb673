"""The demo: users whose taste is known, what is learned of it from their comparisons, and what that is worth to them.

Everything is measured on prompts and comparisons that trained and chose nothing; see `prlhf demo`.
"""

import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prlhf.bestofn.rerank import rerank
from prlhf.core.artefact import versions
from prlhf.core.candidates import Candidates, read_candidates
from prlhf.core.comparisons import Comparison, Comparisons, User
from prlhf.core.generation import GenerateRequest, Generator, LocalGenerator, Sampling, whole_sentences
from prlhf.core.manners import MANNERS, Manner, repeats
from prlhf.core.pretrained import Backbone, find_model, load_backbone
from prlhf.core.properties import PROPERTIES
from prlhf.core.sample import sample
from prlhf.core.scoring import Ranking
from prlhf.core.sources.simulated import POOL, SimulationPlan, World, simulated_parts
from prlhf.core.splits import SplitPlan, prompt_text, write_parts
from prlhf.core.store import JsonlStore
from prlhf.core.tokenize import TextLayout
from prlhf.eval.baselines import length_rule, row0
from prlhf.eval.metrics import accuracies, mean_over_users, paired_difference, per_user
from prlhf.eval.preference import Evaluation, margins
from prlhf.eval.regret import Regret, regret
from prlhf.evaluation import directions, evaluate_model
from prlhf.prm.features import feature_reader
from prlhf.prm.fit import BEST, fit_reward_model
from prlhf.prm.head_config import HeadConfig
from prlhf.prm.reward_model import PersonalizedRewardModel

PROMPTS = (
    "How do I get better at remembering names?",
    "What should I cook for friends who do not eat meat?",
    "How can I be less nervous before an exam?",
)
SAMPLES = 2  # of each manner
SAMPLING = Sampling(max_new_tokens=64, temperature=0.7, top_p=0.95)
NEW_USER_COMPARISONS = 10
SHOWN = (
    PROPERTIES["length"].less,
    PROPERTIES["list"].more,
    PROPERTIES["exclamation"].more,
    PROPERTIES["long_words"].more,
)
CLUSTERS = (4, 8, 16)


@dataclass
class Clock:
    """Tells which step is on, and keeps how long each took."""

    steps: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        print(f"[{len(self.seconds) + 1}/{self.steps}] {name}: {what}", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 1)


@dataclass
class Learned:
    """What was trained: a model per user model, the uniform one within each."""

    world: World
    parts: dict[str, Comparisons]
    models: dict[str, PersonalizedRewardModel]

    @property
    def personal(self) -> PersonalizedRewardModel:
        return self.models["individualized"]


def simulate(out: Path, seed: int) -> tuple[World, dict[str, Comparisons]]:
    """Simulated users' comparisons by part, written to `out` as `prlhf data simulate` does."""
    plan = SplitPlan("prompt", validation=0.1, test=0.25, unseen_users=0.2, seed=seed)
    world, parts = simulated_parts(POOL, SimulationPlan(seed=seed), plan)
    write_parts(parts, out, "world.json")
    world.save(out / "world.json")
    return world, {name: Comparisons(rows, f"{out / name}.parquet") for name, rows in parts.items()}


def compute_features(backbone: Backbone) -> None:
    """Runs the model over every response of the pool once; what is cached is not run again."""
    every = [(c.prompt, "", response) for c in read_candidates(POOL) for response in c.responses]
    feature_reader(backbone, TextLayout()).positions(every, show=True)


def train(
    backbone: Backbone, parts: dict[str, Comparisons], out: Path, seed: int
) -> dict[str, PersonalizedRewardModel]:
    """A reward model per user model, saved as `prlhf prm train` does; validation rows choose pooling and clusters."""

    def fit(name: str, **options: Any) -> PersonalizedRewardModel:
        print(f"{name} users {', '.join(f'{k} {v}' for k, v in options.items())}", file=sys.stderr)
        config = HeadConfig(user_model=name, user_options=options, seed=seed)
        return fit_reward_model(parts["train"], parts["validation"], backbone, TextLayout(), BEST, config)

    clusters = [fit("cluster", clusters=c, seed=seed) for c in CLUSTERS]
    best = min(clusters, key=lambda model: model.figures["validation_log_loss"]["personal"])
    models = {"individualized": fit("individualized"), "cluster": best}
    for name, model in models.items():
        model.save_pretrained(out / name)
    return models


def evaluate_all(learned: Learned) -> Evaluation:
    """Accuracy on test rows of all models and baselines."""
    further = {"cluster": learned.models["cluster"].score}
    return evaluate_model(learned.personal, learned.parts["test"], "individualized", "group", further)


def test_pool(learned: Learned) -> list[Candidates]:
    """The pool's responses to the prompts of the test part."""
    prompts = {prompt_text(row.prompt) for row in learned.parts["test"]}
    return [c for c in read_candidates(POOL) if prompt_text(c.prompt) in prompts]


def regret_of_picks(learned: Learned, users: Sequence[User]) -> Regret:
    """What each user loses by the pick among a test prompt's responses."""
    personal = learned.personal
    uniform = personal.uniform_scorer()
    assert uniform is not None  # heads on a frozen model come with one
    arms = {
        "row0": row0(personal.score),
        "uniform": uniform,
        "length_rule": length_rule(directions(personal)),
        "cluster": learned.models["cluster"].score,
        "personal": personal.score,
    }
    return regret(learned.world.scorer(), arms, users, test_pool(learned))


def beyond_length(learned: Learned, evaluation: Evaluation) -> dict[str, Any]:
    """Paired differences on test rows of seen users whose main taste is not the property in conflict, length."""
    rows = learned.parts["test"]
    length = {user for user, s in learned.world.users.items() if _main(s.weights) == learned.world.plan.conflict}
    kept = evaluation.seen & [row.user.id not in length for row in rows]
    own, clusters = evaluation.correct["individualized"][kept], evaluation.clusters[kept]
    others = ("row0", "length_rule", "uniform")
    return {name: paired_difference(own, evaluation.correct[name][kept], clusters) for name in others}


def _main(weights: Any) -> str:
    return max(weights, key=lambda name: abs(weights[name]))


def add_new_users(learned: Learned) -> dict[str, Any]:
    """Users who were not in training, before and after they gave ten comparisons; intervals are over these users.

    The saved run does not change. Their test rows are on prompts that nobody was trained on.
    """
    model = copy.copy(learned.personal)
    model.users, model.user_model = copy.deepcopy(model.users), copy.deepcopy(model.user_model)
    given: dict[str, list[Comparison]] = {}
    for row in learned.parts["onboarding"]:
        given.setdefault(str(row.user.id), []).append(row)
    rows = [row for row in learned.parts["test"] if row.user.id in given]
    new = sorted({str(row.user.id) for row in rows if len(given[str(row.user.id)]) >= NEW_USER_COMPARISONS})
    for user in new:
        model.add_user(user, given[user][:NEW_USER_COMPARISONS])
    arms = {"row0": row0(model.score), "added": model.score}
    rows = [row for row in rows if row.user.id in new]
    users = [row.user for row in rows]
    right = per_user(
        [user.id for user in users], {name: accuracies(margins(scorer, rows, users)) for name, scorer in arms.items()}
    )
    lost = regret(learned.world.scorer(), arms, [learned.world.users[user].user for user in new], test_pool(learned))
    return {
        "users": len(new),
        "comparisons": NEW_USER_COMPARISONS,
        "interval": "95 %, Student's t over users",
        "accuracy": {name: mean_over_users(right[name].to_numpy()) for name in arms},
        "difference": mean_over_users((right["added"] - right["row0"]).to_numpy(), (-1.0, 1.0)),
        "regret": {name: mean_over_users(lost.users[name].to_numpy(), (0.0, None)) for name in ("random", *arms)},
        "regret_difference": mean_over_users((lost.users["added"] - lost.users["row0"]).to_numpy(), (None, None)),
        "users_who_lose_less": int((lost.users["added"] < lost.users["row0"]).sum()),
    }


def new_requests() -> list[tuple[str, Manner, GenerateRequest]]:
    """What is asked of the model: each new prompt in each manner."""
    asked = [(prompt, slot, manner) for prompt in PROMPTS for slot, manner in enumerate(MANNERS)]
    return [(p, m, GenerateRequest(m.ask(p), SAMPLES, sampling=SAMPLING, seed=slot)) for p, slot, m in asked]


def sample_new(generator: Generator, store: JsonlStore, model: str) -> list[Candidates]:
    """Responses to new prompts, several in each manner; those in the store are not drawn again.

    Texts without a whole sentence and those that only repeat are left out, and counted on the terminal; so are prompts
    with fewer than two texts to pick from.
    """
    asked = new_requests()
    drawn = sample(generator, [request for *_, request in asked], store, model, show=True)
    texts: dict[str, list[str]] = {prompt: [] for prompt in PROMPTS}
    for (prompt, manner, _), found in zip(asked, drawn, strict=True):
        texts[prompt] += [text for text in map(whole_sentences, found) if text and not repeats(text, manner)]
    kept = [Candidates(prompt, tuple(dict.fromkeys(found))) for prompt, found in texts.items()]
    left = sum(map(len, drawn)) - sum(len(c.responses) for c in kept)
    print(f"{left} responses left out: no whole sentence, or nothing new in them", file=sys.stderr)
    return [c for c in kept if len(c.responses) > 1]


def shown_users(learned: Learned) -> list[User]:
    """Four users who were in training and want different things."""
    by_taste: dict[str, User] = {}
    for name, someone in learned.world.users.items():
        if name in learned.personal.users:
            by_taste.setdefault(someone.taste, User(name))
    order = [taste for taste in SHOWN if taste in by_taste] + [taste for taste in by_taste if taste not in SHOWN]
    return [by_taste[taste] for taste in order[:4]]


def pick(learned: Learned, candidates: Sequence[Candidates]) -> list[Ranking]:
    """The candidates' order for each of the four."""
    personal = learned.personal
    return list(rerank(personal.score, candidates, shown_users(learned), personal.knows))


@dataclass
class Outcome:
    """Everything that a demo found out."""

    learned: Learned
    evaluation: Evaluation
    regret: Regret
    new_users: dict[str, Any]
    rankings: list[Ranking]
    seconds: dict[str, float]

    def results(self) -> dict[str, Any]:
        """What `results.json` holds: the figures of an evaluation, and those that only known tastes allow."""
        accuracy = self.evaluation.figures["accuracy"]
        return {
            **self.evaluation.figures,
            "ceiling": accuracy["ceiling"]["top"],
            "length_rule": accuracy["length_rule"]["top"],
            "regret": self.regret.figures,
            "regret_interval": f"95 %, bootstrap over {self.regret.unit}s",
            "beyond_length": beyond_length(self.learned, self.evaluation),
            "new_users": self.new_users,
            "model": self.learned.personal.settings["model"]["label"],
            "seconds": {**self.seconds, "total": round(sum(self.seconds.values()), 1)},
            "versions": versions(),
        }


def run(out: Path, model: str, seed: int) -> Outcome:
    """Runs the demo into a folder, telling of each step as it goes.

    Hidden states and sampled responses are kept, so an interrupted demo goes on where it was and another one is quick.

    Raises:
        ValueError: the model can't be used; found out before the work begins.
    """
    clock = Clock(steps=7)
    with clock.step("model", "fetching it where it is not there yet, and loading it"):
        source = find_model(model)
        print(source.origin, file=sys.stderr)
        backbone, generator = load_backbone(source), LocalGenerator.from_source(source)
        generator.check([request for *_, request in new_requests()])
    with clock.step("users", "simulated users choose between responses of the pool"):
        world, parts = simulate(out / "data", seed)
        for part in parts.values():
            print(part.notice(), file=sys.stderr)
    with clock.step("features", "the frozen model reads every response once"):
        compute_features(backbone)
    with clock.step("heads", "a vector for each user, an individualized, a cluster and a uniform model"):
        learned = Learned(world, parts, train(backbone, parts, out, seed))
    with clock.step("evaluation", "comparisons and prompts that trained and chose nothing"):
        evaluation = evaluate_all(learned)
        lost = regret_of_picks(learned, seen_users(learned))
    with clock.step("new users", f"people who were not in training give {NEW_USER_COMPARISONS} comparisons each"):
        new_users = add_new_users(learned)
    with clock.step("candidates", f"the model writes {SAMPLES * len(MANNERS)} responses to {len(PROMPTS)} new prompts"):
        store = JsonlStore(out / "candidates.jsonl")
        candidates = sample_new(generator, store, backbone.fingerprint)
        rankings = pick(learned, candidates)
    return Outcome(learned, evaluation, lost, new_users, rankings, clock.seconds)


def seen_users(learned: Learned) -> list[User]:
    """Simulated users who were in training."""
    return [someone.user for name, someone in learned.world.users.items() if name in learned.personal.users]
