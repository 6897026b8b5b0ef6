"""The packages' hashes and licences: every pin has both, and no other package has either."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCK, LICENCES = script("lock"), script("licences")


def entries() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in (LOCK.BUILD, LOCK.TORCH, LOCK.ALL):
        for package, entry in LOCK.entries_of((ROOT / LOCK.LOCKS / name).read_text()).items():
            assert package not in found, f"{package} is in two locks"
            assert LOCK.file_of(package) == name
            found[package] = entry
    return found


def test_every_pin_has_the_hashes_of_its_files_and_every_hash_belongs_to_a_pin():
    pins = LOCK.pins_of((ROOT / "constraints.txt").read_text())
    assert LOCK.differences(pins, {name: LOCK.version_of(entry) for name, entry in entries().items()}) == []
    for name, entry in entries().items():
        assert LOCK.version_of(entry) == pins[name]
        assert LOCK.hashes_of(entry), f"{name} has no hash"


def test_torch_for_cpus_is_the_pinned_version_and_has_a_hash():
    text = (ROOT / LOCK.LOCKS / LOCK.CPU).read_text()
    pins = LOCK.pins_of((ROOT / "constraints.txt").read_text())
    assert {name: LOCK.version_of(entry) for name, entry in LOCK.entries_of(text).items()} == {
        "torch": f"{pins['torch']}+cpu"
    }
    assert LOCK.hashes_of(text)


def test_a_lock_has_pins_and_hashes_and_nothing_else():
    line = re.compile(r"#.*|[\w.-]+==[\w.+!]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?")
    for path in (ROOT / LOCK.LOCKS).iterdir():
        for number, each in enumerate(path.read_text().splitlines(), 1):
            assert line.fullmatch(each), f"{path.name}:{number}: {each}"


def test_what_constraints_lack_or_have_for_nothing_is_said():
    assert LOCK.differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == [
        "constraints.txt lacks c==3",
        "constraints.txt pins a, which nothing needs",
    ]


@pytest.mark.parametrize(
    ("marker", "used"),
    [
        ("", True),
        (" ; python_full_version == '3.13.*'", True),
        (" ; sys_platform == 'linux' and platform_machine == 'aarch64'", True),
        (" ; sys_platform == 'win32'", False),
        (" ; python_full_version >= '3.12' and sys_platform == 'emscripten'", False),
    ],
)
def test_packages_that_no_machine_of_ours_installs_are_left_out(marker, used):
    entry = f"a==1{marker} \\\n    --hash=sha256:{'0' * 64}\n"
    assert LOCK.entries_of("# a comment\n" + entry) == {"a": entry}
    assert LOCK.used({"a": entry}) == ({"a": entry} if used else {})


def test_every_package_has_its_licence_on_the_page():
    rows = LICENCES.rows_of((ROOT / LICENCES.PAGE).read_text())
    assert {name: version for name, (version, _) in rows.items()} == LICENCES.locked(ROOT)
    assert [name for name, (_, found) in rows.items() if found == LICENCES.UNKNOWN] == ["cuda-toolkit"]


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"license_expression": "MIT", "license": "Apache"}, "MIT"),
        ({"license": "MPL-2.0", "classifier": ["License :: OSI Approved :: MIT License"]}, "MPL-2.0"),
        ({"license": "x\n" * 9, "classifier": ["License :: OSI Approved :: MIT License"]}, "MIT License"),
        ({"license": "BSD 3-Clause License\n\nCopyright"}, "BSD 3-Clause License"),
        ({"license": "A" * 99, "classifier": ["Topic :: Scientific"]}, None),
        ({}, None),
    ],
)
def test_a_licence_is_what_the_package_states(metadata, found):
    assert LICENCES.stated(metadata) == found


def test_the_licences_of_installed_packages_are_those_of_the_page():
    rows = LICENCES.rows_of((ROOT / LICENCES.PAGE).read_text())
    for name in ("trio", "libp2p", "transformers"):
        version, licence = rows[name]
        assert LICENCES.licence_of(name, version) == licence
    assert LICENCES.licence_of("trio", "0.0.1") is None
