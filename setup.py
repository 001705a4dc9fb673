"""The folders at the top level are installed as subpackages of `prlhf`; see pyproject.toml for everything else."""

from setuptools import setup

FOLDERS = ("core", "prm", "policy", "bestofn", "eval")

setup(
    packages=["prlhf", "prlhf.cli", "prlhf.core.sources", *(f"prlhf.{name}" for name in FOLDERS)],
    package_dir={"prlhf": "prlhf", "prlhf.core.sources": "core/sources", **{f"prlhf.{n}": n for n in FOLDERS}},
    package_data={"prlhf.core.sources": ["*.jsonl"], "prlhf.eval": ["*.j2"]},
)
