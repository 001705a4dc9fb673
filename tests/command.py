"""The command as a person calls it, within this process."""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from prlhf.cli import main


@dataclass
class Done:
    stdout: str
    stderr: str


def prlhf(*args: object, cwd: Path, code: int = 0) -> Done:
    """Runs the command in this process, which spares each call the seconds that importing torch takes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prlhf", *map(str, args)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            main()
    assert (stopped.value.code or 0) == code, err.getvalue()
    return Done(out.getvalue(), err.getvalue())
