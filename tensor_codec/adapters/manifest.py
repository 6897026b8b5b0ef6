"""An adapter as bytes: its manifest, its id, and the sizes of what is kept for each block.

An adapter (LoRA, Hu et al., arXiv:2106.09685) adds `scale * B (A x)` to the output of some linears, its
sites.  The manifest names the sites of every block of the model; ranks and scales are settled there, so
rslora and the patterns of peft are the client's matter alone.  The values are blobs, one for each block: for
each of its sites A [rank, in], then B [out, rank], little-endian in C order.

The id is a hash of the manifest and of the hashes of all blobs.  A hop that has the hashes and the blobs of
its own blocks can verify it.

A prefix (Li and Liang, arXiv:2101.00190) is keys and values of virtual tokens in front of the text.  Each
block has one part of it, named PREFIX, and a blob with the keys and then the values, [virtual tokens,
kv_heads, head_dim] each.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import msgpack

from tensor_codec.blocks import MAX_BLOCKS
from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import MAX_ITEMS, Header, unpack_map
from tensor_codec.limits import Limits

AdapterDtype = Literal["bf16", "fp32"]
AdapterKind = Literal["lora", "prefix"]
ADAPTER_DTYPES: dict[str, int] = {"bf16": 2, "fp32": 4}  # bytes of a value
ADAPTER_KINDS = ("lora", "prefix")
ID_DOMAIN = b"raceme-adapter-1\0"
MAX_VALUE = 1e4  # of A and B: what is larger overflows the 16 bits of a row
MAX_SCALE = 1e4  # peft's largest in use: alpha 256 at rank 1
MAX_VIRTUAL_TOKENS = 4096  # positions of a soft prompt, those of a short context
PREFIX = "keys and values"  # the name of a block's part of a prefix: no linear has it
_ID = re.compile("[0-9a-f]{64}")
_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]{0,63}")
_SITE = struct.Struct("<BHd")  # place of the name, rank, scale


@dataclass(frozen=True, slots=True)
class LoraSite:
    """A linear that low-rank matrices are added to.

    name: the last part of the linear's name in transformers ("q_proj").  rank: rows of A, columns of B.
    scale: of B (A x), for instance alpha / rank.
    """

    name: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """What an adapter is made of, without its values.

    revision: of the model.  dtype: of the values in the blobs.
    blocks: the sites of every block of the model, in the order of the block's blob; empty where it has none.
    kind: "lora"; or "prefix": keys and values of `virtual_tokens` positions in front of every block's own.
    """

    revision: str
    dtype: AdapterDtype
    blocks: tuple[tuple[LoraSite, ...], ...]
    kind: AdapterKind = "lora"
    virtual_tokens: int = 0

    def parts(self, block: int) -> tuple[LoraSite, ...]:
        """The parts of a block's blob: its sites; of a prefix the keys and values, by the name PREFIX.

        The rank of that one part is the number of virtual tokens.
        """
        if self.kind == "prefix":
            return (LoraSite(PREFIX, self.virtual_tokens, 1.0),)
        return self.blocks[block]


@dataclass(frozen=True)
class AdapterContent:
    """An adapter at one moment: the manifest, and the blob of every block of the model."""

    manifest: AdapterManifest
    blobs: tuple[bytes, ...]

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """SHA-256 of every blob."""
        return tuple(blob_digest(blob) for blob in self.blobs)

    @cached_property
    def id(self) -> str:
        """The adapter's id."""
        return adapter_id(self.manifest, self.digests)

    @property
    def nbytes(self) -> int:
        """Bytes of all blobs."""
        return sum(map(len, self.blobs))


def is_adapter_id(name: str) -> bool:
    """Whether the text has the form of an id; an operator's own adapter may have another name."""
    return _ID.fullmatch(name) is not None


def adapter_id(manifest: AdapterManifest, digests: Sequence[bytes]) -> str:
    """The id, 64 hexadecimal digits: SHA-256 of the manifest and of the digests.

    digests: SHA-256 of the blob of every block of the model, 32 bytes each.
    """
    if len(digests) != len(manifest.blocks):
        raise ValueError(f"{len(digests)} digests of {len(manifest.blocks)} blobs")
    packed = encode_manifest(manifest)
    parts = (ID_DOMAIN, manifest.revision.encode(), b"\0", packed, *digests)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def blob_digest(blob: Buffer) -> bytes:
    """SHA-256 of a block's blob, 32 bytes."""
    return hashlib.sha256(blob).digest()


def site_bytes(site: LoraSite, ins: int, outs: int, dtype: str) -> int:
    """Bytes of A and B of a site.  ins, outs: features of its linear."""
    return site.rank * (ins + outs) * ADAPTER_DTYPES[dtype]


def blob_bytes(sites: Sequence[LoraSite], shapes: Mapping[str, tuple[int, int]], dtype: str) -> int:
    """Bytes of a block's blob.

    sites: see `AdapterManifest.parts`.  shapes: (in, out) of the block's linears by their names; under PREFIX
    the values of a key and of a value, where the block can have a prefix.
    Raises MessageError for a site that the block lacks, for a rank above a linear's smaller side, and for a
    prefix where the block can have none.
    """
    total = 0
    for site in sites:
        shape = shapes.get(site.name)
        if shape is None and site.name == PREFIX:
            raise MessageError("a prefix: the cache of this model's blocks takes none")
        if shape is None:
            known = ", ".join(sorted(shapes.keys() - {PREFIX})) or "none"
            raise MessageError(f"an adapter's site {site.name!r}, the block has {known}")
        if site.rank > min(shape) and site.name != PREFIX:
            raise MessageError(f"rank {site.rank} at {site.name!r} of {shape[0]} x {shape[1]}")
        total += site_bytes(site, *shape, dtype)
    return total


def encode_manifest(manifest: AdapterManifest) -> bytes:
    """The manifest as msgpack; one value has one form.

    Blocks with the same sites, most often all, share one table.  `names` are the names of all sites; `tables`
    holds for each table a byte with the number of sites, and 11 bytes for each: place of its name, rank,
    scale as a double; `blocks` the table of every block in 2 bytes.  All in the order of their first use,
    numbers little-endian.
    """
    tables = list(dict.fromkeys(manifest.blocks))
    names = list(dict.fromkeys(site.name for sites in tables for site in sites))
    packed = [
        bytes([len(sites)])
        + b"".join(_SITE.pack(names.index(site.name), site.rank, site.scale) for site in sites)
        for sites in tables
    ]
    places = {sites: place for place, sites in enumerate(tables)}
    fields = {
        "revision": manifest.revision,
        "dtype": manifest.dtype,
        "kind": manifest.kind,
        "virtual_tokens": manifest.virtual_tokens,
        "names": names,
        "tables": b"".join(packed),
        "blocks": b"".join(places[sites].to_bytes(2, "little") for sites in manifest.blocks),
    }
    return bytes(msgpack.packb(fields))


def decode_manifest(data: Buffer, limits: Limits) -> AdapterManifest:
    """Read a manifest.  Raises MessageError, whatever the bytes are."""
    if len(data) > limits.max_adapter_manifest_bytes:
        raise MessageError(
            f"a manifest of {len(data)} bytes, {limits.max_adapter_manifest_bytes} are allowed"
        )
    fields = unpack_map(data)
    header = Header(fields)
    manifest = AdapterManifest(
        revision=header.text("revision", 128),
        dtype=cast(AdapterDtype, header.choice("dtype", frozenset(ADAPTER_DTYPES))),
        blocks=_blocks(_bytes(fields, "blocks"), _tables(header, _bytes(fields, "tables"), limits)),
        kind=cast(AdapterKind, header.choice("kind", frozenset(ADAPTER_KINDS))),
        virtual_tokens=header.integer("virtual_tokens", 0, limits.max_adapter_virtual_tokens),
    )
    is_prefix = manifest.kind == "prefix"
    sites = sum(map(len, manifest.blocks))
    if is_prefix != bool(manifest.virtual_tokens) or (is_prefix and sites):
        raise MessageError(
            f"an adapter of kind {manifest.kind!r} with {manifest.virtual_tokens} virtual tokens"
            f" and {sites} sites"
        )
    return manifest


def _bytes(fields: Mapping[str, object], name: str) -> bytes:
    value = fields.get(name)
    if type(value) is not bytes:
        raise MessageError(f"{name} of a manifest is a {type(value).__name__}, bytes are allowed")
    return value


def _tables(header: Header, packed: bytes, limits: Limits) -> list[tuple[LoraSite, ...]]:
    names = header.items("names", MAX_ITEMS)
    for name in names:
        if type(name) is not str or not _NAME.fullmatch(name):
            raise MessageError(f"an adapter's site is {name!r:.40}, the name of a linear is allowed")
    tables, at = [], 0
    while at < len(packed):
        number, begin = packed[at], at + 1
        at = begin + number * _SITE.size
        if number > limits.max_adapter_sites:
            raise MessageError(f"{number} sites in a block, {limits.max_adapter_sites} are allowed")
        if at > len(packed):
            raise MessageError("a table of sites ends before its last one")
        sites = tuple(_site(names, each, limits) for each in _SITE.iter_unpack(packed[begin:at]))
        if len({site.name for site in sites}) < number:
            raise MessageError("an adapter's site stands twice in a block")
        tables.append(sites)
    return tables


def _site(names: Sequence[str], entry: tuple[int, int, float], limits: Limits) -> LoraSite:
    place, rank, scale = entry
    if place >= len(names):
        raise MessageError(f"an adapter's site has name {place} of {len(names)}")
    if not 1 <= rank <= limits.max_adapter_rank:
        raise MessageError(f"rank {rank} at {names[place]!r}, 1..{limits.max_adapter_rank} is allowed")
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise MessageError(f"scale {scale} at {names[place]!r}, a number up to {MAX_SCALE:g} is allowed")
    return LoraSite(names[place], rank, scale)


def _blocks(packed: bytes, tables: Sequence[tuple[LoraSite, ...]]) -> tuple[tuple[LoraSite, ...], ...]:
    if len(packed) % 2 or not 0 < len(packed) // 2 <= MAX_BLOCKS:
        raise MessageError(f"{len(packed)} bytes for the blocks of an adapter, two for each are needed")
    found = []
    for (place,) in struct.iter_unpack("<H", packed):
        if place >= len(tables):
            raise MessageError(f"a block has table {place} of {len(tables)}")
        found.append(tables[place])
    return tuple(found)
