"""Bad input: one clear error with rank, fqn, got, expected and remedy; nothing is changed."""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

import shardema
from shardema import CheckpointError, ShadowPolicy, ShardedEMA, schedules
from shardema.cli.main import main
from shardema.errors import address
from shardema.errors.entries import ENTRIES
from tests import world, zoo
from tests.test_checkpoint import bits
from tests.test_docs import templates

DOCS = Path(__file__).parent.parent / "docs"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ShardedEMA(net(), 1.2), ValueError, r"decay=1.2, expected a number in \[0, 1\]"),
        (
            lambda: ShardedEMA(net(), lambda t: 0.5),
            TypeError,
            r"schedule .*<lambda>: got a callable of \(t\), expected \(t, dt\)",
        ),
        (lambda: ShardedEMA(net(), None), TypeError, "got None, expected a decay"),
        (lambda: ShardedEMA("net", 0.5), TypeError, "got str, expected a torch.nn.Module"),
        (lambda: ShardedEMA([], 0.5), ValueError, "empty list"),
        (
            lambda: ShardedEMA(nn.Linear(2, 2, device="meta"), 0.5),
            ValueError,
            "weight, bias: on the meta device",
        ),
        (
            lambda: ShardedEMA(nn.Sequential(nn.LazyLinear(2)), 0.5),
            ValueError,
            "0.weight, 0.bias: not initialized, as in a torch.nn.Lazy",
        ),
        (lambda: ShardedEMA(nn.ReLU(), 0.5), ValueError, "no trainable floating-point parameter"),
        (lambda: ShardedEMA(net(), 0.5, select="*.wieght"), ValueError, "matches no floating"),
        (lambda: ShardedEMA(net(), 0.5).copy_to_model(every=0), ValueError, "expected a whole num"),
        (lambda: ShardedEMA(net(), 0.5, on_nonfinite="stop"), ValueError, "expected 'ignore', 'sk"),
        (lambda: ShardedEMA(net(), 0.5, select=re.compile("wight$")), ValueError, "'wight.' match"),
        (lambda: ShardedEMA(net(), 0.5, select=lambda n, t: False), ValueError, "nothing to"),
        (
            lambda: ShardedEMA(net(), 0.5, buffers="mean"),
            ValueError,
            "got 'mean', expected 'copy',",
        ),
        (
            lambda: ShardedEMA(nn.BatchNorm1d(2), 0.5, buffers={"*bias": "average"}),
            ValueError,
            r"'\*bias' matches no buffer of running_mean, running_var, num_batches_tracked",
        ),
        (
            lambda: ShardedEMA(net(), schedules.by_pattern({"*": 0.5, "0.*": 0.9}, 0.1)),
            ValueError,
            r"average 'ema': by_pattern: '0.\*' decides about no averaged tensor",
        ),
        (lambda: schedules.by_pattern({}, 0.5), ValueError, "got no rules"),
        (lambda: schedules.by_pattern({3: 0.5}, 0.5), TypeError, "got the pattern 3"),
        (
            lambda: schedules.by_pattern({re.compile("a", re.I): 0.5}, 0.5),
            ValueError,
            "write its flags into the pattern",
        ),
        (
            lambda: schedules.by_pattern({"a": schedules.half_life("9sp")}, 0.5),
            ValueError,
            r"schedules in \['sample', 'step'\], expected one unit",
        ),
        (
            lambda: schedules.clip(schedules.by_pattern({"a": 0.5}, 0.5)),
            TypeError,
            "expected a decay in",
        ),
        (lambda: ShardedEMA(net(), 0.5, backend="fsdp2"), ValueError, "is of backend 'plain'"),
        (lambda: ShardedEMA(net(), 0.5, backend="zero9"), ValueError, "expected 'auto' or one of"),
        (lambda: ShardedEMA(net(), 0.5, kernel="fast"), ValueError, "expected 'auto' or one of"),
        (lambda: ShardedEMA(net(), {}), ValueError, "empty dict"),
        (lambda: ShardedEMA(net(), {"a/b": 0.5}), ValueError, "names are letters, digits"),
        (
            lambda: ShardedEMA(net(), {"a": 0.5, "b": schedules.half_life(9, unit="token")}),
            ValueError,
            r"count \['step', 'token'\], expected one unit",
        ),
        (
            lambda: ShardedEMA(net(), 0.5, shadow={"a": ShadowPolicy()}),
            ValueError,
            r"policies for \['a'\], expected \['ema'\]",
        ),
        (lambda: ShardedEMA(net(), 0.5, shadow="fp32"), TypeError, "expected a ShadowPolicy"),
        (
            lambda: ShadowPolicy(dtype=torch.float16),
            ValueError,
            r"got dtype=torch.float16, expected .* torch.float64 or torch.bfloat16",
        ),
        (
            lambda: ShardedEMA(nn.Linear(2, 2, dtype=torch.complex64), 0.5),
            ValueError,
            "no trainable floating-point|complex parameters",
        ),
    ],
)
def test_construction(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes are of Python 3.11")
def test_a_traceback_ends_with_the_address_of_its_entry(tmp_path: Path) -> None:
    ema = ShardedEMA(net(), 0.5)
    for call, entry in (
        (lambda: ShardedEMA(net(), 1.2), "decay-range"),
        (lambda: ShardedEMA(net(), None), "schedule-kind"),
        (lambda: schedules.power(gamma=-2), "argument"),
        (lambda: ema.update(7), "update-arguments"),
        (lambda: ema.store(), "no-attribute"),
        (lambda: ema.load(tmp_path / "gone"), "no-folder"),
        (lambda: ema.attach(torch.optim.SGD(net().parameters(), 0.1)), "attach-no-parameters"),
    ):
        with pytest.raises(Exception, match=r"\w") as caught:
            call()
        page = "https://github.com/shardema/shardema/blob/main/docs/errors.md"
        assert caught.value.__notes__ == [f"causes and remedies: {page}#{entry}"]
        assert page not in str(caught.value)


def test_the_entries_are_those_of_the_page() -> None:
    spec = importlib.util.spec_from_file_location("entries", DOCS / "entries.py")
    writing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writing)
    assert writing.MODULE.read_text() == writing.module(), "run python docs/entries.py"
    page = (DOCS / "errors.md").read_text()
    names = re.findall(r'id="([^"]*)"', page)
    assert len(set(names)) == len(names) == len(ENTRIES) == len(set(ENTRIES.values()))
    rows = re.findall(r"^\| (?!message).*", page.split("\n## ", 1)[1], re.MULTILINE)
    assert [row for row in rows if not row.startswith('| <a id="')] == []


# the classes that find their entry by themselves, and the functions that give errors one
LINKED = {"ArgumentError", "ArgumentTypeError", "CallError", "RankError", "CheckpointError"}
LINKED |= {"SwapError", "linked", "rank_error", "ClickException", "UsageError", "BadParameter"}
# parts of messages, which the same file completes: "reading ...: <part> in the manifest; ..."
PARTS = {
    "files/histories.py": "in the history of ...",
    "files/manifest.py": "in the manifest; it was not written by ema.save",
    "files/safetensors.py": "its safetensors header is broken (...)",
    "importers/states.py": "broken ...",
    "importers/torchfile.py": "not a complete file of torch.save (...)",
    "shards/strides.py": "caught by the kernels and by the export, which go another way",
}
# what is said around the message of another error, which has an entry
AROUND = ["\0", "rank \0: \0", "\0 \0: \0", "\0: \0", "rank \0: \0: \0", "\0\0"]
AROUND += ["\0; resume from a checkpoint before the step that caused it", "\0\0 on every rank"]


def raised() -> Iterator[tuple[str, str, str]]:
    """File, class and text of each error of the package; a null character is a value in it."""
    package = Path(shardema.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = ast.unparse(node.func).rpartition(".")[2]
                text = template(node.args[-1 if name == "rank_error" else 0])
                yield str(path.relative_to(package)), name, text


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Call) and node.args:  # linked(ImportError(...)), printable(...)
        return template(node.args[0])
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "\0"


def test_every_message_of_the_package_has_an_entry() -> None:
    messages = [(place, text) for place, name, text in raised() if name in LINKED]
    assert len(messages) > 500
    lost = [m for m in messages if not address(m[1]) and m[1] not in AROUND]
    assert lost == []
    texts = {text for text in templates() if text.count(" ") > 1}
    found = {address(text).partition("#")[2] for text in texts}
    assert sorted(ENTRIES.keys() - found) == []  # no entry is hidden by a longer one


def test_an_error_of_python_is_a_part_of_a_message() -> None:
    bare = ("ValueError", "TypeError", "RuntimeError")
    assert {place for place, name, _ in raised() if name in bare} == PARTS.keys()


def test_every_module_has_a_logger_that_ends_warnings_with_the_address() -> None:
    package = Path(shardema.__file__).parent
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    own = [path.name for path, text in sources.items() if "getLogger(__name__)" in text]
    assert own == []
    assert sum("log = logger(__name__)" in text for text in sources.values()) > 20


def test_a_command_ends_its_line_with_the_address() -> None:
    page = "https://github.com/shardema/shardema/blob/main/docs/errors.md"
    for arguments, code, entry in (
        (["inspect", "gone"], 1, "no-folder"),
        (["plan"], 2, "plan-source"),
        (["plot", "profile", "--steps", "9", "--schedule", "2"], 2, "decay-range"),
    ):
        result = CliRunner().invoke(main, arguments)
        last = result.stderr.splitlines()[-1]
        assert (result.exit_code, last.startswith("Error: ")) == (code, True), result.output
        assert last.endswith(f" ({page}#{entry})")
    unknown = CliRunner().invoke(main, ["inspect", "--gone"])
    assert page not in unknown.stderr  # click says it


def test_a_tensor_that_shares_memory_is_refused() -> None:
    model = net()
    model[0].weight = nn.Parameter(torch.zeros(4).expand(3, 4))
    with pytest.raises(ValueError, match=r"0.weight: .* shares memory between elements"):
        ShardedEMA(model, 0.5)
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)])
    model[1].weight.data = model[0].weight.data[:2]
    with pytest.raises(ValueError, match=r"1.weight and 0.weight share a part of their memory"):
        ShardedEMA(model, 0.5)


def test_weights_that_are_tied_by_storage_are_averaged_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight.data = model[0].weight.data
    ema = ShardedEMA(model, 0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    full = ema.full_state_dict()
    assert torch.equal(full["0.weight"], torch.lerp(start, start + 1, 0.5))
    assert full["1.weight"] is full["0.weight"]
    with ema.swap():
        assert torch.equal(model[1].weight, full["0.weight"])
    assert torch.equal(model[1].weight, start + 1)


def changes() -> dict[str, tuple[Callable[[nn.Module], object], str]]:
    def other_shape(model: nn.Module) -> None:
        model[0].weight = nn.Parameter(torch.zeros(5, 4))

    def other_dtype(model: nn.Module) -> None:
        model.to(torch.bfloat16)

    def gone(model: nn.Module) -> None:
        del model[1].bias

    return {
        "shape": (other_shape, r"rank 0: 0.weight: got shape \(5, 4\), expected \(3, 4\)"),
        "dtype": (other_dtype, r"rank 0: 0.weight: got dtype torch.bfloat16, expected torch.floa"),
        "gone": (gone, r"rank 0: 1.bias is gone since the EMA was built"),
    }


@pytest.mark.parametrize("name", sorted(changes()))
def test_a_model_that_changed_is_refused(name: str) -> None:
    change, text = changes()[name]
    model = net()
    ema = ShardedEMA(model, 0.5)
    before = bits(ema)
    change(model)
    for call in (ema.update, ema.full_state_dict, ema.reset, ema.copy_to_model, ema.state_dict):
        with pytest.raises(RuntimeError, match=text):
            call()
    with pytest.raises(RuntimeError, match=text), ema.swap():
        pass
    assert bits(ema) == before


def test_a_new_parameter_is_reported_at_the_next_collective_call() -> None:
    model = net()
    ema = ShardedEMA(model, 0.5)
    model.append(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"2.bias, 2.weight is new since the EMA was built"):
        ema.full_state_dict()


def test_replaced_storage_is_found_again() -> None:
    model = net()
    ema = ShardedEMA(model, 0.5)
    for replace in (
        lambda: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda: setattr(model[0].weight, "data", model[0].weight.data.clone()),
        lambda: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
    ):
        replace()
        with torch.no_grad():
            model[0].weight.add_(1)
        was = ema.full_state_dict()["0.weight"].clone()
        ema.update()
        now = ema.full_state_dict()["0.weight"]
        assert torch.equal(now, torch.lerp(was, model[0].weight.detach(), 0.5))


def test_weights_that_moved_are_found_though_binding_failed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(2, 2, bias=False)
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema.reset()
    model.weight.data = torch.full((2, 2), 4.0)
    with monkeypatch.context() as failing:
        failing.setattr(ema.internal.updates, "bind_kernel", None)
        with pytest.raises(TypeError):
            ema.update()
    ema.update()
    assert ema.full_state_dict()["weight"].unique().tolist() == [2.0]


def test_weights_that_moved_inside_a_swap_come_back_too() -> None:
    model = net()
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    before = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    average = ema.full_state_dict()
    with ema.swap():
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        model[1].weight.data = model[1].weight.data.clone()
    after, kept = model.state_dict(), ema.full_state_dict()
    assert all(torch.equal(after[fqn], value) for fqn, value in before.items())
    assert all(torch.equal(kept[fqn], value) for fqn, value in average.items())


def test_update_wants_a_sensible_dt() -> None:
    ema = ShardedEMA(net(), schedules.half_life(100, unit="sample"))
    before = bits(ema)
    with pytest.raises(ValueError, match=r"say how many passed .* update\(dt=<samples>\)"):
        ema.update()
    for dt in (-1, float("nan"), float("inf"), "3", True):
        with pytest.raises(ValueError, match="expected samples since the last update"):
            ema.update(dt=dt)  # type: ignore[arg-type]
    ramp = ShardedEMA(net(), schedules.ramp(0.9))
    with pytest.raises(ValueError, match="expected whole steps"):
        ramp.update(dt=0.5)
    odd = ShardedEMA(net(), lambda t, dt: 1.5)
    with pytest.raises(ValueError, match=r"got decay=1.5"):
        odd.update()
    assert (bits(ema), ramp.t, odd.t) == (before, 0, 0)
    ema.update(dt=32)
    assert ema.t == 32


def test_the_arguments_of_other_libraries_updates_are_refused() -> None:
    model = net()
    ema = ShardedEMA(model, 0.99)
    for call, op in ((ema.update, "update"), (ema.before_replay, "before_replay")):
        for given, kind in (
            ((7,), "int"),
            ((model,), "Sequential"),
            ((model, 7), "Sequential, int"),
        ):
            with pytest.raises(TypeError, match=rf"{op}: got {kind} without a keyword, .* timm's"):
                call(*given)
        with pytest.raises(TypeError, match=r"got generator .* expected .*\(dt=.* diffusers"):
            call(model.parameters())
    assert (ema.t, ema.num_updates) == (0, 0)


def test_arguments_of_gathers_and_exports(tmp_path: Path) -> None:
    ema = ShardedEMA(net(), 0.5)
    for call, text in (
        (lambda: ema.full_state_dict("other"), "name: got 'other', expected one of"),
        (lambda: ema.full_state_dict(dtype=torch.int8), r"dtype=torch.int8, expected None"),
        (lambda: ema.export(tmp_path / "x", mode="fast"), "mode: got 'fast', expected 'auto'"),
        (lambda: ema.export(tmp_path / "x", max_shard_size="5 potatoes"), "expected a size such"),
        (lambda: ema.export(tmp_path / "x", max_shard_size=0), "expected a size such"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert list(tmp_path.iterdir()) == []


def test_load_full_refuses_what_is_not_the_model(tmp_path: Path) -> None:
    ema = ShardedEMA(net(), 0.5)
    before = bits(ema)
    good = {fqn: value.clone() for fqn, value in ema.full_state_dict().items()}
    lacking = {fqn: value for fqn, value in good.items() if fqn != "1.bias"}
    safetensors.torch.save_file(lacking, tmp_path / "lacking.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    for source, error, text in (
        (lacking, ValueError, "missing 1.bias"),
        (tmp_path / "lacking.safetensors", ValueError, "missing 1.bias"),
        (good | {"2.weight": good["1.bias"]}, ValueError, "unexpected 2.weight"),
        (
            good | {"1.bias": torch.zeros(7)},
            ValueError,
            r"1.bias has shape \(7,\), expected \(2,\)",
        ),
        (tmp_path / "none.safetensors", CheckpointError, "No such file"),
        (tmp_path, CheckpointError, "it contains no model.safetensors"),
        (tmp_path / "broken.safetensors", CheckpointError, "not a safetensors file"),
    ):
        with pytest.raises(error, match=text):
            ema.load_full(source)
        assert bits(ema) == before


def wrapped_after_the_ema_was_built() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import fully_shard

    model = zoo.make()
    ema = ShardedEMA(model, 0.5)
    before = bits(ema)
    fully_shard(model)
    for call in (ema.update, ema.full_state_dict):
        with pytest.raises(RuntimeError, match=r"was 'plain' .* is 'fsdp2' now; build the EMA aft"):
            call()
    assert bits(ema) == before
    inner = net()
    ema = ShardedEMA(inner, 0.5)
    FSDP(inner, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(RuntimeError, match="build the EMA after"):
        ema.update()
    whole = ShardedEMA(fully_shard(net()), 0.5)
    whole.update()


def built_before_the_process_group() -> None:
    from torch import distributed as dist

    ema = ShardedEMA(net(), 0.5)
    ema.internal.averages.ranks._active = False  # as if init_process_group had come only now
    assert dist.is_initialized()
    with pytest.raises(RuntimeError, match="process group was initialised after the EMA was built"):
        ema.full_state_dict()


def ranks_with_different_models() -> None:
    from torch import distributed as dist

    wide = 3 if dist.get_rank() else 4
    ema = ShardedEMA(nn.Linear(wide, 2), 0.5)
    with pytest.raises(ValueError, match=r"weight: rank 1 has shape \(2, 3\), rank 0 has \(2, 4\)"):
        ema.full_state_dict()


def ranks_with_other_schedules_or_buffers() -> None:
    from torch import distributed as dist

    first = dist.get_rank() == 0
    model = nn.Linear(2, 2)
    for param in model.parameters():
        nn.init.zeros_(param)
    other = ShardedEMA(model, 0.5 if first else 0.25)
    with pytest.raises(ValueError, match="the ranks keep other averages: rank 1 of those"):
        other.full_state_dict()
    model.register_buffer("low", torch.tensor(1.0 if first else torch.inf))
    mixed = ShardedEMA(model, 0.5, buffers="average")
    with pytest.raises(ValueError, match=r'low: this buffer is finite on some .*{"low": "copy"}'):
        mixed.full_state_dict()
    if first:
        with pytest.raises(ValueError, match="pass a pipeline stage as a list"):
            ShardedEMA(model, 0.5, select="9.*")


def test_ranks_that_differ_all_raise() -> None:
    facts = [
        world.Fact("wrapped", wrapped_after_the_ema_was_built),
        world.Fact("different", ranks_with_different_models),
        world.Fact("before", built_before_the_process_group),
    ]
    world.hold(facts, 2)


def test_ranks_with_other_schedules_or_buffers_are_told() -> None:
    world.run(ranks_with_other_schedules_or_buffers, 2)


class Stateful(nn.Linear):
    """A module with extra state, which is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"scale": 3}


def test_extra_state_goes_through_gather_and_load_full() -> None:
    model = Stateful(2, 2)
    ema = ShardedEMA(model, 0.5)
    full = ema.full_state_dict()
    Stateful(2, 2).load_state_dict(full, strict=True)
    ema.load_full(full)


def test_select_takes_names_of_tied_weights_and_full_shapes() -> None:
    model = zoo.make()
    matrices = ShardedEMA(model, 0.5, select=lambda fqn, shape: len(shape) > 1)
    assert "out.weight" in matrices.internal.averages.weights.averaged
    assert "out.bias" not in matrices.internal.averages.weights.averaged
    assert ShardedEMA(model, 0.5, select="head.*").internal.averages.weights.averaged == {
        "embed.weight"
    }
    some = ShardedEMA(model, 0.5, select=[re.compile(r"^out\."), "narrow.bias"])
    assert some.internal.averages.weights.averaged == {"out.weight", "out.bias", "narrow.bias"}
    frozen = ShardedEMA(model, 0.5, select=["frozen.*"])
    assert frozen.internal.averages.weights.averaged == {"frozen.weight", "frozen.bias"}


def test_dt_may_be_of_numpy() -> None:
    import numpy as np

    ema = ShardedEMA(net(), schedules.half_life(100, unit="token"))
    ema.update(dt=np.int64(12_345_678))
    assert "t=12345678 tokens" in repr(ema)


def test_a_state_dict_is_looked_at_whole_before_it_is_taken() -> None:
    ema = ShardedEMA(net(), {"a": 0.5, "b": 0.5})
    other = ShardedEMA(net(), {"a": 0.5, "b": 0.5})
    for shadow in other.internal.averages["a"].shadows.flats:
        shadow.fill_(7.0)
    before = bits(ema)

    def spoil(change: Callable[[dict], object]) -> dict:
        state = other.state_dict()
        change(state)
        return state

    for change, text in (
        (lambda s: s["averages"]["b"].update({"0.bias": torch.zeros(2)}), "0.bias: got Tensor"),
        (lambda s: s["averages"]["b"].pop("0.bias"), "average 'b' differs in 0.bias"),
        (lambda s: s.pop("progress"), r"missing keys \['progress'\]"),
        (lambda s: s["progress"].pop("b"), r"got progress \['a'\], expected averages"),
        (lambda s: s["schedules"].update(b={"name": "x"}), "saved with schedule"),
    ):
        with pytest.raises(ValueError, match=text):
            ema.load_state_dict(spoil(change))
        assert bits(ema) == before
