"""`python -m lora_kernels check`: every op on every backend that can run here, against float64.

``products.py`` and ``weights.py`` hold the cases, ``run.py`` runs them, and on a GPU keeps what they prove.
"""

from .products import CHECKS as _PRODUCTS
from .products import DTYPES, eager_multi, exact_multi
from .weights import CHECKS as _WEIGHTS

CASES = {**_PRODUCTS, **_WEIGHTS}
CHECKS = {name: check for name, (check, _) in CASES.items()}
# The ops behind each check; where a GPU backend lacks one, the check is left out by name.
NEEDS = {name: needs for name, (_, needs) in CASES.items()}

__all__ = ["CHECKS", "DTYPES", "NEEDS", "eager_multi", "exact_multi", "main"]


def main(argv=None):
    from .run import main

    return main(argv)
