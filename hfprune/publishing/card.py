"""The model card: metadata that the Hub reads, and a page that a person reads in a minute.

What hfprune writes stands between two markers and is replaced at every publication; what a person
writes around them stays. What was not measured is not printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfprune.errors import PublishError
from hfprune.publishing.parcel import SHIM, Parcel
from hfprune.publishing.rendering import template
from hfprune.publishing.units import NAMES, units_of
from hfprune.publishing.wording import kilowatt_hours, table_row
from hfprune.structure.modeling_hfprune import KEY

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from hfprune.planning.plan import PruningPlan
    from hfprune.publishing.report import Report

BEGIN = "<!-- hfprune: what stands between these two marks is written anew when published -->"
END = "<!-- /hfprune -->"

# The Hub knows finetune, adapter, merge and quantized. A pruned model has new weights of the base's
# kind, which is the first of them; the tags say that it was pruned.
RELATION = "finetune"
TAGS = ("hfprune", "pruned", "structured-pruning")
_OF_BASE = ("base_model", "base_model_relation")
_ALWAYS_ANEW = ("library_name", "pipeline_tag", "model-index")
_OUR_COUNT = "hfprune"  # how the source of emissions begins that hfprune counted
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForCTC": "automatic-speech-recognition",
}


def base_of(parcel: Parcel) -> tuple[str, str] | None:
    """Hub id and commit of the dense model; None if it did not come from the Hub."""
    base = parcel.config[KEY].get("base")
    return (base["id"], base["revision"]) if base else None


def task_of(parcel: Parcel) -> str | None:
    """The Hub's name for what the model does: its recipe's, or what its class says; else None."""
    (cls, *_) = parcel.config.get("architectures") or [""]
    named = next((task for ending, task in _TASKS.items() if cls.endswith(ending)), None)
    return parcel.recipe.get("task") or named


def card(
    parcel: Parcel,
    repo_id: str,
    revision: str | None = None,
    inherited: Mapping[str, Any] | None = None,
    previous: str = "",
    license: str | None = None,
    family: str = "",
) -> str:
    """The text of README.md.

    Args:
        parcel: what is published.
        repo_id: where.
        revision: branch; None for the main one.
        inherited: license, language and datasets of the base model's card, as far as known.
        previous: the card that is there: what people wrote in it stays, and so does metadata that
            hfprune does not write.
        license: of the pruned model; None for the base model's, or what the previous card says.
        family: the table of the sizes that the model is one of.

    Raises:
        PublishError: the previous card's metadata cannot be read.
    """
    before, words = _read(previous)
    data = _metadata(parcel, repo_id, inherited, before, license)
    made = f"{BEGIN}\n\n{_page(parcel, repo_id, revision, family)}\n{END}"
    text = _around(words, made)
    return f"---\n{data}\n---\n\n{text.strip()}\n"


def _read(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and words of a card."""
    from huggingface_hub import ModelCard

    if not text.strip():
        return {}, ""
    try:
        found = ModelCard(text, ignore_metadata_errors=True)
    except Exception as error:  # YAML's own, or a ValueError
        why = " ".join(str(error).split())
        raise PublishError(
            f"The metadata of the README.md that is there cannot be read: {why}. Mend it, then"
            " publish."
        ) from error
    return found.data.to_dict(), found.text


def _around(old: str, made: str) -> str:
    """The old text with the part that hfprune wrote replaced; at its top if it has none."""
    if BEGIN in old and END in old.partition(BEGIN)[2]:
        above, _, rest = old.partition(BEGIN)
        return above + made + rest.partition(END)[2]
    return f"{made}\n\n{old.strip()}"


def _metadata(
    parcel: Parcel,
    repo_id: str,
    inherited: Mapping[str, Any] | None,
    before: Mapping[str, Any],
    license: str | None,
) -> str:
    """The metadata as YAML."""
    from huggingface_hub import ModelCardData

    kept = {key: value for key, value in before.items() if key not in _ALWAYS_ANEW}
    if str(_source_of(kept.get("co2_eq_emissions"))).startswith(_OUR_COUNT):
        del kept["co2_eq_emissions"]  # people's own counts stay
    taken = dict(inherited or {})
    dataset = parcel.recipe.get("data", {}).get("dataset")
    if dataset:
        taken["datasets"] = list(dict.fromkeys([*_listed(taken.get("datasets")), dataset]))
    if "license" in kept:  # the name and link that the base has are of another
        taken = {k: v for k, v in taken.items() if not k.startswith("license")}
    values = {**taken, **kept}
    if license:
        values = {k: v for k, v in values.items() if not k.startswith("license")}
        values["license"] = license
    if "language" in values:
        values["language"] = _spelled(values["language"])
    values["tags"] = [*TAGS, *(t for t in _listed(kept.get("tags")) if t not in TAGS)]
    values |= {"library_name": "transformers", "pipeline_tag": task_of(parcel)}
    if emitted := _emissions(parcel.report):
        values.setdefault("co2_eq_emissions", emitted)
    base = base_of(parcel)
    if base:
        values |= dict(zip(_OF_BASE, (base[0], RELATION), strict=True))
    results = _results(parcel)
    if results:
        values |= {"model_name": repo_id.split("/")[-1], "eval_results": results}
    return ModelCardData(**values).to_yaml()


def _spelled(language: Any) -> Any:
    """A language, or several; the client's YAML takes Norwegian (`no`) for false."""
    if isinstance(language, list):
        return [_spelled(one) for one in language]
    return "no" if language is False else language


def _source_of(emissions: Any) -> Any:
    return emissions.get("source") if isinstance(emissions, Mapping) else None


def _emissions(report: Report | None) -> dict[str, Any]:
    """What the Hub shows as the carbon footprint; {} where it is not known."""
    if report is None or report.kilowatt_hours is None or report.emissions is None:
        return {}
    drawn = kilowatt_hours(report.kilowatt_hours, report.carbon_intensity)
    return {
        "emissions": float(f"{report.emissions:.3g}"),
        "source": f"{_OUR_COUNT}: {drawn}",
        "training_type": "fine-tuning",
        "hardware_used": str(report.machine.get("CPU", "CPU")),
    }


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def _results(parcel: Parcel) -> list[EvalResult]:
    """What was measured on the test split, for model-index."""
    from huggingface_hub import EvalResult

    report, data, task = parcel.report, parcel.recipe.get("data"), task_of(parcel)
    if report is None or not data or not task:
        return []
    quality = report.result.quality
    named = data.get("dataset") or Path(data["test"]).name
    return [
        EvalResult(
            task_type=task,
            dataset_type=data.get("dataset") or "custom",
            dataset_name=named,
            dataset_config=data.get("config"),
            dataset_split=data["test"] if data.get("dataset") else "test",
            dataset_revision=data.get("revision"),
            metric_type=quality.metric,
            metric_value=round(quality.value, 6),
        )
    ]


def _page(parcel: Parcel, repo_id: str, revision: str | None, family: str) -> str:
    """The part of the page that hfprune writes."""
    report = parcel.report
    base = base_of(parcel)
    text = template("card.md.jinja").render(
        title=repo_id.split("/")[-1],
        summary=_summary(parcel),
        picture=parcel.picture,
        facts=report.facts() if report else [],
        table=_table(report) if report else "",
        caption=report.caption() if report else "",
        sizes="" if report else _sizes(parcel),
        family=family,
        repo_id=repo_id,
        revision_argument=f', revision="{revision}"' if revision not in (None, "main") else "",
        stock=parcel.is_stock,
        shim=SHIM,
        auto_class=_auto_class(parcel),
        processors=_processors(parcel),
        made=_made(parcel),
        lineage=parcel.config[KEY].get("lineage", []),
        limits=_limits(parcel),
        version=version("hfprune"),
        base=base[0] if base else None,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _summary(parcel: Parcel) -> str:
    base, plan = base_of(parcel), _plan_of_all(parcel)
    lineage = parcel.config[KEY].get("lineage", [])
    source = f"[{base[0]}](https://huggingface.co/{base[0]})" if base else "A dense model"
    done = f"{source}, pruned by hfprune: whole {_units(parcel)} are removed"
    if plan is not None:
        macs, params = plan.macs_share, plan.params_share
    elif len(lineage) == 1:
        macs, params = lineage[0]["macs_share"], lineage[0]["params_share"]
    else:
        return f"{done}, in {len(lineage)} steps." if lineage else f"{done}."
    return f"{done}. Its layers keep {macs:.0%} of the MACs and {params:.0%} of the parameters."


def _plan_of_all(parcel: Parcel) -> PruningPlan | None:
    """The plan by which the base became this model; None if it was the last step's alone."""
    steps, plan = parcel.config[KEY].get("lineage", []), parcel.plan
    is_last = plan is not None and len(steps) > 1 and steps[-1]["plan"] == plan.fingerprint
    return None if is_last else plan


def _units(parcel: Parcel) -> str:
    """What was removed, by kind, as "attention heads (72 to 35) and FFN neurons (...)"."""
    plan = _plan_of_all(parcel)
    if plan is None:
        return "attention heads and FFN neurons"
    parts = []
    rows = units_of(plan)
    for kind, name in NAMES.items():
        before = sum(row.total for row in rows if row.kind == kind)
        after = sum(row.kept for row in rows if row.kind == kind)
        if after < before:
            parts.append(f"{name} ({before:,} to {after:,})")
    parts += [f"layers ({len(gone)} of {name})" for name, gone in plan.dropped.items()]
    return " and ".join(parts) or "units"


def _table(report: Report) -> str:
    """Dense and published side by side, one row a figure: narrow enough for a phone."""
    header, dense, *_, result = report.cells()
    lines = ["| | dense | pruned |", "|---|---:|---:|"]
    lines += map(table_row, list(zip(header, dense, result, strict=True))[1:])
    return "\n".join(lines)


def _sizes(parcel: Parcel) -> str:
    """Parameters and bytes of the weights, read from the files."""
    from safetensors import safe_open

    weights = [
        file
        for name, file in parcel.files.items()
        if name.endswith(".safetensors") and isinstance(file, Path)
    ]
    count = 0
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                count += size
    size = sum(file.stat().st_size for file in weights)
    return f"{count / 1e6:,.2f} M parameters, {size / 1e6:,.1f} MB of weights."


def _auto_class(parcel: Parcel) -> str:
    """The auto class to load the model by; of a stock model, its own class."""
    (cls, *_) = parcel.config.get("architectures") or ["AutoModel"]
    found = parcel.config.get("auto_map", {})
    return next((auto for auto, path in found.items() if path.endswith(f".{cls}")), cls)


def _processors(parcel: Parcel) -> list[tuple[str, str]]:
    """What reads the model's inputs, and the auto class to load it by."""
    if "processor_config.json" in parcel.files:  # it has the others
        return [("processor", "AutoProcessor")]
    found = []
    if "tokenizer_config.json" in parcel.files:
        found.append(("tokenizer", "AutoTokenizer"))
    settings = parcel.files.get("preprocessor_config.json")
    if isinstance(settings, Path):
        of_sound = "feature_extractor_type" in json.loads(settings.read_text(encoding="utf-8"))
        what = "feature extractor" if of_sound else "image processor"
        found.append((what, "AutoFeatureExtractor" if of_sound else "AutoImageProcessor"))
    return found


def _made(parcel: Parcel) -> list[str]:
    """How the model came about, a line a step."""
    recipe, base = parcel.recipe, base_of(parcel)
    lines = []
    if base:
        lines.append(f"Base: [{base[0]}](https://huggingface.co/{base[0]}) at `{base[1]}`.")
    if not recipe:
        return [*lines, "Pruned and saved with hfprune; no recipe was kept."]
    data, prune, distill = recipe["data"], recipe["prune"], recipe.get("distill")
    source = data.get("dataset") or ", ".join(data[s] for s in ("train", "dev", "test"))
    reads_text = not str(task_of(parcel)).startswith("image")
    most = f", {data['max_length']} tokens at most" if reads_text else ""
    lines.append(f"Data: {source}{most}.")
    if recipe.get("finetune"):
        lines.append(f"The dense model was fine-tuned first: {_training(recipe['finetune'])}.")
    found = parcel.report.pruning if parcel.report else None
    # The split may hold fewer than the recipe asks for.
    examples = found.examples if found else recipe["score"]["examples"]
    lines.append(
        f"Units were scored by `{prune['criterion']}` on {examples:,} examples"
        " of the training split, and chosen under the budget below."
    )
    if prune.get("compensate"):
        lines.append("The weights that stay were refitted by least squares on the same examples.")
    if distill:
        lines.append(f"It was distilled from the dense model: {_training(distill)}.")
    if parcel.report and parcel.report.kilowatt_hours is not None:
        drawn = kilowatt_hours(parcel.report.kilowatt_hours, parcel.report.carbon_intensity)
        lines.append(f"All steps up to this model drew {drawn}.")
    where = " Hardware and versions stand below the table." if parcel.report else ""
    lines.append(f"Seed {recipe['seed']}.{where}")
    return [*lines, "`recipe.yaml` holds every setting; `hfprune run recipe.yaml` does it again."]


def _training(settings: Mapping[str, Any]) -> str:
    return (
        f"epochs {settings['epochs']:g}, batches of {settings['batch_size']}, learning rate"
        f" {settings['learning_rate']:g}"
    )


def _limits(parcel: Parcel) -> list[str]:
    report = parcel.report
    lines = (
        report.caveats()
        if report
        else ["Its quality was not measured. Judge it on data of the kind you will serve."]
    )
    if not parcel.is_stock:
        lines.append(
            "Its layers have other shapes than the stock model's: transformers refuses it without"
            " `trust_remote_code=True`, and tools that rebuild the stock model cannot load it."
        )
    return [*lines, "It shares the base model's biases and its license's conditions."]
