"""A mixture for a first run on a laptop: short, varied, and learnable within minutes."""

from tasks import cldr, specs

LANGUAGES = ("en", "sw", "bn", "te", "am")
KINDS = ("date", "relative")
CALLS = "bfcl_simple"
# Function calls are several times longer than the others, so this share of the examples is half of the tokens.
_CALLS_SHARE = 0.2


def _register() -> None:
    names = tuple(cldr.task_name(kind, language) for language in LANGUAGES for kind in KINDS)
    languages = ", ".join(cldr.LANGUAGES[code] for code in LANGUAGES)
    rate = len(names) * _CALLS_SHARE / (1 - _CALLS_SHARE)
    specs.add_mixture(
        specs.MixtureSpec(
            name="starter",
            description=f"dates and relative times in {languages}; function calls of {CALLS}",
            tasks=(*names, CALLS),
            rates=(*(1.0,) * len(names), rate),
        )
    )


_register()
