"""What TPU chips can do at most, as Google publishes it.

Source: the pages of the chips in the Cloud TPU documentation, https://docs.cloud.google.com/tpu/docs/v5e, .../v5p and
.../v6e. A capacity of HBM in GB is taken for 2**30 bytes each, as the compiler does. Where two versions of a page differ
(v5e's HBM: 819 GBps or 800 GiBps) the lower number is here.
"""

import dataclasses
from types import MappingProxyType

from sira_jax.errors import check


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: as in a topology's name, "v5e".
      peak_flops: bfloat16 operations a second.
      memory_bytes: of HBM.
      memory_bandwidth: of HBM, bytes a second.
      links: to neighbouring chips, two for each axis of the torus.
      link_bandwidth: bytes a second that a link carries one way: what is published for all links and both ways, shared out.
    """

    name: str
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    links: int
    link_bandwidth: float


def _chip(name: str, *, teraflops: float, gib: int, hbm_gbps: float, links: int, ici_gbps: float):
    return Chip(
        name,
        peak_flops=teraflops * 1e12,
        memory_bytes=gib * 2**30,
        memory_bandwidth=hbm_gbps * 1e9,
        links=links,
        link_bandwidth=ici_gbps * 1e9 / (2 * links),
    )


CHIPS = MappingProxyType(
    {
        "v5e": _chip("v5e", teraflops=197, gib=16, hbm_gbps=819, links=4, ici_gbps=400),
        "v5p": _chip("v5p", teraflops=459, gib=95, hbm_gbps=2765, links=6, ici_gbps=1200),
        "v6e": _chip("v6e", teraflops=918, gib=32, hbm_gbps=1638, links=4, ici_gbps=800),
    }
)


def chip_of(topology: str) -> Chip:
    """The chip of a topology's name, "v5e:16x16".

    Raises:
      ConfigError: the table does not have it.
    """
    name, colon, shape = topology.partition(":")
    is_known = name in CHIPS and colon and all(part.isdecimal() for part in shape.split("x"))
    allowed = f"CHIP:SHAPE such as v5e:16x16, the chips being {', '.join(CHIPS)}"
    check(bool(is_known), "--topology", topology, allowed)
    return CHIPS[name]
