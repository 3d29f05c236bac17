"""Every script can be started: with the installation, from an unpacked archive without it, and by a
Python that lacks everything."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
MODULES = sorted(file.name for file in ROOT.glob("*.py"))


def package_files():
    """The Python files in folders, by path from the project's folder."""
    folders = (ROOT / name.replace(".", "/") for name in SETUPTOOLS["packages"])
    return sorted(file.relative_to(ROOT) for folder in folders for file in folder.glob("*.py"))


SCRIPTS = [
    name for name in (*MODULES, *map(str, package_files())) if 'if __name__ == "__main__":' in (ROOT / name).read_text()
]


def test_the_installation_has_every_module_and_package():
    only_scripts = {"evaluate.py", "eval_compare.py"}  # the first would hide a library of that name
    assert {f"{name}.py" for name in SETUPTOOLS["py-modules"]} == set(MODULES) - only_scripts
    folders = {file.parent for file in ROOT.glob("[a-z]*/*.py")} - {ROOT / "tests", ROOT / "docs"}
    files = (file.relative_to(ROOT) for folder in folders for file in folder.rglob("*.py"))
    assert set(SETUPTOOLS["packages"]) == {".".join(file.parent.parts) for file in files}


# Runs scripts with --help, in one process so that they import PyTorch once. Prints the folder that the project was
# imported from.
SHOW_HELP = """
import runpy, sys
import runtime
print(runtime.__path__[0])
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (script, end.code)
"""


def without_installation(*command, project, cwd):
    """Runs Python with the installed libraries and the folder `project` on PYTHONPATH, but without
    this project's installation.

    -S leaves out the .pth files of site-packages, one of which is the editable installation.
    """
    libraries = sysconfig.get_path("purelib")
    environment = os.environ | {"PYTHONPATH": f"{project}:{libraries}"}
    command = [sys.executable, "-S", *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A copy of the modules and packages, as an unpacked archive has them."""
    folder = tmp_path_factory.mktemp("archive")
    for name in MODULES:
        shutil.copy(ROOT / name, folder)
    for package in {name.partition(".")[0] for name in SETUPTOOLS["packages"]}:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_every_script_of_an_unpacked_archive_shows_its_help(archive, tmp_path):
    """From another folder, with only PYTHONPATH set."""
    scripts = [archive / name for name in SCRIPTS]
    done = without_installation("-c", SHOW_HELP, *scripts, project=archive, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *lines = done.stdout.splitlines()
    assert first == str(archive / "runtime")
    shown = [match[1] for line in lines if (match := re.match(r"usage: (\S+)", line))]
    assert shown == [script.name for script in scripts]


FOR_USERS = [
    name for name in SCRIPTS if not name.startswith(("benchmarks/", "quickstart/")) and "export_native" not in name
]


@pytest.mark.parametrize("script", FOR_USERS)
def test_a_script_reads_its_arguments_before_it_imports_torch(script):
    """--help and mistyped options take no seconds."""
    code = f"{SHOW_HELP}\nassert not {{'torch', 'transformers', 'datasets'}} & sys.modules.keys(), list(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-300:]
    assert "usage:" in done.stdout


def test_a_script_in_a_folder_of_an_archive_can_be_run_by_its_path(archive, tmp_path):
    script = archive / "layer_selection" / "write_configs.py"
    done = without_installation(script, "--help", project=archive, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("usage: write_configs.py")


def test_cluster_jobs_find_the_project_without_its_installation(tmp_path):
    """In any virtual environment, from any folder."""
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    find = "import importlib.util; print(importlib.util.find_spec('runtime').origin)"
    command = f'source "{ROOT}/launch_common.sh"; cd /; python -S -c "{find}"'
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "VENV": str(tmp_path / "venv")}
    done = subprocess.run(["bash", "-euc", command], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "runtime" / "__init__.py"), done.stderr


# Runs in vLLM's environment, which lacks what training needs.
ELSEWHERE = {"benchmarks/serve.py"}


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - ELSEWHERE))
def test_a_script_outside_the_environment_says_how_to_enter_it(script):
    """In a Python without site-packages. Scripts in folders find the project by PYTHONPATH, or by
    its installation."""
    environment = {} if "/" not in script else {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    expected = r"ModuleNotFoundError: .* has no torch, .*datasets.*; run 'source setup.sh' first, .*"
    assert re.fullmatch(expected, done.stderr.splitlines()[-1])
