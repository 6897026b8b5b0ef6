"""The commands that write docs/figures: each result has a name, and its file is NAME.json there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures.tables import Results
from benchmarks.lib.machine import Elsewhere, machine
from benchmarks.lib.results import ROOT, commit

FIGURES = ROOT / "docs" / "figures"
DEMO = "demo"
SWARM = ["swarm", "--jobs", "2"]
THIN, ROOMY = ["--model", "llama-405b"], ["--model", "llama-70b"]
CLIENTS = ["--clients", "1000"]

# Measured by `make figures`: the present version on the present machine.
USUAL: Mapping[str, Sequence[str]] = {
    DEMO: [],  # scripts/demo.py
    **{f"decode-{servers}": ["decode", "--servers", str(servers)] for servers in (1, 2, 3)},
    "journal": ["journal"],
    "backward": ["backward"],
    "loop-lag": ["loop_lag"],
    "quality": ["quality"],
    "quality-codecs": ["quality", "--boundaries", "1", "4"],
    "scrape": ["scrape"],
    "startup": ["startup"],
    "startup-black-holed": ["startup", "--black-holed", "1"],
    "wire": ["wire"],
}
# Measured by name.
LONG: Mapping[str, Sequence[str]] = {
    "decode-int8-1": ["decode", "--servers", "1", "--quantize", "int8"],
    "decode-int8-3": ["decode", "--servers", "3", "--quantize", "int8"],
    "decode-int8-1x16": ["decode", "--servers", "1", "--clients", "16", "--quantize", "int8"],
    "peers-int8": ["peers", "--rows", "raceme-int8-*", "llama.cpp-Q8_0-*", "--many-threads", "1", "2"],
    "peers-bf16": ["peers", "--rows", "raceme-bf16-*", "llama.cpp-BF16-*", "--many", "0"],
    "peers-float32": [
        "peers", "--rows", "*-float32*", "llama.cpp-F32-*", "--many", "0", "--transformers",
    ],
    "executor": [
        "executor", "--sessions", "1", "4", "16", "--quantize", "none", "int8",
        "--dtype", "float32", "bfloat16", "--rounds", "3", "--tokens", "16",
    ],
    "ragged": ["ragged", "--context", "64", "1024"],
    "prefill": ["prefill", "--tokens", "32", "128", "512", "1024", "2048", "8192", "--rounds", "2"],
    "adapters": ["adapters"],
    "gateway": ["gateway"],
    "flood": ["flood", "--quantize", "int8"],
    "recovery-kill": ["recovery", "--runs", "10"],
    "recovery-adapter-none": ["recovery", "--runs", "8"],
    "recovery-adapter": ["recovery", "--adapter-rank", "16", "--runs", "8"],
    "recovery-freeze": ["recovery", "--mode", "freeze", "--runs", "10"],
    "recovery-drain": ["recovery", "--mode", "drain", "--runs", "10"],
    "recovery-prefill": ["recovery", "--kill-at", "prefill", "--runs", "5"],
    "recovery-kill-every": ["recovery", "--tokens", "300", "--kill-every", "60", "--runs", "2"],
    "recovery-no-copy": ["recovery", "--copies", "1", "--give-up", "10", "--runs", "3"],
    "recovery-halfopen": ["recovery", "--mode", "halfopen", "--runs", "5"],
    "recovery-slow": ["recovery", "--mode", "slow", "--runs", "5"],
    "recovery-clients": ["recovery", "--mode", "clients", "--runs", "50"],
    "recovery-rates": [
        "recovery", "--fault-rate", "1e-3", "1e-2", "--tokens", "128", "1024", "--runs", "2",
        "--limit", "120",
    ],
    **{
        f"hf-{'int8-' * (kind == 'int8')}{servers}": [
            "hf", "--servers", str(servers), "--quantize", kind,
        ]
        for kind in ("none", "int8")
        for servers in (1, 3)
    },
    **{
        f"training-{servers}{'' if tape else '-no-tape'}": [
            "training", "--servers", str(servers), *([] if tape else ["--no-tape"]),
        ]
        for servers in (1, 3)
        for tape in (True, False)
    },
    "training-bfloat16-1": ["training", "--dtype", "bfloat16"],
    "training-lora-1": ["training", "--lora"],
    "training-int8-1": ["training", "--quantize", "int8"],
    "hostile": ["hostile", "--all"],
    "soak": ["soak", "--minutes", "30"],
    "routing": ["routing", "--servers", "1000", "10000"],
    "swarm-decisions": ["swarm", "--decisions-only", "60", "1000", "10000"],
    "wan": ["wan"],
    **{
        f"wan-{codec}{'' if blocks is None else f'-{blocks}'}": [
            "wan", "--rtt-ms", "100", "--mbit", "10", "--codec", codec,
            *([] if blocks is None else ["--first-blocks", blocks]),
        ]
        for codec in ("bf16", "fast")
        for blocks in (None, "3")
    },
    "wan-bulk": ["wan", "--rtt-ms", "20", "--mbit", "10", "--servers", "2", "--bulk"],
    **{
        f"wan-{text}-{rtt}": [
            "wan", "--rtt-ms", rtt, "--text", text, "--speculate", "auto", "--tokens", "64", "--rounds", "2",
        ]
        for text in ("code", "summary", "story")
        for rtt in ("0", "100")
    },
    "wire-rtt40": ["wire", "--rtt-ms", "40"],
    "wire-rtt160": ["wire", "--rtt-ms", "160"],
    "wire-rtt160-reno": ["wire", "--rtt-ms", "160", "--control", "reno"],
    "reach": ["reach"],
}  # fmt: skip
# Simulated: the machine does not matter, and hours pass.
SIMULATED: Mapping[str, Sequence[str]] = {
    **{f"swarm-thin{n}-all": [*SWARM, "--servers", str(n), *THIN, "--rule", "all"] for n in (30, 60, 100)},
    **{f"swarm-roomy{n}-all": [*SWARM, "--servers", str(n), *ROOMY, "--rule", "all"] for n in (20, 30)},
    **{
        f"swarm-thin1000-{rule}": [*SWARM, "--servers", "1000", *THIN, "--rule", rule, "--seeds", "3"]
        for rule in ("ours", "petals", "petals-join")
    },
    "swarm-noise60-ours": [*SWARM, "--servers", "60", *THIN, "--noise", "0.1", "--seeds", "5"],
    **{
        f"swarm-churn60-{rule}": [
            *SWARM, "--servers", "60", *THIN, "--churn", "0.3", "--lost", "0.2", "--rule", rule,
            "--seeds", seeds,
        ]
        for rule, seeds in (("ours", "20"), ("petals", "5"))
    },
    **{
        f"swarm-clients-roomy30-{rule}{'' if load == '0.8' else f'-{load}'}": [
            *SWARM, "--servers", "30", *ROOMY, *CLIENTS, "--rule", rule, "--load", load, "--seeds", seeds,
        ]
        for rule, load, seeds in (
            ("ours", "0.5", "3"), ("ours", "0.8", "10"), ("ours", "0.95", "3"),
            ("petals", "0.5", "3"), ("petals", "0.8", "4"), ("petals", "0.95", "3"),
        )
    },
    **{
        f"swarm-clients-thin60-{rule}{'' if load == '0.8' else f'-{load}'}": [
            *SWARM, "--servers", "60", *THIN, *CLIENTS, "--client-seconds", "1000", "--rule", rule,
            "--load", load, "--seeds", "2",
        ]
        for rule in ("ours", "petals")
        for load in ("0.5", "0.8")
    },
    "swarm-liars-roomy30-ours": [
        *SWARM, "--servers", "30", *ROOMY, *CLIENTS, "--liars", "0.1", "--seeds", "2",
    ],
    "eclipse": ["eclipse", "--seeds", "10"],
}  # fmt: skip
MEASUREMENTS: Mapping[str, Sequence[str]] = {**USUAL, **LONG, **SIMULATED}


def measure(name: str, rounds: int | None = None) -> int:
    """Run the command of a result and write its file; the exit code; the file is new if it is 0.

    rounds: of the results of `benchmarks decode`; None: as usual.
    """
    file = FIGURES / f"{name}.json"
    if name == DEMO:
        file.write_text(json.dumps(run_demo(), indent=2) + "\n")
        return 0
    words = list(MEASUREMENTS[name])
    if words[0] == "decode" and rounds is not None:
        words += ["--rounds", str(rounds)]
    print(f"{name}: python -m benchmarks {' '.join(words)}", file=sys.stderr)
    whole = [sys.executable, "-m", "benchmarks", *words, "--json", str(file)]
    return subprocess.run(whole, cwd=ROOT, check=False).returncode


def run_demo() -> dict[str, Any]:
    """The output of the demo without lines that name a file of this machine.  Raises CalledProcessError."""
    from node.devices import best_dtype

    about, elsewhere = machine(), Elsewhere()
    words = [sys.executable, str(ROOT / "scripts" / "demo.py")]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    about["others"] = elsewhere.share()
    print(done.stdout)
    return {
        "command": "make demo",
        "commit": commit(),
        "machine": about,
        "dtype": best_dtype("cpu"),
        "lines": without_files(done.stdout.splitlines()),
    }


def without_files(lines: Sequence[str]) -> list[str]:
    """The lines that neither name a file of this machine nor show progress."""
    return [line for line in lines if not re.search(r"(^| )/\w|^checking ", line)]


def read_figures(folder: Path = FIGURES) -> Results:
    """All results, by the names of their files."""
    return Results({path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))})
