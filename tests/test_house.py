"""The rooms of the house: imports go down only, no circles, the command line in its own room."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

LEVELS = (
    {"errors", "seeds"},
    {"artifacts"},
    {"nets", "data", "measures", "calibration"},
    {"models", "llm"},
    {"pipeline", "api", "export"},
    {"report"},
    {"cli"},
)
LEVEL = {f"rewardlib.{room}": level for level, rooms in enumerate(LEVELS) for room in rooms}
OUTSIDE = len(LEVELS)  # steps, studies, benchmarks and the other scripts


def read_sources():
    folders = ("rewardlib", "studies", "benchmarks")
    paths = [
        *ROOT.glob("*.py"),
        *(path for folder in folders for path in (ROOT / folder).rglob("*.py")),
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def module_of(file):
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module):
    return ".".join(module.split(".")[:2]) if module.startswith("rewardlib.") else module


def imports_of(source, modules):
    """Modules that the source imports anywhere; of `from a import b`, a.b if that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name their module in full"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from {name if name in modules else node.module for name in names}


def violations(sources):
    """Imports that go up or sideways, and scripts that import steps, as readable lines."""
    modules = {module_of(file) for file in sources}
    for file, source in sources.items():
        module, room = module_of(file), room_of(module_of(file))
        for name in imports_of(source, modules):
            other = room_of(name)
            if other == room or (name not in modules and name != "argparse"):
                continue
            if name == "argparse":
                allowed = not module.startswith("rewardlib.") or room == "rewardlib.cli"
            elif other == "rewardlib":  # the version and the table of public names
                allowed = True
            elif module.startswith("rewardlib"):
                allowed = LEVEL.get(other, OUTSIDE) < LEVEL[room]
            else:
                allowed = not (module.startswith("step") and name.startswith("step"))
            if not allowed:
                yield f"{file} imports {name}"


def circles(sources):
    """Modules that import each other, directly or through others."""
    modules = {module_of(file): source for file, source in sources.items()}
    below = {
        module: {*imports_of(source, modules)} & set(modules) for module, source in modules.items()
    }
    while free := {module for module, others in below.items() if not others - {module}}:
        below = {module: others - free for module, others in below.items() if module not in free}
    return sorted(below)


def test_imports_go_down_only():
    assert sorted(violations(read_sources())) == []


def test_no_module_imports_itself_through_others():
    assert circles(read_sources()) == []


def test_every_room_has_its_level():
    rooms = {room_of(module_of(file)) for file in read_sources() if file.startswith("rewardlib/")}
    assert rooms - {"rewardlib"} <= set(LEVEL)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("rewardlib/errors.py", "import rewardlib.artifacts"),
        ("rewardlib/data/splits.py", "from rewardlib.measures import ranking"),
        ("rewardlib/models/base.py", "from rewardlib.pipeline import run_record"),
        ("rewardlib/api.py", "from rewardlib.pipeline import baselines"),
        ("rewardlib/report/page.py", "import argparse"),
        ("rewardlib/nets/mlp.py", "import networks"),
        ("rewardlib/pipeline/leakage.py", "def check():\n    from rewardlib.cli import flags"),
        ("rewardlib/report/page.py", "from studies.interpretable import gating"),
        ("step6_eval_rms.py", "import step5_train_rms"),
    ],
)
def test_a_module_above_what_it_may_import_is_found(file, line):
    assert len([*violations({**read_sources(), file: line})]) == 1


def test_a_circle_is_found():
    sources = {
        "rewardlib/data/a.py": "from rewardlib.data import b",
        "rewardlib/data/b.py": "import rewardlib.data.a",
    }
    assert circles(sources) == ["rewardlib.data.a", "rewardlib.data.b"]


def test_only_the_table_of_public_names_is_lazy():
    lazy = [file for file, source in read_sources().items() if "\ndef __getattr__" in source]
    assert lazy == ["rewardlib/__init__.py"]


def test_scripts_are_in_the_root_and_modules_in_rooms():
    assert not [
        path
        for path in Path(ROOT / "rewardlib").rglob("*.py")
        if len(path.relative_to(ROOT).parts) > 3
    ]
