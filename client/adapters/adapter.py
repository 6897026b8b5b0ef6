"""An adapter as this program holds it: parameters for any torch optimizer, and bytes for servers.

The parameters are float32 and stay here; servers get a copy, in bfloat16 unless the adapter says otherwise.
So a server that goes loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from node.model.peft.folder import file_tensors
from node.model.peft.tensors import AdapterTensors, EndTensors
from tensor_codec.adapters import AdapterContent, AdapterManifest

BlockGradients = Mapping[int, Tensor]  # by block: float32, of every value of the block's blob, in its order


class Adapter:
    """LoRA inside the blocks of a model in a swarm, and at its embedding and head; or a prompt, or a prefix.

    Made by `Swarm.load_adapter`, `Swarm.new_adapter` and the functions of `client.adapters.folder`.
    tensors: the values; each is an `nn.Parameter`.
    """

    def __init__(self, tensors: AdapterTensors) -> None:
        self.tensors = _with_parameters(tensors)
        self._content: tuple[tuple[int, ...], AdapterContent] | None = None

    @property
    def manifest(self) -> AdapterManifest:
        """What servers are told: sites, ranks and scales of every block."""
        return self.tensors.manifest

    @property
    def revision(self) -> str:
        """The revision of its model."""
        return self.tensors.revision

    @property
    def is_in_blocks(self) -> bool:
        """Whether servers hold a part of it."""
        return self.tensors.is_in_blocks

    @property
    def virtual_tokens(self) -> int:
        """Of a prefix: positions in front of the text; learned positions of the text begin after them."""
        return self.manifest.virtual_tokens

    @property
    def id(self) -> str:
        """The hash of the present values, 64 hexadecimal digits; another one after every optimizer step."""
        return self.content().id

    def content(self) -> AdapterContent:
        """Manifest and blobs of the present values.

        Made anew where torch has counted a change of a parameter.  A change through `parameter.data` is not
        counted: call `renew` after it.  Raises ValueError for values that no server takes.
        """
        versions = self._versions()
        if self._content is None or self._content[0] != versions:
            return self.renew()
        return self._content[1]

    def renew(self) -> AdapterContent:
        """`content`, with a look at every value; the object of before where none has changed."""
        found = self.tensors.content()
        if self._content is not None and self._content[1] == found:
            found = self._content[1]  # its hashes are known
        self._content = self._versions(), found
        return found

    def _versions(self) -> tuple[int, ...]:
        return tuple(each._version for each in self.parameters())

    def blobs(self) -> tuple[bytes, ...]:
        """The blob of every block of the model, of the present values."""
        return self.content().blobs

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, float32, in a fixed order: for an optimizer."""
        return [each for each in self.named_parameters().values() if isinstance(each, nn.Parameter)]

    def named_parameters(self) -> dict[str, Tensor]:
        """The parameters by their names in a folder of peft."""
        tensors = self.tensors
        if tensors.prompt is not None:
            return {"prompt_embeddings": tensors.prompt}
        if tensors.prefix is not None:
            return {"prompt_embeddings": tensors.prefix}
        return file_tensors(tensors)

    def block_parameters(self) -> list[list[Tensor]]:
        """For each block what servers compute with, in the order of its blob: A and B of its sites."""
        tensors = self.tensors
        if tensors.prefix is not None:
            return [[one] for one in tensors.prefix]
        pairs = zip(tensors.sites, tensors.blocks, strict=True)
        return [[one for site in sites for one in block[site.name]] for sites, block in pairs]

    def parameters_of(self, start: int, stop: int) -> list[Tensor]:
        """What servers compute with in blocks [start, stop), in the order of the blobs."""
        return [one for own in self.block_parameters()[start:stop] for one in own]

    def gradients_of(self, gradients: BlockGradients, start: int, stop: int) -> list[Tensor | None]:
        """The gradients of `parameters_of`, in their order and shapes; None where there are none."""
        own = enumerate(self.block_parameters()[start:stop], start)
        return [one for block, like in own for one in _divided(gradients.get(block), like)]

    def add_gradients(self, gradients: BlockGradients) -> None:
        """Add to `.grad` of the blocks' parameters, as a backward of torch does."""
        blocks = len(self.tensors.sites)
        own, found = self.parameters_of(0, blocks), self.gradients_of(gradients, 0, blocks)
        pairs = [
            (one, grad)
            for one, grad in zip(own, found, strict=True)
            if one.requires_grad and grad is not None
        ]
        if pairs:
            torch.autograd.backward([one for one, _ in pairs], [grad for _, grad in pairs])

    def requires_grad_(self, wanted: bool = True) -> Adapter:
        """Train it, or keep it as it is."""
        for each in self.parameters():
            each.requires_grad_(wanted)
        return self

    @property
    def is_trained(self) -> bool:
        """Whether any parameter wants a gradient."""
        return any(each.requires_grad for each in self.parameters())

    def __repr__(self) -> str:
        sites = sorted({site.name for block in self.tensors.sites for site in block})
        parts = [*sites, *self.tensors.ends]
        parts += ["prompt"] if self.tensors.prompt is not None else []
        parts += ["prefix"] if self.tensors.prefix is not None else []
        return f"Adapter({', '.join(parts)}; {sum(each.numel() for each in self.parameters())} values)"


def _divided(flat: Tensor | None, like: Sequence[Tensor]) -> list[Tensor | None]:
    if flat is None:
        return [None] * len(like)
    parts = torch.split(flat, [each.numel() for each in like])
    pairs = zip(parts, like, strict=True)
    return [part.view(each.shape).to(each.device, each.dtype) for part, each in pairs]


def _with_parameters(tensors: AdapterTensors) -> AdapterTensors:
    """The same adapter with a parameter of its own for every tensor."""
    return AdapterTensors(
        dict(tensors.fields),
        tensors.revision,
        tensors.dtype,
        tensors.sites,
        tensors.paths,
        tuple({name: (_own(a), _own(b)) for name, (a, b) in block.items()} for block in tensors.blocks),
        {path: _own_end(end) for path, end in tensors.ends.items()},
        None if tensors.prompt is None else _own(tensors.prompt),
        None if tensors.prefix is None else _own(tensors.prefix),
    )


def _own(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to("cpu", torch.float32, copy=True).contiguous())


def _own_end(end: EndTensors) -> EndTensors:
    a, b = (None if one is None else _own(one) for one in (end.a, end.b))
    return EndTensors(end.site, a, b, {name: _own(one) for name, one in end.values.items()}, end.is_embedding)
