"""Trees by named path."""

import jax.numpy as jnp
import numpy as np

from meshgpt import trees

TREE = {
    "wte_VD": jnp.zeros((5, 3), jnp.float32),
    "blocks": {"attn": {"q_DNH": jnp.zeros((2, 3, 1, 3), jnp.bfloat16)}, "list": [jnp.ones((2,), jnp.int32)]},
}


def test_names_join_the_path_with_slashes() -> None:
    assert [name for name, _ in trees.leaves_with_names(TREE)] == ["blocks/attn/q_DNH", "blocks/list/0", "wte_VD"]


def test_map_gives_the_name_and_the_leaves_of_all_trees() -> None:
    out = trees.map_with_names(lambda name, a, b: (name, a.shape, b.dtype), TREE, TREE)
    assert out["blocks"]["attn"]["q_DNH"] == ("blocks/attn/q_DNH", (2, 3, 1, 3), jnp.bfloat16)


def test_mask_finds_a_pattern_anywhere_in_the_name() -> None:
    assert trees.mask(TREE, "attn|wte") == {"wte_VD": True, "blocks": {"attn": {"q_DNH": True}, "list": [False]}}


def test_sizes() -> None:
    assert trees.count(TREE) == 15 + 18 + 2
    assert trees.nbytes(TREE) == 15 * 4 + 18 * 2 + 2 * 4
    assert trees.count({}) == trees.nbytes({}) == 0
    huge = {"x": np.broadcast_to(np.float32(0), (1 << 20, 1 << 20, 4))}
    assert trees.count(huge) == 1 << 42, "beyond 32 bits"


def test_axes_of_matrices_follow_the_letters_of_their_names() -> None:
    axes = {name: trees.MatrixAxes.of(name, rank) for name, rank in [
        ("wte_VD", 2), ("blocks/attn/q_DNH", 4), ("blocks/attn/o_NHD", 4), ("blocks/mlp/up_DF", 3), ("x_DF", 2),
    ]}  # fmt: skip
    shapes = {"wte_VD": (5, 3), "blocks/attn/q_DNH": (2, 6, 3, 4), "blocks/attn/o_NHD": (2, 3, 4, 6)}
    assert [axes[name].shape(shape) for name, shape in shapes.items()] == [(1, 5, 3), (2, 6, 12), (2, 12, 6)]
    assert axes["blocks/mlp/up_DF"].stack == 1
    assert axes["x_DF"].stack == 0
    for name, rank in [("blocks/attn/q_bias_NH", 3), ("ln_f/scale_D", 1), ("blocks/ln_1/scale_D", 2), ("count", 0)]:
        assert trees.MatrixAxes.of(name, rank) is None, name


def test_unzip_keeps_the_structure_and_what_is_in_the_tuples() -> None:
    like = {"a": 1, "b": [2, 3]}
    left, right = trees.unzip(like, {"a": (1, {"x": 2}), "b": [(3, 4), (5, 6)]}, 2)
    assert left == {"a": 1, "b": [3, 5]}
    assert right == {"a": {"x": 2}, "b": [4, 6]}
