"""What users install: the wheel, the source archive, the lock files and the image."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("clients", "router_model", "service")
BASE = {"httpx", "httpx-aiohttp", "pydantic"}


def _run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built straight from the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(ROOT))
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def _checkout_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _locked(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, flags=re.MULTILINE)
    return {canonicalize_name(package): version for package, version in pins}


def _first(pattern: str, file: str) -> str:
    """The first group of the first match in a file of the checkout."""
    match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert match, f"{file}: no {pattern}"
    return match[1]


def _required(project: dict[str, Any], extras: set[str], groups: set[str]) -> list[Requirement]:
    """Everything that the base, the extras and the groups ask for, without persyn itself."""
    lines: list[str] = list(project["project"]["dependencies"])
    for extra in extras:
        lines += project["project"]["optional-dependencies"][extra]
    for group in groups:
        lines += [line for line in project["dependency-groups"][group] if isinstance(line, str)]
    wanted = [Requirement(line) for line in lines]
    return [requirement for requirement in wanted if requirement.name != "persyn"]


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    """Nothing but the three packages is installed, each complete and with its types."""
    names = {name for name in _names(wheel) if ".dist-info/" not in name}
    assert names == _checkout_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_wheel_carries_license_and_command(wheel: Path) -> None:
    """The wheel brings the licence text and the `persyn` command."""
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith("/METADATA")).removesuffix("METADATA")
        assert "Apache License" in archive.read(f"{info}licenses/LICENSE").decode()
        assert "persyn = service.cli:main" in archive.read(f"{info}entry_points.txt").decode()


def test_base_install_is_the_client_alone(wheel: Path) -> None:
    """Without an extra, neither torch nor a web framework is installed."""
    requirements = [Requirement(line) for line in _metadata(wheel).get_all("Requires-Dist", [])]
    assert {requirement.name for requirement in requirements if requirement.marker is None} == BASE


def test_metadata_names_the_extras(wheel: Path, project: dict[str, Any]) -> None:
    """The wheel offers the documented extras, and says Python and licence."""
    metadata = _metadata(wheel)
    assert {"serve", "train"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["Requires-Python"] == project["project"]["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """From the source archive alone comes a wheel with the same files."""
    # Without --wheel and --sdist, the wheel is built from the unpacked source archive.
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        top_level = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= top_level
    assert _names(next(tmp_path.glob("*.whl"))) == _names(wheel)


def test_client_works_with_the_base_dependencies_alone(wheel: Path, tmp_path: Path) -> None:
    """The Python client imports where nothing of the extras is installed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in set(sys.argv[1].split(",")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[2])
import clients.persyn
print(clients.persyn.__file__)
"""
    absent = "torch,transformers,numpy,fastapi,starlette,uvicorn,redis,yaml,structlog,typer,rich,pyarrow"
    where = _run(sys.executable, "-I", "-c", program, absent, str(tmp_path), cwd=tmp_path)
    assert Path(where.strip()) == tmp_path / "clients" / "persyn.py"


@pytest.mark.parametrize("module", ["service.cli", "service.app"])
def test_importing_the_service_loads_no_offline_code(module: str) -> None:
    """The command and the app load offline stages only when one is called."""
    program = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(_run(sys.executable, "-c", program)))
    offline = ("router_model.pipeline", "router_model.learnability", "router_model.quality")
    assert not [name for name in loaded if name.startswith(offline)]


def test_the_command_starts_without_torch() -> None:
    """`persyn --help` does not wait for torch to load."""
    loaded = _run(sys.executable, "-c", "import sys, service.cli; print('torch' in sys.modules)")
    assert loaded.strip() == "False"


@pytest.mark.parametrize(
    ("lock", "extras", "groups"),
    [
        ("requirements.lock", {"serve", "train"}, {"build", "dev", "demo"}),
        ("requirements-serve.lock", {"serve"}, {"build"}),
    ],
)
def test_lock_satisfies_the_project(
    project: dict[str, Any], lock: str, extras: set[str], groups: set[str]
) -> None:
    """Each lock holds a fitting version of all that `pyproject.toml` asks for, but not torch."""
    pins = _locked(lock)
    assert "torch" not in pins
    for requirement in _required(project, extras, groups):
        name = canonicalize_name(requirement.name)
        if name != "torch":
            assert name in pins, f"{lock} lacks {name}: run `make lock`"
            assert requirement.specifier.contains(pins[name]), f"{lock}: {name} {pins[name]}: run `make lock`"


def test_image_has_the_versions_that_were_tested() -> None:
    """The image's lock is a part of the development lock."""
    assert _locked("requirements-serve.lock").items() <= _locked("requirements.lock").items()


def test_model_lock_is_the_models_group(project: dict[str, Any]) -> None:
    """The weights for tests and demo come without the dependencies that their packages declare."""
    wanted = {
        Requirement(line).name: line.partition("==")[2] for line in project["dependency-groups"]["models"]
    }
    assert _locked("requirements-models.lock") == wanted


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-serve.lock", "requirements-models.lock"])
def test_locks_pin_by_hash_and_name_no_host(lock: str) -> None:
    """Each locked package has a hash, and where it comes from is left to the machine."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    for block in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block.splitlines()[0]
    assert "://" not in text
    assert not re.search(r"^\s*-", text.replace("    --hash", ""), flags=re.MULTILINE)


def test_torch_of_setup_fits_the_project(project: dict[str, Any]) -> None:
    """Makefile and image install one torch, which the extra `serve` admits."""
    (torch,) = [r for r in _required(project, {"serve"}, set()) if r.name == "torch"]
    versions = {
        _first(pattern, file)
        for file, pattern in [
            ("Makefile", r"^TORCH \?= torch==(\S+)$"),
            ("Dockerfile", r"^ARG TORCH=torch==(\S+)$"),
            ("deploy/compose.yaml", r"TORCH:-torch==(\S+)\}"),
        ]
    }
    assert len(versions) == 1
    assert torch.specifier.contains(versions.pop())


def test_help_lists_every_task() -> None:
    """`make help` has a line for each task of the Makefile, and only for tasks that exist."""
    tasks = set(_first(r"^\.PHONY: (.*)$", "Makefile").split()) - {"FORCE"}
    make = shutil.which("make")
    assert make is not None
    assert (
        set(re.findall(r"^  make ([\w-]+)", _run(make, "--no-print-directory", "help"), flags=re.MULTILINE))
        == tasks
    )


def test_dockerfile_fits_the_project(project: dict[str, Any]) -> None:
    """The image names extras, files and settings that exist, starts `persyn`, and is not root."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r'"\.\[(\w+)\]"', text)) <= set(project["project"]["optional-dependencies"])
    assert re.findall(r"^USER (\d+)", text, flags=re.MULTILINE) not in ([], ["0"])
    assert _first(r"^ENTRYPOINT (.*)$", "Dockerfile") == '["persyn"]'
    settings = {f"PERSYN_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"\b(PERSYN_\w+)=", text)) <= settings
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore


def test_compose_fits_the_service() -> None:
    """Compose requires the API keys, names settings that exist, waits for Redis, and checks both services."""
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    environment = services["persyn"]["environment"]
    assert set(environment) <= {f"PERSYN_{name.upper()}" for name in Settings.model_fields}
    assert environment["PERSYN_API_KEYS"].startswith("${PERSYN_API_KEYS:?")
    assert services["persyn"]["depends_on"]["redis"]["condition"] == "service_healthy"
    assert all("healthcheck" in service and "mem_limit" in service for service in services.values())
    Settings(host="0.0.0.0", api_keys="k", redis_url=environment["PERSYN_REDIS_URL"])
    grace_s = int(services["persyn"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > Settings.model_fields["shutdown_grace_s"].default
