"""`meshgpt plan WHAT ...`: what a budget buys, what a device holds, and what one's own runs say of the next."""

from collections.abc import Callable, Sequence

from meshgpt.errors import UserError


def _budget(arguments: Sequence[str]) -> None:
    from meshgpt.planning.budget import command

    command(arguments)


def _fit(arguments: Sequence[str]) -> None:
    from meshgpt.planning.fit import command

    command(arguments)


def _memory(arguments: Sequence[str]) -> None:
    from meshgpt.planning.memory import command

    command(arguments)


PLANS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "budget": (_budget, "--flops|--hours|--tokens: size, tokens, loss, hours and cost by three published laws"),
    "memory": (_memory, "RECIPE [--topology NAME]: what it takes of a device, and what would make it fit"),
    "fit": (_fit, "RUN...: a law fitted to your runs, and what it predicts of others"),
}


def plan(arguments: Sequence[str]) -> None:
    """meshgpt plan WHAT ..."""
    what = arguments[0] if arguments else "--help"
    if what in PLANS:
        PLANS[what][0](arguments[1:])
        return
    usage = "\n".join(["usage: meshgpt plan WHAT ...", *(f"  {name:<7} {text}" for name, (_, text) in PLANS.items())])
    if what not in ("-h", "--help"):
        raise UserError(f"no plan {what!r}\n{usage}")
    print(usage)
