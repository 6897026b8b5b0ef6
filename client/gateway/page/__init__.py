"""The page of the gateway: static files, which need no key, hold no secret and ask nobody but the gateway.

`vendor.json` names the libraries among the files, with version, licence and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

INDEX = "index.html"
ASSETS = "assets"
MANIFEST = "vendor.json"
MEDIA_TYPES = MappingProxyType(
    {
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
        ".txt": "text/plain; charset=utf-8",
    }
)
DIGEST_CHARACTERS = 16  # of the SHA-256 of all assets, in their address
FOREVER = "public, max-age=31536000, immutable"  # a year, the most that RFC 9111 knows a use for
ASK_FIRST = "no-cache"  # kept, but compared by ETag before each use
# Scripts and styles from files of this gateway alone, text never parsed as HTML, connections to this gateway
# alone, and no frame around the page.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = MappingProxyType(
    {
        "content-security-policy": CONTENT_POLICY,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
    }
)


@dataclass(frozen=True, slots=True)
class File:
    """One file of the page: its bytes, their media type and their entity tag (RFC 9110, section 8.8.3)."""

    body: bytes
    media_type: str
    etag: str


@dataclass(frozen=True, slots=True)
class Site:
    """All files of the page.

    digest: of the assets; it is part of their address, so a new version is a new address.
    assets: by their path below the folder of assets, "views/chat.js".
    """

    index: File
    assets: Mapping[str, File]
    digest: str


def routes() -> list[BaseRoute]:
    """The routes of the page: `/`, and `/assets/...`.  Neither needs a key."""
    site = read_site()

    async def index(request: Request) -> Response:
        return response_to(request, site.index, ASK_FIRST)

    async def asset(request: Request) -> Response:
        return asset_response(request, site, request.path_params["path"])

    return [Route("/", index, name="page"), Route(f"/{ASSETS}/{{path:path}}", asset, name="page-assets")]


def asset_response(request: Request, site: Site, path: str) -> Response:
    """The file at `path`, with or without the digest of this version in front.

    Raises HTTPException, 404, for anything else.  With the digest a browser keeps the file for good; without
    it the browser asks before each use.
    """
    digest, _, rest = path.partition("/")
    current = digest == site.digest
    file = site.assets.get(rest if current else path)
    if file is None:
        raise HTTPException(404, "no such file", {**HEADERS, "cache-control": "no-store"})
    return response_to(request, file, FOREVER if current else ASK_FIRST)


def response_to(request: Request, file: File, cache_control: str) -> Response:
    """200 with the file, or 304 where the browser has it already (RFC 9110, section 13.1.2)."""
    headers = {**HEADERS, "cache-control": cache_control, "etag": file.etag}
    known = request.headers.get("if-none-match", "")
    if "*" in known.split(",") or file.etag in re.findall(r'"[^"]*"', known):
        return Response(status_code=304, headers=headers)
    return Response(file.body, 200, {**headers, "content-type": file.media_type})


@cache
def read_site() -> Site:
    """Read the page once; 150 kB stay in memory.  Links of the index get the digest of the assets."""
    folder = files(__package__)
    bodies = dict(sorted(_files_below(folder / ASSETS)))
    whole = hashlib.sha256()
    for path, body in bodies.items():
        whole.update(f"{path}\0{len(body)}\0".encode() + body)
    digest = whole.hexdigest()[:DIGEST_CHARACTERS]
    text = (folder / INDEX).read_text(encoding="utf-8")
    index = text.replace(f'="{ASSETS}/', f'="{ASSETS}/{digest}/').encode()
    return Site(
        index=_file(INDEX, index),
        assets=MappingProxyType({path: _file(path, body) for path, body in bodies.items()}),
        digest=digest,
    )


def vendored() -> list[dict[str, Any]]:  # Any: JSON
    """The libraries among the assets, as `vendor.json` lists them: name, version, licence, source, files."""
    found: list[dict[str, Any]] = json.loads((files(__package__) / MANIFEST).read_text(encoding="utf-8"))
    return found


def _files_below(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    found = []
    for entry in folder.iterdir():
        path = f"{prefix}{entry.name}"
        if entry.is_dir():
            found += _files_below(entry, f"{path}/")
        elif entry.name[entry.name.rfind(".") :] in MEDIA_TYPES:
            found.append((path, entry.read_bytes()))
    return found


def _file(name: str, body: bytes) -> File:
    return File(body, MEDIA_TYPES[name[name.rfind(".") :]], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
