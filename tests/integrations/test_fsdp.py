"""FSDP1, FSDP2 and HSDP: a converted model learns on ranks what it learns in one process."""

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
    fully_sharded_data_parallel,
)
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.func import functional_call

import truth
from integrations import stack
from ranks import run_on_ranks
from shuffle_batchnorm import ShuffledEncoder, set_shuffle_state, synchronize_running_stats

Result = tuple[list[Tensor], dict[str, Tensor]]


def _trained(net: nn.Module) -> Result:
    outputs = stack.train(net, net, [stack.own_data(step) for step in range(stack.STEPS)])
    state: dict[str, Any] = get_model_state_dict(
        net, options=StateDictOptions(full_state_dict=True)
    )
    return outputs, state


def _shard(net: nn.Module, per_layer: bool = True, **options: Any) -> nn.Module:
    if per_layer:
        for module in list(net.modules()):
            if list(module.parameters(recurse=False)):
                fully_shard(module, **options)
    fully_shard(net, **options)
    return net


def _fsdp2(mode: str, per_layer: bool) -> Result:
    net = _shard(stack.model(mode, stack.GROUPS), per_layer)
    outputs, state = _trained(net)
    synchronize_running_stats(net)
    for name, buffer in net.named_buffers():
        total = buffer.double().clone()
        dist.all_reduce(total)
        stack.close(total / dist.get_world_size(), buffer.double(), name)
    return outputs, state


@pytest.mark.parametrize("per_layer", [False, True], ids=["whole", "per layer"])
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp2(world_size: int, mode: str, per_layer: bool) -> None:
    """Catches a sharded parameter in a kernel, and an output that its in-place ReLU unhooks."""
    stack.check(run_on_ranks(world_size, _fsdp2, mode, per_layer), mode)


def _mixed() -> Result:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = _shard(stack.model("regroup", stack.GROUPS).float(), mp_policy=policy)
    y = net(stack.own_data(0).float())
    stack.loss_of(y).backward()
    gradients = {n: p.grad.full_tensor() for n, p in net.named_parameters()}  # type: ignore[union-attr]
    return [y.detach()], gradients | dict(net.named_buffers())


def test_fsdp2_in_mixed_precision() -> None:
    """Catches running statistics that lose the digits that the parameters lose for a call."""
    results = run_on_ranks(2, _mixed)
    net = stack.model("regroup", 2 * stack.GROUPS).float()
    low = {name: p.detach().bfloat16().requires_grad_() for name, p in net.named_parameters()}
    y = functional_call(net, low, stack.data(0, 2).bfloat16())
    stack.loss_of(y).backward()
    outputs = torch.cat([outputs[0] for outputs, _ in results])
    assert outputs.dtype == y.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, y, rtol=0.02, atol=0.02)
    for name, parameter in low.items():
        wanted = truth.gradient(parameter).float()
        assert (results[0][1][name] - wanted).norm() <= 0.02 * wanted.norm() + 0.02
    for name, buffer in net.named_buffers():
        got = torch.stack([state[name] for _, state in results])
        assert got.dtype == buffer.dtype
        mean = got.double().mean(dim=0).to(buffer.dtype)
        torch.testing.assert_close(mean, buffer, rtol=1e-3, atol=1e-3)


def _hsdp(mode: str, of_shards: bool) -> Result:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = stack.model(mode, stack.GROUPS, mesh["shard"] if of_shards else None)
    return _trained(_shard(net, mesh=mesh))


@pytest.mark.parametrize("of_shards", [False, True], ids=["all ranks", "shard dimension"])
@pytest.mark.parametrize("mode", ["sync", "regroup"])
def test_hsdp(mode: str, of_shards: bool) -> None:
    """Catches statistics in another group than the one asked for: all ranks, or one replica's."""
    stack.check(run_on_ranks(4, _hsdp, mode, of_shards), mode, replicas=2 if of_shards else 1)


def _on_cpu(state: Any, *_: Any) -> Any:
    """Let FSDP1 run without an accelerator, which its code can do and its constructor refuses."""
    state._device_handle = _FSDPDeviceHandle.from_device(torch.device("cpu"))
    return state


def _wrapped(net: nn.Module, **options: Any) -> nn.Module:
    warnings.filterwarnings("ignore", "The passed-in `module` is on CPU")
    with mock.patch.object(fully_sharded_data_parallel, "_init_device_handle", _on_cpu):
        return FullyShardedDataParallel(
            net, auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}), **options
        )


def _fsdp1(mode: str, use_orig_params: bool) -> Result:
    net = stack.model(mode, stack.GROUPS)
    return _trained(_wrapped(net, use_orig_params=use_orig_params))


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("mode", ["sync", "regroup"])
def test_fsdp1(mode: str, use_orig_params: bool) -> None:
    stack.check(run_on_ranks(2, _fsdp1, mode, use_orig_params), mode)


def _mixed_fsdp1() -> list[torch.dtype]:
    warnings.filterwarnings("ignore", "Both mixed precision and an auto_wrap_policy were specified")
    low = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    net = _wrapped(stack.model("regroup", stack.GROUPS).float(), mixed_precision=low)
    y = net(stack.own_data(0).float())
    stack.loss_of(y).backward()
    return [y.dtype, *(b.dtype for name, b in net.named_buffers() if "running" in name)]


def test_fsdp1_in_mixed_precision_takes_the_layers_for_batch_norm() -> None:
    """Catches running statistics in bfloat16, in which steps of 0.1 % are lost."""
    for first, *others in run_on_ranks(2, _mixed_fsdp1):
        assert first == torch.bfloat16
        assert others == [torch.float32] * 4


def _shuffled(sharded: bool) -> Result:
    set_shuffle_state((7, 0))
    net = ShuffledEncoder(stack.model("local", stack.GROUPS))
    if sharded:
        return _trained(_shard(net))
    # Each rank's own model, the gradients averaged by hand.
    xs = [stack.own_data(step) for step in range(stack.STEPS)]
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(_average)
    return stack.train(net, net, xs), dict(net.state_dict())


def _average(parameter: Tensor) -> None:
    dist.all_reduce(parameter.grad)
    assert parameter.grad is not None
    parameter.grad /= dist.get_world_size()


def test_a_shuffled_encoder_under_fsdp2() -> None:
    """Catches a warning of the hooks that FSDP2 has inside, and sharded layers that go astray."""
    sharded, plain = (run_on_ranks(2, _shuffled, how) for how in (True, False))
    for (outputs, state), (wanted, wanted_state) in zip(sharded, plain, strict=True):
        for got, want in zip(outputs, wanted, strict=True):
            stack.close(got, want)
        for name, want in wanted_state.items():
            stack.close(state[name], want)
