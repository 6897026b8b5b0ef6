"""Other programs that speak OpenAI's API, each as its users run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.conftest import KEY, MODEL, PERSON, WEATHER, Served

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NPM = ROOT / ".venv-conformance" / "npm"
ASKED: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.mark.skipif(
    shutil.which("node") is None or not (NPM / "node_modules" / "openai").exists(),
    reason="needs node, and OpenAI's npm package in .venv-conformance/npm",
)
def test_openai_s_npm_package(served: Served) -> None:
    script = NPM / "client.mjs"
    script.write_text((HERE / "client.mjs").read_text())  # node looks for packages next to it
    done = subprocess.run(
        ["node", str(script), MODEL, json.dumps([WEATHER])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == [MODEL]
    assert found["streamed"] == found["whole"]
    assert found["usage"]["completion_tokens"] <= 16
    assert found["call"]["name"] == "weather"
    assert json.loads(found["call"]["arguments"])["unit"] in "CF"
    assert found["reason"] == "tool_calls"
    assert found["events"][0] == "response.created"
    assert found["events"][-1] in ("response.completed", "response.incomplete")
    assert isinstance(found["response"], str)
    assert found["error"] == {"name": "BadRequestError", "status": 400, "param": "temperature"}


def test_litellm(served: Served) -> None:
    litellm = pytest.importorskip("litellm")
    fields = {
        "model": f"openai/{MODEL}",
        "api_base": served.base_url,
        "api_key": KEY,
        "messages": ASKED,
        "max_tokens": 12,
        "seed": 4,
    }
    whole = litellm.completion(**fields)
    chunks = litellm.completion(**fields, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == (whole.choices[0].message.content or "")
    called = litellm.completion(**{**fields, "max_tokens": 400}, tools=[WEATHER], tool_choice="required")
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**fields, "model": "openai/other"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**fields, "max_tokens": 10**6})


def test_langchain(served: Served) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(model=MODEL, max_tokens=12, seed=4, temperature=0)
    whole = model.invoke("Hello")
    assert isinstance(whole.content, str)
    assert whole.usage_metadata["output_tokens"] <= 12
    parts = list(model.stream("Hello"))
    assert "".join(part.content for part in parts) == whole.content
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) <= 12

    longer = langchain_openai.ChatOpenAI(model=MODEL, max_tokens=400, seed=4)
    called = longer.bind_tools([WEATHER], tool_choice="weather").invoke("Hello")
    assert called.tool_calls[0]["name"] == "weather"
    assert called.tool_calls[0]["args"]["unit"] in "CF"
    person = {"title": "person", "description": "A person", **PERSON}
    found = longer.with_structured_output(person, method="json_schema").invoke("Hello")
    assert found.keys() == {"name", "age"}


def test_llm(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: {MODEL}\n  api_base: {served.base_url}\n  api_key_name: tiny\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def llm(*words: str) -> str:
        command = [sys.executable, "-m", "llm", *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ["-m", "tiny", "--key", KEY, "-o", "max_tokens", "8", "-o", "temperature", "0"]
    streamed = llm("prompt", "Hello", *options)
    assert streamed.strip()
    assert llm("prompt", "Hello", "--no-stream", *options) == streamed
