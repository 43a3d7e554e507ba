"""Rows reach the devices that hold them, whatever the mesh."""

import jax
import numpy as np
import pytest
import tiny

from meshgpt.distributed.batch import Feed
from meshgpt.distributed.mesh import spec

A, M, K = 3, 8, 5
ROWS = np.arange(A * M * K, dtype=np.int32).reshape(A * M, K)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (4, 1, 1)], ids=str)
def test_rows_lie_as_jax_itself_would_put_them(mesh: tuple[int, int, int]):
    with jax.set_mesh(tiny.mesh(*mesh)):
        feed = Feed(jax.sharding.get_mesh(), A, M)
        assert list(feed.rows) == list(range(A * M))
        placed = feed.place(ROWS[list(feed.rows)])
        expected = jax.device_put(ROWS.reshape(A, M, K), spec("_ batch seq"))
    assert placed.sharding == expected.sharding
    assert placed.shape == (A, M, K)
    ours = {shard.device: (shard.index, np.asarray(shard.data)) for shard in placed.addressable_shards}
    for shard in expected.addressable_shards:
        index, data = ours[shard.device]
        assert index == shard.index
        np.testing.assert_array_equal(data, np.asarray(shard.data))


def test_the_tensor_axis_sees_the_same_rows():
    feed = Feed(tiny.mesh(2, 1, 4), A, M)
    shards = [np.asarray(shard.data) for shard in feed.place(ROWS).addressable_shards]
    assert all(shard.shape == (A, M // 2, K) for shard in shards)
    kinds = {shard.tobytes() for shard in shards}
    assert len(kinds) == 2
    np.testing.assert_array_equal(shards[0][1], ROWS.reshape(A, M, K)[1, : M // 2])


def test_weights_keep_their_dtype():
    feed = Feed(tiny.mesh(2, 2, 2), 1, 4)
    assert feed.place(np.ones((4, 2), np.float32)).dtype == np.float32
