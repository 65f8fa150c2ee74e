"""The layer under torch's tracers: a node in torch.fx, a clear word to torch.jit, one count."""

import copy
import pickle
import re
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, shuffle_batch_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
]
MODES = pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])


def _net(mode: str = "regroup", groups: int = 2) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    return ShuffleBatchNorm.convert_shuffle_batchnorm(net, mode=mode, groups=groups)


class Extractor(fx.Tracer):
    """Keeps the qualified name of the module behind each node, as torchvision's tracer does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind == "call_module":
            self.names[str(target)] = proxy.node.name
        return proxy


@MODES
@pytest.mark.parametrize("training", [True, False])
def test_fx_traces_a_layer_as_a_node(mode: str, training: bool) -> None:
    """Catches a TypeError about a Proxy, and a graph that computes something else."""
    net = _net(mode).train(training)
    graph = fx.symbolic_trace(net)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == ["0", "1", "2", "3"]
    x = torch.randn(4, 3, 6, 6)
    got = graph(x)
    moved = [b.clone() for b in net.buffers()]  # which the graph shares
    twin = _net(mode).train(training)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(got, twin(x)) if training else torch.equal(got, net(x))
    assert moved[2] == int(training)
    with torch.no_grad():
        assert torch.equal(graph.eval()(x), net.eval()(x))


def test_other_tracers_find_the_layers_path() -> None:
    """Catches a node without the layer's name, by which feature extractors choose."""
    tracer = Extractor()
    net = nn.ModuleDict({"body": _net(), "head": ShuffleBatchNorm(4, mode="local")})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["head"](self.parts["body"](x))  # type: ignore[no-any-return]

    tracer.trace(Model())
    assert tracer.names.keys() == {*(f"parts.body.{i}" for i in range(4)), "parts.head"}


class Doubling(ShuffleBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_fx_runs_hooks_and_subclasses_once() -> None:
    """Catches what is recorded in a graph and run in its node again."""
    net = nn.Sequential(Doubling(3, mode="local"), nn.BatchNorm2d(3))
    ShuffleBatchNorm.convert_shuffle_batchnorm(net, mode="regroup", groups=2)
    for layer in net:
        layer.register_forward_hook(lambda _module, _inputs, output: output * 3)
        layer.register_forward_pre_hook(lambda _module, inputs: inputs[0] + 1)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(fx.symbolic_trace(net)(x), net(x))
    twin = pickle.loads(pickle.dumps(ShuffleBatchNorm(3)))
    for layer in (twin, copy.deepcopy(twin)):
        assert [n.op for n in fx.symbolic_trace(nn.Sequential(layer)).graph.nodes][
            1
        ] == "call_module"
    reverted = ShuffleBatchNorm.revert_shuffle_batchnorm(net)
    assert "__module__" not in vars(reverted.get_submodule("1"))


def test_fx_traces_layers_with_an_activation_whole() -> None:
    """Catches an activation that is lost in the graph."""

    class BatchNormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, input: Tensor) -> Tensor:
            return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]

    net = nn.Sequential(BatchNormAct(3))
    ShuffleBatchNorm.convert_shuffle_batchnorm(net, mode="regroup", groups=2)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(fx.symbolic_trace(net)(x), net(x))
    assert net(x).min() == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_scripting_says_what_to_do(training: bool, nested: bool) -> None:
    """Catches an error from inside the script compiler that names lines of this library."""
    model = _net().train(training) if nested else ShuffleBatchNorm(4).train(training)
    text = "torch.jit.script can't take a ShuffleBatchNorm: .*revert_shuffle_batchnorm"
    with pytest.raises(RuntimeError, match=f"^shuffle_batch_norm: {text}"):
        torch.jit.script(model)
    if nested:
        torch.jit.script(ShuffleBatchNorm.revert_shuffle_batchnorm(model))


def _dual(net: nn.Module, x: Tensor, function: Any = None) -> Any:
    with forward_ad.dual_level():
        net(x)  # which has no tangent
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return function(dual, None, None, training=True, groups=2) if function else net(dual)


@pytest.mark.parametrize(
    ("run", "tool"),
    [
        (torch.jit.trace, "torch.jit.trace"),
        (lambda net, x: torch.func.vmap(net)(x[None]), "torch.func"),
        (lambda net, x: torch.func.grad(lambda y: net(y).sum())(x), "torch.func"),
        (lambda net, x: torch.func.jvp(net, (x,), (x,)), "forward-mode AD"),
        (_dual, "forward-mode AD"),
        (partial(_dual, function=shuffle_batch_norm), "forward-mode AD"),
    ],
    ids=["trace", "vmap", "grad", "jvp", "dual", "function"],
)
def test_transforms_say_what_to_do(run: Any, tool: str) -> None:
    """Catches errors from inside aten, and a derivative without the statistics' part."""
    net, x = _net(), torch.randn(4, 3, 6, 6)
    net(x)  # so that this kind of call is known
    text = f"{re.escape(tool)} can't take a ShuffleBatchNorm: in training mode .*revert_shuffle_ba"
    with pytest.raises(RuntimeError, match=f"^shuffle_batch_norm: {text}"):
        run(net, x)
    assert net(x).shape == (4, 4, 4, 4)
    ShuffleBatchNorm.revert_shuffle_batchnorm(net.eval())
    torch.jit.trace(net, x)
    torch.func.jvp(net, (x,), (x,))


def test_data_parallel_says_what_to_do() -> None:
    """Catches replicas in threads that would each normalise by themselves, without a word."""
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel can't take .*DistributedDataParal"):
        _net()[1]._replicate_for_data_parallel()  # type: ignore[index]
    assert _net().eval()[1]._replicate_for_data_parallel() is not None  # type: ignore[index]


@pytest.mark.parametrize(
    ("use_reentrant", "warm", "backend"),
    [
        (False, False, "aot_eager"),
        (True, False, "aot_eager"),
        (False, True, "inductor"),  # once compiled, no Python code is run again
        (True, True, "inductor"),
    ],
)
def test_a_checkpoint_around_compiled_code_raises(
    use_reentrant: bool, warm: bool, backend: str
) -> None:
    """Catches running statistics that move twice, whatever was compiled before."""
    torch._dynamo.reset()
    net = _net("local")
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    if warm:
        compiled(x).sum().backward()
    y = checkpoint(compiled, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="checkpoint around compiled code would move"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_so_does_the_function(use_reentrant: bool) -> None:
    """Catches running statistics of the function that move twice."""
    torch._dynamo.reset()
    buffers = torch.zeros(3), torch.ones(3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return shuffle_batch_norm(x.sin(), *buffers, training=True, mode="local", groups=2).tanh()

    x = torch.randn(4, 3, requires_grad=True)
    run(x).sum().backward()
    assert buffers[0].abs().min() > 0
    y = checkpoint(run, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="checkpoint around compiled code would move"):
        y.sum().backward()


@MODES
def test_compiled_layers_count_as_eager_ones(mode: str) -> None:
    """Catches batches that the operator in the graph counts twice, or not at all."""
    torch._dynamo.reset()
    net, eager = _net(mode), _net(mode)
    eager.load_state_dict(net.state_dict())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 6, 6)
    for _ in range(3):
        compiled(x).square().sum().backward()
        eager(x)
    for (name, got), want in zip(net.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=name)
    assert int(net[1].num_batches_tracked) == 3  # type: ignore[index]


def test_a_checkpoint_inside_compiled_code_counts_once() -> None:
    """Catches an error, or a second count, where the checkpoint is part of what is compiled."""
    torch._dynamo.reset()
    net = _net("local")
    compiled = torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), fullgraph=True)
    compiled(torch.randn(4, 3, 6, 6, requires_grad=True)).sum().backward()
    assert int(net[1].num_batches_tracked) == 1  # type: ignore[index]


@pytest.mark.parametrize("groups", [1, 2])
def test_compiling_says_that_nothing_is_shuffled(groups: int) -> None:
    """Catches silence where no Python code is left to say it."""
    torch._dynamo.reset()
    compiled = torch.compile(_net("regroup", groups), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compiled(torch.randn(4, 3, 6, 6))
    texts = {str(w.message) for w in caught}
    assert len(texts) == (groups == 1)
    assert all("so mode 'regroup' shuffles nothing" in text for text in texts)


@torch.no_grad()
def _train_step(mode: str) -> list[float]:
    net = _net(mode)
    graph = fx.symbolic_trace(net)
    torch.manual_seed(torch.distributed.get_rank())
    x = torch.randn(4, 3, 6, 6)
    reference = _net(mode)
    reference.load_state_dict(net.state_dict())
    return [float((graph(x) - reference(x)).abs().max())]


def test_a_graph_communicates_as_the_model() -> None:
    """Catches a traced layer that normalises alone on ranks."""
    assert run_on_ranks(2, _train_step, "regroup") == [[0.0], [0.0]]


def test_the_operators_text_names_the_call() -> None:
    """Catches an operator that is run inside a backward pass without a word."""
    zero, device = torch.ops.shuffle_batchnorm.zero_outside_backward, torch.device("cpu")
    assert torch.equal(zero(device), torch.tensor(0))
    torch.library.opcheck(zero.default, (device,))
    y = torch.ones(1, requires_grad=True) * 2
    y.register_hook(lambda _: zero(device))
    with pytest.raises(RuntimeError, match=re.escape("shuffle_batch_norm: a compiled layer")):
        y.backward()


def test_another_converter_is_noticed() -> None:
    """Catches layers that SyncBatchNorm's converter replaces without a word."""
    net = _net()
    with pytest.warns(UserWarning, match="convert_sync_batchnorm replaces ShuffleBatchNorm") as w:
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert len(w) == 2
    assert isinstance(synchronised.get_submodule("1"), nn.SyncBatchNorm)


def test_the_attribute_that_it_asks_for_is_the_users() -> None:
    """Catches an attribute of quantisation that can't be set, copied or asked for."""
    net = _net()
    layer = net.get_submodule("1")
    assert not hasattr(layer, "qconfig")
    assert "qconfig" not in vars(copy.deepcopy(layer))
    layer.qconfig = "a config"  # type: ignore[assignment]
    assert copy.deepcopy(layer).qconfig == "a config"
    assert pickle.loads(pickle.dumps(layer)).qconfig == "a config"
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


def test_the_package_can_be_imported_again() -> None:
    """Catches an operator that may be defined once in a process, where notebooks reload modules."""
    program = (
        "import sys, shuffle_batchnorm\n"
        "for name in [n for n in sys.modules if n.startswith('shuffle_batchnorm')]:\n"
        "    del sys.modules[name]\n"
        "import shuffle_batchnorm\n"
        "print(shuffle_batchnorm.ShuffleBatchNorm(3).groups)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "1\n"
