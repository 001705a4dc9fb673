"""`prlhf prm train`: a personalized reward model from comparisons."""

import difflib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .options import load
from .output import percent, table, tell

if TYPE_CHECKING:
    from prlhf.core.comparisons import Comparisons
    from prlhf.prm.arguments import RewardArguments
    from prlhf.prm.reward_model import PersonalizedRewardModel

app = typer.Typer(help="Personalized reward model (P-RM; not TRL's process reward model).", no_args_is_help=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Train all users' heads on a frozen model; every flag may also stand in a --config FILE.yaml.",
)
def train(context: typer.Context) -> None:
    from prlhf.core.artefact import writing

    arguments = _parse(context.args)
    begun = time.time()
    out = Path(arguments.output_dir)
    with writing(out):
        model = _fit(arguments)
        figures = model.figures
        figures["seconds"] = round(time.time() - begun, 1)
        model.save_pretrained(out)
    losses = figures["validation_log_loss"]
    table(
        f"{out}: {arguments.user_model} heads, {model.settings['pooling']} pooling, {model.settings['model']['label']}",
        ["on validation rows, which chose the strengths", "log loss", "accuracy"],
        [(k, f"{losses[k]:.4f}", percent(figures["validation_accuracy"][k])) for k in ("personal", "uniform")],
    )
    tell(f"next: prlhf eval preference {out} --data TEST   (rows that chose nothing)")


def _parse(args: list[str]) -> "RewardArguments":
    """Reads flags and `--config`.

    Raises:
        ValueError: an unknown flag or key (the nearest one is named), or a value that does not fit.
    """
    import yaml
    from trl import TrlParser

    from prlhf.prm.arguments import RewardArguments

    kinds: Any = [RewardArguments]
    parser: Any = TrlParser(kinds, prog="prlhf prm train", allow_abbrev=False)
    try:
        (arguments,) = parser.parse_args_and_config(args)
    except ValueError as error:
        raise ValueError(f"prm train: {error}{_nearest(str(error), RewardArguments)}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config: not YAML: {error}") from None
    except FileNotFoundError as error:
        raise ValueError(f"--config {error.filename}: no such file") from None
    return arguments


def _nearest(message: str, arguments: Any) -> str:
    fields = [name.replace("_", "-") for name in arguments.__dataclass_fields__]
    words = [word.strip("[]',\"-").replace("_", "-") for word in message.split()]
    near = [difflib.get_close_matches(word, fields, n=1, cutoff=0.75) for word in words if word not in fields]
    found = sorted({match[0] for match in near if match})
    return f" Did you mean {', '.join('--' + name for name in found)}?" if found else ""


def _fit(arguments: "RewardArguments") -> "PersonalizedRewardModel":
    from prlhf.core.artefact import MANIFEST
    from prlhf.core.pretrained import find_model, load_backbone
    from prlhf.prm.fit import fit_reward_model

    if (Path(arguments.output_dir) / MANIFEST).exists() and not arguments.overwrite:
        raise ValueError(f"--output-dir {arguments.output_dir}: holds a run already; give another, or --overwrite")
    config = arguments.head_config()
    train_rows, validation = _data(arguments)
    source = find_model(arguments.model)
    tell(source.origin)
    backbone = load_backbone(source, arguments.dtype)
    tell(f"running it in {str(backbone.dtype).removeprefix('torch.')} on {next(backbone.model.parameters()).device}")
    return fit_reward_model(train_rows, validation, backbone, arguments.layout(), arguments.pooling, config, show=True)


def _data(arguments: "RewardArguments") -> "tuple[Comparisons, Comparisons]":
    from prlhf.core.splits import SplitPlan, split

    def read(source: str) -> "Comparisons":
        return load(source, arguments.columns, arguments.max_bad_rows, arguments.missing_user)

    rows = read(arguments.data)
    if arguments.eval_data:
        return rows, read(arguments.eval_data)
    parts = split(rows, SplitPlan("prompt", validation=0.1, test=0.0, seed=arguments.seed))
    tell(f"no --eval-data: {len(parts['validation']):,} rows, by prompt, are held back for validation")
    return rows.subset(parts["train"]), rows.subset(parts["validation"])
