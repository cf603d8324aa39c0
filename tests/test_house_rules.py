"""The rules that keep the code liveable, checked on the source: who imports what, sizes, names, a true README.

Each test lists every violation in its message. The rules themselves are in support/house_rules.py. That what ships has
docstrings is checked by ruff (rules D of pyproject.toml).
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from support import house_rules as rules
from support.house import ROOT, House

HOUSE = House()


def check(violations: list[str]) -> None:
    """Fail with one line for each violation."""
    assert not violations, "\n".join(["", *violations])


def test_imports_of_the_runtime_point_to_lower_floors() -> None:
    check(rules.upward_arrows(HOUSE))


def test_the_builder_uses_the_runtimes_lower_floors_and_the_runtime_nothing_of_the_builder() -> None:
    check(rules.arrows_between_packages(HOUSE))


def test_no_modules_import_each_other() -> None:
    check(rules.import_circles(HOUSE))


def test_heavy_packages_are_imported_in_their_rooms_only() -> None:
    check(rules.packages_out_of_place(HOUSE))


def test_an_executor_is_chosen_in_one_place() -> None:
    check(rules.engines_known_by_name(HOUSE))


def test_what_an_executor_can_do_is_declared_not_probed() -> None:
    check(rules.probes(HOUSE))


def test_no_other_environment_variables_are_read() -> None:
    check(rules.environment_variables(HOUSE))


def test_includes_of_the_plugins_point_inward() -> None:
    check(rules.native_arrows(ROOT))


def test_files_and_functions_stay_readable() -> None:
    check(rules.sizes(ROOT))


def test_no_two_public_classes_share_a_name() -> None:
    check(rules.repeated_class_names(HOUSE))


def test_the_readme_tree_names_folders_that_exist() -> None:
    check(rules.untrue_readme_folders(ROOT))


PLANTED = {
    "python/chunkkv/__init__.py": '"""The package."""\n',
    "python/chunkkv/errors.py": '"""E."""\nfrom chunkkv.session import run\n',
    "python/chunkkv/session.py": '"""S."""\nfrom . import native\nfrom .executors import tensorrt, load\n',
    "python/chunkkv/native/__init__.py": '"""N."""\nfrom ..engine import fields\n',
    "python/chunkkv/engine/__init__.py": '"""E."""\n',
    "python/chunkkv/engine/fields.py": (
        '"""F."""\nimport os, typing\nif typing.TYPE_CHECKING:\n    from chunkkv.errors import Wrong\n'
        'KEY = "HOME"\nos.environ[KEY], os.getenv("CHUNKKV_LIB"), "USER" in os.environ\n'
    ),
    "python/chunkkv/executors/__init__.py": '"""X."""\n',
    "python/chunkkv/executors/load.py": '"""L."""\ndef load():\n    """L."""\n    from .tensorrt import run\n',
    "python/chunkkv/executors/tensorrt.py": '"""T."""\nimport importlib\nimportlib.import_module("onnxruntime")\n',
    "python/chunkkv/attic.py": '"""A."""\nhasattr(self._executor, "run"), getattr(a, "b", 0), isinstance(x, Decoder)\n',
    "python/chunkkv/evaluation/__init__.py": "import chunkkv_builder.plan\nclass Plan: ...\n",
    "python/chunkkv/evaluation/report.py": '"""R."""\nimport matplotlib.pyplot\n',
    "builder/chunkkv_builder/__init__.py": '"""B."""\n',
    "builder/chunkkv_builder/plan.py": '"""P."""\nimport chunkkv.session, chunkkv.engine\nclass Plan:\n    """P."""\n',
    "plugins/api.h": '#include "chunkkv/layout.h"\n',
    "plugins/emulator/simt.h": "\n" * 401,
    "plugins/include/chunkkv/layout.h": "",
    "plugins/kernels/score.cu": '#include "api.h"\n#include <NvInfer.h>\n#include "simt.h"\n// getenv("PATH")\n',
    "tests/test_x.py": "def test_x() -> None:\n" + "    x = 1\n" * 60,
    "README.md": "    plugins/        native\n      kernels/      the op\n      cellar/       gone\n",
}
FOUND = """
chunkkv.attic lies in no room of support.house_rules.FLOORS
chunkkv.errors imports chunkkv.session
chunkkv.native imports chunkkv.engine.fields: native stands alone on the ground floor
chunkkv.session imports chunkkv.native: native stands alone on the ground floor
chunkkv.evaluation imports chunkkv_builder.plan
chunkkv_builder.plan imports chunkkv.session
chunkkv.engine.fields ⇄ chunkkv.errors ⇄ chunkkv.native ⇄ chunkkv.session
chunkkv.evaluation.report imports matplotlib when it is imported; do it where it is used
chunkkv.executors.tensorrt imports onnxruntime
chunkkv.session imports chunkkv.executors.tensorrt
chunkkv.attic asks hasattr(self._executor, 'run')
chunkkv.attic asks isinstance(x, Decoder)
chunkkv.engine.fields reads the environment variable HOME
chunkkv.engine.fields reads the environment variable USER
score.cu reads the environment variable PATH
plugins/kernels/score.cu includes plugins/api.h
plugins/kernels/score.cu includes NvInfer.h
plugins/kernels/score.cu includes plugins/emulator/simt.h
tests/test_x.py: test_x has 60 lines
plugins/emulator/simt.h has 401 lines
Plan: chunkkv.evaluation, chunkkv_builder.plan
plugins/cellar/
"""


def test_every_rule_finds_what_breaks_it(tmp_path: Path) -> None:
    for name, text in PLANTED.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    house = House(tmp_path)
    found = [
        *rules.upward_arrows(house),
        *rules.arrows_between_packages(house),
        *rules.import_circles(house),
        *rules.packages_out_of_place(house),
        *rules.engines_known_by_name(house),
        *rules.probes(house),
        *rules.environment_variables(house),
        *rules.native_arrows(tmp_path),
        *rules.sizes(tmp_path),
        *rules.repeated_class_names(house),
        *rules.untrue_readme_folders(tmp_path),
    ]
    assert found == FOUND.split("\n")[1:-1]


PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"


def test_the_page_lists_the_floors() -> None:
    rows = re.findall(r"^\| (\d+) \| ((?:`\w+`(?:, )?)+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows]
    assert listed == [floor for floor in rules.FLOORS if floor != {"chunkkv"}]
    assert [int(number) for number, _ in rows] == [*range(len(rows), 0, -1)]


def test_the_picture_draws_the_floors_one_above_the_other() -> None:
    names = re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*>([^<]*)<', PICTURE.read_text(encoding="utf-8"))
    height = {name.strip(): float(y) for y, text in names for name in re.sub(r"(/|\.py)$", "", text).split("·")}
    floors = [sorted(height[room] for room in floor) for floor in rules.FLOORS if floor != {"chunkkv"}]
    assert all(upper[-1] < lower[0] for upper, lower in pairwise(floors))
