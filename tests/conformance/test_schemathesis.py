"""Requests made of OpenAI's own description of its API: each answer is one that the description has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.conftest import KEY, MODEL, Served
from tests.conformance.openai_schema import cut, load

CASES = int(os.environ.get("CASES", "500"))  # of each path

# The rest of the allow-list.  Each check that is left out, and why:
#   positive_data_acceptance: what OpenAI has and a gateway has not (images, audio, stored responses) is 400.
#   unsupported_method: OpenAI's file names no OPTIONS and no HEAD.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "ignored_auth",
)


def test_answers_are_those_of_the_description(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    description = tmp_path / "openai.json"
    description.write_text(json.dumps(cut(load(), MODEL)))
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", str(description)),
        *("--url", served.base_url, "--header", f"Authorization: Bearer {KEY}"),
        *("--max-examples", str(CASES), "--checks", ",".join(CHECKS), "--workers", "2"),
        *("--request-timeout", "60", "--generation-deterministic", "--no-color"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
