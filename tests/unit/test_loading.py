"""Loading: an engine on the front's node reads the file itself, and one on another node reads a copy."""

from types import SimpleNamespace

import pytest

from rollout_service.engine import loading
from rollout_service.engine.loading import DifferentBytes, check_all_parts, locate, on_this_node
from rollout_service.tensor_bytes import part_checksums
from rollout_service.transports import Update


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """`cluster(node)` puts this process on one of two nodes. Ray's object store returns what was put into it."""

    async def stored(array):
        return array

    def at(node):
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: node))

    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "NodeID": "a"}, {"Alive": True, "NodeID": "b"}])
    monkeypatch.setattr("ray.put", stored)
    at("a")
    return at


@pytest.fixture
def update(tmp_path):
    (tmp_path / "received").write_bytes(bytes(range(256)))
    return Update(tmp_path / "received", "c" * 64)


async def test_an_engine_on_the_fronts_node_reads_the_file_that_was_received(cluster, update):
    weights = locate(3, update)
    assert (weights.version, weights.checksum) == (3, update.checksum)
    async with on_this_node(weights) as file:
        assert file == update.file
    assert update.file.exists()
    weights.bytes.close()


@pytest.mark.parametrize("fails", [False, True])
async def test_an_engine_on_another_node_has_a_copy_only_while_it_loads(cluster, update, tmp_path, fails):
    weights = locate(3, update)
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


async def test_nothing_is_stored_for_other_nodes_if_there_are_none(cluster, update, monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "NodeID": "a"}, {"Alive": False, "NodeID": "b"}])
    assert locate(3, update).bytes is None


async def test_ranks_check_a_part_each_and_one_other_byte_is_refused_before_any_loads(cluster, update):
    weights = locate(3, update, 4)
    weights.bytes.close()
    assert weights.parts == tuple(part_checksums(update.file, 4))
    of_one_rank = locate(3, update)
    of_one_rank.bytes.close()
    assert of_one_rank.parts == ()
    check_all_parts(list(weights.parts), weights.parts)
    wrong = [*weights.parts[:3], "f" * 64]
    with pytest.raises(DifferentBytes, match="read bytes with the BLAKE3 ffff"):
        check_all_parts(wrong, weights.parts)
