"""Adam's state as other programs keep it, and its place in an optimizer of optax."""

import dataclasses

import jax
import jax.numpy as jnp

from meshgpt import trees
from meshgpt.errors import UserError
from meshgpt.optim.adam import AdamState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Adam's state: `mu` and `nu` are trees like the parameters' (first and second moments), `count` its updates."""

    mu: trees.Tree
    nu: trees.Tree
    count: int

    def into(self, opt_state: trees.Tree) -> trees.Tree:
        """`opt_state` with these moments in the place of its own (those of an `adam.AdamState`).

        Raises:
          UserError: the optimizer is not Adam, or keeps its moments in another form.
        """
        nodes, structure = jax.tree.flatten(opt_state, is_leaf=_is_adam)
        if not any(map(_is_adam, nodes)):
            raise UserError("the optimizer has no moments of Adam's to go on from: continue with AdamW")
        return jax.tree.unflatten(structure, [self._put(node) if _is_adam(node) else node for node in nodes])

    def _put(self, old: AdamState) -> AdamState:
        for mine, other in ((self.mu, old.mu), (self.nu, old.nu)):
            found, wanted = _forms(mine), _forms(other)
            if found.keys() != wanted.keys():
                raise UserError("the optimizer keeps its moments in fewer bits than these have: continue with AdamW")
            for name, form in found.items():
                if form != wanted[name]:
                    raise UserError(f"the moment of {name} is {form}, and the optimizer keeps {wanted[name]}")
        # Two arrays: a step is given both to write over.
        count, nu_count = (jax.device_put(jnp.asarray(self.count, jnp.int32), old.count.sharding) for _ in range(2))
        return AdamState(count=count, mu=self.mu, nu=self.nu, nu_count=nu_count)


def _is_adam(node: object) -> bool:
    return isinstance(node, AdamState)


def _forms(tree: trees.Tree) -> dict[str, str]:
    return {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in trees.leaves_with_names(tree)}
