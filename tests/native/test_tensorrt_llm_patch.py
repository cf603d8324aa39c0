"""return_blocks.patch: where it goes, that its lines compile, and what they do to a double of a batch manager."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.trtllm_batch_manager import WAYS, ModelledManager, Request, count, play
from docker.tensorrt_llm_patch import apply
from native.build import compiler

DOUBLE = Path(__file__).parent / "batch_manager_double"
INSIDE = Path("cpp/tensorrt_llm/batch_manager")
PLUGINS = "libchunkkv_tensorrt.so.10"


def make_tree(folder: Path) -> Path:
    """Return a source tree with the double's files."""
    (folder / INSIDE).mkdir(parents=True)
    for path in DOUBLE.glob("kv*"):
        shutil.copy(path, folder / INSIDE)
    shutil.copy(DOUBLE / "trtGptModelInflightBatching.cpp", folder / INSIDE)
    return folder


def build(target: Path, *arguments: str | Path) -> Path:
    flags = ["-std=c++17", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler(), *flags, *map(str, arguments), "-o", str(target)], check=True)
    return target


class CompiledManager:
    """The double behind ctypes, as the scheduler of the benchmark drives it."""

    def __init__(self, library: Path, blocks: int, tokens_per_block: int) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.start(blocks, tokens_per_block)

    @property
    def free_blocks(self) -> int:
        return self.lib.free_blocks()

    def needed(self, request: Request) -> int:
        if request.generated == 0:
            self.lib.request(request.number, request.prompt, request.new, 1)
        return self.lib.needed(request.number)

    def add(self, request: Request) -> None:
        self.lib.add(request.number)

    def prefilled(self, request: Request) -> None:
        self.lib.prefilled(request.number)

    def add_token(self, request: Request) -> None:
        if self.lib.add_token(request.number):
            raise RuntimeError("no free block")

    def remove(self, request: Request) -> None:
        self.lib.remove_sequence(request.number)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The double without and with the patch, and the stand-in for the plugins, which is loaded for all tests."""
    folder = tmp_path_factory.mktemp("batch_manager")
    stock, patched = make_tree(folder / "stock"), make_tree(folder / "patched")
    assert apply.main([str(patched)]) == 0
    build(folder / PLUGINS, DOUBLE / "plugins.cpp", f"-Wl,-soname,{PLUGINS}")
    made = {"plugins": folder / PLUGINS}
    for name, tree in (("stock", stock), ("patched", patched)):
        made[name] = build(folder / f"{name}.so", *(tree / INSIDE).glob("*.cpp"), f"-I{tree / 'cpp'}", "-ldl")
    return made


@pytest.fixture
def keep_one_in(libraries: dict[str, Path]) -> Callable[[int], None]:
    """Set how much of a prompt the engine of this thread keeps: one token in `share`; 0 where none has run."""
    share = ctypes.c_int.in_dll(ctypes.CDLL(str(libraries["plugins"])), "share")

    def set_share(value: int) -> None:
        share.value = value

    set_share(0)
    return set_share


def traffic(seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [Request(number, draw.randint(1, 900), draw.randint(1, 120)) for number in range(60)]


@pytest.mark.parametrize("share", [1, 2, 5, 10])
@pytest.mark.parametrize("seed", range(4))
def test_the_patched_code_does_what_the_model_says(
    libraries: dict[str, Path], keep_one_in: Callable[[int], None], share: int, seed: int
) -> None:
    size = random.Random(seed).choice([1, 16, 32])
    blocks = 2400 // size
    keep_one_in(share)
    for name, way in (("stock", WAYS[0]), ("patched", WAYS[2])):
        compiled = play(CompiledManager(libraries[name], blocks, size), traffic(seed), 40, 2000)
        modelled = play(ModelledManager(blocks, size, lambda tokens: tokens // share, way), traffic(seed), 40, 2000)
        assert compiled == modelled


def test_nothing_changes_before_an_engine_with_chunkkv_has_run(
    libraries: dict[str, Path], keep_one_in: Callable[[int], None]
) -> None:
    keep_one_in(0)
    stock = play(CompiledManager(libraries["stock"], 75, 32), traffic(1), 40, 2000)
    assert play(CompiledManager(libraries["patched"], 75, 32), traffic(1), 40, 2000) == stock


def test_the_blocks_of_the_next_steps(libraries: dict[str, Path], keep_one_in: Callable[[int], None]) -> None:
    keep_one_in(5)
    lib = CompiledManager(libraries["patched"], 40, 16).lib
    lib.request(7, 100, 13, 1)
    assert lib.next_steps(7, True) == 7  # the prompt
    lib.add(7)
    lib.prefilled(7)
    assert lib.tokens(7) == 20 and lib.free_blocks() == 38
    needed = []
    for _ in range(13):
        needed.append((lib.next_steps(7, False), lib.next_steps(7, True)))
        lib.add_token(7)
    assert needed == [(0, 0)] * 11 + [(0, 1), (1, 1)]  # token 33 is the last, so two steps need one block
    assert lib.next_steps(7, True) == 0


def test_beams_are_left_alone(libraries: dict[str, Path], keep_one_in: Callable[[int], None]) -> None:
    keep_one_in(5)
    lib = CompiledManager(libraries["patched"], 40, 16).lib
    lib.request(1, 100, 10, 2)
    lib.add(1)
    lib.prefilled(1)
    assert lib.tokens(1) == 100


def test_more_sequences_fit_only_with_the_counts() -> None:
    stock, returned, patched = (count(way, (65536, 32, 8192, 256), lambda tokens: tokens // 5) for way in WAYS)
    assert (stock.most_sequences, returned.most_sequences, patched.most_sequences) == (7, 7, 30)
    assert returned.fewest_free_blocks > 1000 > patched.fewest_free_blocks >= 0


def test_a_scheduler_that_promises_too_much_is_found_out() -> None:
    class Careless(ModelledManager):
        def needed(self, request: Request) -> int:
            return 0 if request.is_prefilled else self.blocks_for(request.prompt)

    with pytest.raises(RuntimeError, match="finds no block"):
        play(Careless(32, 16, lambda tokens: tokens, WAYS[0]), [Request(n, 100, 100) for n in range(8)], 8, 2000)


def test_the_diff_fits_the_tree_that_it_was_made_for(tmp_path: Path) -> None:
    tree, diff = make_tree(tmp_path / "tree"), tmp_path / "made.diff"
    before = {path: path.read_text() for path in (tree / INSIDE).iterdir()}
    assert apply.main([str(tree), "--check", "--diff", str(diff)]) == 0
    assert {path: path.read_text() for path in (tree / INSIDE).iterdir()} == before
    git = ["git", "-C", str(tree)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "apply", str(diff)], check=True)
    by_git = {path.name: path.read_text() for path in (tree / INSIDE).iterdir()}
    again, out = make_tree(tmp_path / "again"), tmp_path / "out"
    assert apply.main([str(again), "--out", str(out)]) == 0
    assert {path.name: path.read_text() for path in (out / INSIDE).iterdir()}.items() <= by_git.items()
    assert apply.main([str(again)]) == 0
    assert {path.name: path.read_text() for path in (again / INSIDE).iterdir()} == by_git
    removed = [line for line in diff.read_text().splitlines() if line.startswith("-") and line[:3] != "---"]
    assert not removed


def edit(tree: Path, name: str, old: str, new: str) -> None:
    path = tree / INSIDE / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an older release": (
        lambda tree: edit(tree, "kvCacheManager.cpp", ", SizeType32 windowSize) const {", ") const {"),
        "getNeededBlocksOneStep takes (req, twoStepsLookAhead), the patch knows it with",
    ),
    "a renamed function": (
        lambda tree: edit(tree, "trtGptModelInflightBatching.cpp", "::storeContextBlocks", "::storeBlocks"),
        "defines TrtGptModelInflightBatching::storeContextBlocks nowhere, not once",
    ),
    "a function twice": (
        lambda tree: edit(
            tree,
            "kvCacheManager.cpp",
            "void KVCacheManager::addToken(",
            "int KVCacheManager::getRemainingBlocksToCompletion(int a) {\n}\nvoid KVCacheManager::addToken(",
        ),
        "getRemainingBlocksToCompletion 2 times, not once",
    ),
    "another folder": (lambda tree: shutil.rmtree(tree / "cpp"), "is missing; give the folder of a source tree"),
    "a file without includes": (
        lambda tree: edit(tree, "kvCacheManager.cpp", "#include", "// include"),
        "kvCacheManager.cpp has no #include",
    ),
    "a patched tree": (lambda tree: apply.main([str(tree)]), "patched already; start from an unchanged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tree_that_the_patch_does_not_fit_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    tree = make_tree(tmp_path / "tree")
    change, message = REFUSED[case]
    change(tree)
    before = {path: path.read_text() for path in tree.rglob("*.*") if path.is_file()}
    capsys.readouterr()
    assert apply.main([str(tree)]) == 1
    assert message in capsys.readouterr().err
    assert {path: path.read_text() for path in tree.rglob("*.*") if path.is_file()} == before


def test_braces_may_stand_in_a_line_of_their_own() -> None:
    source = "#include <a>\n\nint A::b(\n    int c, B const& d = {}) const\n{\n    return 1;\n}\n\nint x = a.b(1, 2);\n"
    with pytest.raises(apply.PatchError, match="nowhere"):
        apply.insertion_point(source, "start of A::b(c, d)", "a.cpp")
    source = source.replace(" = {}", "")
    assert source[apply.insertion_point(source, "start of A::b(c, d)", "a.cpp") :].startswith("    return 1;")
    assert source[apply.insertion_point(source, "includes", "a.cpp") :].startswith("\nint")
