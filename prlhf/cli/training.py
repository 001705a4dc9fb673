"""What `prm train` and `policy train` do alike: flags and `--config`, reading the data, going on where it stopped."""

import difflib
import os
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ModelPlace, load
from .output import tell

if TYPE_CHECKING:
    from prlhf.core.arguments import RunArguments
    from prlhf.core.comparisons import Comparisons
    from prlhf.core.personal import PersonalizedModel

RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.")]
_SHOWN = (  # of TRL's and transformers' flags, those that most runs set
    *("output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "bf16", "eval_steps", "save_steps"),
    *("resume_from_checkpoint", "push_to_hub", "hub_model_id"),
)


@dataclass
class TrainVerb:
    """A `train` verb: its name on the command line, and the dataclasses whose fields are its flags.

    Attributes:
        stock: TRL's configuration, whose flags the short help leaves out but for the commonest and
        shown: those of them that matter here.
        check: arguments, configuration, and the fields that were named -> nothing, or a ValueError.
    """

    name: str
    arguments: Any
    config: Any
    stock: Any
    shown: tuple[str, ...]
    check: Callable[[Any, Any, set[str]], None]

    @property
    def usage(self) -> str:
        return f"prlhf {self.name} --data FILE --model MODEL --output-dir RUN [flags]   (or --config FILE.yaml)"

    def parse(self, args: list[str]) -> tuple[Any, Any]:
        """Reads flags and `--config`.

        Raises:
            ValueError: an unknown flag or key (the nearest one is named), or a value that does not fit.
        """
        import yaml
        from trl import TrlParser

        kinds: Any = [self.arguments, self.config]
        parser: Any = TrlParser(kinds, prog=f"prlhf {self.name}", usage=self.usage, allow_abbrev=False)
        if {"--help", "-h", "--help-all"} & set(args):
            shown = parser if "--help-all" in args else self._short()
            typer.echo(shown.format_help())
            raise typer.Exit
        try:
            arguments, config = parser.parse_args_and_config(args)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}{_nearest(str(error), kinds)}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"--config: not YAML: {error}") from None
        except FileNotFoundError as error:
            raise ValueError(f"--config {error.filename}: no such file") from None
        if config.output_dir == self.config().output_dir:
            raise ValueError(f"{self.name}: --output-dir is required: the folder of the run")
        given = {word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in args if word[:2] == "--"}
        if "--config" in args:
            given |= set(yaml.safe_load(Path(args[args.index("--config") + 1]).read_text()))
        self.check(arguments, config, given)
        arguments.lora()  # may refuse too
        if str(config.resume_from_checkpoint).lower() == "true":
            config.resume_from_checkpoint = True
        return arguments, config

    def _short(self) -> Any:
        """A parser of this project's own flags and the commonest others, for a help text that can be read."""
        from transformers import HfArgumentParser

        def copied(of: Any) -> Any:
            return field(default=of.default, default_factory=of.default_factory, metadata=of.metadata)

        stock = {one.name for one in fields(self.stock)}
        shown = (*_SHOWN, *self.shown)
        own = [one for one in fields(self.config) if one.name in shown or one.name not in stock]
        own += [one for one in fields(self.config) if one.name in ("max_length", "seed")]
        training: Any = make_dataclass("training", [(one.name, one.type, copied(one)) for one in own])
        foot = (
            f"Every other flag of TRL's {self.stock.__name__} and transformers' TrainingArguments works too: "
            "--help-all lists them."
        )
        return HfArgumentParser([self.arguments, training], prog=f"prlhf {self.name}", usage=self.usage, epilog=foot)


def _nearest(message: str, kinds: list[Any]) -> str:
    fields = [name.replace("_", "-") for kind in kinds for name in kind.__dataclass_fields__]
    # Only what the parser quotes: words of the message itself are near to flags too.
    words = [word.replace("_", "-") for word in re.findall(r"'(?:--)?(\w[\w-]*)", message)]
    near = [difflib.get_close_matches(word, fields, n=1, cutoff=0.75) for word in words if word not in fields]
    found = sorted({match[0] for match in near if match})
    return f" Did you mean {', '.join('--' + name for name in found)}?" if found else ""


def train_and_save(
    verb: TrainVerb,
    args: list[str],
    fit: Callable[[Any, Any, Any], "PersonalizedModel"],
    show: Callable[["PersonalizedModel", Path], None],
) -> None:
    """Parses, trains and writes the run, which no other process writes to meanwhile, and publishes it if asked.

    Args:
        fit: arguments, configuration, and what tells the terminal something, in the first of several processes.
        show: the finished model and its folder.
    """
    from prlhf.core.artefact import MANIFEST, writing

    arguments, config = verb.parse(args)
    begun, out = time.time(), Path(str(config.output_dir))
    token, config.hub_token = config.hub_token, None  # checkpoints keep the configuration, and no secret
    publish, config.push_to_hub = config.push_to_hub, False  # the trainer would push its checkpoints
    first = config.process_index == 0
    if (out / MANIFEST).exists() and not arguments.overwrite:
        raise ValueError(f"--output-dir {out}: holds a run already; give another, or --overwrite")
    with writing(out) if first else nullcontext():
        model = fit(arguments, config, tell if first else lambda _: None)
        if not first:
            return
        model.figures["seconds"] = round(time.time() - begun, 1)
        model.save_pretrained(out)
    show(model, out)
    if publish:
        _push(model, config.hub_model_id or out.name, arguments.publish_users, config.hub_private_repo, token)


def push_run(
    run: RunArgument,
    repo: Annotated[str, typer.Option(help="Name on the hub, as in me/my-model.")],
    users: Annotated[bool, typer.Option("--users", help="Also users' ids, vectors and facts: personal data.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A repository that only you can read.")] = False,
    base: ModelPlace = None,
) -> None:
    """Publish a run on the hub: row 0 alone, unless --users is given. The token is the hub's own ($HF_TOKEN)."""
    from prlhf.runs import load_run

    _push(load_run(run, show=True, model=base), repo, users, private or None, os.environ.get("HF_TOKEN"))


def _push(model: "PersonalizedModel", repo: str, users: bool, private: bool | None, token: str | None) -> None:
    """Publishes a run on the hub."""
    from prlhf.core.publish import push_to_hub

    address = push_to_hub(model, repo, users, private, token)
    tell(f"{address}: published {'with' if users else 'without'} its users")


def load_base(arguments: "RunArguments", config: Any, load_model: Callable[..., Any], say: Any) -> Any:
    """The model that training starts from."""
    from prlhf.core.pretrained import find_model

    source = find_model(arguments.model)
    say(source.origin)
    # Full fine-tuning in bfloat16 would lose small updates; computing in it (--bf16) does not.
    wish = "float32" if arguments.tuning == "full" and arguments.dtype == "auto" else arguments.dtype
    found = load_model(source, wish, "cpu" if config.use_cpu else None)
    say(f"running it in {str(found.dtype).removeprefix('torch.')} on {next(found.model.parameters()).device}")
    return found


def resume(arguments: "RunArguments", config: Any, on: tuple[Any, ...], say: Any) -> None:
    """Sets the checkpoint that training goes on from, where the same command was interrupted."""
    from prlhf.core.checkpoints import begin
    from prlhf.core.splits import data_hash

    if config.resume_from_checkpoint:
        return
    train_rows, validation, fingerprint = on
    aside = {"overwrite", "output_dir", "logging_dir", "local_rank", "hub_token"}
    told = {key: str(value) for key, value in {**asdict(arguments), **asdict(config)}.items() if key not in aside}
    facts = {**told, "rows": data_hash(list(train_rows)), "held": data_hash(list(validation)), "model": fingerprint}
    facts["processes"] = str(config.world_size)
    found = begin(Path(str(config.output_dir)), facts, arguments.overwrite, config.process_index == 0, say)
    config.resume_from_checkpoint = str(found) if found else None


def training_data(arguments: "RunArguments", config: Any, say: Any) -> "tuple[Comparisons, Comparisons]":
    """Training and validation rows."""
    from prlhf.core.splits import SplitPlan, split

    def read(source: str) -> "Comparisons":
        return load(source, arguments.columns, arguments.max_bad_rows, arguments.missing_user, say=say)

    rows = read(arguments.data)
    if arguments.eval_data:
        return rows, read(arguments.eval_data)
    parts = split(rows, SplitPlan("prompt", validation=0.1, test=0.0, seed=config.seed))
    say(f"no --eval-data: {len(parts['validation']):,} rows, by prompt, are held back for validation")
    return rows.subset(parts["train"]), rows.subset(parts["validation"])
