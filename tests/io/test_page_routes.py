"""The page as a browser gets it: files, their types, their policy of content, what a browser may keep."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from urllib.parse import urljoin

import httpx
import pytest
from starlette.applications import Starlette

from client.gateway.page import CONTENT_POLICY, MEDIA_TYPES, read_site, routes


@pytest.fixture
async def browser() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(Starlette(routes=routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


async def links(browser: httpx.AsyncClient) -> list[str]:
    return re.findall(r"(?:src|href)=\"([^\"]+)\"", (await browser.get("/")).text)


async def test_the_index_and_all_that_it_leads_to_are_served(browser):
    todo = [urljoin("http://gateway/", link) for link in await links(browser)]
    assert len(todo) >= 5
    seen = set()
    while todo:
        url = todo.pop()
        if url in seen:
            continue
        seen.add(url)
        answer = await browser.get(url)
        assert answer.status_code == 200, url
        assert answer.headers["content-type"] == MEDIA_TYPES["." + url.rpartition(".")[2]]
        assert "immutable" in answer.headers["cache-control"]
        if url.endswith(".js"):
            todo += [
                urljoin(url, target) for target in re.findall(r"(?:from|import) \"(\.[^\"]+)\"", answer.text)
            ]
    scripts = {url.rpartition("/assets/")[2].partition("/")[2] for url in seen if url.endswith(".js")}
    assert scripts == {path for path in read_site().assets if path.endswith(".js")}


async def test_every_answer_has_the_policy_of_content(browser):
    link = (await links(browser))[0]
    for path in ("/", f"/{link}", "/assets/none.js"):
        headers = (await browser.get(path)).headers
        assert headers["content-security-policy"] == CONTENT_POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert "unsafe" not in CONTENT_POLICY
    assert "default-src 'none'" in CONTENT_POLICY


async def test_the_index_is_asked_for_again_and_not_sent_again(browser):
    first = await browser.get("/")
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    for known in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        again = await browser.get("/", headers={"if-none-match": known})
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == etag
    assert (await browser.get("/", headers={"if-none-match": '"other"'})).status_code == 200


async def test_a_file_without_a_version_in_its_address_is_never_kept_for_good(browser):
    kept = await browser.get(f"/assets/{read_site().digest}/app.js")
    asked = await browser.get("/assets/app.js")
    assert kept.content == asked.content
    assert asked.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    [
        "/assets/",
        "/assets/none.js",
        "/assets/../__init__.py",
        "/assets/%2e%2e/__init__.py",
        "/assets/..%2f..%2fpage%2f__init__.py",
        "/assets/0000000000000000/app.js",
        "/assets//app.js",
        "/assets/vendor",
    ],
)
async def test_nothing_else_is_served(browser, path):
    answer = await browser.get(path)
    assert answer.status_code == 404
    assert b"import" not in answer.content


async def test_the_page_is_only_read(browser):
    assert (await browser.head("/")).status_code == 200
    assert (await browser.post("/")).status_code == 405
    assert (await browser.delete("/assets/app.js")).status_code == 405


async def test_the_index_works_below_the_path_of_a_proxy(browser):
    assert all(not link.startswith("/") for link in await links(browser))
