"""The models that leave the cache: the longest unused first, none in use, and no more than must."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.model.checkpoint.disk.plan import (
    CachedModel,
    DoesNotFit,
    Key,
    evictions,
    in_units,
    total_bytes,
)


def model(name: str, used: float, size: int = 0, **more) -> CachedModel:
    files = more.pop("files", {(0, hash(name)): size} if size else {})
    return CachedModel(Key("hub", name, "1"), used, files=files, **more)


def names(keys: list[Key]) -> list[str]:
    return [key.folder for key in keys]


def test_the_longest_unused_goes_first_and_no_more_than_must():
    models = [model("new", 3, 10), model("old", 1, 10), model("middle", 2, 10)]
    assert names(evictions(models, 30)) == []
    assert names(evictions(models, 29)) == ["old"]
    assert names(evictions(models, 19)) == ["old", "middle"]
    assert names(evictions(models, 1)) == ["old", "middle", "new"]


def test_a_model_in_use_stays_however_old_it_is():
    models = [model("old", 1, 10, in_use=True), model("new", 3, 10)]
    assert names(evictions(models, 10)) == ["new"]
    assert names(evictions(models, 5)) == ["new"]  # as far as it goes


def test_bytes_that_are_about_to_come_count():
    models = [model("old", 1, 10), model("other", 2, 0, in_use=True, coming=10), model("mine", 3, 5)]
    own = models[2].key
    assert names(evictions(models, 24, own)) == ["old"]
    assert names(evictions(models, 25, own)) == []


def test_a_file_that_two_revisions_share_counts_once_and_goes_with_the_last():
    shared = {(0, 1): 8}
    models = [model("a", 1, files={**shared, (0, 2): 1}), model("b", 2, files={**shared, (0, 3): 1})]
    assert total_bytes(models) == 10
    assert names(evictions(models, 9)) == ["a"]
    assert names(evictions(models, 8)) == ["a", "b"]  # removing a alone frees one byte


def test_a_removal_that_was_interrupted_is_ended_even_where_there_is_room():
    models = [model("half", 9, 1, interrupted=True), model("old", 1, 10)]
    assert names(evictions(models, 100)) == ["half"]


def test_a_bound_below_the_models_own_files_is_refused_with_both_numbers():
    models = [model("mine", 1, 1 << 30, in_use=True, coming=1 << 30), model("old", 0, 10)]
    with pytest.raises(DoesNotFit) as caught:
        evictions(models, 1 << 30, models[0].key)
    assert str(caught.value) == "--max-disk of 1.0 GiB is too small for mine: its files need 2.0 GiB"


def test_a_bound_that_models_in_use_fill_is_refused_with_their_names():
    models = [model("mine", 1, 0, in_use=True, coming=2048), model("theirs", 0, 2048, in_use=True)]
    with pytest.raises(DoesNotFit) as caught:
        evictions(models, 3072, models[0].key)
    assert str(caught.value) == (
        "--max-disk of 3.0 KiB leaves no room for mine: its files need 2.0 KiB, and 2.0 KiB are in use"
        " (theirs)"
    )


def test_what_is_there_is_served_although_models_in_use_are_above_the_bound():
    models = [model("mine", 1, 2048, in_use=True), model("theirs", 0, 2048, in_use=True)]
    assert evictions(models, 3072, models[0].key) == []


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.booleans(), st.sets(st.integers(0, 12), max_size=4)), max_size=8
    ),
    st.integers(0, 60),
)
def test_what_remains_fits_or_is_all_in_use(rows, most):
    models = [
        CachedModel(Key("hub", f"m{n}", "1"), used, in_use, {(0, file): file + 1 for file in files})
        for n, (used, in_use, files) in enumerate(rows)
    ]
    gone = evictions(models, most)
    rest = [each for each in models if each.key not in gone]
    assert total_bytes(rest) <= most or all(each.in_use for each in rest)
    assert not any(each.in_use for each in models if each.key in gone)
    if gone:  # the last one had to go
        kept = [*rest, next(each for each in models if each.key == gone[-1])]
        assert total_bytes(kept) > most
    ages = [each.last_used for key in gone for each in models if each.key == key]
    assert ages == sorted(ages)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (1 << 50, "1024.0 TiB")],
)
def test_bytes_are_said_in_units_of_1024(count, text):
    assert in_units(count) == text
