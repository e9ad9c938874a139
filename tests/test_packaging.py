"""The files around the code: they agree with each other, and the README's lines do what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import mrcnn_edu
from mrcnn_edu import cli, presets
from mrcnn_edu.data import shapes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout")

CONDA_NAMES = {"torch": "pytorch"}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text()


def requirements(project, *extras):
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# Dependencies
# ---------------------------------------------------------------------------------------------------------------------


def test_dependencies_have_lower_bounds_and_no_pins(project):
    for requirement in requirements(project, "book", "dev", "fast"):
        operators = [specifier.operator for specifier in requirement.specifier]
        assert ">=" in operators, f"{requirement} has no lower bound"
        assert "==" not in operators and "~=" not in operators, f"{requirement} is pinned"


def test_environment_yml_is_in_step_with_pyproject(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [Requirement(entry) for entry in environment["dependencies"] if isinstance(entry, str) and entry != "pip"]
    conda = {requirement.name: requirement.specifier for requirement in conda}
    assert str(conda.pop("python")) == project["requires-python"].replace(" ", "")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert conda.pop("setuptools") == Requirement(build[0]).specifier
    wanted = {CONDA_NAMES.get(r.name, r.name): r.specifier for r in requirements(project, "book")}
    assert conda == wanted
    assert {"pip": ["--editable ."]} in environment["dependencies"]


def test_constraints_pin_every_dependency_within_its_range(project):
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert [specifier.operator for specifier in pin.specifier] == ["=="], line
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for requirement in requirements(project, "book", "dev", "fast"):
        found = pins.get(canonicalize_name(requirement.name))
        assert found, f"constraints.txt does not pin {requirement.name}"
        for pin in found:
            version = Version(next(iter(pin.specifier)).version)
            assert version in requirement.specifier, f"{pin} is outside {requirement}"


def test_pre_commit_runs_the_tested_ruff_and_nbstripout():
    constraints = (ROOT / "constraints.txt").read_text()
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        name = repo["repo"].rsplit("/", 1)[-1].replace("-pre-commit", "")
        assert f"\n{name}=={repo['rev'].lstrip('v')}\n" in constraints


def test_continuous_integration_covers_the_supported_pythons(project):
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == project["requires-python"]
    assert versions == [f"3.{minor}" for minor in range(10, 10 + len(versions))]


# ---------------------------------------------------------------------------------------------------------------------
# The package
# ---------------------------------------------------------------------------------------------------------------------


def test_every_exported_name_is_there():
    assert sorted(mrcnn_edu.__all__) == mrcnn_edu.__all__
    assert sorted(name for names in mrcnn_edu._HOME.values() for name in names) == mrcnn_edu.__all__
    for name in mrcnn_edu.__all__:
        assert getattr(mrcnn_edu, name).__name__ == name
        assert name in dir(mrcnn_edu)
    with pytest.raises(AttributeError, match="no attribute 'predcit'"):
        mrcnn_edu.predcit  # noqa: B018


def test_importing_the_package_or_its_command_does_not_import_torch():
    code = "import sys, mrcnn_edu, mrcnn_edu.cli, mrcnn_edu.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_versions_and_licences_agree(project):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mrcnn_edu.__version__
    assert citation["license"] == project["license"] == "MIT"
    for file in project["license-files"]:
        assert (ROOT / file).stat().st_size > 0
    assert (ROOT / "mrcnn_edu/py.typed").exists()
    assert project["scripts"] == {"mrcnn-edu": "mrcnn_edu.cli:main"}


# ---------------------------------------------------------------------------------------------------------------------
# README and book
# ---------------------------------------------------------------------------------------------------------------------


def test_the_readmes_python_runs(readme, tmp_path, monkeypatch):
    """As it stands, on a folder as it describes it; only the preset is shortened."""
    code = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(code) == 1
    assert len([line for line in code[0].splitlines() if line.strip()]) <= 10
    full = presets.PRESETS["maskrcnn_shapes"]
    short = replace(
        full,
        data=replace(full.data, workers=0),
        train=replace(full.train, iterations=2, warmup_iterations=0, batch_size=2),
    )
    monkeypatch.setitem(presets.PRESETS, "maskrcnn_shapes", short)
    monkeypatch.chdir(tmp_path)
    shapes.write("photos", train=4, val=2)
    exec(code[0], {})
    assert (tmp_path / "found.png").stat().st_size > 0
    assert (tmp_path / "runs/photos/weights.safetensors").exists()


def test_the_readmes_commands_are_understood(readme, monkeypatch, tmp_path):
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", readme, re.S))
    commands = re.findall(r"^(?:mrcnn-edu|torchrun .*-m mrcnn_edu) ([^#\n]*)", shell, re.M)
    assert {command.split()[0] for command in commands} == {"train", "evaluate", "predict", "check", "reproduce"}
    for command in commands:
        assert cli.parse(command.replace('"', "").split()) is not None
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"\bmake ([a-z]+)", readme):
        assert target in targets
    assert "make test" in readme and re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.M)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "book/index.md", "book/setup.md"])
def test_links_within_the_repository_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) + re.findall(r"```\{figure\} (\S+)", text):
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_the_files_the_readme_names_exist(readme):
    for name in re.findall(r"`((?:mrcnn_edu|book|tests)/[\w/.]*)`", readme):
        assert (ROOT / name).exists(), name
