"""Rules about the code as a whole: imports point down, nothing is replaced by name, functions are short.

The files are parsed, never imported, so this takes seconds. Imports by a computed name are not seen: the table of
packages in `common/registry.py` is the one way up, and `minigpt4/__main__.py` finds its commands in another.
"""

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

# From the bottom up. A file imports its own package and the packages before it.
ORDER = (
    "minigpt4",  # its own `__init__.py`, which Python executes before every other file
    "common",
    "tracking",
    "processors",
    "kernels",
    "quantization",
    "weights",
    "models",
    "fast",
    "datasets",
    "data_tools",
    "tasks",
    "conversation",
    "runners",
    "evaluation",
    "serving",
    "web",
    "doctor",
    "benchmarks",
    "cli",
)
SCRIPTS = ("minigpt4.__main__", "train", "demo")  # import everything, and nothing imports them
RANKS = {name: rank for rank, name in enumerate(ORDER)} | dict.fromkeys(SCRIPTS, len(ORDER))
COMPAT = "minigpt4.common.compat"  # the one file with private names of libraries
FORWARD = "minigpt4.models.mini_gpt4"

FILES = (*sorted((ROOT / "minigpt4").rglob("*.py")), ROOT / "train.py", ROOT / "demo.py")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def for_each(items):
    """Make one test of a rule that holds for each item. 1,800 tests would take longer than what they look at."""

    def make(rule):
        def test():
            broken = []
            for item in items:
                try:
                    rule(item)
                except AssertionError as error:
                    broken.append(str(error))
            assert not broken, "\n".join(broken)

        return test

    return make


every_module = for_each(MODULES)


def package_of(module: str) -> str:
    """The name under which RANKS knows it."""
    if module in SCRIPTS or "." not in module:
        return module
    return module.split(".")[1]


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def line(module: str, node: ast.AST) -> str:
    return f"{MODULES[module].relative_to(ROOT).as_posix()}:{node.lineno}"


def expect_none(problems: list[str]) -> None:
    assert not problems, "\n".join(["", *problems])


# Imports


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """Everything below a node except imports for type checkers; without `lazy`, except the bodies of functions too."""
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
    for child in children:
        if lazy or not isinstance(child, Function | ast.Lambda):
            yield child
            yield from statements(child, lazy)


def imported_names(module: str, lazy: bool = True) -> Iterator[tuple[str, ast.AST]]:
    """The full names that a file imports. `importlib.import_module("a.b")` counts where the name is written out."""
    is_package = MODULES[module].name == "__init__.py"
    for node in statements(tree_of(module), lazy):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module
            if node.level:
                base = ".".join(module.split(".")[: (1 if is_package else 0) - node.level or None])
                base += f".{node.module}" if node.module else ""
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield name.value, node


@functools.cache
def imports(module: str, lazy: bool = True) -> dict[str, str]:
    """The modules of this repository that a module imports by name, and the place of each import."""
    found = {}
    for name, node in imported_names(module, lazy):
        target = name if name in MODULES else name.rpartition(".")[0]
        if target in MODULES:
            found.setdefault(target, line(module, node))
    return found


def with_parents(module: str) -> list[str]:
    """A module and the packages around it, whose `__init__.py` Python executes first."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def reachable(start: str, lazy: bool) -> set[str]:
    """The modules that are executed when `start` is imported; with `lazy`, also those that its functions import."""
    seen, waiting = set(), [start]
    while waiting:
        for module in with_parents(waiting.pop()):
            if module not in seen:
                seen.add(module)
                waiting += imports(module, lazy)
    return seen


def find_circle(graph: dict[str, list[str]]) -> list[str]:
    """A circle of a graph, its first node repeated at the end; empty if there is none."""
    done, path = set(), []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for target in graph[node]:
            if circle := visit(target):
                return circle
        done.add(path.pop())
        return []

    for node in graph:
        if circle := visit(node):
            return circle
    return []


def lines_of_code(module: str) -> int:
    """Lines that hold code: without blank lines, comments and docstrings."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    used = set()
    for token in tokenize.generate_tokens(io.StringIO(MODULES[module].read_text(encoding="utf-8")).readline):
        if token.type not in nothing:
            used |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree_of(module)):
        # A text that stands alone, as docstrings and notes below attributes do.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            used -= set(range(node.lineno, node.end_lineno + 1))
    return len(used)


def test_every_package_has_a_rank():
    assert {package_of(module) for module in MODULES} == set(RANKS)


def is_there(name: str) -> bool:
    """Whether a full name is a module of this repository, or a name that one of them defines or imports."""
    home, _, last = name.rpartition(".")
    if name in MODULES or home in MODULES and last == "*":
        return True
    return home in MODULES and not known_names(home).isdisjoint({last, "__getattr__"})


@functools.cache
def known_names(module: str) -> set[str]:
    """The names that a module defines or imports."""
    known = set(defined_names(tree_of(module)))
    for imported, node in imported_names(module, lazy=False):
        known |= {alias.asname or alias.name for alias in node.names} if hasattr(node, "names") else {imported}
    return known


@every_module
def test_imports_find_what_they_name(module):
    """Imports inside functions too: other tests notice a stale one only if they execute it."""
    ours = [(name, node) for name, node in imported_names(module) if name.split(".")[0] == "minigpt4"]
    expect_none([f"{line(module, node)} {name}" for name, node in ours if not is_there(name)])


@every_module
def test_imports_point_down(module):
    own = package_of(module)
    upward = [
        f"{place} imports {target}"
        for target, place in imports(module).items()
        if package_of(target) != own and RANKS[package_of(target)] >= RANKS[own]
    ]
    expect_none(upward)


def test_no_circle_of_files():
    """Imports inside functions count: they hide a circle, and do not undo it."""
    circle = find_circle({module: list(imports(module)) for module in MODULES})
    assert not circle, "\n".join(f"{imports(a)[b]}: {a} imports {b}" for a, b in zip(circle, circle[1:], strict=False))


def test_circles_are_found():
    assert find_circle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}) == ["b", "d", "b"]
    assert find_circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("kernels", {"kernels", "common"}),
        ("models", set(RANKS) - {"fast"}),  # a reader of models/ can ignore how it is made fast
    ],
)
def test_packages_that_know_few_others(package, allowed):
    files = [module for module in MODULES if package_of(module) == package]
    others = [
        f"{place} imports {target}"
        for module in files
        for target, place in imports(module).items()
        if package_of(target) not in allowed
    ]
    assert files
    expect_none(others)


@pytest.mark.parametrize(("lazy", "most_modules", "most_lines"), [(False, 26, 2100), (True, 32, 2500)])
def test_little_code_is_reachable_from_forward(lazy, most_modules, most_lines):
    """The code that a reader can reach from `forward`; an `__init__` without code is no module to read."""
    lines = {module: count for module in sorted(reachable(FORWARD, lazy)) if (count := lines_of_code(module))}
    listing = "\n".join(f"{count:5} {module}" for module, count in lines.items())
    message = f"{len(lines)} modules, {sum(lines.values())} lines of code:\n{listing}"
    assert len(lines) <= most_modules and sum(lines.values()) <= most_lines, message


# Functions


def functions(module: str) -> list[Function]:
    return [node for node in ast.walk(tree_of(module)) if isinstance(node, Function)]


def length(function: Function) -> int:
    """From `def` to its last line, without the docstring."""
    count = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        count -= docstring.end_lineno - docstring.lineno + 1
    return count


@every_module
def test_functions_are_short(module):
    expect_none([f"{line(module, f)} {f.name}: {length(f)} lines" for f in functions(module) if length(f) > 60])


@pytest.mark.parametrize("package", ["models", "tasks"])
def test_signatures_are_annotated(package):
    """At least 90 % of parameters and return values, `self` and `cls` apart."""
    total, missing = 0, []
    for module in MODULES:
        if package_of(module) != package:
            continue
        for function in functions(module):
            own = function.args
            every = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, [own.vararg, own.kwarg])]
            annotations = {a.arg: a.annotation for a in every if a.arg not in ("self", "cls")}
            if function.name != "__init__":
                annotations["return"] = function.returns
            total += len(annotations)
            missing += [
                f"{line(module, function)} {function.name}: {name}"
                for name, annotation in annotations.items()
                if annotation is None
            ]
    assert total and len(missing) <= 0.1 * total, "\n".join([f"{len(missing)} of {total}:", *missing])


# Nothing is replaced by name or by class


MODULE_METHODS = {
    "__call__", "compile", "cpu", "cuda", "float", "forward", "forward_features", "forward_head", "half",
    "get_decoder", "get_input_embeddings", "load_state_dict", "named_parameters", "parameters", "requires_grad_",
    "state_dict", "to", "zero_grad",
}  # fmt: skip


@functools.cache
def method_names() -> set[str]:
    """Methods of torch's and timm's modules, and of the classes in models/; not properties, nor `train`, a YAML key."""
    names = set(MODULE_METHODS)
    for module in MODULES:
        if package_of(module) != "models":
            continue
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef):
                methods = [f for f in node.body if isinstance(f, Function)]
                names |= {f.name for f in methods if "property" not in map(ast.unparse, f.decorator_list)}
    return names - {"train"}


def is_namespace(node: ast.AST) -> bool:
    """`vars(x)` or `x.__dict__`."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__dict__"
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "vars"


def replacements(tree: ast.AST) -> Iterator[ast.AST]:
    """Places where an object gets another class, or another object's method is replaced or taken away."""
    for node in ast.walk(tree):
        changed = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        if isinstance(node, ast.Attribute) and changed:
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if node.attr == "__class__" or node.attr in method_names() and not is_own:
                yield node
        elif isinstance(node, ast.Subscript) and changed and is_namespace(node.value):
            yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changing = ("pop", "update", "setdefault", "clear", "popitem", "__setitem__", "__delitem__")
            if node.func.attr in changing and is_namespace(node.func.value):
                yield node
            elif node.func.attr in ("__setattr__", "__delattr__") and names_a_method(node):
                yield node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr") and names_a_method(node):
            yield node


def names_a_method(call: ast.Call) -> bool:
    """Whether a call like `setattr(layer, "forward", …)` writes out the name of a method, or `__class__`."""
    texts = [x.value for x in call.args if isinstance(x, ast.Constant)]
    return any(text == "__class__" or text in method_names() for text in texts)


@every_module
def test_nothing_is_replaced_by_name_or_class(module):
    """Layers are exchanged as a whole (`setattr(parent, name, new_layer)`); a model has a step object."""
    expect_none([f"{line(module, node)} {ast.unparse(node)}" for node in replacements(tree_of(module))])


@pytest.mark.parametrize(
    "code",
    [
        "layer.__class__ = Fused",
        "first.__class__, first.weight = Fused, weight",
        "setattr(layer, '__class__', Fused)",
        "object.__setattr__(layer, 'forward', fused)",
        "layer.forward = fused",
        "model.llama_model.forward = fused",
        "model.query_outputs = lambda image: image",
        "model.encode_img: Any = fused",
        "setattr(vit, 'forward_features', fused)",
        "vars(model).pop('predict', None)",
        "vars(model)['predict'] = fused",
        "layer.__dict__.pop('forward')",
        "del layer.forward",
    ],
)
def test_replacements_are_found(code):
    assert len(list(replacements(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "setattr(parent, name, new_layer)",
        "self.forward = fused",
        "names = vars(model).items()",
        "model.step = FastStep(model)",
        "options.device = 'cpu'",
    ],
)
def test_changes_that_are_allowed(code):
    assert not list(replacements(ast.parse(code)))


# Private names


LONG_NAME = re.compile(r"(minigpt4|torch|transformers|timm|bitsandbytes|accelerate|triton)[\w.]*\._[\w.]*")


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def homes_of(tree: ast.AST) -> dict[str, str]:
    """The names that a file gives to its imports: {"F": "torch.nn.functional"}."""
    homes = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                homes |= {alias.asname: alias.name} if alias.asname else {top: top}
        elif isinstance(node, ast.ImportFrom):
            homes |= {alias.asname or alias.name: f"{home_of(node)}.{alias.name}" for alias in node.names}
    return homes


def home_of(node: ast.ImportFrom) -> str:
    return "." * node.level + (node.module or "")


def private_imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Full names with a private part: imported, reached from an import (`torch._dynamo`), or written as a text."""
    homes = homes_of(tree)

    def full_name(node: ast.AST) -> str:
        root, *rest = ast.unparse(node).split(".")
        return ".".join([homes[root], *rest]) if root in homes and all(map(str.isidentifier, rest)) else ""

    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{home_of(node)}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            names = [full_name(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if LONG_NAME.fullmatch(node.value) else []
        elif name := attribute_as_text(node):
            names = [f"{full_name(node.args[0])}.{name}"] if full_name(node.args[0]) else []
        yield from ((name, node) for name in names if any(map(is_private, name.split("."))))


def attribute_as_text(node: ast.AST) -> str:
    """The private name that `getattr(x, "_name")` and its kind are given, `monkeypatch.setattr` included."""
    if not isinstance(node, ast.Call) or len(node.args) < 2 or not isinstance(node.args[1], ast.Constant):
        return ""
    function, name = ast.unparse(node.func).split(".")[-1], node.args[1].value
    is_access = function in ("getattr", "hasattr", "setattr", "delattr")
    return name if is_access and isinstance(name, str) and is_private(name) else ""


def private_attributes(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Private names of attributes, whatever they belong to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node
        elif name := attribute_as_text(node):
            yield name, node


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives to functions, classes, variables, and attributes of `self` or `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


@functools.cache
def own_names() -> set[str]:
    return {name for module in MODULES for name in defined_names(tree_of(module))}


def is_ours(name: str) -> bool:
    return name.split(".")[0] in ("minigpt4", "")


def private_names_of_libraries(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Python's own library apart: `os._exit` is documented."""
    for name, node in private_imports(tree):
        if not is_ours(name) and name.split(".")[0] not in sys.stdlib_module_names:
            yield name, node
    found = {id(node) for _, node in private_imports(tree)}
    for name, node in private_attributes(tree):
        if id(node) not in found and name not in own_names():
            yield name, node


@every_module
def test_private_names_of_libraries_live_in_one_file(module):
    if module != COMPAT:
        names = private_names_of_libraries(tree_of(module))
        expect_none([f"{line(module, node)} {name}" for name, node in names])


def test_the_file_of_private_names_is_there():
    assert COMPAT in MODULES
    assert list(private_names_of_libraries(tree_of(COMPAT)))


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch\ntorch._dynamo.config.recompile_limit = 64", "torch._dynamo"),
        ("import torch\nx = torch.ops.aten._addmm_activation(a, b, c)", "torch.ops.aten._addmm_activation"),
        ("import torch._inductor.config", "torch._inductor.config"),
        ("from torch._dynamo import config", "torch._dynamo.config"),
        ("from transformers.modeling_utils import _load_state_dict", "transformers.modeling_utils._load_state_dict"),
        ("import torch.nn.functional as F\nF._pad_circular(x)", "torch.nn.functional._pad_circular"),
        ("config._attn_implementation = 'sdpa'", "_attn_implementation"),
        ("if getattr(llm, '_supports_attention_backend', False): pass", "_supports_attention_backend"),
        ("x = vit.norm_pre(vit._pos_embed(x))", "_pos_embed"),
        ("logging.getLogger('bitsandbytes.autograd._functions')", "bitsandbytes.autograd._functions"),
    ],
)
def test_private_names_are_found(code, name):
    assert [name for name, _ in private_names_of_libraries(ast.parse(code))] == [name]


@every_module
def test_private_names_stay_in_their_file(module):
    """A name that another file of this repository uses is public."""
    names = [(name, node) for name, node in private_imports(tree_of(module)) if is_ours(name)]
    expect_none([f"{line(module, node)} {name}" for name, node in names])


TESTS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]


@for_each(TESTS)
def test_private_names_are_touched_by_their_own_tests_only(path):
    """Those of `minigpt4/fast` in `tests/fast`."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    folder = path.split("/")[1]
    names = [(name, node) for name, node in private_imports(tree) if is_ours(name)]
    expect_none([f"{path}:{node.lineno} {name}" for name, node in names if name.split(".")[1] != folder])


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from minigpt4.fast import vit\nvit._embed(x)", "minigpt4.fast.vit._embed"),
        ("from minigpt4.fast.vit import _embed", "minigpt4.fast.vit._embed"),
        ("from minigpt4.fast import vit\nmonkeypatch.setattr(vit, '_embed', f)", "minigpt4.fast.vit._embed"),
        ("monkeypatch.setattr('minigpt4.fast.vit._embed', f)", "minigpt4.fast.vit._embed"),
    ],
)
def test_private_names_of_ours_are_found(code, name):
    assert [name for name, _ in private_imports(ast.parse(code))] == [name]


# The tests


def test_slow_tests_are_there():
    """`conftest.SLOW_TESTS`: a file or test that has another name now would be taken for quick."""
    tree = ast.parse((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    (value,) = [x.value for x in tree.body if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "SLOW_TESTS"]
    for name in ast.literal_eval(value):
        path, _, function = name.partition("::")
        assert (ROOT / path).is_file(), name
        assert f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), name


# The docs


def test_paths_named_in_the_docs_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
    place = re.compile(r"`((?:minigpt4|train_configs|eval_configs|dataset|prompts|tests|docs)/[\w./-]*)")
    named = [(page.name, path) for page in pages for path in place.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 100
    assert not [(page, path) for page, path in named if not (ROOT / path).exists()]
