"""Faults that were once in the library, each put back by one line: whether the machine finds it.

::

    patch     one line of the package is another, in a copy of the tree
    hunt      cases of a seed on one layout, until one fails
    table     of each patch: seeds that found it, after how many operations, on which layouts

By hand: ``python -m tests.soak.teeth [--seeds 10] [--operations 400] [NAME...]``.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import statistics
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.layouts import LAYOUTS
from tests.mutants import ROOT, Bench, Mutant
from tests.soak.cases import FSDP1, FSDP2, Case, draw
from tests.soak.machine import run

LENGTH = 40  # operations of a case
OPERATIONS = 400  # of a seed
SECONDS = 400.0  # for as many operations
SEVERAL = tuple(name for name, layout in LAYOUTS.items() if max(layout.worlds) > 1)


@dataclass(frozen=True)
class Patch:
    """A line of the package, and the line that puts a fault back.

    Attributes:
        inside: the function that the line is in, exactly once.
        fault: what is wrong then.
        layouts: where it can show; everywhere if empty.
    """

    name: str
    file: str
    inside: str
    before: str
    after: str
    fault: str
    layouts: tuple[str, ...] = ()

    def mutant(self, root: Path = ROOT) -> Mutant:
        """The change of the tree. Raises ValueError where the line is not there exactly once."""
        text = (root / "shardema" / self.file).read_text()
        lines = text.splitlines()
        found = [
            number
            for function in ast.walk(ast.parse(text))
            if isinstance(function, ast.FunctionDef) and function.name == self.inside
            for number in range(function.lineno, (function.end_lineno or 0) + 1)
            if lines[number - 1].strip() == self.before
        ]
        if len(found) != 1:
            raise ValueError(
                f"{self.name}: {self.file} has {len(found)} lines {self.before!r} in "
                f"{self.inside}, expected one"
            )
        line = lines[found[0] - 1]
        after = line.replace(self.before, self.after)
        return Mutant(self.file, found[0], line, after, self.fault)


PATCHES = {
    patch.name: patch
    for patch in (
        Patch(
            "gap",
            "update/shadows.py",
            "merged_pairs",
            "adjacent = end is not None and self.next_fqn.get(end) == shard.fqn",
            "adjacent = end is not None",
            "neighbours are joined across a gap in which another averaged tensor lies",
            FSDP1,
        ),
        Patch(
            "pending",
            "backends/fsdp2.py",
            "ensure_sharded",
            "_forget_pending(group)",
            "pass",
            "an all-gather that is under way survives a swap",
            FSDP2,
        ),
        Patch(
            "post_optim_event",
            "backends/fsdp2.py",
            "mark_written",
            "module._get_fsdp_state()._state_ctx.post_optim_event = None",
            "pass",
            "an all-gather waits for an event from before the write, and not for the write",
            FSDP2,
        ),
        Patch(
            "summon",
            "backends/fsdp1.py",
            "_refuse_busy",
            'if "SUMMON_FULL_PARAMS" in states:',
            "if False:",
            "an update inside summon_full_params loses what the block wrote",
            FSDP1,
        ),
        Patch(
            "prefetched",
            "backends/fsdp1.py",
            "ensure_sharded",
            "if _gathered(handle):",
            "if False:",
            "what a forward has left gathered survives a swap",
            FSDP1,
        ),
        Patch(
            "import_erased",
            "update/average.py",
            "_erasing",
            "if weight == 1:",
            "if False:",
            "an average that is imported without its progress is erased by the first update",
        ),
        Patch(
            "import_clock",
            "files/loading.py",
            "read_full",
            "seed = restart and (*restart, None)",
            "seed = None",
            "the progress that an import was given is not taken",
        ),
        Patch(
            "out_of_step",
            "calls.py",
            "_arrive",
            "same.update(self.averages.clocks())",
            "pass",
            "ranks that were updated more or less often are put together",
            (*FSDP1, *FSDP2),  # whole replicas are compared as well
        ),
        Patch(
            "update_while_attached",
            "update/following.py",
            "refuse_by_hand",
            "if self.source is not None:",
            "if False:",
            "an update by hand counts twice what the attached optimizer does",
        ),
        Patch(
            "attached_twice",
            "update/following.py",
            "attach",
            "if self.source is not None:",
            "if False:",
            "each step of an optimizer that is attached twice counts twice",
        ),
        Patch(
            "positional",
            "ema.py",
            "update",
            'refuse_positional("update", misplaced)',
            "dt = misplaced[0] if misplaced else dt",
            "update(step) takes the number of the step for the progress",
        ),
        Patch(
            "other_optimizers",
            "update/attach.py",
            "__init__",
            "followed = [optimizer for optimizer, one in zip(given, held, strict=True) if one]",
            "followed = given",
            "steps of an optimizer that steps no averaged tensor count",
        ),
        Patch(
            "open_round",
            "calls.py",
            "close_round",
            "if self.swap.inside is None and self._other_swap() is None:",
            "if False:",
            "what reads the average does not see the steps of an open round",
        ),
        Patch(
            "round_after_load",
            "update/following.py",
            "clear",
            "self.source.clear()",
            "pass",
            "the steps of a round that was open before a load or reset count after it",
        ),
        Patch(
            "forward",
            "update/attach.py",
            "before_forward",
            "self.close()",
            "pass",
            "a forward does not end an open round, whose update then sees later weights",
        ),
        Patch(
            "fused_skip",
            "update/stepping.py",
            "_leave",
            "if found_inf is not None and bool(found_inf.item()):",
            "if False:",
            "a step that a fused optimizer skips inside of its kernel counts",
            ("plain", "ddp"),
        ),
        Patch(
            "own_state",
            "model/own_state.py",
            "_has_own_code",
            "return overridden or any(True for _ in _hooks(module))",
            "return False",
            "what modules write into their state themselves is lost",
        ),
        Patch(
            "interrupted_swap",
            "exchange.py",
            "swap_out",
            "if self._state[1]:",
            "if False:",
            "the end of a swap does not finish the exchange that an exception stopped",
        ),
        Patch(
            "interrupted_update",
            "update/updates.py",
            "advance",
            "with uninterrupted():  # all averages and clocks are updated, or none",
            "with contextlib.nullcontext():",
            "an update that an exception stops has moved some averages, and no clock",
        ),
        Patch(
            "interrupted_load",
            "ema.py",
            "load",
            'self._updates.replace("load", apply)',
            "apply(); self._updates.following.clear()",
            "a load that an exception stops has set some averages, and the clocks of others",
        ),
        Patch(
            "arguments",
            "calls.py",
            "_arrive",
            "same.update(name=average.name, dtype=str(call.dtype), **call.given())",
            "call.given()",
            "arguments that differ over the ranks are not compared",
            SEVERAL,
        ),
        Patch(
            "dcp_buffers",
            "files/dcp.py",
            "state_of",
            "s.fqn: BoxedTensor.of(s, views[s.fqn], saved=s.fqn not in elsewhere)",
            "s.fqn: BoxedTensor.of(s, views[s.fqn])",
            "of an averaged buffer that differs between ranks any rank's is saved",
            (*FSDP1, *FSDP2),  # under DDP, too, DCP may happen to take the first rank's
        ),
        Patch(
            "moved",
            "update/updates.py",
            "carry_over",
            "if self._binding.moved:",
            "if False:",
            "an update goes on with the storage that the weights have left",
            ("plain", *FSDP2),
        ),
        Patch(
            "exchanged",
            "model/weights.py",
            "storage_unchanged",
            "return self._form.holds() and "
            "all(address() == known for address, known in self._addresses)",
            "return all(address() == known for address, known in self._addresses)",
            "a module that was exchanged is averaged on, and its successor is not",
            ("plain",),
        ),
        Patch(
            "given_back",
            "model/weights.py",
            "copy_to_replaced",
            "new.local.copy_(old.local)",
            "pass",
            "weights that were moved inside of a swap keep the average",
            ("plain",),
        ),
        Patch(
            "frozen",
            "model/selection.py",
            "facts",
            'shard.role == "buffer",',
            "shard.role,",
            "a part that is frozen or unfrozen makes every call raise",
            ("plain", *FSDP2),
        ),
        Patch(
            "load_clock",
            "files/loading.py",
            "_read_average",
            "clock = kept.t, kept.num_updates, kept.moved_at",
            "clock = kept.t, kept.num_updates, None",
            "a load forgets when an average last moved",
        ),
        Patch(
            "dcp_clock",
            "files/loading.py",
            "apply_state",
            'average.restart(clock["t"], clock["num_updates"], clock.get("moved_at"))',
            'average.restart(clock["t"], clock["num_updates"])',
            "load_state_dict forgets when an average last moved",
        ),
        Patch(
            "stale",
            "swapping.py",
            "_ready",
            'self._updates.flush("swap")',
            "pass",
            "a swap reads an average in host memory before its update is done",
            ("fsdp2-offload",),
        ),
        Patch(
            "autocast",
            "model/weights.py",
            "announce_write",
            "torch.clear_autocast_cache()",
            "pass",
            "a forward under autocast computes with the weights from before a swap",
            ("plain", "ddp"),
        ),
        Patch(
            "buffers_in_swap",
            "exchange.py",
            "__init__",
            'if shadow is None or param.dtype != shadow.dtype or shard.role == "buffer":',
            "if shadow is None or param.dtype != shadow.dtype:",
            "what a forward inside of a swap writes into a buffer stays in the average",
            ("plain", "ddp"),
        ),
        Patch(
            "written",
            "swapping.py",
            "_swapped",
            "if written:",
            "if False:",
            "weights that are written inside of a swap are lost without a word",
        ),
        Patch(
            "grown",
            "calls.py",
            "_ready",
            "same_state = known == self.own.facts() and self._planned == self.weights.stamp()",
            "same_state = known == self.own.facts()",
            "a buffer that has grown is gathered in its old shape",
        ),
    )
}


@dataclass(frozen=True)
class Hunt:
    """What became of a seed: a fault after so many operations, or none (None)."""

    seed: int
    layout: str
    operations: int | None
    said: str = ""


def hunt(seed: int, layouts: Sequence[str], operations: int) -> Hunt:
    """Cases of a seed on one of the layouts, in one world, until one fails."""
    layout = layouts[seed % len(layouts)]
    count = -(-operations // LENGTH)
    drawn = [draw(1000 * seed + number, layout, LENGTH) for number in range(count)]
    ranks = min(LAYOUTS[layout].worlds)
    drawn = [dataclasses.replace(case, ranks=ranks) for case in drawn]
    done = 0
    for case, said in run(drawn):
        if said:
            return Hunt(seed, layout, done + _failed_at(case, said), said)
        done += len(case.actions)
    return Hunt(seed, layout, None)


def _failed_at(case: Case, said: str) -> int:
    numbers = [int(number) for number in re.findall(r"^in action (\d+):", said, re.MULTILINE)]
    return 1 + min(numbers, default=len(case.actions) - 1)


def hunts(bench: Bench, patch: Patch, seeds: Sequence[int], operations: int) -> Generator[Hunt]:
    """The seeds, on the copy of the tree with the patch."""
    with bench.having(patch.mutant(bench.folder)):
        for seed in seeds:
            words = ["tests.soak.teeth", "--hunt", f"{seed}", "--operations", f"{operations}"]
            code, said = bench.run([*words, patch.name], SECONDS * operations / OPERATIONS)
            if code != 0:
                raise RuntimeError(f"{patch.name}, seed {seed}: the hunt ended with {code}")
            yield Hunt(**json.loads(said.splitlines()[-1]))


def row(patch: Patch, found: Sequence[Hunt]) -> list[str]:
    """What a table says of a patch."""
    counts = sorted(hunt.operations for hunt in found if hunt.operations is not None)
    layouts = dict.fromkeys(hunt.layout for hunt in found if hunt.operations is not None)
    return [
        patch.name,
        f"{len(counts)} of {len(found)}",
        f"{statistics.median(counts):.0f}" if counts else "",
        f"{counts[-1]}" if counts else "",
        " ".join(layouts),
        patch.fault,
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(list(PATCHES)))
@click.option("--seeds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--operations", type=click.IntRange(1), default=OPERATIONS, show_default=True)
@click.option("--hunt", "only", type=int, help="This seed in this tree, as JSON.")
def main(names: tuple[str, ...], seeds: int, operations: int, only: int | None) -> None:
    """Put faults back, one at a time, and see which seeds find them."""
    patches = [PATCHES[name] for name in names or PATCHES]
    if only is not None:
        for patch in patches:
            found = hunt(only, patch.layouts or tuple(LAYOUTS), operations)
            click.echo(json.dumps(dataclasses.asdict(found)))
        return
    table = Table("patch", "seeds", "median", "most", "layouts", "fault")
    lost = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for patch in patches:
            found = []
            for result in hunts(bench, patch, range(seeds), operations):
                found.append(result)
                click.echo(f"{patch.name}: {result.seed} {result.layout} {result.operations}")
            table.add_row(*row(patch, found))
            if all(result.operations is None for result in found):
                lost.append(patch.name)
    Console().print(table)
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
