"""ShuffledEncoder: shuffle, encode, unshuffle, as one module that can't forget the last step."""

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from shuffle_batchnorm.comm import failures
from shuffle_batchnorm.comm.world import ProcessGroupLike, World, check_process_group, resolve

from .batch_shuffle import Tree, batch_shuffle, batch_unshuffle
from .plan import ShufflePlan

CALL = "ShuffledEncoder"


class ShuffledEncoder(nn.Module):
    r"""Encode the samples of this rank among the samples of all ranks: MoCo's key encoder.

    .. math:: f_{\text{shuffled}}(x) = \pi^{-1}(f(\pi(x)))

    with a new permutation of all ranks' samples at every call. All tensors among the arguments
    are shuffled together, and all tensors among the outputs unshuffled: no output is forgotten.
    In eval mode the encoder is called as it is, without communication.

    The encoder's parameters, buffers and submodules are this module's own, under the same names:
    ``state_dict`` and ``named_parameters`` are the encoder's. Other attributes are found, and set,
    on it. ``encoder`` is the encoder itself, unless that has an attribute of this name.

    Only what the encoder returns is unshuffled. What leaves it in another way, through a hook on
    one of its modules or an attribute, holds samples of other ranks in the shuffle's order. A
    forward hook brings them back with ``batch_unshuffle(output, shuffled_encoder.current_plan)``,
    on all ranks.

    Communication: that of one `batch_shuffle` of the arguments and one `batch_unshuffle` of the
    outputs; backward as much for what needs a gradient.

    Args:
        encoder: any module whose arguments and outputs are tensors ``[N, *]``, or pytrees of
            these; other arguments (None, bool, int, float, str) are handed on.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Attributes:
        current_plan: the plan of the shuffle while the encoder runs in training mode, else None.

    Shape:
        As the encoder's, with the same N for all arguments and outputs.

    Raises:
        TypeError: when called: an argument or output of a type not named above.
        ValueError: when called: a scalar tensor, or another N; see `batch_shuffle`.
        AttributeError: `encoder` is set to another module.

    Warns:
        UserWarning: the shuffle does nothing, at the first call in training mode: no batch norm
            in the encoder, only synchronised ones, or one rank and no virtual groups. At the first
            call with new forward or backward hooks on modules of the encoder, but those of torch.

    Source:
        He et al. 2019, arXiv 1911.05722, section 3.3.

    Example:
        >>> from shuffle_batchnorm import ShuffleBatchNorm, ShuffledEncoder
        >>> layers = nn.Conv2d(3, 8, 3), ShuffleBatchNorm(8, mode="local", groups=2)
        >>> encoder = ShuffledEncoder(nn.Sequential(*layers))
        >>> encoder(torch.randn(8, 3, 6, 6)).shape
        torch.Size([8, 8, 4, 4])
        >>> list(encoder.state_dict())[:2]
        ['0.weight', '0.bias']
    """

    def __init__(self, encoder: nn.Module, *, process_group: ProcessGroupLike = None) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"{CALL}: encoder must be a module, got {type(encoder).__name__}")
        check_process_group(CALL, process_group)
        # Not a submodule, which would put a prefix before every name: it shares its registries.
        for name in _SHARED:
            self.__dict__[name] = encoder.__dict__[name]
        self.process_group = process_group
        self.training = encoder.training
        self.current_plan: ShufflePlan | None = None
        self._has_checked = False
        self._next_hook = 0  # the hooks before this one are known
        self.__dict__["_encoder"] = encoder  # from here on, what the encoder has is set on it

    def forward(self, *args: Any, **kwargs: Any) -> Tree:
        """Shuffle the tensors among the arguments, encode, unshuffle the outputs."""
        if not self.training:
            return self._encoder(*args, **kwargs)
        if not torch.compiler.is_compiling():
            if not self._has_checked:
                self._has_checked = True
                self._warn_if_it_does_nothing()
            if self._next_hook != RemovableHandle.next_id:
                self._warn_of_new_hooks()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        batch = pytree.tree_unflatten(_without_constants(leaves), spec)
        # As a tree, so that ranks whose trees differ are told, and don't mix unlike tensors.
        shuffled, plan = batch_shuffle(batch, process_group=self.process_group)
        args, kwargs = pytree.tree_unflatten(_with_constants(shuffled, leaves), spec)
        self.current_plan = plan
        try:
            outputs = self._encoder(*args, **kwargs)
        except Exception as error:
            if not torch.compiler.is_compiling():
                failures.announce(plan.world, f"{CALL}: {error}")
            raise
        finally:
            self.current_plan = None
        leaves, spec = pytree.tree_flatten(outputs)
        restored = batch_unshuffle(pytree.tree_unflatten(_without_constants(leaves), spec), plan)
        return pytree.tree_unflatten(_with_constants(restored, leaves), spec)

    def _warn_if_it_does_nothing(self) -> None:
        world = resolve(self.process_group, CALL)
        layers = [m for m in self._encoder.modules() if isinstance(m, _BatchNorm)]
        groups = [_count_groups(layer, world) for layer in layers]
        if not layers:
            reason = "the encoder has no batch norm layer, so no sample depends on the others"
        elif not any(groups):
            reason = (
                "all batch norm layers of the encoder are synchronised, so every sample is "
                "normalised with all samples wherever it is; use nn.BatchNorm layers"
            )
        elif world.size == 1 and max(groups) == 1:
            reason = (
                "there is one rank, and no batch norm layer has virtual groups to shuffle among; "
                'convert the encoder with convert_shuffle_batchnorm(..., mode="local", groups=8)'
            )
        else:
            return
        warnings.warn(f"{CALL}: the shuffle does nothing: {reason}", stacklevel=5)

    def _warn_of_new_hooks(self) -> None:
        """Warn of hooks that see shuffled samples; torch numbers a process's hooks in a row."""
        known, self._next_hook = self._next_hook, RemovableHandle.next_id
        found = [text for number, text in _foreign_hooks(self._encoder) if number >= known]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            warnings.warn(
                f"{CALL}: hooks inside the encoder see samples of all ranks in shuffled order: "
                f"{', '.join(found[:3])}{more}. In a forward hook, batch_unshuffle(output, "
                "shuffled_encoder.current_plan) brings them back, called on all ranks",
                stacklevel=5,
            )

    def train(self, mode: bool = True) -> Self:
        """Set training mode, here and in the encoder."""
        self.training = mode
        self._encoder.train(mode)
        return self

    def apply(self, fn: Any) -> Self:
        """Apply a function to every module of the encoder and to the encoder itself."""
        self._encoder.apply(fn)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._encoder._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the encoder's state, as it gives it."""
        return self._encoder.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Hand a state to the encoder."""
        return self._encoder.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._encoder._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While a copy is made there is no encoder yet.
            if "_encoder" not in self.__dict__:
                raise
            if name == "encoder" and not hasattr(self._encoder, name):
                return self._encoder
            return getattr(self._encoder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the encoder what is the encoder's."""
        if "_encoder" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        elif hasattr(self._encoder, name):
            setattr(self._encoder, name, value)
        elif name == "encoder":
            raise AttributeError(f"{CALL}: encoder can't be replaced; wrap the new one instead")
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete from the encoder what is the encoder's."""
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._encoder, name)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy gets: it is in no call, and has warned of no hook."""
        return {**self.__dict__, "current_plan": None, "_next_hook": 0}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A process group can't be copied, and need not be.
        memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __repr__(self) -> str:
        """Return the encoder's description inside this one's."""
        inner = repr(self._encoder).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {inner}\n)"


_SHARED = (
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


_HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


def _foreign_hooks(encoder: nn.Module) -> Iterator[tuple[int, str]]:
    """Yield number and description of the users' hooks on the encoder's modules."""
    of_all = {kind: getattr(nn.modules.module, f"_global{kind}") for kind in _HOOKS}
    owners = ((repr(name), vars(module)) for name, module in encoder.named_modules())
    for owner, tables in itertools.chain(owners, [("all modules", of_all)]):
        entries = [entry for kind in _HOOKS if tables[kind] for entry in tables[kind].items()]
        for number, entry in entries:
            hook = getattr(entry, "func", entry)  # of functools.partial, the function
            module = str(getattr(hook, "__module__", ""))
            if module.partition(".")[0] not in ("torch", "shuffle_batchnorm"):
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                yield number, f"{name} on {owner}"


def _count_groups(layer: _BatchNorm, world: World) -> int:
    """Return into how many groups a layer cuts a batch; 0 if it mixes the samples of all ranks.

    All that is asked of a norm layer, whoever wrote it: its class, `mode`, `groups`, and MoCo's
    and lightly's name for them, `num_splits`.
    """
    synchronised = isinstance(layer, nn.SyncBatchNorm) or getattr(layer, "mode", None) == "sync"
    if synchronised and resolve(layer.process_group, CALL).size >= world.size:
        return 0
    return max([int(getattr(layer, name, 1)) for name in ("groups", "num_splits")])


def _without_constants(leaves: list[Any]) -> list[Any]:
    """Put None for what has no samples; leave to `batch_shuffle` what might have."""
    return [None if isinstance(leaf, (bool, int, float, str)) else leaf for leaf in leaves]


def _with_constants(moved: Tree, leaves: list[Any]) -> list[Any]:
    found = pytree.tree_leaves(moved)
    return [old if new is None else new for new, old in zip(found, leaves, strict=True)]
