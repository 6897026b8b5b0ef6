import errno
import fcntl
import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.config import ConfigError
from node.network.transport.identity import held_identity, identity_of, load_or_create_identity
from routing.names import public_key_of


def test_an_identity_is_made_once_and_kept(tmp_path):
    path = tmp_path / "new" / "identity"
    first = load_or_create_identity(path)
    assert load_or_create_identity(path) == first
    assert path.read_bytes() == first.private_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]  # no part file stays


def test_without_a_path_every_identity_is_new():
    assert load_or_create_identity(None).peer_id != load_or_create_identity(None).peer_id


def test_an_identity_has_one_node_at_a_time(tmp_path):
    path = tmp_path / "identity"
    with held_identity(path) as first:
        used = rf"identity {path} is in use by another node: every node needs an identity of its own"
        with pytest.raises(ConfigError, match=used), held_identity(path):
            pass
        with held_identity(tmp_path / "other") as other, held_identity(None) as third:
            assert len({first.peer_id, other.peer_id, third.peer_id}) == 3
        assert load_or_create_identity(path) == first, "to read it is no use of it"
    with held_identity(path) as again:
        assert again == first


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def unknown(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with held_identity(tmp_path / "identity") as one, held_identity(tmp_path / "identity") as two:
        assert one == two


def test_the_peer_id_is_that_of_libp2p():
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    seed = bytes(range(32))
    identity = identity_of(seed)
    assert identity.peer_id == ID.from_pubkey(create_new_key_pair(seed=seed).public_key).to_base58()
    public_key = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    assert public_key_of(identity.peer_id) == public_key == identity.public_key


def test_the_private_key_is_not_printed():
    identity = identity_of(b"\x07" * 32)
    assert repr(identity.private_key) not in repr(identity)


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (bytes(32), 0o644, r"mode 0644, others can read it; run: chmod 600"),
        (bytes(32), 0o640, r"mode 0640"),
        (bytes(31), 0o600, r"has 31 bytes, an Ed25519 key has 32"),
        (b"", 0o600, r"has 0 bytes"),
        (bytes(9999), 0o600, r"has more than 32 bytes"),
    ],
)
def test_a_file_that_is_not_a_private_key_of_ours_is_refused(tmp_path, content, mode, message):
    path = tmp_path / "identity"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        load_or_create_identity(path)
    assert path.read_bytes() == content


def test_a_key_that_another_user_can_change_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "identity"
    load_or_create_identity(path)
    fstat = os.fstat

    def of_another_user(descriptor):
        found = fstat(descriptor)
        return os.stat_result((*found[:4], os.geteuid() + 1, *found[5:]))

    monkeypatch.setattr(os, "fstat", of_another_user)
    with pytest.raises(
        ConfigError, match=rf"belongs to user {os.geteuid() + 1}, .*; run: chown {os.geteuid()} "
    ):
        load_or_create_identity(path)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_folders_that_are_made_for_a_key_are_its_owners_alone_under_any_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        load_or_create_identity(tmp_path / "one" / "two" / "identity")
    finally:
        os.umask(before)
    for made in (tmp_path / "one", tmp_path / "one" / "two"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "one" / "two" / "identity").stat().st_mode) == 0o600


def test_a_folder_in_the_place_of_the_file_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        load_or_create_identity(tmp_path)


def test_a_full_disk_leaves_no_file_at_all(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write identity .*identity \(32 bytes\): No space left"):
        load_or_create_identity(tmp_path / "identity")
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_that_make_it_at_once_the_first_one_wins(tmp_path, monkeypatch):
    path = tmp_path / "identity"
    link = os.link

    def other_was_faster(source, target):
        monkeypatch.setattr(os, "link", link)
        theirs.append(load_or_create_identity(path))
        link(source, target)

    theirs = []
    monkeypatch.setattr(os, "link", other_was_faster)
    assert [load_or_create_identity(path)] == theirs


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "identity")
    with pytest.raises(ConfigError, match=r"regular file|directory"):
        load_or_create_identity(tmp_path / "identity")


@pytest.mark.parametrize("path", ["", "/", "/dev/null/identity"])
def test_a_place_where_no_file_can_be_is_named(path):
    with pytest.raises(ConfigError, match=f"identity {path}"):
        load_or_create_identity(path)
