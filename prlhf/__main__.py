"""`python -m prlhf` is the `prlhf` command."""

from .cli import main

main()
