"""The rooms of the house: who may import whom, and that what is in the tree is in the wheel."""

import ast
import pathlib
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("manifests", "stages", "pipeline")
MAY_IMPORT = {
    "manifests": {"manifests"},
    "stages": {"manifests", "stages"},
    "pipeline": {"manifests", "stages", "pipeline"},
}
MANIFESTS_MAY_USE = {"numpy", "ml_dtypes", "pyarrow", "zstandard", "pydantic", "xxhash", "crc32c"}
FLOORS = (
    {"draws", "ranks", "rows"},
    {"prepare", "feed"},
    {"models"},
    {"sglang"},
    {"loss", "teacher", "rollout", "codec"},
    {"student", "extract"},
    {"align"},
    {"evaluate", "exchange", "generate"},
    {"train"},
    {"live"},
)
"""The rooms of stages/, the lowest floor first: a room imports lower floors only. Records that cross a boundary between
two rooms live in manifests/."""


def sources(room: str) -> list[pathlib.Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: pathlib.Path) -> set[str]:
    """Every module named by an import statement in the file, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write kdpipe.X.Y"
            found.add(node.module or "")
            if (node.module or "").startswith("kdpipe"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def stage_of(module: str) -> str:
    """kdpipe.stages.loss.fused -> loss"""
    return module.split(".")[2] if module.count(".") >= 2 else ""


def test_rooms_import_only_downwards() -> None:
    for room in ROOMS:
        for path in sources(room):
            for module in imports(path):
                parts = module.split(".")
                if parts[0] == "kdpipe" and len(parts) > 1:
                    assert parts[1] in MAY_IMPORT[room], f"{path} imports {module}"


def test_manifests_use_only_their_short_list() -> None:
    for path in sources("manifests"):
        for module in imports(path):
            head = module.split(".")[0]
            known = head == "kdpipe" or head in sys.stdlib_module_names or head in MANIFESTS_MAY_USE
            assert known, f"{path} imports {module}"


def floor_of(room: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"stages/{room} has no floor: give it one in FLOORS"
    return found[0]


def test_a_stage_imports_lower_floors_only() -> None:
    for path in sources("stages"):
        own = path.relative_to(ROOT / "stages").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module in imports(path):
            other = stage_of(module) if module.startswith("kdpipe.stages") else ""
            if other and other != own:
                assert floor_of(other) < floor_of(own), f"{path}: {own} imports {other}, which is no floor below"


def test_no_module_imports_in_a_circle() -> None:
    modules = {}
    for room in ROOMS:
        for path in sources(room):
            name = "kdpipe." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            modules[name.removesuffix(".__init__")] = path
    graph = {
        name: {module for module in imports(path) if module in modules and module != name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for module in graph[name]:
                visit(module, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_wheel_names_every_package_in_the_tree() -> None:
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {"kdpipe." + ".".join(path.parent.relative_to(ROOT).parts) for room in ROOMS for path in sources(room)}
    assert named == present


def test_manifests_load_without_torch() -> None:
    modules = ["kdpipe." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("manifests")]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
