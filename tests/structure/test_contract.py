"""The contract that every family of the table fulfils. A new row is tested by being there.

The oracle is the dense model with the gates of the dropped units closed; the pruned model must
say the same.
"""

import copy
import json
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError as Ambiguous,
)

from hfprune.importance.gates import frozen, gate_gradients, gated, masked
from hfprune.importance.scoring import score
from hfprune.recovery.compensation import compensate
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.architectures import ROWS
from hfprune.structure.checkpoint import from_pretrained
from hfprune.structure.cost import layers_macs, layers_params, stack_macs
from hfprune.structure.surgery import copy_and_cut, cut

# One of each way of being built runs the expensive tests by default, the others when slow ones do.
TELLING = {
    *("bert", "deberta-v2", "modernbert", "clip", "llama", "gemma3_text", "phi3", "gpt2", "falcon"),
    *("t5", "whisper", "mixtral", "deepseek_v3"),
}


def families(names):
    """Parameters for families, those that tell nothing new marked as slow."""
    return [n if n in TELLING else pytest.param(n, marks=pytest.mark.slow) for n in names]


every_family = pytest.mark.parametrize("family", ROWS)
every_family_if_slow = pytest.mark.parametrize("family", families(ROWS))
GENERATING = [
    family
    for family in ROWS
    if "LM" in tiny.auto_class(family) and "Masked" not in tiny.auto_class(family)
]


def dense_and_pruned(family, dtype=torch.float32):
    dense = tiny.model(family, dtype=dtype)
    keep = tiny.selection(Anatomy.of(dense))
    return dense, copy_and_cut(dense, keep), keep


@every_family
def test_the_pruned_model_is_the_dense_one_with_closed_gates(family):
    dense, pruned, keep = dense_and_pruned(family, torch.float64)
    inputs = tiny.batch(dense)
    with torch.no_grad(), masked(dense, keep):
        expected = tiny.outputs(dense, inputs)
    with torch.no_grad():
        whole, got = tiny.outputs(dense, inputs), tiny.outputs(pruned, inputs)
    assert type(pruned).__name__ == type(dense).__name__
    # Most families compute norms, softmax and rotary tables in float32, whatever the weights.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if keep:  # olmoe has experts only, which the next test drops
        assert not torch.allclose(whole, expected, rtol=1e-3, atol=1e-3)


@contextmanager
def only(dense, keep):
    """The dense model with the layers a selection drops skipped, and its experts not chosen."""

    def skip(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    base = dense.base_model
    with ExitStack() as stack:
        for block in Anatomy.of(dense).blocks:
            units = torch.tensor(sorted(keep.get(block.name, range(block.units))))
            if block.kind == "layer":
                for index in set(range(block.units)) - set(units.tolist()):
                    layer = base.get_submodule(f"{block.name}.{index}")
                    hook = layer.register_forward_hook(skip, prepend=True, with_kwargs=True)
                    stack.callback(hook.remove)
                continue
            moe = ROWS[dense.config.model_type].stacks[block.stack].moe
            layer = block.name.removesuffix(moe.experts)
            router = base.get_submodule(layer + moe.router)
            for name, parameter in list(router.named_parameters(recurse=False)):
                stack.callback(setattr, router, name, parameter)
                setattr(router, name, torch.nn.Parameter(parameter[units]))
            if moe.correction:
                path, _, name = moe.correction.rpartition(".")
                at = base.get_submodule(layer + path)
                tensor = getattr(at, name)
                stack.callback(setattr, at, name, tensor)
                kept = tensor[..., units]
                trained = isinstance(tensor, torch.nn.Parameter)
                setattr(at, name, torch.nn.Parameter(kept) if trained else kept)
                stack.callback(setattr, router, "num_experts", router.num_experts)
                router.num_experts = len(units)
            hook = router.register_forward_hook(
                lambda module, args, output, units=units: (*output[:-1], units[output[-1]])
            )
            stack.callback(hook.remove)
        yield


@every_family_if_slow
def test_without_a_layer_it_is_the_dense_one_that_skips_it(family, tmp_path):
    dense = tiny.model(family, dtype=torch.float64)
    anatomy, inputs = Anatomy.of(dense), tiny.batch(dense)
    keep = tiny.selection(anatomy, seed=3)
    for block in anatomy.blocks:
        gone = [unit for unit in range(block.units) if unit not in block.pinned][:1]
        keep[block.name] = [unit for unit in range(block.units) if unit not in gone]
    pruned = copy_and_cut(dense, keep)
    groups = {group.name: keep[group.name] for group in anatomy}
    with torch.no_grad(), masked(dense, groups), only(dense, keep):
        expected = tiny.outputs(dense, inputs)
    with torch.no_grad(), masked(dense, keep):  # which skips and routes too
        torch.testing.assert_close(tiny.outputs(dense, inputs), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        got = tiny.outputs(pruned, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        added = sum(p.numel() for p in pruned.parameters()) - anatomy.outside_params
        assert layers_params(anatomy, keep) <= added <= layers_params(anatomy, keep) * 1.05
        pruned.save_pretrained(tmp_path, verify=False)
        again = from_pretrained(
            tmp_path, attn_implementation="eager", experts_implementation="eager"
        )
        torch.testing.assert_close(tiny.outputs(again, inputs), got, rtol=1e-5, atol=1e-5)
    if family in GENERATING:
        inputs.pop("decoder_input_ids", None)
        options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
        cached = pruned.generate(**inputs, **options)
        assert cached.equal(pruned.generate(**inputs, **options, use_cache=False))


@every_family_if_slow
def test_gate_gradients_are_finite_differences(family):
    model = tiny.model(family, dtype=torch.float64)
    anatomy, inputs = Anatomy.of(model), tiny.batch(model)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(
        tiny.outputs(model, inputs).shape, generator=generator, dtype=torch.float64
    )
    found = {}

    def receive(group, activation, gradient):
        by_unit = (activation * gradient).reshape(-1, group.units, group.columns).sum((0, 2))
        found[group.name] = found.get(group.name, 0) + by_unit

    def loss():
        return (tiny.outputs(model, inputs) * weights).sum()

    if not anatomy.groups:
        pytest.skip("experts are chosen by their router; they have no gate")
    with frozen(model):
        with gate_gradients(model, anatomy, receive):
            loss().backward()
        step = 3e-4
        for group in anatomy:
            direction = torch.randn(group.units, generator=generator, dtype=torch.float64)
            sides = []
            for sign in (1, -1):
                with torch.no_grad(), gated(model, {group.name: 1 + sign * step * direction}):
                    sides.append(loss())
            slope = (sides[0] - sides[1]) / (2 * step)
            torch.testing.assert_close(found[group.name] @ direction, slope, rtol=1e-2, atol=5e-2)


TOKENS_FIRST = {"mlcd_vision_model"}
"""Families that take batches of one only."""


def alone(batch):
    """The two examples of a batch, each by itself."""
    return [
        {name: values.tensor_split(2)[which] for name, values in batch.items()} for which in (0, 1)
    ]


def sum_of_examples(model, batch):
    """A loss with a term for each example."""
    said = model(**batch)
    if "text_embeds" in said:  # the logits compare each text with each image
        return said["text_embeds"].square().sum() + said["image_embeds"].logsumexp(-1).sum()
    return said[0].logsumexp(-1).sum()


@every_family_if_slow
def test_a_batch_of_two_is_two_batches_of_one(family):
    if family in TOKENS_FIRST:
        pytest.skip("refused, see test_batches.py")
    dense, pruned, keep = dense_and_pruned(family, torch.float64)
    pairs = [tiny.batch(dense, seed=seed) for seed in range(3)]
    singles = [example for pair in pairs for example in alone(pair)]
    one, other = (score(dense, some, "fisher", sum_of_examples) for some in (pairs, singles))
    for name, importance in one.by("fisher").items():
        torch.testing.assert_close(importance, other.by("fisher")[name], rtol=1e-6, atol=1e-12)

    bare, by_singles = copy.deepcopy(pruned), copy.deepcopy(pruned)
    compensate(dense, pruned, pairs, keep)
    compensate(dense, by_singles, singles, keep)
    for name, parameter in pruned.named_parameters():
        torch.testing.assert_close(
            parameter, by_singles.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name
        )

    def error(model):
        gaps = [tiny.outputs(model, pair) - tiny.outputs(dense, pair) for pair in pairs]
        return sum(float(gap.square().mean()) for gap in gaps)

    with torch.no_grad():
        assert error(pruned) <= 1.1 * error(bare)  # tokens may go to other experts


@contextmanager
def shapes_seen(model, anatomy):
    """{stack: sequences and tokens in each}, filled by the forward passes inside the context."""
    shapes = {}

    def see(stack, states):
        shapes[stack] = (states.shape[:-2].numel(), states.shape[-2])

    with ExitStack() as stack:
        for block in anatomy.stacks:
            for layer in model.base_model.get_submodule(block.name).children():
                hook = layer.register_forward_hook(
                    lambda module, args, kwargs, output, at=block.stack: see(
                        at, args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
        yield shapes


def one_example(model):
    """A batch of one, and {stack: sequences and tokens in each}."""
    inputs = tiny.batch(model, examples=1)
    with torch.no_grad(), shapes_seen(model, Anatomy.of(model)) as shapes:
        model(**inputs)
    return inputs, shapes


def counted_in_layers(model, inputs, anatomy):
    """{stack: MACs that torch counts inside its layers}."""
    prefix = type(model).__name__ + "".join(
        f".{name}" for name, module in model.named_modules() if name and module is model.base_model
    )
    with torch.no_grad(), frozen(model), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return {
        block.stack: sum(
            sum(counter.get_flop_counts().get(f"{prefix}.{block.name}.{n}", {}).values()) // 2
            for n in range(block.units)
        )
        for block in anatomy.stacks
    }


@every_family_if_slow
def test_cost_counts_what_is_there(family):
    dense, pruned, keep = dense_and_pruned(family)
    before, after = Anatomy.of(dense), Anatomy.of(pruned)
    for model, anatomy in ((dense, before), (pruned, after)):
        total = sum(p.numel() for p in model.parameters())
        assert layers_params(anatomy) + anatomy.outside_params == total
    assert layers_params(before, keep) == layers_params(after)
    assert layers_macs(before, 9, keep) == layers_macs(after, 9)

    inputs, shapes = one_example(dense)
    lengths = tuple(shapes[stack][1] for stack in sorted(shapes))
    for model, anatomy in ((dense, before), (pruned, after)):
        for stack, counted in counted_in_layers(model, inputs, anatomy).items():
            assert shapes[stack][0] * stack_macs(anatomy, stack, lengths) == counted


@every_family_if_slow
def test_keeping_everything_changes_nothing_and_twice_is_the_union(family):
    dense, pruned, keep = dense_and_pruned(family)
    anatomy, inputs = Anatomy.of(dense), tiny.batch(dense)
    assert Anatomy.from_dict(json.loads(json.dumps(anatomy.to_dict()))) == anatomy
    same = copy_and_cut(dense, anatomy.everything)
    assert tiny.outputs(same, inputs).equal(tiny.outputs(dense, inputs))
    half = {g.name: keep[g.name] if g.layer else range(g.units) for g in anatomy}
    rest = {g.name: range(len(half[g.name])) if g.layer else keep[g.name] for g in anatomy}
    twice = cut(copy_and_cut(dense, half), rest)
    assert twice.config.to_dict() == pruned.config.to_dict()
    assert tiny.outputs(twice, inputs).equal(tiny.outputs(pruned, inputs))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@every_family_if_slow
def test_it_runs_and_trains_as_the_stock_model_does(family):
    dense, pruned, _ = dense_and_pruned(family)
    inputs = tiny.batch(dense)
    eager = tiny.outputs(pruned, inputs)
    if dense._supports_sdpa:
        pruned.set_attn_implementation("sdpa")
        torch.testing.assert_close(tiny.outputs(pruned, inputs), eager, rtol=1e-3, atol=1e-3)
    narrow = copy.deepcopy(pruned).to(torch.bfloat16)
    assert tiny.outputs(narrow, tiny.batch(narrow)).isfinite().all()

    def gradients(model):
        model.zero_grad()
        torch.manual_seed(0)
        tiny.outputs(model.train(), inputs).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients(pruned)
    if dense.supports_gradient_checkpointing:
        pruned.gradient_checkpointing_enable()
        checkpointed = gradients(pruned)
        assert checkpointed.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-4)
    before = {n: p.detach().clone() for n, p in pruned.named_parameters()}
    torch.optim.SGD(pruned.parameters(), lr=0.1).step()
    assert any(not p.equal(before[n]) for n, p in pruned.named_parameters())


@pytest.mark.parametrize("family", families(GENERATING))
def test_the_cache_does_not_change_what_is_generated(family):
    dense, pruned, _ = dense_and_pruned(family)
    inputs = tiny.batch(dense)
    inputs.pop("decoder_input_ids", None)
    options = {"do_sample": False, "max_new_tokens": 7, "min_new_tokens": 7}
    without = pruned.generate(**inputs, **options, use_cache=False)
    assert pruned.generate(**inputs, **options).equal(without)
    assert pruned.generate(**inputs, **options, num_beams=2).shape == without.shape
    if dense._can_compile_fullgraph:
        static = pruned.generate(
            **inputs, **options, cache_implementation="static", disable_compile=True
        )
        assert static.equal(without)


STRANGER = """
import json, sys
sys.modules["hfprune"] = None  # whoever imports it gets an ImportError
import torch, transformers
torch.set_num_threads(1)
for line in sys.stdin:
    folder, head = json.loads(line)
    cls = getattr(transformers, head)
    model, info = cls.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, attn_implementation="eager"
    )
    inputs, expected = torch.load(folder + "/../probe.pt")
    with torch.no_grad():
        same = torch.allclose(model.eval()(**inputs)[0], expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(folder + "/../again")
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    odd = {k: sorted(map(str, info[k])) for k in keys}
    print(json.dumps({"same": same, "odd": odd}), flush=True)
"""


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    """A process that cannot import hfprune, and loads the folders it is told to."""
    modules = tmp_path_factory.mktemp("modules")
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", STRANGER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=modules,
        env={"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    yield process
    process.stdin.close()
    process.wait(timeout=30)


def load_as(stranger, folder: Path, head: str) -> dict:
    stranger.stdin.write(json.dumps([str(folder), head]) + "\n")
    stranger.stdin.flush()
    answer = stranger.stdout.readline()
    assert answer, "the process that loads without hfprune died"
    return json.loads(answer)


@pytest.mark.xdist_group("stranger")  # one process for all
@every_family_if_slow
def test_it_comes_back_in_a_process_without_hfprune(family, stranger, tmp_path):
    _, pruned, _ = dense_and_pruned(family)
    folder, head = tmp_path / family.replace("-", "_"), tiny.auto_class(family)
    pruned.save_pretrained(folder)
    inputs = tiny.batch(pruned)
    with torch.no_grad():
        expected = tiny.outputs(pruned, inputs)
        torch.save((inputs, expected), tmp_path / "probe.pt")
        again = tiny.outputs(from_pretrained(folder, attn_implementation="eager"), inputs)
        # Where a tensor lies in memory may change the order of a sum.
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    answer = load_as(stranger, folder, head)
    assert answer == {
        "same": True,
        "odd": {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []},
    }
    first = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    again = {p.name: p.read_bytes() for p in sorted((tmp_path / "again").iterdir())}
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


GUARDED = [f for f in ROWS if all(s.ffn and s.ffn.setting and not s.moe for s in ROWS[f].stacks)]


@every_family_if_slow
def test_a_stock_load_raises(family, tmp_path):
    _, pruned, keep = dense_and_pruned(family)
    if not keep:
        anatomy = Anatomy.of(pruned)
        pruned = cut(pruned, {b.name: (0, 2) for b in anatomy.blocks if b.kind == "expert"})
    pruned.save_pretrained(tmp_path, verify=False)
    head = getattr(transformers, tiny.auto_class(family))
    with pytest.raises((RuntimeError, Ambiguous)):
        head.from_pretrained(tmp_path)
    if family in GUARDED:
        with pytest.raises(Ambiguous):
            head.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
