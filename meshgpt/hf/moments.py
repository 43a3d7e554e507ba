"""Adam's state as other programs keep it, and its place in an optimizer of optax."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from meshgpt import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Adam's state: `mu` and `nu` are trees like the parameters' (first and second moments), `count` its updates."""

    mu: trees.Tree
    nu: trees.Tree
    count: int

    def into(self, opt_state: trees.Tree) -> trees.Tree:
        """`opt_state` with these moments in the place of the ones of its `optax.scale_by_adam`."""

        def put(node: object) -> object:
            if not isinstance(node, optax.ScaleByAdamState):
                return node
            assert isinstance(node.count, jax.Array), "the optimizer's state is not on devices"
            count = jax.device_put(jnp.asarray(self.count, node.count.dtype), node.count.sharding)
            return optax.ScaleByAdamState(count=count, mu=self.mu, nu=self.nu)

        return jax.tree.map(put, opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
