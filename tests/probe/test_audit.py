"""The audit finds what mixes samples where it is planted, and nothing where nothing does."""

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.audited import After, Centre, planted
from probe.known_leaks import convolutional, one_thread
from shuffle_batchnorm import AuditReport, ShuffleBatchNorm, ShuffledEncoder, audit
from shuffle_batchnorm.probe import progress
from shuffle_batchnorm.probe.patching import patched

module = sys.modules["shuffle_batchnorm.probe.audit"]  # hidden by the function
__all__ = ["one_thread"]  # a fixture


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("kind", ["batch norm", "by hand", "attention"])
def test_all_of_it_is_where_it_was_planted(kind: str, place: int) -> None:
    model, name = planted(kind, place)
    report = audit(model, torch.randn(16, 8))
    assert report.dependence > 0.001
    assert report.shares == {name: pytest.approx(1, abs=1e-9)}


NOTHING: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten()),
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.LayerNorm(8)),
    "eval mode": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(),
    "perceptron": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(48, 8), nn.Dropout(), nn.ReLU(True)
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_what_does_not_mix_gives_exactly_zero(kind: str) -> None:
    report = audit(NOTHING[kind](), torch.randn(16, 3, 4, 4))
    assert (report.dependence, report.shares, report.intervals) == (0, {}, {})


@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
def test_every_mode_of_the_layer_is_found(mode: str) -> None:
    """Four players, all of them batch norm; the shares sum to the whole."""
    report = audit(convolutional(mode, groups=4), torch.randn(32, 3, 6, 6))
    assert list(report.shares) == ["1", "4", "7", "10"]
    assert set(report.kinds.values()) == {"ShuffleBatchNorm"}
    assert sum(report.shares.values()) == pytest.approx(1, abs=1e-6)
    assert report.intervals == {n: pytest.approx((s, s)) for n, s in report.shares.items()}


def test_the_dependence_by_hand() -> None:
    """x - mean(x): probe 0 changes by the change of the mean; the spread is that of 0, 2, 4."""
    report = audit(Centre(), torch.tensor([[0.0], [2.0], [4.0]]), replace=torch.tensor([[9.0]]))
    assert report.dependence == pytest.approx((6 - 2) / (8 / 3) ** 0.5)
    assert (report.samples, report.probes) == (3, 1)


class _Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.ReLU())
        self.decoder = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x))
        return y


def test_an_autoencoder_that_sees_the_other_of_two() -> None:
    """In a batch of two, batch norm tells each sample which of the two is larger."""
    with pytest.raises(ValueError, match="2 samples with 1 probes leave 1 other"):
        audit(_Autoencoder(), torch.randn(2, 6))
    report = audit(_Autoencoder(), torch.randn(2, 6), replace=torch.randn(8, 6))
    assert report.dependence > 0.1
    assert report.shares == {"encoder.1": 1}


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=0).expand_as(x)


class _Gate(nn.Module):
    """What one module lets through, a second one shuts out."""

    def __init__(self) -> None:
        super().__init__()
        self.through, self.gate = _Mean(), _Mean()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.through(x[:, :1]) * self.gate(x[:, 1:])
        return y


def test_shares_can_be_negative() -> None:
    """Three samples: means go from 0 to 20 / 3 and from 1 to 0.4, so v is 6.67, 0 and 2.67."""
    x, others = torch.tensor([[0.0, 1.0]] * 3), torch.tensor([[10.0, 0.1]])
    report = audit(_Gate(), x, replace=others)
    assert report.shares == pytest.approx({"through": 1.75, "gate": -0.75})


def test_both_a_container_and_the_layer_in_it_have_a_share() -> None:
    """Catches a search that ends at the layer."""
    report = audit(nn.Sequential(nn.Linear(4, 4), After()), torch.randn(32, 4))
    assert list(report.kinds.values()) == ["BatchNorm1d", "After"]
    assert sum(report.shares.values()) == pytest.approx(1, abs=1e-9)
    assert all(abs(share) > 0.01 for share in report.shares.values())


class _Reordering(nn.Module):
    """Shows a layer its samples in another order, as MoCo's shuffle does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.flip(0))
        return y.flip(0)


def test_a_container_that_reorders_has_the_share_of_what_it_hides() -> None:
    """Catches a share for the layer inside, whose rows are not those of the batch."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sigmoid(), _Reordering())
    shares = audit(model, torch.randn(16, 4)).shares
    assert shares == pytest.approx({"1": 0, "3.norm": 0, "3": 1})


@pytest.mark.parametrize("depth", [0, 4])
def test_nesting_costs_nothing_where_containers_do_not_mix(depth: int) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    calls: list[None] = []
    model[0].register_forward_hook(lambda *_: calls.append(None))  # type: ignore[index]
    for _ in range(depth):
        model = nn.Sequential(model)
    audit(model, torch.randn(16, 8))
    assert len(calls) == 6


def test_dropout_is_the_same_in_all_passes() -> None:
    """Catches stacked passes that are trusted where rows drop otherwise."""
    layers = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(8, 8), nn.BatchNorm1d(8))
    report = audit(model, torch.randn(32, 8))
    assert list(report.shares) == ["1", "4"]
    assert audit(model, torch.randn(32, 8)).dependence > 0.01


def test_stacked_passes_and_whole_ones_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convolutional("local", groups=4), torch.randn(32, 3, 6, 6)
    stacked, kinds = audit(model, x), []

    def whole(*args: Any) -> Any:
        kinds.append(args[-1])
        if args[-1]:
            raise OverflowError
        return patched(*args)

    monkeypatch.setattr(module, "patched", whole)
    assert audit(model, x).shares == pytest.approx(stacked.shares, abs=1e-4)
    assert kinds == [True] + [False] * 16


def test_passes_that_do_not_reproduce_the_change_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TOLERANCE", -1)
    with pytest.raises(RuntimeError, match=r"don't reproduce the change \(off by 0 of it\): Batch"):
        audit(nn.BatchNorm1d(2), torch.randn(8, 2))


def test_more_players_have_an_interval() -> None:
    layers = [layer for _ in range(9) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    report = audit(nn.Sequential(*layers), torch.randn(16, 8))
    assert len(report.shares) == 9
    assert sum(report.shares.values()) == pytest.approx(1, abs=1e-9)
    assert all(low < report.shares[name] < high for name, (low, high) in report.intervals.items())


class _Trees(nn.Module):
    """Named arguments, a constant mask with a row for each sample, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, *, x: Tensor, mask: Tensor, scale: float) -> dict[str, Any]:
        y = self.norm(x) * scale
        return {"y": (y, mask @ x.detach() * 0), "mean": x.mean()}


def test_trees_in_and_out() -> None:
    inputs = {"x": torch.randn(8, 4), "mask": torch.ones(1, 8), "scale": 2.0}
    assert audit(_Trees(), inputs).shares == {"norm": 1}


def test_wrapped_and_compiled_models() -> None:
    model, x = convolutional("local", groups=4), torch.randn(16, 3, 6, 6)
    plain = audit(model, x)
    wrapped: Any = torch.compile(model, backend="eager")
    compiled = audit(wrapped, x)
    assert compiled.dependence == plain.dependence
    assert list(compiled.shares.values()) == pytest.approx(list(plain.shares.values()))
    assert audit(ShuffledEncoder(model), x).shares == {"ShuffledEncoder": 1}


@pytest.mark.filterwarnings("ignore")  # of torch.jit, that it is deprecated
def test_a_scripted_module_is_one_player() -> None:
    model: Any = torch.jit.trace(nn.BatchNorm1d(4), torch.randn(3, 4), check_trace=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = audit(nn.Sequential(nn.Linear(4, 4), model), torch.randn(16, 4))
    assert list(report.shares) == ["1"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_model_that_does_not_repeat_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="audit: _Counting gives other outputs when it is called"):
        audit(_Counting(), torch.randn(8, 2))


def test_everything_is_left_as_it_was() -> None:
    """Also after an error."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    failing = nn.Sequential(model, nn.Linear(5, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = torch.randn(8, 4)
    kept, state = inputs.clone(), torch.get_rng_state()
    audit(model, inputs)
    with pytest.raises(RuntimeError):
        audit(failing, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs, kept)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(part) for part in failing.modules())
    assert all(part.training for part in failing.modules())


def test_the_seed_decides() -> None:
    model = nn.Sequential(convolutional("local", groups=2), nn.Dropout())
    x = torch.randn(16, 3, 6, 6)

    def report(seed: int) -> AuditReport:
        torch.rand(1)  # a global state that has moved on
        return audit(model, x, generator=torch.Generator().manual_seed(seed))

    assert report(3) == report(3) != report(4)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (torch.relu, TypeError, "audit: model must be a module, got builtin_function_or_method"),
        (nn.Flatten(0), TypeError, "must return a floating-point tensor [4, *] or a tree with one"),
        (nn.Threshold(9.0, torch.nan), ValueError, "the model returned numbers that are not fin"),
    ],
)
def test_errors_name_the_call(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        audit(model, torch.randn(4, 2))


class _Scores(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - x.mean(dim=0)).sum(dim=1), x[:, :0]


def test_one_number_a_sample_is_enough() -> None:
    """Beside a tensor that has none."""
    assert audit(_Scores(), torch.randn(8, 2)).shares == {"_Scores": 1}


def test_equal_outputs_that_depend_on_the_batch_have_no_scale() -> None:
    """Seven equal numbers have a mean that differs from them by rounding."""
    report = audit(_Mean(), torch.randn(7, 2).double())
    assert report.dependence == float("inf")
    assert report.shares == {"_Mean": 1}


def test_the_default_device_does_not_matter() -> None:
    model, x = nn.Sequential(ShuffleBatchNorm(3, groups=2)), torch.randn(8, 3)
    want = audit(model, x)
    with torch.device("meta"):
        got = audit(model, x)
    assert got == want


def test_progress_counts_the_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five layers have 32 coalitions, of which two are known; eight fit in a pass."""
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    audit(nn.Sequential(*layers), torch.randn(16, 4), progress=True)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 3
    assert err.startswith("audit:  25 %, pass 1 of 4, ")
    audit(nn.Sequential(*layers), torch.randn(16, 4))
    assert capsys.readouterr().err == ""
