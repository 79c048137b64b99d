"""Low-rank edits of hidden vectors at chosen rows, fused forward and backward.

``lowrank_edit`` is the operator, ``RowPlan`` says where, ``orthonormalize`` keeps R orthonormal,
``reference`` is the meaning. Importing this package loads neither triton nor transformers.
"""

from reft_kernels import reference
from reft_kernels.functional import explain, loreft, loreft_, lowrank_edit, lowrank_edit_
from reft_kernels.orthonormal import orthonormalize, reflector_base
from reft_kernels.rows import RowPlan
from reft_kernels.spec import FAMILY, EditSpec, fold

__all__ = [
    "FAMILY",
    "EditSpec",
    "RowPlan",
    "explain",
    "fold",
    "loreft",
    "loreft_",
    "lowrank_edit",
    "lowrank_edit_",
    "orthonormalize",
    "reference",
    "reflector_base",
]
