"""A PyTorch model as a line of units: what a pipeline can cut, named as in the model.

``torch.fx`` records the calls of the model's forward. A unit begins at each call of a module and at
each use of a parameter, and takes the calls without parameters that follow: cutting between those
would gain nothing. The children of an ``nn.Sequential`` are units whatever is inside.

It is recorded twice, since a constant such as dropout's probability may depend on whether the model
is in training mode: :func:`perform` takes those of the mode that it finds.

What the record cannot tell, one run on a sample can: which calls draw random numbers, and which
write into tensors of earlier units. The latter join those units, since an autograd graph cannot be
cut between a tensor and a change of it.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from hvdx.errors import PlanError
from hvdx.pipeline import ir


@dataclass
class Unit:
    """A run of calls that stay together.

    Attributes:
        name: the module's (a second call's has ``#2``), or the call's.
        nodes: the calls, in order.
        params: name in the model -> parameter, of those it uses.
        tied: those of them that other units use, too.
        reads: values of earlier units, or inputs of the model, that it uses.
        makes: its values that later units use, or that the model returns.
        random: whether it draws random numbers.
    """

    name: str
    nodes: list[fx.Node]
    params: dict[str, nn.Parameter] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    reads: list[str] = field(default_factory=list)
    makes: list[str] = field(default_factory=list)
    random: bool = False


@dataclass
class Graph:
    """The units of a model and the values that pass between them.

    Attributes:
        model: the module.
        units: in order.
        inputs: values that the caller gives -> forward's parameter.
        result: what forward returns: nested containers of ``fx.Node``.
        kinds: by value, how its leaves travel; see :func:`flat`.
        fixed: by value that cannot travel, what it is.
        line: the units as the planner sees them.
        changing: names of the buffers of modules whose forward writes into theirs.
    """

    model: nn.Module
    units: list[Unit]
    inputs: dict[str, str]
    result: Any
    kinds: dict[str, tuple[Any, list[Any]]] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    line: Any = None
    changing: list[str] = field(default_factory=list)

    def written(self, units: Sequence[Unit]) -> list[str]:
        """Return those of :attr:`changing` that ``units`` have."""
        nodes = [node for unit in units for node in unit.nodes]
        return [name for name in self.changing if any(_within(name, node) for node in nodes)]

    def bind(self, given: Any) -> dict[str, Any]:
        """Give the inputs of forward their values: a tuple's in order, a dictionary's by name."""
        try:
            bound = inspect.signature(self.model.forward).bind(*arguments(given)[0],
                                                               **arguments(given)[1])  # fmt: skip
        except TypeError as error:
            raise TypeError(f"the model's forward does not take what is given: {error}") from None
        if set(bound.arguments) != set(self.inputs.values()):
            raise TypeError(
                f"the pipeline was made for inputs {list(self.inputs.values())}, given are "
                f"{list(bound.arguments)}; give sample= what step() and the call get"
            )
        return {name: bound.arguments[argument] for name, argument in self.inputs.items()}

    def move(self, unit: Unit, device: torch.device) -> None:
        """Move the modules, parameters and buffers of ``unit``."""
        for node in unit.nodes:
            if node.op == "call_module":
                self.model.get_submodule(str(node.target)).to(device)
            for each in node.all_input_nodes:
                if each.op == "get_attr":
                    tensor = operator.attrgetter(str(each.target))(self.model)
                    tensor.data = tensor.data.to(device)

    def buffer(self, name: str) -> torch.Tensor:
        """Return one of :meth:`written`."""
        return self.model.get_buffer(name)

    def set_buffer(self, name: str, value: torch.Tensor) -> None:
        """Put another tensor in its place."""
        path, _, own = name.rpartition(".")
        setattr(self.model.get_submodule(path), own, value)

    def results(self) -> list[str]:
        """Name the values that the last stage needs behind its units."""
        return result_names(self)

    def perform(
        self, unit: Unit, values: dict[str, Any], aliases: Mapping[str, Any], train: bool
    ) -> None:
        """Compute a unit; see :func:`perform`. Modules know their mode themselves."""
        perform(self, unit, values, aliases)

    def entries(self, unit: Unit) -> dict[str, Any]:
        """Return by name what ``unit`` uses of the model's state, and its other buffers."""
        held = dict(self.model.named_buffers(remove_duplicate=False))
        held.update(self.model.state_dict(keep_vars=True))
        own = {id(p) for p in unit.params.values()}
        return {
            name: value for name, value in held.items()
            if id(value) in own or any(_within(name, node) for node in unit.nodes)
        }  # fmt: skip

    def load(self, entries: Mapping[str, Any]) -> None:
        """Take values of such entries, of the same model elsewhere."""
        saved = self.model.state_dict().keys()
        told = {name: value for name, value in entries.items() if name in saved}
        self.model.load_state_dict(told, strict=False)
        with torch.no_grad():
            for name in entries.keys() - saved:
                self.model.get_buffer(name).copy_(entries[name])

    def owner(self, name: str) -> int:
        """Return the first unit that uses an entry of the model's ``state_dict()``; 0 if none."""
        held = self.model.state_dict(keep_vars=True)[name]
        for index, unit in enumerate(self.units):
            if any(held is p for p in unit.params.values()):
                return index
            if any(_within(name, node) for node in unit.nodes):
                return index
        return 0


def arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split a batch into positional and named arguments of forward."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else ((given,), {})


def flat(value: Any) -> tuple[Any, list[Any], list[torch.Tensor]]:
    """Return structure, kinds of leaves and tensors of a value; numbers become tensors, too.

    The structure of a single tensor is None: such are most values, and nothing is searched then.
    """
    if type(value) is torch.Tensor:
        return None, [torch.Tensor], [value]
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda each: isinstance(each, torch.Size))
    kinds: list[Any] = []
    tensors: list[torch.Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            kinds.append(torch.Tensor)
            tensors.append(leaf)
        elif isinstance(leaf, (bool, int, float, torch.Size)):
            kinds.append(type(leaf))
            dtype = torch.float64 if isinstance(leaf, float) else torch.int64
            tensors.append(torch.tensor(leaf, dtype=dtype))
        elif leaf is None or isinstance(leaf, (str, torch.dtype, torch.device)):
            kinds.append(("same", leaf))
        else:
            raise TypeError(f"a {type(leaf).__name__}, which cannot travel between stages")
    return spec, kinds, tensors


def unflat(spec: Any, kinds: Iterable[Any], tensors: Iterable[torch.Tensor]) -> Any:
    """Undo :func:`flat`, taking the tensors it needs from an iterator."""
    if spec is None:
        return next(iter(tensors))
    leaves = []
    for kind in kinds:
        if isinstance(kind, tuple):
            leaves.append(kind[1])
        elif kind is torch.Tensor:
            leaves.append(next(tensors))  # type: ignore[call-overload]
        else:
            leaves.append(kind(next(tensors).tolist()))  # type: ignore[call-overload]
    return pytree.tree_unflatten(leaves, spec)


class _Tracer(fx.Tracer):
    """Records calls; keeps whole what PyTorch's own tracer does, and what the user names."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        super().__init__(param_shapes_constant=True)
        self._leaves = leaves
        self.at: list[str] = []  # the modules it is in

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        named = path in self._leaves or isinstance(
            module, tuple(leaf for leaf in self._leaves if isinstance(leaf, type))
        )
        child = isinstance(self.root, nn.Sequential) and "." not in path
        return named or child or super().is_leaf_module(module, path)

    def call_module(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(module)
        self.at.append(path)
        result = super().call_module(module, forward, args, kwargs)
        self.at.pop()  # not on errors: then it tells where
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["of"] = self.at[-1] if self.at else ""
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record that buffers are read: what is made of them, a part of a mask, may change."""
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter):
            for name, buffer in self.root.named_buffers():
                if buffer is attr_val and name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                if buffer is attr_val:
                    return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Record what a module asserts; what else it decides by values cannot be recorded."""
        frame = inspect.currentframe()
        asker = frame and frame.f_back and frame.f_back.f_back  # beyond Proxy.__bool__
        if asker is None or not _in_assertion(asker):
            return super().to_bool(obj)
        where = f"{asker.f_code.co_filename}:{asker.f_lineno}"
        self.create_proxy("call_function", torch._assert, (obj, f"asserted in {where}"), {})
        return True

    @contextlib.contextmanager
    def makers(self) -> Iterator[None]:
        """Record ``torch.arange(n)`` and the like, too: of an unknown ``n``, but of no tensor."""
        before = {name: getattr(torch, name) for name in _MAKERS}
        for name, make in before.items():
            setattr(torch, name, self._recorded(make))
        try:
            yield
        finally:
            for name, make in before.items():
                setattr(torch, name, make)

    def _recorded(self, make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = pytree.tree_leaves((args, kwargs))
            if any(isinstance(each, fx.Proxy) and each.tracer is self for each in given):
                return self.create_proxy("call_function", make, args, kwargs)
            return make(*args, **kwargs)

        return call


_MAKERS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
           "randperm", "tensor", "tril_indices", "triu_indices", "zeros")  # fmt: skip


def _in_assertion(frame: types.FrameType) -> bool:
    """Tell whether the instruction that ``frame`` is at decides if an assertion fails."""
    code = list(dis.get_instructions(frame.f_code))
    places = {each.offset: index for index, each in enumerate(code)}
    here = places.get(frame.f_lasti)
    if here is None or not code[here].opname.startswith("POP_JUMP"):
        return False
    onward = [here + 1, places.get(code[here].argval, here)]
    return any(code[place].opname == "LOAD_ASSERTION_ERROR" for place in onward)


def traced(model: nn.Module, sample: Any, leaves: Sequence[Any] = ()) -> Graph:
    """Make the units of ``model`` and learn about them by one run on ``sample``.

    Args:
        model: any module that ``torch.fx`` can trace.
        sample: a batch, or part of one, as ``forward`` takes it.
        leaves: classes, or paths, of modules that shall be units as a whole.

    Raises:
        PlanError: the model cannot be traced; the message names the module and the remedy.
    """
    graph = _grouped(model, _recorded(model, sample, leaves))
    sizes = _learn(graph, sample)
    _connect(graph)
    graph.line = _line(graph, sizes)
    return graph


def _line(graph: Graph, sizes: Mapping[str, int]) -> ir.Graph:
    """Describe the units for the planner."""
    units = [
        ir.Unit(
            unit.name,
            tuple(unit.reads),
            {name: sizes[name] for name in unit.makes},
            {name: p.numel() * p.element_size() for name, p in unit.params.items()},
            kept_bytes=sum(sizes[node.name] for node in unit.nodes),
            uses_rng=unit.random,
        )
        for unit in graph.units
    ]
    inputs = {name: sizes[name] for name in graph.inputs}
    outputs = tuple(dict.fromkeys(result_names(graph)))
    line = ir.Graph(tuple(units), inputs, outputs, _inside(graph))
    return _bound(graph, line) if graph.fixed else line


def _inside(graph: Graph) -> dict[str, str]:
    """Tell of the modules and calls that are no units in which ones they are, and why."""
    told: dict[str, str] = {}
    for unit in graph.units:
        for node in unit.nodes:
            target = str(node.target)
            if node.op == "call_module":
                told.setdefault(target, f"unit {unit.name!r}, which it is part of, is kept whole, "
                                "since something in it changes a tensor in place")  # fmt: skip
                for path, _ in graph.model.get_submodule(target).named_modules():
                    told.setdefault(f"{target}.{path}", f"it is inside {target!r}, which is one "
                                    "unit: cut before that or after it")  # fmt: skip
            else:
                told.setdefault(node.name, f"it goes with unit {unit.name!r}, as calls without "
                                "parameters do with what is before them")  # fmt: skip
    return told


def _bound(graph: Graph, line: ir.Graph) -> ir.Graph:
    """Forbid the cuts that a value would cross which cannot travel."""
    units, inside = list(line.units), dict(line.inside)
    for cut in range(1, len(units)):
        for value in line.live(cut):
            if value in graph.fixed:
                units[cut] = replace(units[cut], joined=True)
                inside[units[cut].name] = (
                    f"or {value!r} would cross the cut, which is {graph.fixed[value]}"
                )
    return replace(line, units=tuple(units), inside=inside)


def _recorded(model: nn.Module, sample: Any, leaves: Sequence[Any]) -> fx.Graph:
    bound = inspect.signature(model.forward).bind(*arguments(sample)[0], **arguments(sample)[1])
    given = set(bound.arguments)
    parameters = inspect.signature(model.forward).parameters
    absent = {name: each.default for name, each in parameters.items()
              if name not in given and each.default is not each.empty}  # fmt: skip
    graph, other = (_record(model, leaves, absent, training) for training in (True, False))
    _pair(model, graph, other)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target not in given:
            _erase(graph, node)  # it was recorded with its default, and checks only that
    return graph


def _record(
    model: nn.Module, leaves: Sequence[Any], absent: dict[str, Any], training: bool
) -> fx.Graph:
    tracer = _Tracer(leaves)
    try:
        with mode(model, training), tracer.makers():
            return tracer.trace(model, concrete_args=absent or None)
    except Exception as error:
        path = tracer.at[-1] if tracer.at else ""
        raise PlanError(
            f"{_whereabouts(model, path)} cannot be traced to find where to cut: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
            f"In hvd.Pipeline {_remedy(model, path)}"
        ) from error


def _whereabouts(model: nn.Module, path: str) -> str:
    kind = type(model.get_submodule(path)).__name__
    return f"module {path!r} ({kind})" if path else f"{kind}.forward"


def _remedy(model: nn.Module, path: str) -> str:
    if path:
        return f"leaves=[{type(model.get_submodule(path)).__name__}] keeps it in one piece"
    return (
        "move what cannot be traced into a submodule, here Inner: leaves=[Inner] keeps it in "
        "one piece; or make the model an nn.Sequential of its parts"
    )


def _pair(model: nn.Module, graph: fx.Graph, other: fx.Graph) -> None:
    """Note what constants the calls of ``graph``, recorded in training mode, have in ``other``.

    Raises:
        PlanError: the two make different calls.
    """
    twins: dict[fx.Node, fx.Node] = {}
    for node, its in itertools.zip_longest(graph.nodes, other.nodes):
        told = node and its and _told_as(model, node, its, twins)
        if told is None:
            path = (node or its).meta["of"]
            raise PlanError(
                f"{_whereabouts(model, path)} makes other calls in training mode than in "
                f"inference mode, first {node and node.name!r} for {its and its.name!r}: a "
                f"pipeline needs one line of calls. In hvd.Pipeline {_remedy(model, path)}"
            )
        twins[its] = node
        if told != (node.args, node.kwargs):
            node.meta["inference"] = told


def _told_as(
    model: nn.Module, node: fx.Node, its: fx.Node, twins: Mapping[fx.Node, fx.Node]
) -> Any:
    """Return the arguments of ``its``, of nodes as in ``node``; None if more differs than those."""
    if node.op == its.op == "get_attr" and node.target != its.target:
        one, two = (operator.attrgetter(str(each.target))(model) for each in (node, its))
        return (node.args, node.kwargs) if torch.equal(one, two) else None  # made by forward
    told = fx.node.map_arg((its.args, its.kwargs), twins.__getitem__)
    own = (node.args, node.kwargs)
    alike = told == own if node.op == "output" else _nodes(told) == _nodes(own)
    return told if alike and (node.op, node.target) == (its.op, its.target) else None


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _grouped(model: nn.Module, recorded: fx.Graph) -> Graph:
    params = dict(model.named_parameters(remove_duplicate=False))
    canonical = {id(p): name for name, p in model.named_parameters()}
    units: list[Unit] = []
    inputs: dict[str, str] = {}
    head: list[fx.Node] = []
    result: Any = None
    names: dict[str, int] = {}
    for node in recorded.nodes:
        if node.op == "placeholder":
            inputs[node.name] = str(node.target)
            continue
        if node.op == "output":
            result = node.args[0]
            continue
        if node.op == "get_attr":
            continue  # read where it is used
        used = _parameters(model, node, params)
        if node.op == "call_module" or used:
            name = str(node.target) if node.op == "call_module" else node.name
            names[name] = names.get(name, 0) + 1
            name = name if names[name] == 1 else f"{name}#{names[name]}"
            units.append(Unit(name, [*head, node]))
            head = []
        elif units:
            units[-1].nodes.append(node)
        else:
            head.append(node)
        if used:
            units[-1].params.update({canonical[id(p)]: p for p in used})
    if not units:
        raise PlanError(f"{type(model).__name__} calls no module and uses no parameter")
    seen: dict[int, int] = {}
    for unit in units:
        for p in unit.params.values():
            seen[id(p)] = seen.get(id(p), 0) + 1
    for unit in units:
        unit.tied = {name for name, p in unit.params.items() if seen[id(p)] > 1}
        for node in unit.nodes if unit.tied else ():
            if node.op == "call_module":
                module = model.get_submodule(str(node.target))
                named = module.named_parameters(remove_duplicate=False)
                node.meta["tied"] = {
                    local: canonical[id(p)] for local, p in named if canonical[id(p)] in unit.tied
                }
            for each in node.all_input_nodes:
                if each.op == "get_attr" and str(each.target) in params:
                    each.meta["name"] = canonical[id(params[str(each.target)])]
    return Graph(model, units, inputs, result)


def _parameters(model: nn.Module, node: fx.Node, params: Mapping[str, Any]) -> list[Any]:
    if node.op == "call_module":
        return list(model.get_submodule(str(node.target)).parameters())
    return [params[str(each.target)] for each in node.all_input_nodes
            if each.op == "get_attr" and str(each.target) in params]  # fmt: skip


def _within(name: str, node: fx.Node) -> bool:
    if node.op == "call_module":
        return name.startswith(f"{node.target}.")
    return any(each.op == "get_attr" and each.target == name for each in node.all_input_nodes)


def _nodes(nested: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(nested, found.append)
    return found


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put all modules in training or inference mode for a while."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes.items():
            module.training = before


def _learn(graph: Graph, sample: Any) -> dict[str, int]:
    """Run the sample: find random units, join units that change each other's tensors.

    Returns:
        Bytes of each value.
    """
    model = graph.model
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    values = graph.bind(pytree.tree_map_only(torch.Tensor, torch.clone, sample))
    versions = {name: _versions(value) for name, value in values.items()}
    maker = dict.fromkeys(values, 0)
    joins: list[tuple[int, int]] = []
    try:
        with mode(model, True), torch.random.fork_rng(), torch.no_grad():
            for index, unit in enumerate(graph.units):
                before = _random_states()
                _named_perform(graph, unit, values)
                unit.random = _random_states() != before
                changed = [maker[name] for name, seen in versions.items()
                           if _versions(values[name]) != seen]  # fmt: skip
                if changed and min(changed) < index:
                    joins.append((min(changed), index))
                for node in unit.nodes:
                    maker[node.name] = index
                versions = {name: _versions(value) for name, value in values.items()}
    finally:
        changed_buffers = {id(each) for each, saved in buffers.items()
                           if not torch.equal(each, saved)}  # fmt: skip
        with torch.no_grad():
            for buffer, saved in buffers.items():
                buffer.copy_(saved)
    graph.changing = _of_their_modules(model, changed_buffers)
    _join(graph, joins)
    for name, value in values.items():
        try:
            graph.kinds[name] = flat(value)[:2]
        except TypeError as error:
            graph.fixed[name] = str(error)
    return {
        name: sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(value)
                  if isinstance(leaf, torch.Tensor))
        for name, value in values.items()
    }  # fmt: skip


def _of_their_modules(model: nn.Module, changed: set[int]) -> list[str]:
    """Name all buffers of the modules that have one of ``changed``.

    All, since the sample may leave as it was what other batches change.
    """
    names = dict(model.named_buffers(remove_duplicate=False))
    homes = {name.rpartition(".")[0] for name, each in names.items() if id(each) in changed}
    return [name for name in names if name.rpartition(".")[0] in homes]


def _named_perform(graph: Graph, unit: Unit, values: dict[str, Any]) -> None:
    try:
        perform(graph, unit, values, {})
    except Exception as error:
        raise PlanError(
            f"unit {unit.name!r} fails on the sample: {type(error).__name__}: {error}"
        ) from error


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _random_states() -> list[bytes]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.numpy().tobytes() for state in states]


def _join(graph: Graph, joins: Iterable[tuple[int, int]]) -> None:
    """Make one unit of each run of units from the first to the last of a pair."""
    for first, last in sorted(joins, key=lambda pair: -pair[1]):
        last = min(last, len(graph.units) - 1)
        together = graph.units[first : last + 1]
        whole = together[0]
        for unit in together[1:]:
            whole.nodes += unit.nodes
            whole.params.update(unit.params)
            whole.tied |= unit.tied
            whole.random |= unit.random
        graph.units[first : last + 1] = [whole]


def differentiable(graph: Graph) -> set[str]:
    """Name the values that depend on a parameter which requires a gradient."""
    found: set[str] = set()
    for unit in graph.units:
        trained = any(p.requires_grad for p in unit.params.values())
        if trained or not found.isdisjoint(unit.reads):
            found.update(unit.makes)
    return found


def is_smooth(tensor: torch.Tensor) -> bool:
    """Tell whether gradients exist for this dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def batch_norms(graph: Graph, units: Sequence[Unit]) -> dict[str, _BatchNorm]:
    """Name the BatchNorm modules in ``units``."""
    called = {str(node.target) for unit in units for node in unit.nodes if node.op == "call_module"}
    modules = graph.model.named_modules(remove_duplicate=False)
    return {
        name: module
        for name, module in modules
        if isinstance(module, _BatchNorm)
        and any(name == each or name.startswith(f"{each}.") for each in called)
    }


def result_names(graph: Graph) -> list[str]:
    """Name the values that the model returns."""
    return [node.name for node in _nodes(graph.result)]


def result_of(graph: Graph, values: Mapping[str, Any]) -> Any:
    """Return what the model returns, from its values by name."""
    return _plain(fx.node.map_arg(graph.result, lambda node: values[node.name]))


def _plain(nested: Any) -> Any:
    """Turn fx's immutable containers into ordinary ones."""
    if isinstance(nested, dict):
        return {key: _plain(value) for key, value in nested.items()}
    if isinstance(nested, list):
        return [_plain(each) for each in nested]
    if type(nested) is tuple:
        return tuple(_plain(each) for each in nested)
    return nested


def _connect(graph: Graph) -> None:
    """Note what each unit reads from before it and makes for those after it."""
    for index, unit in enumerate(graph.units):
        own = {node.name for node in unit.nodes}
        reads = [each.name for node in unit.nodes for each in node.all_input_nodes
                 if each.op != "get_attr" and each.name not in own]  # fmt: skip
        unit.reads = list(dict.fromkeys(reads))
        for earlier in graph.units[:index]:
            made = {node.name for node in earlier.nodes}
            earlier.makes += [name for name in unit.reads
                              if name in made and name not in earlier.makes]  # fmt: skip
    for unit in graph.units:
        for node in _nodes(graph.result):
            if node in unit.nodes and node.name not in unit.makes:
                unit.makes.append(node.name)
        order = [node.name for node in unit.nodes]
        unit.makes.sort(key=order.index)


def perform(graph: Graph, unit: Unit, values: dict[str, Any], aliases: Mapping[str, Any]) -> None:
    """Compute a unit: read from ``values`` and add to them.

    Args:
        graph: that it is of.
        unit: to compute.
        values: by name.
        aliases: parameter's name -> tensor to use in its place.
    """
    model = graph.model

    def load(node: fx.Node) -> Any:
        if node.op != "get_attr":
            return values[node.name]
        alias = aliases.get(node.meta.get("name", ""))
        return operator.attrgetter(str(node.target))(model) if alias is None else alias

    for node in unit.nodes:
        args, kwargs = fx.node.map_arg(_told(model, node), load)
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            inner = {local: aliases[name] for local, name in node.meta.get("tied", {}).items()
                     if name in aliases}  # fmt: skip
            if inner:
                options = {"tie_weights": False}
                result = torch.func.functional_call(module, inner, args, kwargs, **options)
            else:
                result = module(*args, **kwargs)
            values[node.name] = result
        elif node.op == "call_method":
            values[node.name] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]


def _told(model: nn.Module, node: fx.Node) -> Any:
    """Return the arguments that the call has in the mode that its module is in."""
    if "inference" in node.meta and not model.get_submodule(node.meta["of"]).training:
        return node.meta["inference"]
    return node.args, node.kwargs
