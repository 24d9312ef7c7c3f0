"""`certify check DIR`: prove the stored numbers again, from the model and the data; `certify check FILE.tsv`: what a published log cannot be right about."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from certify.cli.arguments import add_json, add_opening, add_setting, load_model, setting
from certify.report.summary import lookup, plain

if TYPE_CHECKING:
    from certify.bound import Bound
    from certify.cli.console import Advance
    from certify.data import Dataset
    from certify.graph import Graph
    from certify.margins import Margin
    from certify.models import Model
    from certify.report import Run
    from certify.smoothing.logs import Finding
    from certify.smoothing.method import Smoothing

HELP = "Prove every number of a results folder again, or look for impossible ones in a published log; exit with 4 if one is not what the proof gives."
EPILOG = """examples:
  certify check runs/demo/sandwich
  certify check runs/certified --against runs/attacked
  certify check sigma_0.50.tsv --sigma 0.5 --n 100000 --alpha 0.001"""

_TOLERANCE = 1e-6  # relative; the weights of a layer may differ by some 1e-7 when they are computed by another BLAS
_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and where model and data are now; or a log and its setting."""
    parser.add_argument("folder", metavar="DIR", type=pathlib.Path, help="a results folder, a proof (FILE of --save-proof), or a published log (FILE.tsv)")
    parser.add_argument("--model", metavar="MODEL", help="where the model is now, if it was moved; the network that a proof should be of")
    add_opening(parser)
    parser.add_argument("--data", metavar="DATA", help="where the data (or the log that a folder was made of) are now, if they were moved")
    parser.add_argument("--against", metavar="DIR", type=pathlib.Path, help="a folder of certify attack: no attack in it may be closer than a certificate")
    add_setting(parser.add_argument_group("with a published log"))
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Model and data by their sha256; then each number from what it follows from: the proof and the logits, or the counts. Logs have only their setting."""
    from certify.cli import Exit
    from certify.cli.console import out, print_json
    from certify.errors import CertifyError
    from certify.results import foreign, passed_over, read_manifest, read_rows

    if args.against is not None and args.folder.is_file():
        raise CertifyError(f"{args.folder}: --against compares a results folder of certify run with one of certify attack, and this is a file")
    if args.folder.is_file():
        _refuse_options_of_others(args)
    if _is_proof(args.folder):
        return _proof_file(args)
    if args.folder.is_file():
        count, (what, wrong, kinds) = _log_file(args)
    else:
        if any(value is not None for value in (args.sigma, args.n, args.alpha, args.n0)):
            raise CertifyError(f"{args.folder}: a results folder says itself what its setting is; --sigma, --n, --alpha and --n0 are for a published log")
        manifest, rows = _needed(args.folder, read_manifest(args.folder)), read_rows(args.folder)
        if not rows:
            raise CertifyError(f"{args.folder}: there are no results yet; run certify run first")
        count = len(rows)
        what, wrong, kinds = (_log_folder if "log" in manifest else _results)(args, manifest, rows)
        wrong = foreign(args.folder, manifest) + wrong + passed_over(args.folder) + _finished(args.folder, rows)
    if args.json:
        print_json({"folder": str(args.folder), "rows": count, "contradictions": wrong, **({} if kinds is None else {"kinds": kinds})})
    else:
        console = out()
        for message in wrong[:_SHOWN]:
            console.print(f"contradiction: {plain(message)}", markup=False, soft_wrap=True)
        more = f" ({len(wrong) - _SHOWN} more not shown)" if len(wrong) > _SHOWN else ""
        console.print(f"{args.folder}: {what}, {len(wrong)} contradictions{more}", markup=False, soft_wrap=True)
    return Exit.CONTRADICTION if wrong else Exit.DONE


def _refuse_options_of_others(args: argparse.Namespace) -> None:
    """A proof has no data and no setting of noise, a log neither a model nor data."""
    from certify.errors import CertifyError

    proof = _is_proof(args.folder)
    for name in ("data", "sigma", "n", "alpha", "n0") if proof else ("model", "data"):
        if getattr(args, name) is not None:
            kind = "a proof" if proof else "a published log"
            raise CertifyError(f"{args.folder}: this file is {kind}, for which there is no --{name}; leave it out")


def _is_proof(path: pathlib.Path) -> bool:
    """Whether a file begins like a safetensors file: the length of a JSON object, and that."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**32


def _proof_file(args: argparse.Namespace) -> int:
    """A proof of LipSDP by the checker that stands alone, and, with a model, that its network is the one of the proof."""
    import lipnet
    import sdp.check
    from certify.bound import Everywhere
    from certify.cli import Exit
    from certify.cli.console import out, print_json
    from certify.errors import CertifyError
    from certify.graph import Graph
    from certify.lure import wire
    from sdp import proof_file

    if args.folder.suffix == ".safetensors":
        with contextlib.suppress(lipnet.CheckpointError):
            lipnet.open_checkpoint(args.folder)
            raise CertifyError(f"{args.folder}: this is a network and not a proof; certify lipschitz --method lipsdp --save-proof FILE writes one")
    stored = args.model if args.model and args.model.endswith(".safetensors") else None
    holds, sentence = sdp.check.check(str(args.folder), stored)
    wrong = [] if holds else [sentence]
    if holds and args.model:
        model = load_model(args)
        wired = wire(Graph.of(model.net, model.shape), Everywhere())
        here, there = proof_file.digest(wired.wiring.steps, wired.output.number, wired.wiring.inputs), proof_file.read(args.folder).network
        same = here == there
        sentence += f"; {args.model} is this network" if same else ""
        wrong = [] if same else [f"the proof is of the network {there[:12]}, {args.model} is {here[:12]}"]
    if args.json:
        print_json({"proof": str(args.folder), "contradictions": wrong, "sentence": sentence})
    else:
        without = "" if args.model else "; name the network with --model to see that it is its own"
        out().print(f"{args.folder}: {wrong[0] if wrong else sentence + without}", markup=False, soft_wrap=True)
    return Exit.CONTRADICTION if wrong else Exit.DONE


Found = tuple[str, list[str], "dict[str, int] | None"]  # what was done, the contradictions, and how many of each kind


def _results(args: argparse.Namespace, manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Found:
    """The rows of a run."""
    from certify import data
    from certify.cli.console import progress
    from certify.cli.run import UNITS
    from certify.errors import CertifyError

    _refuse_missing(args, manifest)
    sides = _sides(args, manifest, rows)
    shape = tuple(manifest["model"]["input_shape"])
    model = load_model(args, manifest["model"])
    dataset = data.load(args.data or manifest["data"]["spec"], _input_shape(manifest, shape))
    for what, found, stored in (("model", model.sha256, manifest["model"]["sha256"]), ("data", dataset.sha256, manifest["data"]["sha256"])):
        if found != stored:
            where = "--model" if what == "model" else "--data"
            raise CertifyError(
                f"{args.folder}: the {what} has sha256 {found[:12]}, the results are of {stored[:12]}; name the file that was certified with {where}"
            )
    again = _counts if _counted(manifest) else functools.partial(_proof, args.folder)
    again = _one_by_one if str(manifest.get("method")).startswith(("LowRank(", "LocalMargin(")) else again
    again = _attacks if manifest["guarantee"] == "attack" else again
    known = {
        "model.parameters": model.parameters,
        "model.classes": list(model.classes) if model.classes else None,
        "input.range": list(model.input_range) if model.input_range else None,
        "input.units": UNITS,
        "data.count": len(dataset),
    }
    told = {name: lookup(manifest, *name.split(".")) for name in known}
    wrong = [f"the manifest has {name} {told[name]!r}, the model and the data have {known[name]!r}" for name in known if told[name] != known[name]]
    with progress(f"check {args.folder}", len(rows)) as advance:
        did, differing = again(manifest, rows, model, dataset, advance)
    if sides is not None:
        against, closer = _against(*sides, model, dataset)
        did, differing = f"{did}; {against}", closer + differing
    return did, wrong + differing, None


def _refuse_missing(args: argparse.Namespace, manifest: Mapping[str, Any]) -> None:
    """A folder has the paths as they were typed; from another working directory they may lead nowhere."""
    from certify.errors import CertifyError

    model, data = manifest["model"]["spec"], manifest["data"]["spec"]
    where = data.partition(":")[2]  # of mnist:DIR, mnist:DIR:train
    places = {"model": (model,), "data": (data, where, where.rpartition(":")[0])}
    named = {"model": pathlib.Path(model).suffix and ":" not in model, "data": data.partition(":")[0] != "digits"}
    for name, spec in (("model", model), ("data", data)):
        if getattr(args, name) is None and named[name] and not any(place and pathlib.Path(place).expanduser().exists() for place in places[name]):
            raise CertifyError(f"{args.folder}: its {name} was {spec}, and that is not there from {pathlib.Path.cwd()}; say where it is now with --{name}")


def _counted(manifest: Mapping[str, Any]) -> bool:
    """Whether its certificates are of counts, and not of a bound."""
    return "smoothing" in manifest or manifest.get("guarantee") == "probabilistic"


def _input_shape(manifest: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the data, for a model of this shape: the noise may give it other copies than the inputs are."""
    from certify.smoothing.noise.other import given
    from certify.smoothing.rows import method_of

    return given(method_of(manifest).noise, shape) if _counted(manifest) else shape


def _proof(
    folder: pathlib.Path, manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], model: Model, dataset: Dataset, advance: Advance
) -> tuple[str, list[str]]:
    """The bound by its proof, each row by its logits."""
    from certify.graph import Graph
    from certify.margins import Margin

    graph, wrong = Graph.of(model.net, model.shape), list[str]()
    for bound in _bounds(folder, manifest, model):
        wrong = _bound_differences(manifest, bound) + _row_differences(rows, manifest, Margin(bound), graph, dataset, advance)
        if not wrong:
            break
    return f"bound and {len(rows)} rows proved again (tolerance {_TOLERANCE:g} relative)", wrong


def _bounds(folder: pathlib.Path, manifest: Mapping[str, Any], model: Model) -> Iterator[Bound]:
    """By the multipliers that are kept in the folder, if they are; and, for what does not follow from that, by the method of the manifest."""
    from certify.frequency import LipSDPFrequency
    from certify.lipsdp import LipSDP
    from certify.methods import Layerwise, LipschitzMethod, lipschitz
    from certify.multipliers import proved_again

    method: LipschitzMethod = Layerwise()
    if lookup(manifest, "bound", "lipsdp") is not None:
        method = LipSDP.from_settings(lookup(manifest, "bound", "lipsdp", "settings"))
        kept = proved_again(model.net, method, model.shape, folder)
        if kept is not None:
            yield kept
    elif str(lookup(manifest, "bound", "method")).startswith("LipSDPFrequency("):
        method = LipSDPFrequency()
    yield lipschitz(model.net, method, input_shape=model.shape)


def _one_by_one(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], model: Model, dataset: Dataset, advance: Advance) -> tuple[str, list[str]]:
    """Each radius by a new proof at that radius."""
    from certify.graph import Graph
    from certify.local.radius import LocalMargin
    from certify.lowrank import LowRank
    from certify.singly import contradictions, method_of

    method, graph = method_of(manifest, (LowRank, LocalMargin)), Graph.of(model.net, model.shape)
    seen, selected = method.see(graph), set(manifest["selection"])
    told = {"norm": f"{method.norm:g}", "guarantee": "proof", "failure": 0.0, "assumptions": sorted(a.name for a in method.assumptions)}
    told["within"] = list(method.within) if isinstance(method, LocalMargin) and method.within is not None else None
    wrong = [f"the manifest has {name} {manifest.get(name)!r}, its method has {value!r}" for name, value in told.items() if manifest.get(name) != value]
    for row in rows:
        if row["index"] not in selected or not 0 <= row["index"] < len(dataset):
            wrong.append(f"input {row['index']} is not among those that were selected")
        else:
            wrong += contradictions(method, graph, seen, dataset, row, _TOLERANCE)
        advance(1)
    return f"{len(rows)} rows proved again (tolerance {_TOLERANCE:g} relative)", wrong


def _attacks(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], model: Model, dataset: Dataset, advance: Advance) -> tuple[str, list[str]]:
    """Each attack by its point: the class that the network gives it, and its distance."""
    from certify.attack import contradictions
    from certify.errors import CertifyError
    from certify.opaque import runnable

    if manifest["norm"] not in ("2", "inf") or not isinstance(lookup(manifest, "attack", "clip"), bool):
        raise CertifyError("the manifest of an attack has the norm 2 or inf, and says whether points were clipped; make the folder again with certify attack")
    graph, selected, wrong = runnable(model.net, model.shape), set(manifest["selection"]), []
    for row in rows:
        if row["index"] not in selected or not 0 <= row["index"] < len(dataset):
            wrong.append(f"input {row['index']} is not among those that were selected")
        else:
            wrong += contradictions(graph, dataset, row, manifest["norm"], lookup(manifest, "attack", "clip"), _TOLERANCE)
        advance(1)
    return f"{len(rows)} attacks looked at again by their points", wrong


def _sides(args: argparse.Namespace, manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[Run, Run] | None:
    """The certificates and the attacks that they are to be compared with, if any. Raises CertifyError where they say nothing of each other."""
    from certify.errors import CertifyError
    from certify.report import Run
    from certify.report.sandwich import incomparable
    from certify.results import foreign, read_manifest, read_rows

    if args.against is None:
        return None
    certified = Run(str(args.folder), manifest, rows)
    attacked = Run(str(args.against), _needed(args.against, read_manifest(args.against)), read_rows(args.against))
    why = next(iter(foreign(args.against, attacked.manifest)), None) or incomparable(certified, attacked)
    if why is None and not {row["index"] for row in certified.rows} & {row["index"] for row in attacked.rows}:
        why = f"{args.folder} and {args.against} have no input in common; attack what was certified"
    if why is not None:
        raise CertifyError(why)
    return certified, attacked


def _against(certified: Run, attacked: Run, model: Model, dataset: Dataset) -> tuple[str, list[str]]:
    """The certificates against the attacks, each of which is looked at again too."""
    from certify.cli.console import progress
    from certify.report.sandwich import contradictions

    with progress(f"check {attacked.name}", len(attacked.rows)) as advance:
        did, wrong = _attacks(attacked.manifest, attacked.rows, model, dataset, advance)
    return f"compared with {attacked.name}, {did}", [*contradictions(certified, attacked), *(f"{attacked.name}: {each}" for each in wrong)]


def _counts(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], model: Model, dataset: Dataset, advance: Advance) -> tuple[str, list[str]]:
    """Each certificate from the counts that it claims to follow from. That the counts are those of the model is not looked at."""
    from certify.smoothing.rows import as_stored, contradictions, differences, method_of, off_grid

    stored, pair = lookup(manifest, "smoothing", "lipschitz"), lookup(manifest, "smoothing", "pair")
    method, wrong = _with_lipschitz(method_of(manifest), stored, pair, model)
    procedure = as_stored(method.procedure(dataset.inputs.shape[1:]), manifest)
    selected, wrong = set(manifest["selection"]), [*wrong, *differences(manifest, method, procedure)]
    for row in rows:
        index = row["index"]
        if index not in selected or not 0 <= index < len(dataset):
            wrong.append(f"input {index} is not among those that were selected")
        elif row.get("label") != dataset.labels[index] or row.get("guarantee") != "probabilistic" or row.get("norm") != method.noise.unit:
            wrong.append(f"input {index}: label, guarantee or norm are not those of the data and the method")
        else:
            wrong += contradictions(row, procedure, manifest["smoothing"].get("classes"), off_grid(method, dataset.inputs[index]))
        advance(1)
    return f"{len(rows)} rows computed again from their counts", wrong


def _with_lipschitz(method: Smoothing, stored: object, pair: object, model: Model) -> tuple[Smoothing, list[str]]:
    """The method with the Lipschitz constants that a manifest has, if any, and whether one is less than what is proved of the model again."""
    from certify.errors import CertifyError
    from certify.methods import lipschitz
    from certify.smoothing.values import with_constants

    if stored is None:
        return method, []
    proved = lipschitz(model.net, input_shape=model.shape)
    try:
        return dataclasses.replace(method, lipschitz=with_constants(proved, stored, pair)), []
    except CertifyError as error:
        return dataclasses.replace(method, lipschitz=proved), [str(error)]


def _log_file(args: argparse.Namespace) -> tuple[int, Found]:
    """The lines of a log by the setting that is given."""
    from certify.smoothing.logs import audit, read_log

    log = read_log(args.folder)
    findings = audit(log.lines, setting(args))
    kinds = _kinds(findings)
    what = f"{len(log.lines)} lines of a log, which has no counts to compute a radius from{_told(kinds)}"
    return len(log.lines), (what, [finding.text for finding in findings], kinds)


def _log_folder(args: argparse.Namespace, manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Found:
    """Each row by what its log printed, that by the setting, and the rows by the log itself where it can be found."""
    from certify.errors import CertifyError
    from certify.smoothing.logs import audit, line_of, log_differences, procedure_of, read_log, row_differences

    _sides(args, manifest, rows)  # which refuses: a log is of a smoothed classifier
    procedure = procedure_of(manifest)
    wrong = log_differences(manifest, procedure)
    path = pathlib.Path(args.data or manifest["data"]["spec"])
    log = read_log(path) if args.data or path.is_file() else None
    if log is not None and log.sha256 != manifest["data"]["sha256"]:
        raise CertifyError(
            f"{args.folder}: {path} has sha256 {log.sha256[:12]}, the rows are of {manifest['data']['sha256'][:12]}; name the log they are from with --data"
        )
    lines = []
    for row in rows:
        try:
            lines.append(line_of(row))
        except CertifyError as error:
            wrong.append(str(error))
    wrong += row_differences(rows, manifest["selection"], log)
    findings = audit(lines, procedure)
    kinds = _kinds(findings)
    seen = "compared with their log" if log is not None else f"of a log that is not at {path} any more (say where with --data)"
    return f"{len(rows)} rows {seen}, which has no counts to compute a radius from{_told(kinds)}", [*wrong, *(finding.text for finding in findings)], kinds


def _kinds(findings: Sequence[Finding]) -> dict[str, int]:
    from certify.smoothing.logs import KINDS

    return {kind: count for kind in KINDS if (count := sum(finding.kind == kind for finding in findings))}


def _told(kinds: Mapping[str, int]) -> str:
    from certify.smoothing.logs import KINDS

    return "".join(f", {count} {KINDS[kind]}" for kind, count in kinds.items())


def _needed(folder: pathlib.Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, if it has what is looked up in it. Raises CertifyError with the first thing that it lacks."""
    from certify.errors import CertifyError

    model = {} if "log" in manifest else {"model.spec": str, "model.sha256": str, "model.input_shape": list}
    for name, kind in {**model, "data.spec": str, "data.sha256": str, "selection": list, "norm": str, "guarantee": str}.items():
        if not isinstance(lookup(manifest, *name.split(".")), kind):
            raise CertifyError(f"{folder / 'manifest.json'}: it has no {name}, or not of the kind that certify run writes; make the folder again")
    whole = [*manifest["selection"], *(manifest["model"]["input_shape"] if model else ())]
    if not all(type(number) is int for number in whole):
        raise CertifyError(f"{folder / 'manifest.json'}: selection and input_shape are lists of whole numbers; make the folder again with certify run")
    return manifest


def _finished(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`results.jsonl`, where it is there, has the rows of the parts, without their times."""
    import json

    try:
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        lines = []
    stored = [json.dumps({key: value for key, value in row.items() if key != "seconds"}) for row in rows]
    return [] if lines == stored else ["results.jsonl does not have the rows of the part-*.jsonl; delete it, and repeat the run"]


def _bound_differences(manifest: Mapping[str, Any], proved: Bound) -> list[str]:
    """The stored bound may be larger than the proved one, never smaller; what is said of it is the same."""
    stored, norm = lookup(manifest, "bound", "value"), f"{proved.norm[0]:g}"
    wrong = [] if manifest["norm"] == norm else [f"the manifest has radii in l{manifest['norm']}, the proof gives them in l{norm}"]
    told = {"guarantee": "proof", "failure": 0.0, "assumptions": sorted(assumption.name for assumption in proved.assumptions)}
    wrong += [f"the manifest has {name} {manifest.get(name)!r}, the proof has {value!r}" for name, value in told.items() if manifest.get(name) != value]
    exactly, pair = lookup(manifest, "bound", "hex"), lookup(manifest, "bound", "largest_pair")
    if isinstance(stored, float) and exactly != stored.hex():
        wrong.append(f"the stored Lipschitz bound is {stored} and, in hexadecimal, {exactly}")
    least = None if proved.pairs is None else float(proved.pairs.max()) * (1 - _TOLERANCE)
    if pair is not None and (least is None or not (isinstance(pair, float | int) and pair >= least)):
        wrong.append(f"the stored bound of two outputs is {pair!r}, the proof gives {least!r}")
    if isinstance(stored, float | int) and stored >= proved.value * (1 - _TOLERANCE):
        return wrong
    return [*wrong, f"the stored Lipschitz bound is {stored}, the proof gives {proved.value!r}"]


def _row_differences(
    rows: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], method: Margin, graph: Graph, dataset: Dataset, advance: Advance
) -> list[str]:
    """A stored radius may be smaller than the proved one, never larger; predictions, labels and statuses are the same."""
    from certify.cli.run import margin_rows
    from certify.margins import same_gap

    selected = set(manifest["selection"])
    wrong = [f"input {row['index']} is not among those that were selected" for row in rows if row["index"] not in selected]
    known = [row for row in rows if row["index"] in selected and 0 <= row["index"] < len(dataset)]
    for row in known:
        (proved,) = margin_rows(graph, dataset, method, [row["index"]])
        differing = [key for key in ("label", "prediction", "status", "norm", "guarantee", "method") if row.get(key) != proved[key]]
        wrong += [f"input {row['index']}: {key} is stored as {row.get(key)!r}, the proof gives {proved[key]!r}" for key in differing]
        if "margin" in row and not same_gap(row["margin"], proved["margin"]):
            wrong.append(f"input {row['index']}: the margin is stored as {row['margin']!r}, the logits give {proved['margin']!r}")
        radius = row.get("radius")
        if not isinstance(radius, float | int) or not radius <= proved["radius"] * (1 + _TOLERANCE):
            wrong.append(f"input {row['index']}: the radius is stored as {radius!r}, the proof gives {proved['radius']!r}")
        advance(1)
    return wrong
