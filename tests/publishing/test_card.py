"""The model card: metadata by the Hub's own loader, a page whose code runs, people's words kept."""

import dataclasses
import json
import re
import shutil

import pytest
import saved
import tiny
import torch
import transformers
import yaml
from huggingface_hub import ModelCard

import hfprune
from hfprune.errors import PublishError
from hfprune.planning.budget import Budget
from hfprune.planning.plan import PruningPlan
from hfprune.publishing.card import BEGIN, END, RELATION, card
from hfprune.publishing.hub import publish
from hfprune.publishing.parcel import packed
from hfprune.publishing.units import Pruning
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.surgery import copy_and_cut

FIGURE = re.compile(r"\d[\d,.]*\s?(%|ms|MB|M)(?![\w])")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved.run(tmp_path_factory.mktemp("run"), base=saved.BASE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved.save(tmp_path_factory.mktemp("model"))


def text_of(source, repo="me/half", **options):
    with packed(source, None) as parcel:
        return card(parcel, repo, **options)


def data_of(source, **options):
    return ModelCard(text_of(source, **options)).data


def test_the_hub_reads_the_metadata_of_a_run(run):
    inherited = {"license": "mit", "language": ["en"], "datasets": ["base/text"]}
    data = data_of(run, inherited=inherited)
    assert data.base_model == "base/bert"
    assert data.base_model_relation == RELATION == "finetune"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert {"hfprune", "pruned"} <= set(data.tags)
    assert (data.license, data.language, data.datasets) == ("mit", ["en"], ["base/text"])
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.89)  # of the distilled model
    assert (result.task_type, result.dataset_name) == ("text-classification", "test.jsonl")
    assert data.model_name == "half"
    assert "co2_eq_emissions" not in data.to_dict()


def test_emissions_are_told_where_energy_was_read_and_its_carbon_is_known(tmp_path):
    run = saved.run(tmp_path)
    report = json.loads((run / "report.json").read_text())

    def measured(**values):
        (run / "report.json").write_text(json.dumps(report | values))
        return ModelCard(text_of(run)).data.to_dict().get("co2_eq_emissions"), text_of(run)

    read = {"energy": {"dense": 3.6e6, "distilled": 1.8e6}}
    assert "kWh" not in measured(carbon_intensity=100.0)[1]
    emissions, text = measured(**read)
    assert emissions is None and "drew 1.5 kWh by the processors' own counters." in text
    emissions, text = measured(**read, carbon_intensity=56.0)
    assert emissions.pop("source").startswith("hfprune: 1.5 kWh")
    assert emissions == {
        "emissions": 84,  # grams
        "training_type": "fine-tuning",
        "hardware_used": "a fine one",
    }
    assert "at 56 g of CO2 equivalent per kWh" in text
    # What hfprune has counted goes with the model it was counted for; a person's count stays.
    measured()
    assert "co2_eq_emissions" not in data_of(run, previous=text).to_dict()
    mine = text.replace("source: 'hfprune:", "source: 'codecarbon,").replace(
        "source: hfprune:", "source: codecarbon,"
    )
    kept = data_of(run, previous=mine).to_dict()["co2_eq_emissions"]
    assert kept["source"].startswith("codecarbon") and kept["emissions"] == 84


def test_a_hub_data_set_is_named_with_its_revision(tmp_path):
    data = saved.RECIPE["data"] | {
        "dataset": "org/movies",
        "test": "validation",
        "config": "small",
        "revision": None,
    }
    run = saved.run(tmp_path, data=data, commits={"data": "4" * 40})
    found = data_of(run, inherited={"datasets": "base/text"})
    assert found.datasets == ["base/text", "org/movies"]
    (result,) = found.eval_results
    assert (result.dataset_type, result.dataset_config) == ("org/movies", "small")
    assert (result.dataset_split, result.dataset_revision) == ("validation", "4" * 40)
    with packed(run, None) as parcel:
        assert yaml.safe_load(parcel.files["recipe.yaml"])["data"]["revision"] == "4" * 40


def test_every_figure_of_the_page_was_measured(run):
    """What the page says in figures stands in the report, the plan or the config."""
    text = text_of(run)
    report = saved.report()
    plan = PruningPlan.load(run / "plan.json")
    cells = " ".join(cell for row in report.cells() for cell in row)
    shares = f"{plan.macs_share:.0%} {plan.params_share:.0%}"
    shares += f" {plan.macs_share:.1%} {plan.params_share:.1%} 95 % {plan.budget}"
    for figure in FIGURE.finditer(text):
        known = cells + shares + report.markdown()
        assert figure[0] in known or figure[0].replace("%", " %") in known, figure[0]
    header, dense, distilled = report.cells()
    for what, before, after in list(zip(header, dense, distilled, strict=True))[1:]:
        assert f"| {what} | {before} | {after} |" in text
    assert "![" in text and "(kept.png)" in text
    assert "1,024 examples" in text and "Seed 7" in text and "CPU a fine one" in text
    assert "No difference in accuracy can be shown" in text  # its interval includes 0
    assert all(f"- {caveat}" in text for caveat in report.caveats())
    heads = [g for g in plan.anatomy if g.kind == "head"]
    kept = sum(len(plan.keep[g.name]) for g in heads)
    assert f"attention heads ({sum(g.units for g in heads)} to {kept})" in text


def test_without_a_report_nothing_is_said_of_quality_and_speed(folder):
    text = text_of(folder)
    assert ModelCard(text).data.eval_results is None
    for word in ("accuracy", "latency", " ms", "vs dense", "!["):
        assert word not in text
    assert "was not measured" in text
    size = (folder / "model.safetensors").stat().st_size
    params = sum(p.numel() for p in hfprune.from_pretrained(folder).parameters())
    assert f"{params / 1e6:,.2f} M parameters, {size / 1e6:,.1f} MB" in text
    assert "base_model" not in ModelCard(text).data.to_dict() or not ModelCard(text).data.base_model


@pytest.mark.parametrize("text", ["", "words", "a: [", "data: here\n", "stage:\n  targets: [x]\n"])
def test_a_recipe_of_another_program_is_left_out(folder, tmp_path, text):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "recipe.yaml").write_text(text)
    with packed(model) as parcel:
        assert parcel.left_out == ("recipe.yaml",) and "recipe.yaml" not in parcel.files
        assert "no recipe was kept" in card(parcel, "me/half")


def test_lineage_over_repeated_prunings(tmp_path):
    once = saved.pruned(base=saved.BASE)
    anatomy = Anatomy.of(once)
    keep = {g.name: tuple(range(max(0, g.units - g.heads_per_kv))) for g in anatomy}
    summary = {"plan": "x", "budget": "params=70%", "criterion": "taylor"}
    twice = copy_and_cut(once, keep, summary | {"macs_share": 0.7, "params_share": 0.6})
    twice.save_pretrained(tmp_path / "twice")
    text = text_of(tmp_path / "twice")
    assert "| 1 | macs=50% | fisher |" in text
    assert "| 2 | params=70% | taylor | 70.0% | 60.0% |" in text
    assert f"[base/bert](https://huggingface.co/base/bert) at `{'5' * 40}`" in text
    assert ModelCard(text).data.base_model == "base/bert"
    assert "in 2 steps" in text
    # The plan of the last step says nothing of what the base has lost in all.
    last = PruningPlan(anatomy, keep, Budget.parse("params=70%"), "taylor", 9)
    copy_and_cut(once, keep, last.summary).save_pretrained(tmp_path / "planned")
    last.save(tmp_path / "planned" / "plan.json")
    text = text_of(tmp_path / "planned")
    assert "in 2 steps" in text and " to " not in text.split("pruned by hfprune:")[1].split(".")[0]


def test_how_it_was_made_tells_what_was_done(tmp_path):
    """Not what was asked for: the split held 64 examples, and images have no tokens."""
    run = saved.run(tmp_path, task="image-classification")
    plan = PruningPlan.load(run / "plan.json")
    pruning = Pruning.of(plan, saved.scores_of(plan))
    report = dataclasses.replace(saved.report(run=run), pruning=pruning)
    (run / "report.json").write_text(json.dumps(report.to_dict()))
    text = text_of(run)
    assert "on 64 examples of the training split" in text and "1,024" not in text
    assert "Data: train.jsonl, dev.jsonl, test.jsonl." in text


def test_experts_that_were_removed_are_counted(tmp_path):
    model = tiny.model("mixtral")
    plan = saved.plan_of(model)
    experts = {block.name: (0, 2, 5) for block in plan.anatomy.experts}
    plan = dataclasses.replace(plan, keep=plan.keep | experts)
    hfprune.remove(model, plan).save_pretrained(tmp_path / "moe")
    plan.save(tmp_path / "moe" / "plan.json")
    assert "routed experts (18 to 9)" in text_of(tmp_path / "moe")


def test_the_code_of_the_page_loads_the_model(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    publish(folder, "me/half", revision="macs-50", verify=False, say=lambda line: None)
    blocks = re.findall(
        r"```python\n(.*?)```", text_of(folder, revision="macs-50"), flags=re.DOTALL
    )
    expected = hfprune.from_pretrained(folder)
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        exec(block, names)
        with torch.no_grad():
            assert names["model"].eval()(**inputs).logits.equal(expected(**inputs).logits)
    assert transformers.AutoTokenizer.from_pretrained("me/half", revision="macs-50")("good")


def test_a_stock_model_needs_no_trust(tmp_path):
    model = tiny.model("llama")
    anatomy = Anatomy.of(model)
    keep = {g.name: tuple(range(g.units // 2)) for g in anatomy}
    plan = saved.plan_of(model)
    made = hfprune.as_stock(copy_and_cut(model, keep, plan.summary))
    made.save_pretrained(tmp_path / "stock")
    text = text_of(tmp_path / "stock")
    assert "trust_remote_code" not in text
    assert 'LlamaForCausalLM.from_pretrained("me/half")' in text
    assert ModelCard(text).data.pipeline_tag == "text-generation"


def test_what_a_model_of_many_uses_is_for_says_its_recipe(tmp_path):
    assert data_of(saved.run(tmp_path, task="summarization")).pipeline_tag == "summarization"


def test_peoples_words_and_metadata_stay(run, folder):
    mine = (
        f"---\nlicense: mit\nextra: 1\ntags: [mine]\n---\n\n# Read me\n\n{BEGIN}\nold\n{END}\n\nBye"
    )
    others = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    text = text_of(run, previous=mine, inherited=others)
    above, _, rest = text.partition(BEGIN)
    made, _, below = rest.partition(END)
    assert above.endswith("# Read me\n\n") and below.strip() == "Bye"
    assert "old" not in made.split("\n")
    data = ModelCard(text).data
    assert data.license == "mit"  # people know better than the base's card
    assert not {"license_name", "license_link"} & data.to_dict().keys()
    assert data.to_dict()["extra"] == 1
    assert "mine" in data.tags and "hfprune" in data.tags
    assert text_of(run, previous=text) == text_of(run, previous=text_of(run, previous=text))
    # Results of an earlier model do not stay on the card of one that was not measured.
    assert ModelCard(text_of(folder, previous=text)).data.eval_results is None
    # A card without our marks is a person's from top to bottom.
    whole = text_of(run, previous="# All mine\n\nLong story.\n")
    assert whole.rstrip().endswith("Long story.")
    assert whole.count(BEGIN) == whole.count(END) == 1
    assert "license: apache-2.0" in text_of(run, previous=mine, license="apache-2.0")


def test_a_base_that_only_a_person_knows_stays_named(run, folder):
    mine = "---\nbase_model: org/dense\nbase_model_relation: finetune\n---\n"
    assert data_of(folder, previous=mine).base_model == "org/dense"
    assert data_of(run, previous=mine).base_model == "base/bert"


def test_broken_metadata_of_a_person_is_told(run):
    with pytest.raises(PublishError, match=r"README\.md .*cannot be read.*Mend it"):
        text_of(run, previous="---\nlicense: [mit\n---\n# Hello\n")


def test_what_a_base_says_is_taken_over(hub, tmp_path):
    hub.create("me/base")
    words = {"license": "other", "license_name": "own", "language": "de", "pipeline_tag": "x"}
    text = f"---\n{yaml.safe_dump(words)}---\n# Base\n"
    revision = hub.put("me/base", {"README.md": text.encode()})
    model = saved.save(tmp_path / "model", base={"id": "me/base", "revision": revision})
    done = publish(model, "me/half", verify=False, say=lambda line: None)
    assert not done.warnings
    data = ModelCard.load("me/half").data
    assert (data.license, data.license_name, data.language) == ("other", "own", "de")
    assert data.pipeline_tag == "text-classification"
    hub.repos.pop("me/base")
    (warning,) = publish(model, "me/half", verify=False, say=lambda line: None).warnings
    assert "me/base could not be read" in warning
    assert ModelCard.load("me/half").data.license == "other"  # it was on the card already


@pytest.mark.parametrize(("said", "told"), [("no", "no"), ("[en, no]", ["en", "no"])])
def test_norwegian_is_no_false(run, said, told):
    previous = f"---\nlanguage: {said}\n---\n"
    assert data_of(run, previous=previous).language == told
    inherited = ModelCard(previous).data.to_dict()
    assert data_of(run, inherited=inherited).language == told


def test_what_was_published_can_be_published_again_with_its_quality(run, tmp_path):
    publish(run, "me/half", dry_run=tmp_path / "there", say=lambda line: None)
    with packed(run) as first, packed(tmp_path / "there") as again:
        assert first.files.keys() == again.files.keys()
        assert not again.left_out
        assert again.recipe == first.recipe
    assert text_of(tmp_path / "there") == text_of(run)
    (result,) = data_of(tmp_path / "there").eval_results
    assert result.metric_value == 0.89


def test_a_report_of_other_weights_is_not_published(run, tmp_path):
    """A model that was trained on is not the one that was measured."""
    publish(run, "me/half", dry_run=tmp_path / "there", say=lambda line: None)
    saved.pruned(seed=1).save_pretrained(tmp_path / "there")
    with packed(tmp_path / "there") as parcel:
        assert parcel.report is None
        assert not {"report.json", "report.md"} & parcel.files.keys()
        assert {"report.json", "report.md"} <= set(parcel.left_out)
    assert data_of(tmp_path / "there").eval_results is None
    assert "was not measured" in text_of(tmp_path / "there")
    for other in ("{}", "[]", "none of ours"):
        (tmp_path / "there" / "report.json").write_text(other)
        assert "was not measured" in text_of(tmp_path / "there")
    # In a run, that is a result that was made anew, and not yet measured.
    anew = shutil.copytree(run, tmp_path / "run")
    saved.save(anew / "distilled", seed=1)
    with pytest.raises(PublishError, match=r"of another model than distilled.*hfprune run"):
        text_of(anew)


def test_several_rounds_name_the_last_model(tmp_path):
    run = saved.run(tmp_path)
    (run / "round-2").mkdir()
    for name in ("distilled", "plan.json", "kept.png"):
        (run / name).rename(run / "round-2" / name)
    names = ("dense", "round-1/distilled", "round-2/distilled")
    (run / "reloaded.json").write_text(json.dumps({"model": names[-1]}))
    (run / "report.json").write_text(json.dumps(saved.report(names, run=run).to_dict()))
    with packed(run, None) as parcel:
        assert {"plan.json", "kept.png", "model.safetensors"} <= parcel.files.keys()
        assert parcel.plan is not None and parcel.picture == "kept.png"
    (result,) = data_of(run).eval_results
    assert result.metric_value == 0.88
