"""How much a router's choice of expert tells of a label, from its counts.

Axis letters: L layers, Z labels, E experts.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


def information(load_ZE: np.ndarray, weight_Z: np.ndarray) -> float:
    """Mutual information of label and expert, nats: how much less uncertain one is when the other is known.

    Args:
      load_ZE: each label's distribution over the experts; rows sum to 1 (rows of labels that do not occur are ignored).
      weight_Z: how often each label occurs, in any unit.
    """
    there = weight_Z > 0
    if not there.any():
        return 0.0
    share_Z = weight_Z[there] / weight_Z[there].sum()
    joint_ZE = share_Z[:, None] * load_ZE[there]
    expected_ZE = share_Z[:, None] * joint_ZE.sum(0)
    positive = joint_ZE > 0
    return float(np.sum(joint_ZE[positive] * np.log(joint_ZE[positive] / expected_ZE[positive])))


def entropy(weight: np.ndarray) -> float:
    """Entropy of a distribution given by weights, nats."""
    share = weight[weight > 0] / weight.sum()
    return float(-np.sum(share * np.log(share)))


@dataclasses.dataclass(frozen=True)
class Told:
    """What the routers tell of one labelling.

    Attributes:
      labels: number of labels that occur.
      bound: entropy of the labels, nats: more cannot be told.
      real_L: projection -> information in each layer, nats.
      shuffled_NL: projection -> the same for each shuffling, (N, L).
      fresh_L: projection -> the same of the routers before training, which tell of whatever their random weights tell apart.
    """

    labels: int
    bound: float
    real_L: Mapping[str, np.ndarray]
    shuffled_NL: Mapping[str, np.ndarray]
    fresh_L: Mapping[str, np.ndarray]

    @property
    def mean(self) -> float:
        """Over all routers."""
        return float(np.mean(np.concatenate([*self.real_L.values()])))

    @property
    def before(self) -> float:
        """The same before training."""
        return float(np.mean(np.concatenate([*self.fresh_L.values()])))

    @property
    def risen(self) -> int:
        """Routers that tell more than before training."""
        return sum(int(np.sum(self.real_L[name] > self.fresh_L[name])) for name in self.real_L)

    @property
    def chance_N(self) -> np.ndarray:
        """The same for each shuffling, (N,)."""
        return np.mean(np.concatenate([*self.shuffled_NL.values()], axis=1), axis=1)

    @property
    def p(self) -> float:
        """Share of shufflings, the real labels among them, whose mean is at least the real one's."""
        return (1 + int(np.sum(self.chance_N >= self.mean))) / (1 + len(self.chance_N))

    @property
    def above(self) -> tuple[int, int]:
        """Routers that tell more than in every shuffling, and all routers."""
        beats = [self.real_L[name] > self.shuffled_NL[name].max(0) for name in self.real_L]
        return int(np.sum(np.concatenate(beats))), sum(map(len, beats))


def told(
    real: Mapping[str, Mapping[str, np.ndarray]],
    shuffled: Sequence[Mapping[str, Mapping[str, np.ndarray]]],
    fresh: Mapping[str, Mapping[str, np.ndarray]],
    groups: Sequence[Sequence[int]] | None = None,
) -> Told:
    """Sums the labels into groups, and takes the information of every router.

    Args:
      real: projection -> task_expert_load (L, Z, E) and task_tokens (L, Z), as `router_report` has them.
      shuffled: the same for each shuffling.
      fresh: the same before training.
      groups: labels of each group; None for each label alone. Labels in no group are left out.
    """

    def of(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
        load_LZE, weight_LZ = grouped(statistics, groups)
        return np.array([information(*pair) for pair in zip(load_LZE, weight_LZ, strict=True)])

    weight_Z = grouped(next(iter(real.values())), groups)[1][0]
    return Told(
        labels=int(np.count_nonzero(weight_Z)),
        bound=entropy(weight_Z),
        real_L={name: of(statistics) for name, statistics in real.items()},
        shuffled_NL={name: np.stack([of(report[name]) for report in shuffled]) for name in real},
        fresh_L={name: of(fresh[name]) for name in real},
    )


def grouped(
    statistics: Mapping[str, np.ndarray], groups: Sequence[Sequence[int]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Loads (L, U, E) and tokens (L, U) of groups of labels; a group without tokens has a load of 0."""
    load_LZE = np.asarray(statistics["task_expert_load"], np.float64)
    weight_LZ = np.asarray(statistics["task_tokens"], np.float64)
    if groups is None:
        return load_LZE, weight_LZ
    member_UZ = np.zeros((len(groups), weight_LZ.shape[1]))
    for place, labels in enumerate(groups):
        member_UZ[place, list(labels)] = 1
    weight_LU = weight_LZ @ member_UZ.T
    sum_LUE = np.einsum("uz,lz,lze->lue", member_UZ, weight_LZ, load_LZE)
    return sum_LUE / np.maximum(weight_LU, 1e-30)[:, :, None], weight_LU
