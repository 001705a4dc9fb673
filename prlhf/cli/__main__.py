"""`python -m prlhf.cli` is the `prlhf` command."""

from . import main

main()
