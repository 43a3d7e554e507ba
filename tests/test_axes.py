"""The mesh and the table from words to mesh axes."""

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from meshgpt.distributed.mesh import RULES, MeshShape, Rules, gathered, make_mesh, spec
from meshgpt.errors import UserError


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        (MeshShape(), 8, (8, 1, 1)),
        (MeshShape(data=2, fsdp=-1), 8, (2, 4, 1)),
        (MeshShape(data=1, fsdp=2, tensor=-1), 6, (1, 2, 3)),
        (MeshShape(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshShape(), 1, (1, 1, 1)),
    ],
)
def test_minus_one_takes_what_is_left(shape: MeshShape, devices: int, expected: tuple[int, int, int]) -> None:
    full = shape.resolve(devices)
    assert (full.data, full.fsdp, full.tensor) == expected
    assert full.batch_shards == expected[0] * expected[1]


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}])
def test_a_shape_that_means_nothing_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"mesh data="):
        MeshShape(**sizes)


@pytest.mark.parametrize(
    ("shape", "devices", "needs"),
    [
        (MeshShape(data=3, fsdp=1, tensor=1), 8, "needs 3 devices"),
        (MeshShape(data=2, fsdp=2, tensor=4), 8, "needs 16 devices"),
        (MeshShape(data=-1, fsdp=3), 8, "needs a multiple of 3 devices"),
    ],
)
def test_too_many_or_too_few_devices_are_refused_with_a_shape_that_works(
    shape: MeshShape, devices: int, needs: str
) -> None:
    with pytest.raises(UserError, match=rf"{needs}, and there are 8") as caught:
        shape.resolve(devices)
    suggested = dict(zip(("data", "fsdp", "tensor"), map(int, str(caught.value).split()[-5::2]), strict=True))
    MeshShape(**suggested).resolve(devices)


def test_the_mesh_is_explicit_and_lies_over_the_devices() -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": len(jax.devices()) // 4, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Explicit}


def test_words_become_mesh_axes() -> None:
    assert spec("batch seq embed") == PartitionSpec(("data", "fsdp"), None, None)
    assert spec("layers fsdp heads _") == PartitionSpec(None, "fsdp", "tensor", None)
    assert spec("batch", Rules(batch="data")) == PartitionSpec("data")
    assert spec("") == PartitionSpec()


def test_an_unknown_word_and_an_axis_used_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown axis 'head' in 'batch head'"):
        spec("batch head")
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        spec("heads mlp")
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        spec("batch fsdp")


def test_gathering_takes_fsdp_away_and_nothing_else() -> None:
    assert gathered("layers fsdp heads _") == "layers _ heads _"
    assert spec(gathered("vocab_fsdp embed")) == PartitionSpec("tensor", None)
    # `tensor` must be the major axis of the table: its slices are contiguous once `fsdp` is gathered.
    assert RULES.vocab_fsdp == ("tensor", "fsdp")
