"""The callback and the plugin in one process, for Trainers of both of Lightning's packages."""

import importlib.util
import pickle
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import nn

from integrations.lightning_fits import (
    GROUPS,
    PLAIN,
    SHUFFLED,
    Batches,
    Net,
    OldNet,
    kinds,
    states,
    trainer,
)
from shuffle_batchnorm import ShuffleBatchNorm, get_shuffle_state, set_shuffle_state
from shuffle_batchnorm.integrations import lightning as ours
from shuffle_batchnorm.integrations import lightning_callbacks
from shuffle_batchnorm.integrations.lightning import ShuffleBatchNormCallback, ShuffleBatchNormSync

PACKAGES = {lightning.pytorch: Net, pytorch_lightning: OldNet}

pytestmark = pytest.mark.filterwarnings(
    r"ignore:.*isinstance\(treespec, LeafSpec\):FutureWarning",  # Lightning with this torch
)


def _spy(package: Any, **hooks: Callable[..., None]) -> Any:
    """Return a callback with these hooks."""
    return type("Spy", (package.Callback,), hooks)()


def _fit(model: Any, *callbacks: Any, package: Any = lightning.pytorch, **options: Any) -> Any:
    fit = trainer(*callbacks, package=package, **options)
    fit.fit(model, Batches(), Batches())
    return fit


def _seen_in(
    stage: str, *callbacks: Any, model: Any = None, package: Any = lightning.pytorch
) -> list[str]:
    """Return the batch norms' classes in one stage of the Trainer."""
    seen: list[str] = []
    phase = {"validate": "validation"}.get(stage, stage)
    hook = {f"on_{phase}_start": lambda _self, _trainer, model: seen.extend(kinds(model))}
    run = trainer(*callbacks, _spy(package, **hook), package=package)
    model = model or PACKAGES[package]()
    loaders = [Batches()] * (2 if stage == "fit" else 1)
    getattr(run, stage)(model, *loaders)
    return seen


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("names", "converted"),
    [
        ((), (1, 1, 1)),
        (("encoder",), (1, 1, 0)),
        (("encoder.0",), (1, 0, 0)),
        (("encoder.2",), (0, 1, 0)),  # a batch norm itself
        (("encoder.0", "head"), (1, 0, 1)),
        (("encoder", "encoder.0"), (1, 1, 0)),
    ],
)
def test_fit_trains_with_the_named_submodules(
    package: Any, names: tuple[str, ...], converted: tuple[int, ...]
) -> None:
    model = PACKAGES[package]()
    callback = ShuffleBatchNormCallback(*names, groups=GROUPS)
    found = _seen_in("fit", callback, model=model, package=package)
    assert found == [SHUFFLED if yes else PLAIN for yes in converted]
    assert kinds(model) == [PLAIN] * 3


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_have_plain_batch_norm(stage: str) -> None:
    assert _seen_in(stage, ShuffleBatchNormCallback(groups=GROUPS)) == [PLAIN] * 3


def _by_hand(**options: Any) -> nn.Module:
    model = Net()
    ShuffleBatchNorm.convert_shuffle_batchnorm(model, **options)
    optimizer = model.configure_optimizers()
    for x, y in Batches():
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


class EarlyOptimizer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.early = super().configure_optimizers()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.early


@pytest.mark.parametrize("options", [{"groups": 8}, {"groups": 4, "mode": "swap", "offset": 3}])
def test_options_reach_the_layers(options: dict[str, Any]) -> None:
    """Also with an optimizer made before the conversion, and `regroup` where no mode is named."""
    model = EarlyOptimizer()
    _fit(model, ShuffleBatchNormCallback(**options))
    expected = _by_hand(**{"mode": "regroup", **options})
    torch.testing.assert_close(states(model), states(expected))
    with pytest.raises(TypeError, match="unexpected keyword argument 'group'"):
        _fit(Net(), ShuffleBatchNormCallback(group=2))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_module_trains_as_it_does_uncompiled() -> None:
    model, plain = Net(), Net()
    _fit(torch.compile(model, backend="eager"), ShuffleBatchNormCallback(groups=GROUPS))
    _fit(plain, ShuffleBatchNormCallback(groups=GROUPS))
    torch.testing.assert_close(states(model), states(plain))
    assert kinds(model) == [PLAIN] * 3


def test_an_exception_reverts() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    model = Net()
    with pytest.raises(RuntimeError, match="in the middle"):
        _fit(
            model,
            ShuffleBatchNormCallback(groups=GROUPS),
            _spy(lightning.pytorch, on_train_batch_end=fail),
        )
    assert kinds(model) == [PLAIN] * 3


def test_a_checkpoint_has_the_keys_of_plain_batch_norm(tmp_path: Path) -> None:
    kept: list[Any] = []
    set_shuffle_state(None)  # nothing of an earlier test

    def save(_: Any, run: Any, model: Any) -> None:
        run.save_checkpoint(tmp_path / "in_fit.ckpt")
        kept.append(states(model))

    model = Net()
    _fit(model, ShuffleBatchNormCallback(groups=GROUPS), _spy(lightning.pytorch, on_train_end=save))
    checkpoint = torch.load(tmp_path / "in_fit.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Net().state_dict())
    assert checkpoint["callbacks"] == {}  # nothing was shuffled, so Lightning need not ask for it
    later = Net()
    trainer().test(later, Batches(), ckpt_path=tmp_path / "in_fit.ckpt", verbose=False)
    torch.testing.assert_close(states(later), kept[0])


def test_only_fit_takes_the_shuffles_state_from_a_checkpoint() -> None:
    set_shuffle_state((7, 3))
    state = ShuffleBatchNormCallback(groups=GROUPS).state_dict()
    assert state == {"shuffle_states": [(7, 3), (7, 3)]}
    set_shuffle_state((1, 1))
    callback = ShuffleBatchNormCallback(groups=GROUPS)
    callback.load_state_dict(state)
    assert get_shuffle_state() == (1, 1)
    load = _spy(lightning.pytorch, on_fit_start=lambda *_: callback.load_state_dict(state))
    _fit(Net(), callback, load)
    assert get_shuffle_state() == (7, 3)
    set_shuffle_state(None)


def test_two_callbacks_in_one_trainer() -> None:
    """Catches one state in a checkpoint for both, which Lightning refuses."""
    query = ShuffleBatchNormCallback("head", mode="local", groups=2)
    key = pickle.loads(pickle.dumps(ShuffleBatchNormCallback("encoder", groups=GROUPS)))
    assert query.state_key != key.state_key
    assert _seen_in("fit", query, key) == [SHUFFLED] * 3


@pytest.mark.parametrize(
    ("name", "near"),
    [("encoder_k", "encoder"), ("encoder.7", "encoder.2"), ("backbone", "encoder, head")],
)
def test_a_name_that_is_none_is_refused(name: str, near: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match="has no submodule") as error:
        _fit(model, ShuffleBatchNormCallback("head", name, groups=GROUPS))
    assert f"Net has no submodule {name!r} yet; near names: " in str(error.value)
    assert near in str(error.value)
    assert "What is built in setup or configure_model comes too late" in str(error.value)
    assert kinds(model) == [PLAIN] * 3


class LateNet(Net):
    def configure_model(self) -> None:
        self.encoder.append(nn.BatchNorm1d(4).double())  # type: ignore[operator]


def test_batch_norm_built_after_the_conversion_is_refused() -> None:
    text = "ShuffleBatchNormCallback: 1 batch norm layers were built after this callback's setup"
    with pytest.raises(RuntimeError, match=text):
        _fit(LateNet(), ShuffleBatchNormCallback(groups=GROUPS))
    # What is built elsewhere is nobody's business.
    _fit(LateNet(), ShuffleBatchNormCallback("head", groups=GROUPS))


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_refuses_the_plugin_with_sync_batchnorm(package: Any) -> None:
    text = r"You set `Trainer\(sync_batchnorm=True\)` and provided a `ShuffleBatchNormSync` plugin"
    with pytest.raises(Exception, match=text) as error:
        trainer(package=package, plugins=[ShuffleBatchNormSync()], sync_batchnorm=True)
    assert error.type.__name__ == "MisconfigurationException"


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the entry points that an installation has."""
    info = tmp_path / "shuffle_batchnorm-0.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Name: shuffle_batchnorm\nVersion: 0.0\n")
    groups = [f"{p}.callbacks_factory" for p in ("lightning.pytorch", "pytorch_lightning")]
    line = "shuffle_batchnorm = shuffle_batchnorm.integrations:lightning_callbacks"
    info.joinpath("entry_points.txt").write_text("\n".join(f"[{g}]\n{line}" for g in groups))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("package", PACKAGES)
def test_a_plugin_that_was_not_applied_is_noticed(package: Any) -> None:
    plugin = ShuffleBatchNormSync("encoder")
    text = (
        "no layer was converted, so nothing is shuffled in this fit: Lightning does not apply this "
        "plugin under SingleDeviceStrategy"
    )
    with pytest.warns(UserWarning, match=text):
        _fit(PACKAGES[package](), package=package, plugins=[plugin])
    # Not where the callback has converted, nor in the fit of another Trainer.
    _fit(
        PACKAGES[package](),
        ShuffleBatchNormCallback(groups=GROUPS),
        package=package,
        plugins=[plugin],
    )
    _fit(PACKAGES[package](), package=package)


def test_trainers_without_the_plugin_get_no_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShuffleBatchNormSync, "exists", False)
    assert lightning_callbacks() == []
    monkeypatch.delitem(sys.modules, ours.__name__)
    assert lightning_callbacks() == []


def _import_anew(monkeypatch: pytest.MonkeyPatch, *missing: str) -> Any:
    for name in list(sys.modules):
        if name.split(".")[0] in missing:
            monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    assert ours.__file__
    spec = importlib.util.spec_from_file_location("anew", ours.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("missing", ["lightning", "pytorch_lightning"])
def test_one_of_the_packages_is_enough(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = _import_anew(monkeypatch, missing).ShuffleBatchNormCallback
    found = [package for package in PACKAGES if issubclass(callback, package.Callback)]
    assert [package.__name__.split(".")[0] for package in found] != [missing]
    assert len(found) == 1


def test_without_lightning_the_import_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"needs Lightning: pip install lightning \(or pytorch"):
        _import_anew(monkeypatch, "lightning", "pytorch_lightning")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_entry_point_is_installed(package: Any) -> None:
    """Catches a plugin that nobody watches over, since Lightning does not know of the watch."""
    found = entry_points(group=f"{package.__name__}.callbacks_factory", name="shuffle_batchnorm")
    assert [point.load() for point in found] == [lightning_callbacks]
