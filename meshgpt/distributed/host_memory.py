"""The host's pinned memory, which GPUs and TPUs address: arrays that wait there for their turn."""

import jax

from meshgpt.errors import UserError
from meshgpt.trees import Tree

KIND = "pinned_host"


def require(what: str, instead: str) -> None:
    """Refuses `what`, a setting, where the devices cannot address the host's memory.

    Raises:
      UserError: saying what to do `instead`.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform in ("gpu", "cuda", "tpu"):  # perhaps elsewhere; all of these can
        return
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if KIND not in kinds:
        raise UserError(f"{what}: a {device.device_kind} addresses {', '.join(kinds)} only; {instead}")


def refuse_bytes_on_tpu(what: str) -> None:
    """Refuses `what`, a setting, for arrays of bytes where the mesh is of TPUs.

    XLA for TPUs (libtpu 0.0.42) gives such a copy two layouts that differ, and fails.

    Raises:
      UserError: saying what to do instead.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform == "tpu":
        raise UserError(
            f"{what}: XLA for TPUs cannot move moments of 8 or 4 bits to the host; leave these on the device, where "
            "they are small, or take AdamW(moment_dtype='bfloat16')"
        )


def to_host(tree: Tree) -> Tree:
    """Inside jit: the tree with its arrays (not its scalars) in the host's memory."""
    return _moved(tree, jax.memory.Space.Host)


def to_device(tree: Tree) -> Tree:
    """Inside jit: the tree with its arrays in the device's memory."""
    return _moved(tree, jax.memory.Space.Device)


def on_host(abstract: Tree) -> Tree:
    """Abstract arrays as `to_host` leaves them, which `jax.eval_shape` does not say."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not leaf.ndim or leaf.sharding is None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(KIND))

    return jax.tree.map(one, abstract)


def _moved(tree: Tree, space: jax.memory.Space) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, tree)
