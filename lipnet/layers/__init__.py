"""Layers with a known Lipschitz constant, one file per family."""

from lipnet.layers.activations import Abs, GroupSort, Householder, MaxMin, NActivation
from lipnet.layers.bro import BROConv2d, BROLinear
from lipnet.layers.fourier import FourierBROConv2d, FourierSandwichConv2d
from lipnet.layers.gershgorin import GershgorinBlock
from lipnet.layers.heads import UnitRowLinear
from lipnet.layers.ldlt import LDLTBlock, LDLTConv2d
from lipnet.layers.liresnet import LiResConv2d
from lipnet.layers.orthogonal import ContractionConv2d, ContractionLinear
from lipnet.layers.pooling import L2Pool2d, ScaledAvgPool2d
from lipnet.layers.sandwich import SandwichConv2d, SandwichLinear
from lipnet.layers.shape import BatchCentering, ChannelsLast, LayerCentering2d, Normalize, PadChannels, ReverseChannels, Scale
from lipnet.layers.sll import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear

__all__ = [
    "Abs",
    "BROConv2d",
    "BROLinear",
    "BatchCentering",
    "CPLConv2d",
    "CPLLinear",
    "ChannelsLast",
    "ContractionConv2d",
    "ContractionLinear",
    "FourierBROConv2d",
    "FourierSandwichConv2d",
    "GershgorinBlock",
    "GroupSort",
    "Householder",
    "L2Pool2d",
    "LDLTBlock",
    "LDLTConv2d",
    "LayerCentering2d",
    "LiResConv2d",
    "MaxMin",
    "NActivation",
    "Normalize",
    "PadChannels",
    "ReverseChannels",
    "SLLConv2d",
    "SLLLinear",
    "SandwichConv2d",
    "SandwichLinear",
    "Scale",
    "ScaledAvgPool2d",
    "UnitRowLinear",
]
