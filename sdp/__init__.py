"""Semidefinite programs for offline certification: numpy, scipy and cvxpy; knows no torch."""

from sdp import check as check
from sdp import proof_file as proof_file
from sdp.exact import prove_exactly as prove_exactly
from sdp.lipsdp import Solution as Solution
from sdp.lipsdp import lipsdp as lipsdp
from sdp.lure import LureSystem as LureSystem
from sdp.lure import feed_forward as feed_forward
from sdp.lure import residual_block as residual_block
from sdp.newton import Progress as Progress
from sdp.program import program as program
from sdp.proof import estimate as estimate
from sdp.proof import is_positive_semidefinite as is_positive_semidefinite
from sdp.proof import is_well_posed as is_well_posed
from sdp.proof import largest_eigenvalue as largest_eigenvalue
from sdp.proof import prove as prove
from sdp.wiring import Region as Region
from sdp.wiring import Signal as Signal
from sdp.wiring import Wiring as Wiring
