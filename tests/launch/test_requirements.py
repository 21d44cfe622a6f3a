"""requirements.txt: every import is declared, every pin has its reason."""

import ast
import importlib.metadata
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "launch" / "requirements").glob("*.txt"))
# Imported where a flag asks for them, and installed by hand.
OPTIONAL = [
    ROOT / "launch" / "requirements" / f"{name}.txt" for name in ("beam", "wandb")
]
PIN = re.compile(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)")

# Needed, and imported by nobody: what it is needed by.
NOT_IMPORTED = {
    "jaxlib": "jax",
    "importlib-resources": "tensorflow-datasets",
    "pytest-xdist": "launch/test",
    "ruff": "launch/test",
    "dask": "apache-beam",
    "distributed": "apache-beam",
    "aiohttp": "fsspec",
}
# Module -> distribution, where their names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
}
# Libraries of the peers' environment.
PEERS = {"torch", "diffusers", "transformers"}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def pins(path: pathlib.Path) -> dict[str, tuple[str, str]]:
    """Returns name -> (version, comment) of a requirements file."""
    found = {}
    for line in path.read_text().splitlines():
        requirement, _, comment = line.partition("#")
        if requirement.strip() and not requirement.startswith("-"):
            pin = PIN.fullmatch(requirement.strip())
            assert pin, f"{path.name}: {line!r} is not pinned with =="
            found[canonical(pin[1])] = (pin[2], comment.strip())
    return found


def imported_packages() -> set[str]:
    """Returns the distributions whose modules the tree imports."""
    modules = set()
    for folder in ("sora_jax", "configs", "experiments", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if ROOT / "tests" / "oracle" in path.parents:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    modules.add(node.module)
    ours = {"sora_jax", "configs", "experiments", "tests", "launch"}
    tops = {module.split(".")[0] for module in modules}
    tops -= ours | PEERS | set(sys.stdlib_module_names)
    return {canonical(DISTRIBUTIONS.get(top, top)) for top in tops}


def test_every_import_is_declared_and_every_requirement_imported():
    files = [ROOT / "requirements.txt", *OPTIONAL]
    declared = {name for path in files for name in pins(path)} - set(NOT_IMPORTED)
    assert imported_packages() == declared


def test_every_direct_pin_has_its_reason():
    without = [
        name for name, (_, why) in pins(ROOT / "requirements.txt").items() if not why
    ]
    assert not without


def test_what_is_installed_is_what_is_pinned():
    """Otherwise the tests would say something about other versions."""
    wanted = pins(ROOT / "requirements.txt") | pins(
        ROOT / "launch" / "requirements" / "constraints.txt"
    )
    installed = {
        canonical(d.metadata["Name"]): d.version
        for d in importlib.metadata.distributions()
    }
    other = {
        name: (version, installed.get(name))
        for name, (version, _) in wanted.items()
        if installed.get(name) != version
    }
    assert not other


def test_every_accelerator_has_the_same_jax():
    version = pins(ROOT / "requirements.txt")["jax"][0]
    files = [path for path in FILES if path.stem.startswith(("cuda", "tpu"))]
    assert len(files) == 3
    assert {pins(path)["jax"][0] for path in files} == {version}


def test_beam_has_what_it_allows_of_ours():
    """The libraries that write the shards are the same; older ones say why."""
    ours = pins(ROOT / "requirements.txt")
    beams = pins(ROOT / "launch" / "requirements" / "beam.txt")
    same = {name for name in beams if beams[name][0] == ours.get(name, ("",))[0]}
    assert same >= {"array-record", "av", "fsspec", "tensorflow-datasets"}
    others = {name: why for name, (_, why) in beams.items() if name not in same}
    assert all(others.values())
    assert {name for name in others if name in ours} == {
        name for name, why in others.items() if why.startswith("Beam takes no")
    }


def test_programs_are_compiled_by_the_libtpu_that_runs_them():
    folder = ROOT / "launch" / "requirements"
    tpu, peers = (
        re.findall(r"(?m)^libtpu==[\w.]+", (folder / f"{name}.txt").read_text())
        for name in ("tpu", "peers")
    )
    assert len(tpu) == 1 and tpu == peers


def test_requirements_and_constraints_do_not_overlap():
    constraints = pins(ROOT / "launch" / "requirements" / "constraints.txt")
    assert not set(constraints) & set(pins(ROOT / "requirements.txt"))
