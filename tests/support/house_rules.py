"""The house rules: each is a function that returns one line for each violation in a checkout, none where it is kept."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from support.house import House, Module, circles, includes, native_sources, tree_folders

GROUND = {
    "cache_layout",
    "cache_scales",
    "command_line",
    "errors",
    "files",
    "findings",
    "limits",
    "logs",
    "native_files",
    "profiling",
    "reference",
    "reference_layers",
    "reference_scores",
    "requests",
    "rereading",
    "results",
    "sampling",
    "settings",
    "stop_text",
}
# From the roof to the ground: a room imports from the floors below its own. On the ground floor, which holds single
# modules, they may import each other. The package itself only names what users import.
FLOORS = (
    {"cli"},
    {"evaluation", "profile", "serve", "triton"},
    {"batching", "conversation"},
    {"chunkkv"},
    {"session"},
    {"generation"},
    {"answer", "contexts", "inspection"},
    {"executors"},
    {"gpu", "native", "text"},
    {"engine"},
    GROUND,
)
STANDS_ALONE = "native"  # the op for users of arrays; the runtime does not need it, and it needs no engine directory
BUILDER_USES = GROUND | {"engine", "gpu", "text"}
ENGINES = ("onnxruntime", "tensorrt", "tensorrt_llm")
# Which rooms may import a package. An empty tuple: none.
ONLY_IN = {
    "cuda": ("chunkkv.gpu",),
    "google": ("chunkkv.triton.repository",),
    "kvpress": (),
    "lm_eval": ("chunkkv.cli.lm_eval", "chunkkv.evaluation.lm_eval"),
    "matplotlib": ("chunkkv.evaluation.report", "chunkkv.profile.picture"),
    "nvtx": ("chunkkv.profile", "chunkkv.profiling"),
    "onnxruntime": ("chunkkv.executors.onnxruntime", "chunkkv_builder.backends.calibration"),
    "pickle": (),
    "prometheus_client": ("chunkkv.serve",),
    "psutil": ("chunkkv.triton.server", "chunkkv.batching", "chunkkv.executors.cpus"),
    "safetensors": (),
    "starlette": ("chunkkv.serve",),
    "tensorrt": ("chunkkv.gpu", "chunkkv_builder.backends"),
    "tensorrt_llm": ("chunkkv.executors.tensorrt_llm", "chunkkv_builder.backends.tensorrt_llm"),
    "tensorrt_rtx": ("chunkkv.gpu", "chunkkv_builder.backends"),
    "torch": (),
    "transformers": (),
    "triton_python_backend_utils": ("chunkkv.triton.models",),
    "tritonclient": ("chunkkv.triton",),
    "uvicorn": ("chunkkv.serve",),
}
LAZY = {"matplotlib", "nvtx"}  # extras of commands that work without them
NATIVE_FLOORS = {"tensorrt": 3, "": 2, "kernels": 1, "include": 0}  # "": what lies in plugins/ itself, the C ABI
# The first is ours. The second is NVIDIA's: a profiler sets it in the processes that it starts. The third is ONNX
# Runtime's, and is set before that is imported.
ENVIRONMENT = {"CHUNKKV_LIB", "NVTX_INJECTION64_PATH", "ORT_DISABLE_TELEMETRY"}
FIXED_BY_OTHERS = {"TritonPythonModel"}  # class names that another program asks for
_READS_ENVIRONMENT = re.compile(r"environ\.(get|pop|setdefault)$|\bgetenv$")
_CONTRACT = re.compile(r"(executor|decoder|prefiller|(?<!_)backend)\w*(\(\))?$", flags=re.IGNORECASE)
_CONTRACT_TYPE = re.compile(r"\b\w*(Executor|Decoder|Prefiller|KVCache)\b")


def room(name: str) -> str:
    """Return the room of the runtime's module `name`: "engine" for chunkkv.engine.fields."""
    if name == "chunkkv.__main__":  # runs the commands, as the script chunkkv does
        return "cli"
    return name.split(".")[1] if "." in name else name


def upward_arrows(house: House) -> list[str]:
    """Return imports inside the runtime that do not point to a lower floor."""
    floor = {each: number for number, rooms in enumerate(FLOORS) for each in rooms}
    homeless = [name for name in house.modules if name.startswith("chunkkv.") and room(name) not in floor]
    wrong = []
    for module, _, target in house.arrows():
        if not module.within("chunkkv") or not target.startswith("chunkkv."):
            continue
        start, end = room(module.name), room(target)
        if start == end or start not in floor or end not in floor:
            continue
        inside_ground = start in GROUND and end in GROUND
        if end == STANDS_ALONE or (start == STANDS_ALONE and end not in GROUND):
            wrong.append(f"{module.name} imports {target}: {STANDS_ALONE} stands alone on the ground floor")
        elif floor[start] >= floor[end] and not inside_ground:
            wrong.append(f"{module.name} imports {target}")
    return [*(f"{name} lies in no room of support.house_rules.FLOORS" for name in homeless), *wrong]


def arrows_between_packages(house: House) -> list[str]:
    """Return imports of the builder by the runtime, and those of the runtime that the builder may not use."""
    wrong = []
    for module, statement, target in house.arrows():
        to_runtime = target.split(".", maxsplit=1)[0] == "chunkkv"
        if module.within("chunkkv_builder") and to_runtime:
            allowed = room(target) in BUILDER_USES or statement.target in {"chunkkv", "chunkkv.__version__"}
        else:
            allowed = to_runtime or module.within("chunkkv_builder")
        if not allowed:
            wrong.append(f"{module.name} imports {statement.target}")
    return wrong


def import_circles(house: House) -> list[str]:
    """Return the groups of modules that import each other; imports for type checkers and inside functions count."""
    edges: dict[str, set[str]] = defaultdict(set)
    for module, _, target in house.arrows():
        edges[module.name].add(target)
    return [" ⇄ ".join(group) for group in circles(edges)]


def packages_out_of_place(house: House) -> list[str]:
    """Return imports of engines' runtimes and other heavy packages outside the rooms that are for them."""
    wrong = []
    for module in house.modules.values():
        for statement in module.imports:
            rooms = ONLY_IN.get(statement.package)
            if rooms is not None and not module.within(*rooms):
                wrong.append(f"{module.name} imports {statement.package}")
            elif statement.package in LAZY and not statement.lazy:
                wrong.append(f"{module.name} imports {statement.package} when it is imported; do it where it is used")
    return sorted(set(wrong))


def engines_known_by_name(house: House) -> list[str]:
    """Return imports of one engine's executor from outside its folder; `executors.load` alone chooses one."""
    wrong = []
    for module, _, target in house.arrows():
        for engine in ENGINES:
            home = f"chunkkv.executors.{engine}"
            if house.modules[target].within(home) and not module.within(home, "chunkkv.executors.load"):
                wrong.append(f"{module.name} imports {target}")
    return wrong


def probes(house: House) -> list[str]:
    """Return questions about what an executor, decoder or prefiller has or is: they declare it."""
    wrong = []
    for module in house.modules.values():
        for node in module.nodes:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or len(node.args) < 2:
                continue
            subject = ast.unparse(node.args[0])
            has_default = node.func.id == "getattr" and len(node.args) == 3
            is_contract = _CONTRACT.search(subject) or _CONTRACT_TYPE.search(ast.unparse(node.args[1]))
            if is_contract and (has_default or node.func.id in {"hasattr", "isinstance"}):
                wrong.append(f"{module.name} asks {ast.unparse(node)}")
    return wrong


def environment_variables(house: House) -> list[str]:
    """Return reads of environment variables other than those in ENVIRONMENT, in Python and in C++."""
    constants = {name: value for module in house.modules.values() for name, value in _string_constants(module)}
    wrong = []
    for module in house.modules.values():
        for key in _environment_keys(module):
            name = key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key).split(".")[-1])
            if name not in ENVIRONMENT:
                wrong.append(f"{module.name} reads the environment variable {name or ast.unparse(key)}")
    for path in native_sources(house.root):
        names = re.findall(r'getenv\s*\(\s*"?(\w*)', path.read_text(encoding="utf-8"))
        wrong += [f"{path.name} reads the environment variable {name}" for name in names if name not in ENVIRONMENT]
    return wrong


def _string_constants(module: Module) -> Iterator[tuple[str, str]]:
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((ast.unparse(target), node.value.value) for target in node.targets)


def _environment_keys(module: Module) -> Iterator[ast.expr]:
    for node in module.nodes:
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            yield node.slice
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
            yield node.left
        elif isinstance(node, ast.Call) and _READS_ENVIRONMENT.search(ast.unparse(node.func)):
            yield node.args[0]


def native_arrows(root: Path) -> list[str]:
    """Return includes in plugins/ that point outward, and those of NvInfer* or the emulator in the wrong places."""
    plugins = root / "plugins"
    wrong = []
    for path in native_sources(root):
        start = _native_room(path, plugins)
        for name in includes(path):
            if name.startswith("NvInfer") and start != "tensorrt":
                wrong.append(f"{path.relative_to(root)} includes {name}")
            places = (path.parent, plugins, plugins / "include", plugins / "kernels", plugins / "emulator")
            target = next((place / name for place in places if (place / name).is_file()), None)
            if target is not None and not _points_inward(start, _native_room(target, plugins), path.name):
                wrong.append(f"{path.relative_to(root)} includes {target.relative_to(root)}")
    return wrong


def _native_room(path: Path, plugins: Path) -> str:
    parts = path.relative_to(plugins).parts
    return parts[0] if len(parts) > 1 else ""


def _points_inward(start: str, end: str, file: str) -> bool:
    if "emulator" in (start, end):  # it stands for the CUDA runtime: kernels see it through dev.h alone
        return start == end or (start == "kernels" and file == "dev.h")
    return NATIVE_FLOORS[start] >= NATIVE_FLOORS[end]


def sizes(root: Path) -> list[str]:
    """Return files of more than 400 lines and functions of 60 or more."""
    wrong = []
    folders = ("python", "builder", "tests", "benchmarks", "examples")
    python = [path for name in folders for path in sorted((root / name).rglob("*.py"))]
    native = [*native_sources(root), *(p for p in (root / "tests").rglob("*") if p.suffix in {".h", ".cc", ".cu"})]
    for path in [*python, *native]:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 400:
            wrong.append(f"{path.relative_to(root)} has {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno
                if length >= 60:
                    wrong.append(f"{path.relative_to(root)}: {node.name} has {length} lines")
    return wrong


def repeated_class_names(house: House) -> list[str]:
    """Return public class names that stand in more than one module of the two packages."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in house.modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name not in FIXED_BY_OTHERS:
                places[node.name].append(module.name)
    return [f"{name}: {', '.join(modules)}" for name, modules in sorted(places.items()) if len(modules) > 1]


def untrue_readme_folders(root: Path) -> list[str]:
    """Return folders that the README's tree names and the checkout lacks; an error where the README has no tree."""
    folders = tree_folders((root / "README.md").read_text(encoding="utf-8"))
    absent = [name for name in folders if not (root / name).is_dir()]
    return absent if folders else ["README.md names no folder"]
