"""Sync debug mode is on inside, and only there."""

import warnings

import pytest
import torch

from cuda_sync import never_waits


def _modes(monkeypatch: pytest.MonkeyPatch, warning: str) -> list[int | str]:
    """The modes that are set; "error" warns after it has been set, as torch does the first time."""
    modes: list[int | str] = [1]

    def set_mode(mode: int | str) -> None:
        modes.append(mode)
        if mode == "error":
            warnings.warn(warning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return modes


def test_the_mode_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mode that stays on after its own warning, or after a test that fails."""
    modes = _modes(monkeypatch, "Synchronization debug mode is a prototype feature and does not")
    with never_waits():
        assert modes == [1, "error"]
    assert modes == [1, "error", 1]
    with pytest.raises(KeyError), never_waits():
        raise KeyError
    assert modes[2:] == [1, "error", 1]


def test_another_warning_does_not_leave_the_mode_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mode that is set before somebody will set it back."""
    modes = _modes(monkeypatch, "something else")
    with pytest.raises(UserWarning, match="something else"), never_waits():
        raise AssertionError
    assert modes == [1, "error", 1]


@pytest.mark.gpu
def test_what_waits_raises() -> None:
    """Catches a block in which the host may wait unseen."""
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), never_waits():
        x.sum().item()
    assert x.sum().item() == 3
