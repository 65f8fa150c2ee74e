"""ShuffledEncoder: transparent, complete, and honest when it does nothing."""

import contextlib
import copy
import io
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meters import received_messages
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import truth
from ranks import run_on_ranks
from shuffle.networks import inputs, network, weights
from shuffle_batchnorm import ShuffleBatchNorm, ShuffledEncoder, batch_shuffle, set_shuffle_state
from shuffle_batchnorm.shuffle.permutations import Key, samples_sent_to


class Encoder(nn.Module):
    """Two inputs, many outputs, constants among both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ShuffleBatchNorm(3, mode="local", groups=2)
        self.head = nn.Linear(3, 2)
        self.width = 2

    def forward(self, x: Tensor, *, index: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.norm(x) * scale
        return {"y": y, "deep": [(index, self.head(y))], "none": None, "width": 2}


def test_state_and_names_are_the_encoders_own() -> None:
    """Catches a prefix in checkpoints, in an optimizer's names, and inside a larger model."""
    encoder = Encoder()
    whole = nn.Module()
    whole.key = ShuffledEncoder(encoder)
    assert list(whole.key.state_dict()) == list(encoder.state_dict())
    assert list(whole.state_dict()) == [f"key.{name}" for name in encoder.state_dict()]
    for get in ("named_parameters", "named_buffers"):
        names = [name for name, _ in getattr(encoder, get)()]
        assert [name for name, _ in getattr(whole.key, get)()] == names
    other = Encoder()
    assert whole.load_state_dict({f"key.{n}": v for n, v in other.state_dict().items()})
    assert torch.equal(encoder.head.weight, other.head.weight)
    assert ShuffledEncoder(Encoder()).load_state_dict(other.state_dict())


class Versioned(nn.Linear):
    """Its state is not what nn.Module makes of it, and has a version."""

    _version = 3

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "bias" not in name}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        assert state_dict._metadata[""]["version"] == 3
        return super().load_state_dict({**state_dict, "bias": torch.ones(2)}, *args, **kwargs)


def test_a_state_of_the_encoders_own_making_is_kept() -> None:
    """Catches a wrapper that saves and loads what the encoder would have changed."""
    shuffled = ShuffledEncoder(Versioned(2, 2))
    state = nn.Linear.state_dict(shuffled.encoder)
    assert list(shuffled.state_dict()) == ["weight"]
    assert shuffled.load_state_dict(state)
    assert torch.equal(shuffled.bias, torch.ones(2))


def test_mode_device_dtype_and_attributes_reach_the_encoder() -> None:
    """Catches a wrapper that only looks like the encoder."""
    encoder = Encoder().eval()
    shuffled = ShuffledEncoder(encoder)
    assert not shuffled.training
    assert shuffled.train().norm.training
    assert encoder.training
    assert shuffled.double().head.weight.dtype == encoder.head.weight.dtype == torch.float64
    assert shuffled.width == 2
    shuffled.head = nn.Linear(3, 7)
    assert encoder.head.out_features == 7
    shuffled.width, shuffled.mine = 3, 4
    assert encoder.width == 3
    assert shuffled.mine == 4
    assert not hasattr(encoder, "mine")
    del shuffled.width, shuffled.mine
    assert not hasattr(encoder, "width")
    with pytest.raises(AttributeError, match="ShuffledEncoder: encoder can't be replaced"):
        shuffled.encoder = Encoder()
    assert shuffled.encoder is encoder
    with pytest.raises(AttributeError, match="nothing"):
        _ = shuffled.nothing
    assert "(head): Linear" in repr(shuffled)


def test_a_child_that_is_called_encoder_is_found() -> None:
    """Catches the wrapper's own name in the way of the model's: tools look names up by parts."""
    model = nn.Module()
    model.encoder, model.head = nn.Sequential(nn.Linear(3, 2)), nn.Linear(2, 2)
    shuffled = ShuffledEncoder(model)
    assert shuffled.encoder is model.encoder
    for name, parameter in shuffled.named_parameters():
        assert shuffled.get_parameter(name) is parameter
    shuffled.encoder = nn.Identity()
    assert isinstance(model.encoder, nn.Identity)


def test_a_process_group_of_the_encoders_own_is_left_alone() -> None:
    """Catches a layer as encoder that loses its group to the wrapper around it."""
    layer = nn.SyncBatchNorm(3)
    layer.process_group = "its own"
    shuffled = ShuffledEncoder(layer)
    assert layer.process_group == "its own"
    assert shuffled.process_group is None


def test_copies_are_whole_and_separate() -> None:
    """Catches a copy whose parameters aren't those of its encoder: MoCo's key encoder is one."""
    shuffled = ShuffledEncoder(Encoder())
    buffer = io.BytesIO()
    torch.save(shuffled, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(shuffled), torch.load(buffer, weights_only=False)):
        twin.head.weight.data.zero_()
        assert twin.encoder.head.weight is twin.head.weight
        assert shuffled.head.weight.abs().sum() > 0
        assert twin(torch.randn(4, 3), index=torch.arange(4))["width"] == 2


def test_all_outputs_come_back_in_order() -> None:
    """Catches an output that stays shuffled (DenseCL#1), and constants that are shuffled."""
    shuffled = ShuffledEncoder(Encoder())
    index = torch.arange(64)
    x = torch.randn(64, 3)
    outputs = shuffled(x, index=index, scale=3.0)
    assert torch.equal(outputs["deep"][0][0], index)
    assert outputs["none"] is None
    # Of 64 samples in new groups, each keeps its direction against its group's mean on average.
    plain = (x - x.mean(dim=0)) / x.std(dim=0)
    assert torch.corrcoef(torch.stack([outputs["y"].flatten(), plain.flatten()]))[0, 1] > 0.9
    own = shuffled.encoder(x, index=index, scale=3.0)["y"]
    assert not torch.allclose(outputs["y"], own)
    assert torch.equal(shuffled.eval()(x, index=index)["y"], shuffled.encoder(x, index=index)["y"])


class Returns(nn.Module):
    """A batch norm whose output is what it is told."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.norm, self.output = nn.BatchNorm1d(3), output

    def forward(self, x: Tensor) -> Any:
        self.norm(x)
        return self.output


@pytest.mark.filterwarnings("ignore:ShuffledEncoder")
def test_outputs_that_cannot_come_back_are_refused() -> None:
    """Catches an output that would be handed on shuffled, because it isn't understood."""
    for output, error in ((object(), TypeError), (torch.tensor(1.0), ValueError)):
        with pytest.raises(error, match="batch_unshuffle: "):
            ShuffledEncoder(Returns(output))(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"batch of 3 samples; the plan is for 4"):
        ShuffledEncoder(Returns(torch.ones(3)))(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (nn.Linear(3, 3), "no batch norm layer"),
        (nn.BatchNorm1d(3), "one rank, and no batch norm layer has virtual groups"),
        (ShuffleBatchNorm(3, mode="sync", groups=2), "layers of the encoder are synchronised"),
        (nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3)), "are synchronised"),
        (ShuffleBatchNorm(3, mode="local", groups=2), None),
        (nn.Sequential(nn.SyncBatchNorm(3), ShuffleBatchNorm(3, groups=2)), None),
    ],
)
def test_it_warns_once_when_it_does_nothing(encoder: nn.Module, reason: str | None) -> None:
    """Catches a silent no-op (CMC#39), a warning at every step, and a false alarm."""
    shuffled, x = ShuffledEncoder(encoder), torch.randn(8, 3)
    # nn.SyncBatchNorm may refuse the CPU.
    refusal = contextlib.suppress(ValueError)
    with warnings.catch_warnings(record=True) as caught, refusal:
        warnings.simplefilter("always")
        shuffled.eval()
        shuffled.train()(x)
        shuffled(x)
    expected = [] if reason is None else [f"ShuffledEncoder: the shuffle does nothing: .*{reason}"]
    assert len(caught) == len(expected)
    for warning, text in zip(caught, expected, strict=True):
        assert re.match(text, str(warning.message))
        assert warning.filename == __file__


def test_outputs_that_need_no_gradient_stay_so() -> None:
    """Catches a key that is detached in the encoder and comes back as a part of the graph."""

    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = ShuffleBatchNorm(3, mode="local", groups=2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.norm(x)
            return {"query": y, "key": y.detach()}

    outputs = ShuffledEncoder(Keys())(torch.randn(8, 3, requires_grad=True))
    assert outputs["query"].requires_grad
    assert not outputs["key"].requires_grad


def _encode(sizes: list[int]) -> Any:
    x = inputs(sizes)[dist.get_rank()].requires_grad_()
    set_shuffle_state((7, 3))
    encoder = ShuffledEncoder(network())
    y = encoder(x)
    (y.square() * weights(y)).sum().backward()
    return y.detach(), x.grad, [p.grad for p in encoder.parameters()]


@pytest.mark.parametrize("sizes", [[4, 4], [3, 5], [6, 6, 6], [4, 3, 5]], ids=str)
def test_shuffled_encoder_equals_one_process(sizes: list[int]) -> None:
    """Catches a gradient that doesn't travel back (moco#67), and groups that aren't mixed."""
    results = run_on_ranks(len(sizes), _encode, sizes)
    xs = [x.requires_grad_() for x in inputs(sizes)]
    everything, plain = torch.cat(xs), network()
    orders = [samples_sent_to(rank, Key(7, 3), sizes) for rank in range(len(sizes))]
    shuffled = torch.cat([plain(everything[order]) for order in orders])
    y = shuffled[torch.argsort(torch.cat(orders))]
    (y.square() * weights(y)).sum().backward()
    close: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y.detach(), **close)
    for x, result in zip(xs, results, strict=True):
        torch.testing.assert_close(result[1], x.grad, **close)
    for k, parameter in enumerate(plain.parameters()):
        total = torch.stack([result[2][k] for result in results]).sum(dim=0)
        torch.testing.assert_close(total, truth.gradient(parameter), **close)


def _under_ddp() -> list[Tensor]:
    x = inputs([4, 4])[dist.get_rank()]
    encoder = ShuffledEncoder(network())
    model = DistributedDataParallel(encoder)
    set_shuffle_state((7, 3))
    for _ in range(2):
        y = model(x)
        (y.square() * weights(y)).sum().backward()
    return [truth.gradient(p) for p in encoder.parameters()]


def test_under_ddp_gradients_are_averages() -> None:
    """Catches messages of the shuffle and of DDP that get in each other's way."""
    first, second = run_on_ranks(2, _under_ddp)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    xs, plain = torch.cat(inputs([4, 4])), network()
    for step in (3, 4):
        for order in (samples_sent_to(rank, Key(7, step), [4, 4]) for rank in range(2)):
            y = plain(xs[order])
            (y.square() * weights(y)).sum().div(2).backward()
    wanted = [truth.gradient(p) for p in plain.parameters()]
    torch.testing.assert_close(first, wanted, rtol=1e-10, atol=1e-10)


def _checkpointed() -> str:
    x = inputs([4, 4])[dist.get_rank()].requires_grad_()
    encoder = ShuffledEncoder(network())
    y: Tensor = checkpoint(encoder, x, use_reentrant=False)
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward()
    batch_shuffle(x)  # the ranks are in step
    return str(caught.value)


def test_a_shuffle_inside_a_checkpoint_is_refused() -> None:
    """Catches a recomputation with another permutation, whose gradients are of other samples."""
    for text in run_on_ranks(2, _checkpointed):
        assert text.startswith("batch_shuffle: an activation checkpoint, or a compiler")


def _evaluates() -> int:
    encoder = ShuffledEncoder(nn.BatchNorm1d(3)).eval()
    x = torch.randn(4, 3)
    with received_messages() as messages:
        assert torch.equal(encoder(x), encoder.encoder(x))
    return len(messages)


def test_evaluation_sends_nothing() -> None:
    """Catches a shuffle in eval mode, where ranks may have batches of any number."""
    assert run_on_ranks(2, _evaluates) == [0, 0]


class _Named(nn.Module):
    """Its outputs come in the order in which their names are given."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.norm, self.names = nn.BatchNorm1d(2), names

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.norm(inputs["a"])
        return {name: inputs[name] for name in self.names}


def _in_another_order(outputs: bool) -> str:
    first = dist.get_rank() == 0
    encoder = ShuffledEncoder(_Named("ab" if first or not outputs else "ba"))
    named = {name: torch.randn(4, 2) for name in ("ab" if first or outputs else "ba")}
    with pytest.raises(ValueError, match="ranks disagree on tree") as caught:
        encoder(**named)
    return str(caught.value)


@pytest.mark.parametrize("outputs", [False, True])
def test_an_encoder_with_names_in_another_order_is_told(outputs: bool) -> None:
    """Catches one rank's images mixed with another's masks, which have the same shape."""
    call = "batch_unshuffle" if outputs else "batch_shuffle"
    for text in run_on_ranks(2, _in_another_order, outputs):
        assert text.startswith(f"{call}: ")


class _Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bad = ShuffleBatchNorm(2), True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        if self.bad:
            raise ValueError("out of luck")
        return y


def _all_break() -> None:
    encoder = ShuffledEncoder(_Breaks())
    for _ in range(2):
        with pytest.raises(ValueError, match="out of luck"):
            encoder(torch.randn(4, 2))
    encoder.bad = False
    encoder(torch.randn(4, 2))


def test_ranks_whose_encoders_all_raise_go_on() -> None:
    """Catches a group that is given up for a mistake that all ranks have made and caught."""
    run_on_ranks(3, _all_break)
