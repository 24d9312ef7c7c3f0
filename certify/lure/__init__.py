"""From a traced network to `sdp.LureSystem`: how each module and operation becomes linear maps and scalar nonlinearities."""

from certify.lure import layers as layers  # these two fill the tables
from certify.lure import operations as operations
from certify.lure.lowering import Lowering as Lowering
from certify.lure.lowering import Wire as Wire
from certify.lure.lowering import Wired as Wired
from certify.lure.lowering import check as check
from certify.lure.lowering import memory as memory
from certify.lure.lowering import problems_of as problems_of
from certify.lure.lowering import signals_of as signals_of
from certify.lure.lowering import wire as wire
