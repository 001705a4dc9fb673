"""The page of `prlhf demo`."""

from pathlib import Path

from prlhf.core.scoring import Ranking
from prlhf.demo import NEW_USER_COMPARISONS, Outcome, beyond_length
from prlhf.eval.charts import NUMBER, POINTS, shown
from prlhf.eval.preference import WORDS
from prlhf.eval.report import Section, write_report
from prlhf.eval.sections import audit_section, bars_section, made_section, picks_section

from .pages import audit, audit_of_training, evaluation_sections, facts_of, prompts_in_common

SPREADS = "spreads of true utility"
ARMS = {"random": "a blind pick", "personal": "individualized", "oracle": "the best response"}


def demo_page(path: Path, command: str, found: Outcome) -> None:
    """Writes the page of a demo."""
    learned, model = found.learned, found.learned.personal
    tastes = {name: someone.taste for name, someone in learned.world.users.items()}
    accuracy, users, groups, drawn = evaluation_sections(found.evaluation, model, tastes)
    sections = [
        picks_section(found.rankings, {r.user.id or "": _about(found, r) for r in found.rankings}),
        accuracy,
        _regret(found),
        _beyond_length(found),
        users,
        groups,
        _new_users(found),
        drawn,
        audit_section(_audit(found)),
        made_section(command, {**_world(found), **facts_of(model)}, found.seconds),
    ]
    write_report(path, "What personalization is worth: simulated users", lead(found), sections)


def _audit(found: Outcome) -> list[tuple[str, str, str]]:
    parts, model = found.learned.parts, found.learned.personal
    held = {name: parts[name] for name in ("test", "onboarding")}
    return [*audit_of_training(model), *audit(held, model), prompts_in_common(parts["train"], parts["test"])]


def lead(found: Outcome) -> list[str]:
    """What came out, in a few sentences."""
    world, accuracy = found.learned.world, found.evaluation.figures["accuracy"]
    lost, new = {name: f["value"] for name, f in found.regret.figures.items()}, found.new_users
    own = accuracy["individualized"]
    share = (lost["row0"] - lost["personal"]) / lost["row0"]
    seen = found.evaluation.figures["users"]["seen"]
    return [
        f"{len(world.users)} simulated users, each with a taste of their own, chose {world.plan.comparisons} times "
        f"between two responses of a small language model. A reward model learned from the choices of {seen} of them; "
        "it was told who chose what, never why.",
        f"On prompts that it never saw it predicts {shown(own['top'])} of their choices; one model for everybody "
        f"{shown(accuracy['uniform']['top'])}, the best length rule for each user "
        f"{shown(accuracy['length_rule']['top'])}. Choices are noisy: their true taste itself predicts "
        f"{shown(accuracy['ceiling']['top'])}.",
        f"Picking one of eight responses for each of them, it loses {lost['personal']:.2f} {SPREADS} (a spread is the "
        "standard deviation over a prompt's responses) against the best one; the same model without the user loses "
        f"{lost['row0']:.2f}, a blind pick {lost['random']:.2f}. Knowing the user closes {100 * share:.0f} % of the "
        "gap.",
        f"{new['users']} users who were not in training are ranked by row 0, the unknown user: "
        f"{shown(new['accuracy']['row0'])} of their choices, on average over them. After "
        f"{new['comparisons']} comparisons of their own it is {shown(new['accuracy']['added'])}, and "
        f"their picks lose {new['regret']['added']['value']:.2f} in place of {new['regret']['row0']['value']:.2f} "
        f"{SPREADS}.",
    ]


def _regret(found: Outcome) -> Section | None:
    text = [
        "For every test prompt and user, one of the pool's eight responses is picked: by the model that knows the "
        "user, by the same model without the user (row 0), by the uniform and the cluster model, and by what "
        "needs no model. Regret is the true utility of the best response less that of the pick, in units "
        "of the user's spread within a prompt; 0 is the best there is. Users seen in training. Interval: 95 %, "
        f"bootstrap over {found.regret.unit}s.",
    ]
    bars = {ARMS.get(arm, WORDS.get(arm, arm)): figure for arm, figure in found.regret.figures.items()}
    return bars_section("What users lose by the pick", text, bars, f"regret, {SPREADS}", NUMBER)


def _beyond_length(found: Outcome) -> Section | None:
    text = [
        "Accuracy of the individualized model minus that of others, on comparisons of seen users whose main taste is "
        "not length: what it knows of them is more than whether they like long responses.",
    ]
    bars = {WORDS[model]: figure for model, figure in beyond_length(found.learned, found.evaluation).items()}
    return bars_section("More than length", text, bars, "difference in points", POINTS)


def _new_users(found: Outcome) -> Section | None:
    new = found.new_users
    text = [
        f"{new['users']} users were kept out of training. Each then gives {NEW_USER_COMPARISONS} comparisons, on "
        "training prompts, and gets a vector by a convex fit that leaves everything else as it is; they are judged on "
        f"test prompts. {new['users_who_lose_less']} of them lose less by their picks than before; "
        f"the mean difference is {shown(new['regret_difference'], NUMBER)} spreads. Interval: {new['interval']}.",
    ]
    bars = {"before: row 0": new["regret"]["row0"], "after": new["regret"]["added"]}
    return bars_section("Users who come later", text, bars, f"regret, {SPREADS}", NUMBER)


def _about(found: Outcome, ranking: Ranking) -> str:
    return f"above all likes {found.learned.world.users[str(ranking.user.id)].taste}"


def _world(found: Outcome) -> dict[str, str]:
    plan = found.learned.world.plan
    return {
        "simulated users": f"{plan.users}, {plan.comparisons} comparisons each, seed {plan.seed}",
        "what they can like": ", ".join(plan.properties),
        "groups": f"{100 * plan.majority:.0f} % like more {plan.conflict}, the others less",
        "strength of their choices": f"{plan.strength:g} logits of spread within a prompt",
    }
