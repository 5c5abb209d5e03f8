"""Loading: an engine on the front's node reads the file itself, and one on another node reads a copy."""

import asyncio
from types import SimpleNamespace

import pytest

from rollout_service.engine import loading
from rollout_service.engine.loading import DifferentBytes, check_all_parts, locate, on_this_node
from rollout_service.tensor_bytes import part_checksums
from rollout_service.transports import Update
from rollout_service.weights.versions import WeightSet


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """`cluster(node)` puts this process on one of two nodes. Ray's object store returns what was put into it."""

    async def stored(array):
        return array

    def at(node):
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: node))

    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr("ray.put", stored)
    at("a")
    return at


@pytest.fixture
def update(tmp_path):
    (tmp_path / "received").write_bytes(bytes(range(256)))
    return Update(tmp_path / "received", "c" * 64)


async def test_an_engine_on_the_fronts_node_reads_the_file_that_was_received(cluster, update):
    weights = locate(3, update, 1, ["a", "b"])
    assert (weights.version, weights.checksum) == (3, update.checksum)
    async with on_this_node(weights) as file:
        assert file == update.file
    assert update.file.exists()
    weights.bytes.close()


@pytest.mark.parametrize("fails", [False, True])
async def test_an_engine_on_another_node_has_a_copy_only_while_it_loads(cluster, update, tmp_path, fails):
    weights = locate(3, update, 1, ["a", "b"])
    update.file.unlink()
    cluster("b")
    try:
        async with on_this_node(weights) as file:
            assert file.read_bytes() == bytes(range(256))
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert list((tmp_path / "memory").iterdir()) == []


async def test_bytes_are_stored_once_when_the_first_engine_is_on_another_node(cluster, update):
    weights = locate(3, update, 1, ["a"])
    assert weights.bytes is None
    assert weights.for_nodes(["a"]).bytes is None
    stored = weights.for_nodes(["b"])
    assert bytes(await stored.bytes) == bytes(range(256))
    assert stored.for_nodes(["a", "c"]) is stored


async def test_an_engine_that_comes_long_after_a_push_can_read_what_is_in_service_on_its_own_node(cluster, update):
    """Its node joined later, or the front started again with its state before the nodes were there."""
    policy = WeightSet("policy", {}, "float32")
    assert await policy.file_for("b") is None
    policy.publish(locate(3, update, 1, nodes=()), seconds=0.0, pause=0.0)
    assert (await policy.file_for("a")).bytes is None
    first, second = await asyncio.gather(policy.file_for("b"), policy.file_for("c"))
    assert first is second
    cluster("b")
    async with on_this_node(first) as file:
        assert file.read_bytes() == bytes(range(256))


async def test_ranks_check_a_part_each_and_one_other_byte_is_refused_before_any_loads(cluster, update):
    weights = locate(3, update, 4, ["a"])
    assert weights.parts == tuple(part_checksums(update.file, 4))
    assert locate(3, update, 1, ["a"]).parts == ()
    check_all_parts(list(weights.parts), weights.parts)
    wrong = [*weights.parts[:3], "f" * 64]
    with pytest.raises(DifferentBytes, match="read bytes with the BLAKE3 ffff"):
        check_all_parts(wrong, weights.parts)
