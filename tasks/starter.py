"""A mixture for a first run on a laptop: short, varied, and learnable within minutes."""

from tasks import cldr, specs

LANGUAGES = ("en", "sw", "bn", "te", "am")


def _register() -> None:
    names = tuple(
        name for language in LANGUAGES for name in specs.MIXTURES[f"cldr_{language}"].tasks
    )
    # A quarter of the examples are function calls; they are several times longer than the others.
    calls = "bfcl_simple"
    specs.add_mixture(
        specs.MixtureSpec(
            name="starter",
            description=f"cldr in {', '.join(cldr.LANGUAGES[code] for code in LANGUAGES)}, and {calls}",
            tasks=(*names, calls),
            rates=(*(1.0,) * len(names), len(names) / 3),
        )
    )


_register()
