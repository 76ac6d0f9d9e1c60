"""Wrong formulas, which `mutations.py --formulas` seeds one at a time: exact replacements, and tests to notice them.

Those that are `known` were found in the source of a trainer in wide use in 2026.
"""

from __future__ import annotations

from formulas_cost import COST
from formulas_model import MODEL
from formulas_process import PROCESS
from formulas_update import UPDATE

FORMULAS = (*PROCESS, *COST, *MODEL, *UPDATE)
