"""The package as users get it: names, one import of each module, a wheel that works anywhere."""

import inspect
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from triton.runtime.jit import JITFunction

import fastlm.kernels

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_exists_and_is_documented():
    assert sorted(fastlm.kernels.__all__) == sorted(set(fastlm.kernels.__all__))
    for name in fastlm.kernels.__all__:
        thing = getattr(fastlm.kernels, name)
        assert name == "OPS" or thing.__doc__, f"{name} has no docstring"


def test_sources_found_by_indentation_are_those_of_inspect():
    """Triton compiles what the quick search found while the package was imported."""
    kernels = [
        thing
        for module in list(sys.modules.values())
        if module.__name__.startswith("fastlm.kernels")
        for thing in vars(module).values()
        if isinstance(thing, JITFunction)
    ]
    assert len(kernels) > 100
    for kernel in kernels:
        assert kernel.raw_src == inspect.getsourcelines(kernel.fn)[0], kernel
    assert inspect.getblock.__module__ == "inspect"


def test_folders_are_imported_under_one_name_only():
    """The repository root on sys.path would import ``kernels`` a second time, ops and all."""
    for name in ("kernels", "lm", "bench"):
        module = sys.modules.get(name)
        assert module is None or ROOT not in Path(module.__file__ or "/").parents


def test_no_file_knows_the_tests():
    for folder in ("kernels", "lm", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "import pytest" not in text or path.name.startswith(("bench_", "conftest")), path
            if folder == "kernels":
                assert "fastlm.lm" not in text, f"{path}: kernels import nothing of lm"
                assert "fastlm.bench" not in text, f"{path}: kernels import nothing of bench"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the repository."""
    out = tmp_path_factory.mktemp("wheel")
    tracked = ("pyproject.toml", "README.md", "LICENSE", "kernels", "lm", "bench", "src")
    for name in tracked:
        source, copy = ROOT / name, out / "source" / name
        if source.is_dir():
            shutil.copytree(
                source, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(out), str(out / "source")], check=True, timeout=300)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("kernels", "lm", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"fastlm/{path.relative_to(ROOT)}" in packed
    assert "fastlm/py.typed" in packed


def test_the_wheel_works_from_any_directory(wheel, tmp_path):
    """In an environment of its own, from the root, its parent and ``/``."""
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    here = Path(torch.__file__).parent.parent  # torch and triton from this environment
    code = (
        "import sys; sys.path.append(sys.argv[1]);"
        "import torch, fastlm.kernels as k, fastlm.lm, fastlm.bench;"
        "print(k.__file__, k.layer_norm(torch.randn(2, 3), (3,)).shape)"
    )
    python = str(tmp_path / "env" / "bin" / "python")
    for cwd in (ROOT, ROOT.parent, Path("/")):
        run = subprocess.run(
            [python, "-c", code, str(here)],
            cwd=cwd,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert str(site) in run.stdout, run.stderr
