"""Import rules between packages, and what must work with only torch installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedalign.impls.softmax import SoftmaxStats
from fusedalign.problem import DEFINITIONS, OUTPUTS, Problem, TokenLogps

PACKAGE = Path(__file__).parents[1] / "fusedalign"
#: Packages from the bottom up: a module may import from its own package and from earlier ones.
ROOMS = [
    "private",
    "checks",
    "commandline",
    "sources",
    "methods",
    "problem",
    "head",
    "engines",
    "impls",
    "losses",
    "sequence",
    "compaction",
    "sharding",
    "graphs",
    "ops",
    "modules",
    "packing",
    "embedded",
    "reports",
    "recipes",
    "provenance",
    "trl",
    "score",
    "plan",
    "support",
    "supportcommand",
    "check",
    "bench",
    "harness",
    "demo",
    "environment",
    "envcommand",
    "flags",
    "completion",
    "cli",
]
#: Modules shared by impls: per-token records, tiling, autograd around an impl's arithmetic, the base of adapters.
SHARED = ["base", "logits", "softmax", "head_grads", "tiles", "autograd", "adapter", "parallel"]
TORCH_ONLY = ["checks", "losses", "sequence"]
OPTIONAL = [
    *("triton", "transformers", "trl", "liger_kernel", "cut_cross_entropy", "datasets", "peft", "accelerate", "lm_eval")
]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level_only=False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


FILES = [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name not in ("__init__.py", "__main__.py")]


def test_every_room_is_listed():
    assert {room(p) for p in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    for name in imports(path):
        if name.startswith("fusedalign."):
            package = name.split(".")[1]
            assert package in ROOMS, f"{path.name} imports {name}"
            assert ROOMS.index(package) <= ROOMS.index(room(path)), (
                f"{path.name} must not import {name}, which lies above it"
            )


@pytest.mark.parametrize("path", [p for p in FILES if room(p) == "impls"], ids=lambda p: p.name)
def test_impls_do_not_import_one_another(path):
    own = path.relative_to(PACKAGE / "impls").parts[0].removesuffix(".py")
    if own not in ("__init__", "survey"):  # these import the table of impls
        names = [name.split(".")[2] for name in imports(path) if name.startswith("fusedalign.impls.")]
        assert set(names) <= {own, *SHARED}


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in TORCH_ONLY], ids=lambda p: p.name)
def test_losses_and_sequence_import_torch_alone(path):
    allowed = {"torch", "fusedalign", "__future__", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_trl_room_and_the_commands_import_trl(path):
    """Scoring and the benchmark use TRL if it is installed, so they import it inside functions."""
    if room(path) not in ("trl", "demo", "cli"):
        names = imports(path, top_level_only=room(path) in ("score", "bench"))
        assert "trl" not in {name.split(".")[0] for name in names}


def test_torch_alone_is_enough():
    """With optional packages unimportable, the package imports and the PyTorch impl runs."""
    script = f"""
import sys, torch  # torch first: its CUDA build looks for triton itself
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import fusedalign, fusedalign.sequence, fusedalign.head
hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
targets = torch.randint(0, 20, (2, 3))
fusedalign.linear_logps(hidden, weight, targets, outputs=["entropy"]).logps.sum().backward()
fusedalign.linear_cross_entropy(hidden, weight, targets).backward()
assert fusedalign.explain()
import fusedalign.cli, fusedalign.bench
print(fusedalign.cli.main(["env"]))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().endswith("0")


def test_importing_the_package_loads_no_optional_package():
    modules = f"[m for m in {OPTIONAL!r} if m in sys.modules and m != 'triton']"
    script = f"import sys, fusedalign, fusedalign.bench; print({modules})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_per_token_output_is_named_in_the_files_that_contributing_lists():
    """The declaration and the statistic; `ops` names outputs in a docstring, and a kernel has names of its own."""
    primitive = [p for p in FILES if room(p) in ("problem", "impls", "compaction", "sharding", "graphs", "ops")]
    for output in ("mean_logit", "log_sum_sq_probs"):
        files = {str(p.relative_to(PACKAGE)) for p in primitive if output in p.read_text()}
        assert files == {"problem.py", "impls/softmax.py", "ops.py"}, output


def test_every_output_has_a_definition_and_every_statistic_of_the_kernels_a_field():
    STATS = pytest.importorskip("fusedalign.impls.triton.kernels", reason="needs triton").STATS
    assert tuple(DEFINITIONS) == OUTPUTS == TokenLogps._fields[1:]
    hidden, targets = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    stats = SoftmaxStats(Problem(hidden, hidden, targets, torch.float32, outputs=frozenset(OUTPUTS)))
    assert all(isinstance(getattr(stats, name), torch.Tensor) for name in STATS)
