"""The noise of `certify run --method smoothing`: its options, and the value that they say."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from certify.smoothing import Law, Noise

_OPTIONS = {  # what each option is of, for --help and for whoever leaves it out
    "sigma": "the standard deviation of normal noise (for translation, in pixels; for contrast and gamma, of the logarithm)",
    "tau": "the standard deviation of the brightness",
    "scale": "of Laplace noise; the half width of uniform noise; of the law of blur and gamma",
    "keep": "the number of pixels that are not hidden",
    "law": "of the blur's variance or of the gamma",
}
_EXAMPLE = {"sigma": "0.25", "tau": "0.2", "scale": "0.5", "keep": "45", "law": "exponential"}
_NEEDS = {
    "gaussian": ("sigma",),
    "laplace": ("scale",),
    "uniform": ("scale",),
    "ablation": ("keep",),
    "brightness": ("sigma",),
    "contrast": ("sigma",),
    "gamma": ("sigma",),  # or a law and its scale
    "translation": ("sigma",),
    "blur": ("law", "scale"),
    "contrast-brightness": ("sigma", "tau"),
}
_LAWS = ("exponential", "uniform", "folded-normal", "rayleigh")


def add_noise(group: argparse._ActionsContainer) -> None:
    """--noise and what noises need."""
    group.add_argument("--noise", choices=tuple(_NEEDS), help="what the copies are made by (default gaussian); what a radius is of depends on it (docs/cli.md)")
    group.add_argument("--sigma", type=float, metavar="S", help=_OPTIONS["sigma"])
    group.add_argument("--scale", type=float, metavar="S", help=_OPTIONS["scale"])
    group.add_argument("--tau", type=float, metavar="T", help=f"{_OPTIONS['tau']}, with contrast-brightness")
    group.add_argument("--keep", type=int, metavar="K", help=_OPTIONS["keep"])
    group.add_argument("--law", choices=_LAWS, help=_OPTIONS["law"])
    group.add_argument("--norm", choices=["1", "2", "inf"], help="of the radius: inf for gaussian and uniform noise; otherwise it is that of the noise")


def noise_of(
    args: argparse.Namespace,
    shape: tuple[int, ...],  # of what the network takes
) -> Noise:
    """The noise. Raises CertifyError for an option that it needs and lacks, that it has no use for, and for a norm that its radii are not in."""
    from certify import smoothing
    from certify.errors import CertifyError
    from certify.smoothing.noise.other import given

    name = args.noise or "gaussian"
    needs = ("law", "scale") if name == "gamma" and (args.law or args.scale) else _NEEDS[name]
    for option in needs:
        if getattr(args, option) is None:
            raise CertifyError(f"--noise {name} needs --{option} ({_OPTIONS[option]}), such as --{option} {_EXAMPLE[option]}")
    for option in _OPTIONS:
        if option not in needs and getattr(args, option) is not None:
            raise CertifyError(f"--noise {name} has no --{option}; it takes {' and '.join('--' + need for need in needs)}")
    at_infinity = args.norm == "inf"
    match name:
        case "laplace":
            noise: Noise = smoothing.Laplace(args.scale)
        case "uniform":
            noise = smoothing.UniformLinf(args.scale, math.prod(shape)) if at_infinity else smoothing.Uniform(args.scale)
        case "ablation":
            inputs = given(smoothing.Ablation(1, 1), shape)
            noise = smoothing.Ablation(args.keep, math.prod(inputs[1:] if len(inputs) == 3 else inputs))
        case "brightness":
            noise = smoothing.Brightness(args.sigma)
        case "contrast":
            noise = smoothing.Contrast(args.sigma)
        case "gamma":
            noise = smoothing.LogNormalGamma(args.sigma) if args.law is None else smoothing.Gamma(_law(args))
        case "translation":
            noise = smoothing.CyclicTranslation(args.sigma)
        case "blur":
            noise = smoothing.FourierBlur(_law(args))
        case "contrast-brightness":
            noise = smoothing.ContrastBrightness(args.sigma, args.tau)
        case _:
            noise = smoothing.GaussianLinf(args.sigma, math.prod(shape)) if at_infinity else smoothing.Gaussian(args.sigma)
    if args.norm is not None and noise.unit != args.norm:
        raise CertifyError(f"--norm {args.norm}: the radii of --noise {name} are bounds on {noise.measure}; leave --norm out")
    return noise


def _law(args: argparse.Namespace) -> Law:
    from certify import smoothing

    match args.law:
        case "uniform":
            return smoothing.UniformTo(args.scale)
        case "folded-normal":
            return smoothing.FoldedNormal(args.scale)
        case "rayleigh":
            return smoothing.Rayleigh(args.scale)
    return smoothing.Exponential(args.scale)
