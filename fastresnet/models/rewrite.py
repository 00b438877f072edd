# SPDX-License-Identifier: Apache-2.0
"""Rewrites methods written by hand so that their batch norms run fused.

    F.relu(self.bn1(y))          fused_call(F.relu, fused_call(self.bn1, y))
    out = self.bn2(y)            out = fused_call(self.bn2, y)
    out += self.shortcut(x)  ->  out = add_relu(F.relu, out, shortcut(self.shortcut, x))
    out = F.relu(out)

Only the spelling of calls changes, in the syntax tree of the source: whatever the method decides
when it runs (``self.training``, a random number, an attribute changed later) it still decides
then, and the new calls do what the old ones did for any callable. Nothing is traced or frozen.
A method that is not surely understood is left as it is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

_RELU_NAMES = ("relu", "relu_")
_BLOCKS = ("body", "orelse")


class ChildNames(NamedTuple):
    """Under which names a module holds the children that matter here."""

    batch_norms: frozenset[str]
    convolutions: frozenset[str]
    relus: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> ChildNames:
        return cls(
            *(
                frozenset(name for name, child in module._modules.items() if type(child) is kind)
                for kind in (nn.BatchNorm2d, nn.Conv2d, nn.ReLU)
            )
        )


def rewritten_methods(cls: type[nn.Module], children: ChildNames) -> dict[str, types.FunctionType]:
    """The methods of ``cls``, for modules with such children, that change; by name."""
    methods = {}
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if isinstance(method, types.FunctionType) and not method.__module__.startswith("torch."):
            rewritten = _rewrite(method, children)
            if rewritten is not None:
                methods[name] = rewritten
    return methods


def _rewrite(method: types.FunctionType, children: ChildNames) -> types.FunctionType | None:
    tree = _parse(method)
    if tree is None:
        return None
    rewriter = _Rewriter(tree.body[0], children)
    rewriter.visit(tree)
    if not rewriter.changed:
        return None
    code = _compile(ast.fix_missing_locations(tree), method)
    result = types.FunctionType(code, method.__globals__, method.__name__, method.__defaults__)
    for attribute in ("__kwdefaults__", "__annotations__", "__doc__", "__qualname__", "__module__"):
        setattr(result, attribute, getattr(method, attribute))
    return result


def _parse(method: types.FunctionType) -> ast.Module | None:
    """The method's syntax tree, or None where it is not plain or not surely the running code."""
    code = method.__code__
    if code.co_freevars or code.co_cellvars or not code.co_argcount:
        return None  # super() and closures need cells that a new function would not share
    try:
        file = "".join(inspect.findsource(method)[0])
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        current = compile(file, code.co_filename, "exec", dont_inherit=True)
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    # The file may have changed since it was imported, and inspect then finds another text.
    if not any(_same_code(found, code) for found in _nested(current)):
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    if tree.body[0].decorator_list or any(isinstance(node, ast.Try) for node in ast.walk(tree)):
        return None
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    # Outside its class a name like self.__bn would lose its mangling.
    return tree if _compile(tree, method).co_names == code.co_names else None


def _compile(tree: ast.Module, method: types.FunctionType) -> types.CodeType:
    module = compile(tree, method.__code__.co_filename, "exec", dont_inherit=True)
    return next(code for code in _nested(module) if code.co_name == tree.body[0].name)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield const
            yield from _nested(const)


def _same_code(a: types.CodeType, b: types.CodeType) -> bool:
    return (
        (a.co_name, a.co_firstlineno) == (b.co_name, b.co_firstlineno)
        and (a.co_code, a.co_names, a.co_varnames) == (b.co_code, b.co_names, b.co_varnames)
        and len(a.co_consts) == len(b.co_consts)
        and all(
            _same_code(x, y) if isinstance(x, types.CodeType) else (type(x), x) == (type(y), y)
            for x, y in zip(a.co_consts, b.co_consts, strict=False)
        )
    )


class _Rewriter(ast.NodeTransformer):
    """Rewrites one method in place; ``changed`` says whether there was anything to rewrite."""

    def __init__(self, function: ast.FunctionDef, children: ChildNames) -> None:
        self.function = function
        self.self_name = function.args.args[0].arg
        self.children = children
        self.changed = False

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for block in _BLOCKS:
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                self._fuse_statements(statements)
        return super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """``relu(bn(y))``, ``relu(bn(y) + r)`` and ``relu(r + bn(y))`` in one expression."""
        if self._is_relu_call(node):
            argument = node.args[0]
            if self._is_batch_norm_call(argument):
                node = self._relu(node, self._pending(argument))
            elif _is_add(argument):
                left, right = argument.left, argument.right
                if self._is_batch_norm_call(left) and (
                    isinstance(right, ast.Name) or self._is_fresh(left.args[0])
                ):
                    node = self._add_relu(node, x=self._pending(left), residual=right)
                elif self._is_batch_norm_call(right):
                    node = self._add_relu(node, residual=left, x=self._pending(right))
        return self.generic_visit(node)

    def _fuse_statements(self, statements: list[ast.stmt]) -> None:
        """``a = bn(y)`` and, later in the list, what turns ``a`` into a ReLU's result."""
        for start, statement in enumerate(statements):
            name = _assigned(statement)
            if name is None or not self._is_batch_norm_call(statement.value):
                continue
            following = range(start + 1, len(statements))
            use = next((i for i in following if name in _names(statements[i])), None)
            if use is not None and self._fuse_use(statements, start, use, name):
                statement.value = self._pending(statement.value)

    def _fuse_use(self, statements: list[ast.stmt], start: int, use: int, name: str) -> bool:
        """Fuses ``statements[use]``, the first to mention ``name``; says whether it could."""
        add, residual, last = None, _added(statements[use], name), statements[use]
        if residual is not None:  # the ReLU must be what comes next
            if use + 1 == len(statements):
                return False
            add, last = last, statements[use + 1]
        if not self._is_dead_after(name, last, [statements[start], last, *([add] if add else [])]):
            return False
        for call in ast.walk(last):
            if not (isinstance(call, ast.Call) and self._is_relu_call(call)):
                continue
            argument = call.args[0]
            if _is_name(argument, name):
                terms = {"x": argument} | ({"residual": residual} if add else {})
            elif _is_add(argument) and add is None and _is_name(argument.left, name):
                terms = {"x": argument.left, "residual": argument.right}
            elif _is_add(argument) and add is None and _is_name(argument.right, name):
                terms = {"residual": argument.left, "x": argument.right}
            else:
                continue
            runs_between = not isinstance(terms.get("residual", argument), ast.Name)
            if add is not None and runs_between and call is not last.value:
                return False  # what else is in `last` would run before the residual
            if runs_between or use > start + 1:
                previous = statements[start - 1] if start else None
                if not self._is_fresh(statements[start].value.args[0], previous):
                    return False
            if "residual" in terms:
                new = self._add_relu(call, isinstance(add, ast.AugAssign), **terms)
            else:
                new = self._relu(call, argument)
            call.func, call.args, call.keywords = new.func, new.args, new.keywords
            if add is not None:
                statements.remove(add)
            return True
        return False

    def _is_fresh(self, node: ast.expr, previous: ast.stmt | None = None) -> bool:
        """Whether ``node`` is a convolution's result that nobody else holds: then nothing that
        runs between the statistics and the ReLU can change it in place."""
        if isinstance(node, ast.Name) and previous is not None and _assigned(previous) == node.id:
            node = previous.value
        return isinstance(node, ast.Call) and self._is_own(node.func, self.children.convolutions)

    def _is_dead_after(self, name: str, last: ast.stmt, involved: list[ast.stmt]) -> bool:
        """Whether nobody reads ``name`` but ``last``, once, as far as this value goes."""
        if not isinstance(last, (ast.Assign, ast.Return)) or _loads(last, name) != 1:
            return False
        read = _loads(self.function, name) - sum(_loads(node, name) for node in involved)
        return _assigned(last) == name or isinstance(last, ast.Return) or read == 0

    def _is_batch_norm_call(self, node: ast.AST) -> bool:
        return (
            isinstance(node, ast.Call)
            and self._is_own(node.func, self.children.batch_norms)
            and len(node.args) == 1
            and not isinstance(node.args[0], ast.Starred)
            and not node.keywords
        )

    def _is_relu_call(self, node: ast.Call) -> bool:
        function = node.func
        named = (isinstance(function, ast.Name) and function.id in _RELU_NAMES) or (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, (ast.Name, ast.Attribute))
            and function.attr in _RELU_NAMES
        )
        return (
            (named or self._is_own(function, self.children.relus))
            and len(node.args) == 1
            and not isinstance(node.args[0], ast.Starred)
        )

    def _is_own(self, node: ast.AST, names: frozenset[str] | None = None) -> bool:
        """Whether ``node`` is ``self.<name>``, of ``names`` where given."""
        return (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == self.self_name
            and (names is None or node.attr in names)
        )

    def _pending(self, call: ast.Call) -> ast.Call:
        return self._helper("_fused_call", call.func, *call.args)

    def _relu(self, call: ast.Call, argument: ast.expr) -> ast.Call:
        return self._helper("_fused_call", call.func, argument, *call.keywords)

    def _add_relu(self, call: ast.Call, overwrite: bool = False, **terms: ast.expr) -> ast.Call:
        # The terms are keywords in the order of the source, in which Python evaluates them.
        residual = terms["residual"]
        if self._is_batch_norm_call(residual):
            terms["residual"] = self._pending(residual)
        elif (
            isinstance(residual, ast.Call)
            and self._is_own(residual.func)
            and len(residual.args) == 1
            and not isinstance(residual.args[0], ast.Starred)
            and not residual.keywords
        ):
            terms["residual"] = self._helper("_fused_shortcut", residual.func, *residual.args)
        keywords = [ast.keyword(name, value) for name, value in terms.items()]
        keywords.append(ast.keyword("overwrite", ast.Constant(overwrite)))
        return self._helper("_fused_add_relu", call.func, *keywords, *call.keywords)

    def _helper(self, name: str, *arguments: ast.expr | ast.keyword) -> ast.Call:
        self.changed = True
        return ast.Call(
            func=ast.Attribute(ast.Name(self.self_name, ast.Load()), name, ast.Load()),
            args=[node for node in arguments if isinstance(node, ast.expr)],
            keywords=[node for node in arguments if isinstance(node, ast.keyword)],
        )


def _assigned(statement: ast.stmt) -> str | None:
    """``a`` where the statement is ``a = ...``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_add(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _added(statement: ast.stmt, name: str) -> ast.expr | None:
    """``r`` where the statement is ``name += r``, ``name = name + r`` or ``name = r + name``."""
    if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
        target, terms = statement.target, [statement.value]
    elif _assigned(statement) and _is_add(statement.value):
        target, terms = statement.targets[0], [statement.value.left, statement.value.right]
    else:
        return None
    if not _is_name(target, name):
        return None
    others = [term for term in terms if not _is_name(term, name)]
    # With one term left over, `name` must have been the other one, and r must not mention it.
    return others[0] if len(others) == 1 and name not in _names(others[0]) else None


def _name_nodes(node: ast.AST) -> Iterator[ast.Name]:
    return (child for child in ast.walk(node) if isinstance(child, ast.Name))


def _names(node: ast.AST) -> set[str]:
    return {child.id for child in _name_nodes(node)}


def _loads(node: ast.AST, name: str) -> int:
    return sum(child.id == name and isinstance(child.ctx, ast.Load) for child in _name_nodes(node))
