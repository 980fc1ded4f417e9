"""Budget: of several groups, each with a few options, those options of least loss whose costs fit a limit.

The multiple-choice knapsack problem, solved exactly as an integer program by HiGHS (scipy.optimize.milp).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

Table = Sequence[Sequence[float]]  # a row a group, an entry an option


def least(losses: Table, costs: Table, limit: float) -> list[int] | None:
    """The option of each group such that the sum of their losses is least and that of their costs at most
    `limit`; None if the cheapest cost more. All numbers are finite."""
    import numpy  # half a second with scipy, which who has no budget need not wait for
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    room = limit - sum(map(min, costs))
    if room < -1e-9 * abs(limit):
        return None
    count = sum(map(len, costs))
    group = numpy.repeat(numpy.arange(len(costs)), [len(row) for row in costs])
    one_each = csr_array((numpy.ones(count), (group, numpy.arange(count))), shape=(len(costs), count))
    # What an option costs beyond its group's cheapest, in units of the least such: far above tolerances.
    extra = numpy.array([float(cost - min(row)) for row in costs for cost in row])
    unit = extra[extra > 0].min() if extra.any() else 1.0
    lost = numpy.array([loss - min(row) for row in losses for loss in row])
    ends = list(accumulate((len(row) for row in costs), initial=0))
    while True:
        fits = LinearConstraint(extra[None] / unit, -numpy.inf, max(room, 0) / unit)
        found = milp(
            lost / max(lost.max(), 1e-300),
            integrality=numpy.ones(count),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), fits],
            options={"mip_rel_gap": 0},
        )
        taken = [int(found.x[a:b].argmax()) for a, b in pairwise(ends)]
        over = sum(row[i] for row, i in zip(costs, taken, strict=True)) - limit
        if over <= 1e-9 * abs(limit):
            return taken
        room -= over  # what a solver counts as an integer is one nearly
