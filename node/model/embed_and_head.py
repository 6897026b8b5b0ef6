"""Embedding, norm and head of a model, as the library computes them.

They are the library's own model, with all blocks replaced by one that keeps its input and answers a given
value.  So embedding scales, learned positions, embedding norms, soft caps and logit scales are the
library's, for every family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from node.config import ConfigError
from node.model.blocks.kv_pages import tensor_bytes
from node.model.blocks.rope import LengthRope, length_rope
from node.model.blocks.span import LibraryConfig, class_and_config, load_trimmed, sliced_config
from node.model.checkpoint.architecture import Architecture, architecture_of
from node.model.checkpoint.folder import ModelFolder, read_json
from node.model.checkpoint.packed import packing_of, unpacked
from node.model.checkpoint.progress import Progress, silent
from node.model.checkpoint.tensors import end_tensors, load_tensors
from node.model.llama.modules import LlamaForCausalLM, RMSNorm

if TYPE_CHECKING:
    from node.model.peft.modules import ModelModules
    from node.model.weights.argmax_head import ExactArgmax


_Norm = Callable[[NDArray[np.float32]], NDArray[np.float32]]

# A tokenizer needs at least one of these files; its other files alone do not make a tokenizer.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")


class EmbedAndHead:
    """Embedding, head and tokenizer of a model.  Made by `load_embed_and_head`.

    model: the library's causal language model, or ours; `remote` stands where its blocks were.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, folder: ModelFolder) -> None:
        self.model = model
        self.folder = folder
        self.architecture = architecture
        self._base = model.get_submodule(architecture.prefix)
        self.remote = _remote(self._base, architecture)
        self.config = cast(LibraryConfig, model.config)
        self.hidden_size = self.config.hidden_size
        parameter = next(model.parameters())
        self.dtype = parameter.dtype
        self.device = parameter.device
        # The library's whole forward costs 1 ms a token for masks and rotary embeddings that are not used.
        self._plain: tuple[nn.Module, nn.Module, nn.Module] | None = None
        if architecture.plain_ends:
            embedding, norm = (self._base.get_submodule(name) for name in architecture.ends)
            self._plain = embedding, norm, cast(Any, model).get_output_embeddings()
        self._rows = None if self._plain is None else _rows_of(self._plain[0])
        self._product: Callable[..., Tensor] | None = None  # the head's, where it is compiled
        self._exact_argmax: ExactArgmax | None = None
        self._norm: _Norm | None = None  # the compiled one
        self._threads = 1

    @cached_property
    def rope(self) -> LengthRope | None:
        """The rule of angles that depend on the length; None where no angle does."""
        return length_rope(self.config)

    @property
    def stateless(self) -> bool:
        """Whether several threads may use it at a time; a GPU is asked from the torch thread alone."""
        return self._plain is not None and self.device.type == "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return tensor_bytes(self.model)

    def compile_head(self) -> None:
        """From now on compute the head by our own kernel, where there is one for it.

        The kernel works in float32 on the CPU.  For several rows it takes a third of the time of torch's
        product.  A row has the same logits alone and in a batch.  They differ from torch's by rounding.
        """
        from node.model.weights.quantize import kernels

        if self._plain is None or self.dtype != torch.float32 or self.device.type != "cpu":
            return
        head = self._plain[2]
        if (compiled := kernels()) is not None and type(head) is nn.Linear and head.weight.is_contiguous():
            bias = None if head.bias is None else head.bias.detach()
            self._product = compiled.Rows(head.weight.detach(), None, bias)
            self._norm = _compiled_norm(self._plain[1])
            self._threads = torch.get_num_threads()  # torch counts those of each thread apart

    @property
    def product(self) -> Callable[..., Tensor] | None:
        """The head's product where it is compiled: (hidden states, threads) -> logits; else None."""
        return self._product

    def make_exact_argmax(self) -> None:
        """From now on find the likeliest token with less work, where that is possible (see `ExactArgmax`).

        May run at the same time as other threads' calls.  Needs `compile_head` to have been called.
        """
        from node.model.weights.argmax_head import ExactArgmax

        head = cast("nn.Linear", self._plain[2]) if self._plain is not None else None
        if head is None or self._product is None or cast("Tensor | None", head.bias) is not None:
            return
        with suppress(ValueError):  # a head without finite numbers; its logits will show it
            self._exact_argmax = ExactArgmax(head.weight.detach())

    def row_of(self, token: int) -> NDArray[np.float32] | None:
        """The hidden state float32 [hidden_size] of a token before the first block, a row of the weights.

        None: `embed` computes it.  Nobody writes to it.
        """
        return None if self._rows is None else self._rows[token]

    @torch.inference_mode()
    def embed(self, ids: Tensor, position: int) -> Tensor:
        """Token ids [batch, tokens], the first at `position` -> hidden states before the first block.

        They are on `device`, in `dtype`.
        """
        if self._plain is not None:
            return cast(Tensor, self._plain[0](ids.to(self.device)))
        tokens = ids.shape[1]
        positions = torch.arange(position, position + tokens, device=self.device).unsqueeze(0)
        self._base(input_ids=ids.to(self.device), position_ids=positions, use_cache=False)
        return self.remote.take()

    @torch.inference_mode()
    def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
        """Hidden states after the last block [batch, tokens, hidden_size] -> float32 logits
        [batch, tokens, vocab_size] on the CPU, one for each position that is given.

        best_only: only the place and the value of the largest logit matter; others may be -inf.
        """
        if self._plain is not None:
            _, norm, head = self._plain
            if self._product is not None:
                hidden, threads = hidden.to(self.device, self.dtype), torch.get_num_threads()
                normed = norm(hidden) if self._norm is None else _normed(self._norm, hidden)
                if best_only and self._exact_argmax is not None:
                    flat = self._exact_argmax(normed.flatten(0, -2), threads)
                    return flat.view(*hidden.shape[:-1], -1)
                return self._product(normed, threads)
            return _logits(head(norm(hidden.to(self.device, self.dtype))))
        self.remote.answer = hidden.to(self.device, self.dtype)
        try:
            # The library must embed a token to go on; the remote block ignores it.
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.remote.answer = None
            self.remote.take()
        return _logits(logits)

    def best_of(self, hidden: Tensor) -> int:
        """The place of the first largest logit of `head`, of one hidden state float32 [1, 1, hidden_size]."""
        if self._exact_argmax is None or self._norm is None:  # not `finds_best`
            return int(self.head(hidden, best_only=True).numpy().argmax())
        return self._exact_argmax.best(self._norm(hidden.numpy()[0])[0], self._threads)

    def bests_of(self, hidden: Tensor) -> list[int]:
        """`best_of` of each row of hidden states float32 [rows, 1, hidden_size]."""
        if self._exact_argmax is None or self._norm is None:  # not `finds_best`
            return [int(row.argmax()) for row in self.head(hidden, best_only=True).numpy()[:, -1]]
        normed = self._norm(np.ascontiguousarray(hidden.numpy()[:, 0]))
        return self._exact_argmax.bests(normed, self._threads)

    @property
    def finds_best(self) -> bool:
        """Whether `best_of` and `bests_of` are compiled code alone, which any thread may call at any time."""
        return self._exact_argmax is not None and self._norm is not None

    @cached_property
    def library_model(self) -> nn.Module:
        """`model` as the library's class, with the same weights."""
        if not isinstance(self.model, LlamaForCausalLM):
            return self.model
        kind = class_and_config(self.architecture, self.architecture.whole, self.folder, own=False)
        made = _ends_of(kind, self.folder, self.architecture, self.model.state_dict(), self.dtype)
        return made.to(self.device)

    @cached_property
    def tokenizer(self) -> Any:  # Any: the library's tokenizers are not typed
        """The folder's tokenizer, with its chat template if the model has one."""
        return open_tokenizer(self.folder.path)

    @cached_property
    def modules(self) -> ModelModules:
        """Names and shapes of all modules of the model, for adapters."""
        from node.model.peft.modules import model_modules

        return model_modules(self.folder)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a generation, from the generation config, else the config."""
        path = self.folder.path / "generation_config.json"
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is None:
            found = self.folder.config.get("eos_token_id")
        return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _rows_of(embedding: nn.Module) -> NDArray[np.float32] | None:
    """The rows of a plain embedding in float32 on the CPU; None for any other."""
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    weight = embedding.weight.detach()
    is_plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    return weight.numpy() if is_plain else None


def _compiled_norm(norm: nn.Module) -> _Norm | None:
    """Our own norm of float32 rows [rows, hidden] in one call of compiled code; None for other norms."""
    if type(norm) is not RMSNorm or norm.weight.dtype != torch.float32:
        return None
    from node.model.weights.argmax_head import norm_kernel

    kernel, weight, eps = norm_kernel(), norm.weight.detach().contiguous().numpy(), norm.variance_epsilon

    def normed(x: NDArray[np.float32]) -> NDArray[np.float32]:
        out = np.empty_like(x)
        kernel(x, weight, eps, out)
        return out

    return normed


def _normed(norm: _Norm, hidden: Tensor) -> Tensor:
    rows = hidden.detach().contiguous().view(-1, hidden.shape[-1])
    return torch.from_numpy(norm(rows.numpy())).view(hidden.shape)


def _logits(found: Tensor) -> Tensor:
    return found.to("cpu", torch.float32)


def open_tokenizer(path: Path) -> Any:  # Any: the library's tokenizers are not typed
    """The tokenizer in a model's folder.  Raises ConfigError where there is no working tokenizer."""
    names = [file.name for file in path.iterdir()]
    if not any(fnmatch(name, pattern) for name in names for pattern in _VOCABULARIES):
        raise ConfigError(
            f"{path} has no tokenizer: neither tokenizer.json nor tokenizer.model nor a vocabulary;"
            " copy that of the model which it was made from"
        )
    try:
        if _is_fast_llama(path):  # AutoTokenizer would take this class too, after imports of a second
            from transformers import PreTrainedTokenizerFast as Tokenizer
        else:
            from transformers import AutoTokenizer as Tokenizer
        tokenizer = Tokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        words = len(tokenizer)
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the tokenizer in {path} cannot be opened: {type(error).__name__}: {what}"
        ) from error
    if words <= len(tokenizer.all_special_ids):
        raise ConfigError(f"the tokenizer in {path} has no vocabulary")
    return tokenizer


_FAST_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the library's names for one class


def _is_fast_llama(path: Path) -> bool:
    """Whether the folder of a llama has a tokenizer.json and names the library's class for all of them."""
    files = path / "config.json", path / "tokenizer_config.json"
    try:
        model, own = (json.loads(file.read_bytes()) for file in files)
        named = own["tokenizer_class"] in _FAST_TOKENIZERS and model["model_type"] == "llama"
        return named and "auto_map" not in {**own, **model} and (path / "tokenizer.json").is_file()
    except (OSError, ValueError, LookupError, TypeError):
        return False


class RemoteBlocks(nn.Module):
    """Replaces the blocks: keeps its input and answers `answer`, if there is one."""

    def __init__(self, answers_tuple: bool) -> None:
        super().__init__()
        self.answer: Tensor | None = None
        self._seen: Tensor | None = None
        self._answers_tuple = answers_tuple

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        """The answer in the form of the library's blocks."""
        self._seen = hidden_states
        answer = hidden_states if self.answer is None else self.answer
        return (answer,) if self._answers_tuple else answer

    def take(self) -> Tensor:
        """The last input, once."""
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen


def load_embed_and_head(
    folder: ModelFolder,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> EmbedAndHead:
    """Read embedding, norm and head of a model.  Raises ConfigError that names the fault.

    A head that is tied to the embedding is the embedding's tensor, unless the checkpoint has a head.  On
    the CPU, weights whose file has `dtype` stay mapped from the file.
    """
    architecture = architecture_of(folder.config.get("model_type"))
    kind = class_and_config(architecture, architecture.whole, folder)
    packed = packing_of(folder)
    tensors = load_tensors(folder, end_tensors(folder, architecture), progress)
    tensors = unpacked(tensors, packed, folder.config, dtype)
    model = _ends_of(kind, folder, architecture, tensors, dtype)
    return EmbedAndHead(model.to(device), architecture, folder)


def _ends_of(
    kind: tuple[type[nn.Module], LibraryConfig],
    folder: ModelFolder,
    architecture: Architecture,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> nn.Module:
    """The causal language model with one remote block.  kind: see `class_and_config`."""

    def trim(model: nn.Module) -> None:
        base = model.get_submodule(architecture.prefix)
        container = base.get_submodule(architecture.container)
        setattr(container, architecture.blocks, nn.ModuleList([RemoteBlocks(architecture.answers_tuple)]))
        one_block = sliced_config(cast(Any, model).config, 0, 1)
        for module in (model, base, container):
            cast(Any, module).config = one_block

    return load_trimmed(kind[0], trim, kind[1], tensors, folder, "the ends", dtype)


def _remote(base: nn.Module, architecture: Architecture) -> RemoteBlocks:
    blocks = base.get_submodule(architecture.container).get_submodule(architecture.blocks)
    remote = next(iter(blocks.children()))
    assert isinstance(remote, RemoteBlocks)
    return remote
