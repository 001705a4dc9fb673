"""Wheel and sdist: each imports from another folder, and nothing but `prlhf` lands in site-packages."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of the checkout, and a wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel_holds_prlhf_alone_and_all_of_it(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"prlhf"}
    folders = {"prlhf": "prlhf", **{f: f"prlhf/{f}" for f in ("core", "prm", "policy", "bestofn", "eval")}}
    for folder, place in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{place}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_builds_and_holds_no_data(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    assert any(name.endswith("/core/users.py") for name in names)
    assert not [name for name in names if name.endswith((".parquet", ".safetensors", ".gguf"))]


def test_installed_wheel_imports_from_another_folder(built: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(next(built.glob("*.whl")))], check=True, capture_output=True)
    assert {p.name.split("-")[0] for p in target.iterdir()} <= {"prlhf", "bin"}
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import prlhf; "
        f"assert prlhf.__file__.startswith({str(target)!r}), prlhf.__file__; "
        "from prlhf.core.users import UserIndex; import prlhf.eval, prlhf.policy, prlhf.cli; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fine"


def test_editable_install_imports_from_another_folder(tmp_path: Path) -> None:
    code = "import prlhf.core.users, sys; print(prlhf.core.users.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_file()
