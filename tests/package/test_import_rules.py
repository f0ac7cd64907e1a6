"""Who may import whom: parsed from the sources, so that a forbidden import fails even where it never runs."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STDLIB = set(sys.stdlib_module_names)
PLAN = (
    *("engine.plan", "engine.verify", "engine.verify_caches", "engine.caching", "engine.bind"),
    *("engine.prediction", "engine.render", "engine.token_rows", "engine.token_layout", "engine.verify_tokens"),
    "engine.merge_rows",
    "engine.looking",
    "engine.low_rank",
    "engine.liveness",
)
MAKING = ("engine.noise_schedule", "engine.timesteps", "engine.solvers")
FROM_DIFFUSERS = tuple(
    f"engine.diffusers_{part}" for part in ("config", "grids", "rows", "discrete", "sigmas", "multistep", "classes")
)
RUNTIME = (  # and never torch
    *(*PLAN, "engine.plan_io", "engine.plan_codec", "engine.noise"),
    *("models.prompts", "models.pictures", "runtime"),
)
FREE = ("errors", "__version__")  # everyone may import these

# First matching prefix decides: (module prefix, own modules it may import, third-party packages it may import).
RULES: list[tuple[str, tuple[str, ...], set[str]]] = [
    *((name, PLAN, set()) for name in PLAN),
    ("engine.plan_codec", PLAN, set()),
    ("engine.plan_io", (*PLAN, "engine.plan_codec"), {"numpy", "safetensors"}),
    ("engine.noise_schedule", PLAN, {"numpy"}),
    ("engine.noise", (), {"numpy"}),
    ("engine.timesteps", (*PLAN, "engine.noise_schedule"), {"numpy"}),
    ("engine.solvers", (*PLAN, "engine.noise_schedule", "engine.timesteps", "engine.solvers"), {"numpy"}),
    ("engine.forecast", (), set()),
    (
        "engine.tables",
        (*PLAN, "engine.plan_io", "engine.plan_codec", "engine.calibrate.table"),
        {"numpy"},
    ),
    ("engine.planners", (*PLAN, "engine.forecast", "engine.planners"), {"numpy"}),
    ("engine.passes.token_history", (*PLAN, "engine.noise_schedule"), set()),
    (
        "engine.passes",
        (*PLAN, *MAKING, "engine.passes", "engine.planners", "engine.tables", "engine.plan_io"),
        {"numpy"},
    ),
    *((name, (*PLAN, *MAKING, *FROM_DIFFUSERS), {"numpy"}) for name in FROM_DIFFUSERS),
    ("engine.from_diffusers", (*PLAN, *MAKING, *FROM_DIFFUSERS), {"numpy"}),
    (
        "engine.interchange",
        (
            *(*PLAN, *MAKING, *FROM_DIFFUSERS, "engine.plan_codec"),
            *("engine.passes", "engine.from_diffusers", "engine.interchange"),
        ),
        {"numpy"},
    ),
    (
        "engine.planning",
        (
            *(*PLAN, *MAKING, "engine.passes", "engine.from_diffusers", "engine.interchange"),
            *("engine.tables", "engine.plan_io"),
        ),
        {"numpy"},
    ),
    ("engine.machine", ("kernels", "_C"), {"torch"}),
    ("engine", ("engine", "kernels"), {"numpy", "torch", "safetensors"}),
    ("kernels", ("kernels", "_C", "engine.noise"), {"numpy", "torch", "triton"}),
    ("metrics", ("metrics", "engine", "kernels"), {"numpy", "torch", "safetensors", "PIL"}),
    (
        "models.pipelines",
        ("models", "engine", "kernels", "metrics"),
        {"numpy", "torch", "safetensors", "PIL", "diffusers", "huggingface_hub", "accelerate"},
    ),
    ("models.compiled", ("models", "engine", "kernels", "_C"), {"torch"}),
    ("models", ("models", "engine", "kernels", "metrics"), {"numpy", "torch", "safetensors", "PIL", "rapidfuzz"}),
    ("profile", ("profile", "models", "engine", "kernels", "_C"), {"numpy", "torch"}),
    (
        "runtime",
        RUNTIME,
        {"numpy", "safetensors", "PIL", "rapidfuzz", "onnxruntime", "openvino", "tokenizers", "tensorrt"},
    ),
    (
        "export",
        ("export", "runtime", "models", "engine", "kernels", "metrics"),
        {"numpy", "torch", "safetensors", "PIL", "onnx", "onnxruntime", "ml_dtypes", "tokenizers"}
        | {"tensorrt", "tensorrt_rtx"},
    ),
    ("bench.peers", ("",), {"numpy", "torch", "diffusers", "cache_dit", "onnx", "onnxruntime", "openvino"}),
    (
        "bench.peers",
        ("bench", "kernels", "errors"),
        {"numpy", "torch", "diffusers", "onnx", "onnxruntime", "openvino", "cache_dit"},
    ),
    ("bench", ("",), {"numpy", "torch", "safetensors", "diffusers", "matplotlib"}),
    ("cli", ("",), {"typer", "PIL"}),
    ("__main__", ("cli",), set()),
    ("__init__", (), set()),
    ("errors", (), set()),
]
# Methods of Plan delegate to modules that import it; each is one import inside a function.
DELEGATES = {
    "engine.plan": ("engine.plan_io", "engine.bind", "engine.planning", "engine.from_diffusers", "engine.render")
}


def modules():
    for folder in ("engine", "kernels", "bench", "python/vivace"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / "python/vivace" if folder == "python/vivace" else ROOT)
            if folder == "python/vivace" and relative.parts[0] in ("engine", "kernels", "bench"):
                continue
            yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), path


MODULES = dict(modules())


@cache
def imports(path):
    """(imported name, inside a function or a type-checking block) of every import of a file."""
    return list(_imports(ast.parse(path.read_text()), False))


def _imports(node, inner):
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, inner
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        module = node.module
        own = module.removeprefix("vivace").lstrip(".") if module.split(".")[0] == "vivace" else None
        for alias in node.names:
            sub = f"{own}.{alias.name}".lstrip(".") if own is not None else ""
            yield f"vivace.{sub}" if sub in MODULES or module == "vivace" else module, inner
    elif not isinstance(node, ast.expr):
        inner = inner or isinstance(node, (ast.FunctionDef, ast.If))
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, inner)


def under(name, prefixes):
    return any(p == "" or name == p or name.startswith(p + ".") for p in prefixes)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_layer_may(module):
    own, packages = next((own, pkgs) for prefix, own, pkgs in RULES if under(module, (prefix,)))
    for name, inner in imports(MODULES[module]):
        top = name.split(".")[0]
        assert top not in ("engine", "kernels", "bench"), f"{module} imports {name}; write vivace.{name}"
        if top == "vivace":
            target = name.removeprefix("vivace").lstrip(".") or "__init__"
            delegated = inner and under(target, DELEGATES.get(module, ()))
            assert delegated or under(target, (*own, *FREE)), f"{module} may not import {name}"
        else:
            assert top in STDLIB or top in packages, f"{module} may not import {name}"
            if top in ("diffusers", "huggingface_hub", "accelerate") and module.startswith("models"):
                assert inner, f"{module} imports {name} at its top; import it where it is used"
            if top == "triton":
                assert module.endswith("triton_impl"), f"{module} imports triton; only triton_impl.py may"


def test_engine_and_kernels_have_no_import_cycle():
    graph = {}
    for module, path in MODULES.items():
        found = {
            name.removeprefix("vivace.") for name, inner in imports(path) if name.startswith("vivace.") and not inner
        }
        graph[module] = {name for name in found if name in MODULES and name != module}
    done, active = set(), []

    def visit(module):
        if module in active:
            pytest.fail(" -> ".join([*active[active.index(module) :], module]))
        if module not in done:
            active.append(module)
            for name in sorted(graph[module]):
                visit(name)
            active.pop()
            done.add(module)

    for module in graph:
        visit(module)
