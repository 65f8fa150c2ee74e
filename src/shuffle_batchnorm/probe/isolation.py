"""Call a user's encoders and leave no trace: what they change is restored."""

import functools
import hashlib
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from shuffle_batchnorm.comm.world import World, resolve
from shuffle_batchnorm.shuffle.encoder import ShuffledEncoder
from shuffle_batchnorm.shuffle.state import get_shuffle_state, set_shuffle_state

# What a call may change in a module besides its buffers: flags, the options of a ShuffleBatchNorm,
# and whether DistributedDataParallel is to send its buffers in the next forward pass.
_ATTRIBUTES = ("training", "mode", "groups", "offset", "blocks", "require_forward_param_sync")


def find_roots(source: object) -> list[nn.Module]:
    """Return the modules that a callable uses, as far as they can be found from outside.

    Found are: a module itself; the object of a bound method; the function and arguments of a
    ``functools.partial``; the variables that a function or lambda takes from outside; and modules
    that are attributes of these.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def search(item: object) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        else:
            for part in _parts(item):
                search(part)

    search(source)
    return list(found.values())


def _parts(source: Any) -> list[object]:
    if isinstance(source, functools.partial):
        return [source.func, *source.args, *source.keywords.values()]
    if inspect.ismethod(source):
        return [source.__self__, source.__func__]
    if inspect.isfunction(source):
        try:
            outside = inspect.getclosurevars(source)
        except ValueError:  # a variable that has no value yet
            return []
        # Globals are half a program: of these only the modules.
        return [*outside.nonlocals.values(), *_modules_among(outside.globals.values())]
    return _modules_among(getattr(source, "__dict__", {}).values())


def _modules_among(values: Iterable[object]) -> list[object]:
    return [value for value in values if isinstance(value, nn.Module)]


def all_modules(roots: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return all modules in some modules, each once, by name; also what a ShuffledEncoder wraps."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for root in roots:
        for name, module in root.named_modules():
            found.setdefault(id(module), (name, module))
            if isinstance(module, ShuffledEncoder):
                # It shares its encoder's registries and does not have it as a submodule.
                found.setdefault(id(module.encoder), (name, module.encoder))
    names: dict[str, nn.Module] = {}
    for name, module in found.values():
        unique = name
        while unique in names:  # several roots, or an encoder under its wrapper's name
            unique += "'"
        names[unique] = module
    return names


def shuffle_worlds(modules: Iterable[nn.Module], world: World) -> list[World]:
    """Return the groups, among them `world`, in which the modules may shuffle samples."""
    groups = [m.process_group for m in modules if isinstance(m, ShuffledEncoder)]
    worlds = [world, *(resolve(group, "ShuffledEncoder") for group in groups)]
    return list({found.name: found for found in worlds}.values())


@contextmanager
def isolated(modules: Iterable[nn.Module], worlds: Iterable[World]) -> Iterator[None]:
    """Restore, at the end of a ``with`` block, everything but parameters and gradients.

    That is: buffers, training flags, options of the layers, the random states of torch (CPU and
    CUDA), Python and NumPy, and the shuffle states of the groups.
    """
    modules = list(modules)
    buffers = [(module, dict(module._buffers)) for module in modules]
    tensors = {id(t): t for _, named in buffers for t in named.values() if t is not None}
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    attributes = [
        (module, {name: vars(module)[name] for name in _ATTRIBUTES if name in vars(module)})
        for module in modules
    ]
    shuffles = [(world.group, get_shuffle_state(world.group)) for world in worlds]
    restore_random_states = _keep_random_states()
    try:
        yield
    finally:
        restore_random_states()
        for group, state in shuffles:
            set_shuffle_state(state, group)
        for module, values in attributes:
            vars(module).update(values)
        for module, named in buffers:
            # The dict itself stays: a ShuffledEncoder shares it with its encoder.
            # A scripted module has no dict, and can't gain or lose buffers.
            if isinstance(module._buffers, dict):
                module._buffers.clear()
                module._buffers.update(named)
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)


def _keep_random_states() -> Callable[[], None]:
    """Return what sets the random states to what they are now."""
    numpy = sys.modules.get("numpy")
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    array = None if numpy is None else numpy.random.get_state()

    def restore() -> None:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(array)

    return restore


def draw_seed(generator: torch.Generator | None) -> int:
    """Return the seed of a call: 0, or a number from `generator`.

    To be called before anything can fail, so that the generators of all ranks stay in step.
    """
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def derive_seed(*parts: object) -> int:
    """Return a seed that is a function of its parts, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def seed_all(seed: int) -> None:
    """Set the random states of torch (CPU and CUDA), Python and NumPy, if it is loaded."""
    # torch.manual_seed puts a call on a list, with its whole stack, for a CUDA that never starts.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def eager() -> AbstractContextManager[Any]:
    """Run compiled models as they were written: what a probe adds is not called in a graph."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
