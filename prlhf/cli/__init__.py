"""The `prlhf` command: one thin file per group of verbs; torch and the rest are loaded by the verb that needs them."""

import contextlib
import errno
import os
import sys
import warnings
from typing import NoReturn

import typer

from . import bestofn, data, eval, policy, prm, users
from .demo import demo

app = typer.Typer(
    name="prlhf",
    help="Personalized reward models and policies from personalized preference data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.add_typer(data.app, name="data")
app.add_typer(prm.app, name="prm")
app.add_typer(policy.app, name="policy")
app.add_typer(bestofn.app, name="bestofn")
app.add_typer(eval.app, name="eval")
app.add_typer(users.app, name="users")


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        from prlhf import __version__

        typer.echo(__version__)
        raise typer.Exit


BAD_INPUT, BAD_ARTEFACT, DISK, BAD_ROWS, INTERRUPTED = 2, 3, 4, 5, 130


def main() -> NoReturn:
    """Runs the command. Exit codes: 0 ok, 2 bad input, 3 bad artefact, 4 disk, 5 too many bad rows, 130 interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Read when torch is loaded. Threads that spin while they wait for each other gain nothing on idle cores, and where
    # something else keeps a core busy they make sampling many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Of flags' coming names: nothing that whoever runs the command could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except SystemExit as stopped:  # typer turns an interrupt into this
        if stopped.code == INTERRUPTED:
            _stop("interrupted; what is computed is kept, run the same command again to go on", INTERRUPTED)
        raise
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            _stop(f"disk: {error}; files that were there are unchanged, run again when there is room", DISK)
        _stop(str(error), BAD_INPUT)
    except (ValueError, KeyError, FloatingPointError) as error:
        from prlhf.core.artefact import ArtefactError
        from prlhf.core.comparisons import TooManyBadRows

        codes = {ArtefactError: BAD_ARTEFACT, TooManyBadRows: BAD_ROWS}
        _stop(str(error), next((code for kind, code in codes.items() if isinstance(error, kind)), BAD_INPUT))
    sys.exit(0)


def _stop(message: str, code: int) -> NoReturn:
    from .output import plain

    print(f"prlhf: {plain(message, lines=True)}", file=sys.stderr)
    sys.exit(code)
