"""A device that computes nothing in place of a GPU: what would be mixed, copied, launched and waited for.

Tensors on torch's meta device have shapes and no values.  `Counted` sees each operation: it refuses one that
mixes devices, as CUDA does, and answers what would come back from the device with zeros.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
# They launch nothing.
VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "unsqueeze", "squeeze", "expand",
    "expand_as", "slice", "select", "split", "split_with_sizes", "chunk", "detach", "alias",
    "as_strided", "_reshape_alias", "narrow", "flatten", "unflatten", "unbind", "empty", "lift_fresh",
    "empty_like", "new_empty", "empty_strided", "view_as", "numpy_T", "contiguous", "is_pinned",
})  # fmt: skip
WAITS = frozenset(("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim"))
COPIES = frozenset(("to", "_to_copy", "copy_", "cpu"))


class MixedDevices(RuntimeError):
    """An operation on tensors of two devices."""


def name_of(function: Any) -> str:
    return str(function._schema.name.split("::")[1])


class Counted(TorchDispatchMode):
    """launched: operations on the device, by name.  to_device, to_host: copies.  waits: for a value.

    pageable: copies to the device that the host waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.to_device = 0
        self.to_host = 0
        self.pageable = 0
        self.waits: list[str] = []

    @property
    def launches(self) -> int:
        return self.launched.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = name_of(function)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        kinds = {each.device.type for each in given if each.dim()}
        if len(kinds) > 1 and name not in COPIES:
            shapes = [(each.device.type, tuple(each.shape)) for each in given]
            raise MixedDevices(f"{name} of {shapes}")
        there = any(each.device.type == "meta" for each in given)
        if name in WAITS and there:
            self.waits.append(name)
            return self._waited(name, given)
        if name in COPIES and self._copied(name, given, args, kwargs):
            source = given[0]
            dtype = next(
                (each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.dtype)), None
            )
            if name == "copy_":
                return args[0]
            return torch.zeros(source.shape, dtype=dtype or source.dtype)
        answer = function(*args, **kwargs)
        made = [each for each in tree_leaves(answer) if isinstance(each, Tensor)]
        on = (made or given or [None])[0]
        unchanged = name in COPIES - {"copy_"} and made and given and made[0] is given[0]
        launched = name not in VIEWS and not unchanged and (name not in COPIES or there_all(given))
        if launched and on is not None and on.device.type == "meta":
            self.launched[name] += 1
        return answer

    def _copied(self, name: str, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Count a copy between devices; whether its answer must be made up."""
        if name == "copy_":
            target, source = given[0].device.type, given[1].device.type
        else:
            wanted = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.device)]
            source = given[0].device.type
            target = "cpu" if name == "cpu" else wanted[0].type if wanted else source
        if (source, target) == ("cpu", "meta"):
            self.to_device += 1
            flag = kwargs.get("non_blocking", any(each is True for each in args[1:]))
            self.pageable += not flag
        if (source, target) == ("meta", "cpu"):
            self.to_host += 1
            return True
        return False

    @staticmethod
    def _waited(name: str, given: list[Tensor]) -> object:
        if name in ("_local_scalar_dense", "item"):
            return 1
        if name == "nonzero":
            return torch.empty(2, given[0].dim(), dtype=torch.long, device=DEVICE)
        return True


def there_all(given: list[Tensor]) -> bool:
    return all(each.device.type == "meta" for each in given)
