"""Launchers for clusters: configs are what accelerate and Kubernetes read; commands are whole.

No scheduler runs here: the commands that a script or a pod would start are recorded by stand-ins on
the PATH, and their flags are parsed by torchrun's and launch/train.py's own parsers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
RECORDING = '#!/bin/sh\nfor word in "$@"; do echo "$word"; done >"$RECORD"\n'


@pytest.fixture
def recorded(tmp_path: Path) -> Any:
    """Runs a command in a folder with the repository's layout; returns torchrun's words."""
    tools = tmp_path / "tools"
    tools.mkdir()
    place = tmp_path / "workspace"
    (place / "launch").mkdir(parents=True)
    for name, code in (
        ("torchrun", RECORDING),
        ("srun", RECORDING),
        ("scontrol", "#!/bin/sh\necho first\necho second\n"),
    ):
        (tools / name).write_text(code)
        (tools / name).chmod(0o755)
    (place / "launch/nodes.sh").symlink_to(LAUNCH / "nodes.sh")

    def run(*command: str, **variables: str) -> list[str]:
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "RECORD": str(tmp_path / "words"),
            **variables,
        }
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return (tmp_path / "words").read_text().splitlines()

    run.place = place  # type: ignore[attr-defined]
    return run


PARSER = """
import json, sys
sys.path.insert(0, "launch")
import train
for line in sys.stdin:
    context = train.main.make_context("train", json.loads(line))
    print(json.dumps(context.params, default=str), flush=True)
"""
Check = Callable[[list[str], int, str], dict[str, Any]]


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    """Whether torchrun accepts words, and train.py what is for it; returns the latter's flags."""
    command = [sys.executable, "-c", PARSER]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parser:

        def checked(words: list[str], nodes: int, endpoint: str) -> dict[str, Any]:
            given = get_args_parser().parse_args(words)
            got = given.nnodes, given.rdzv_backend, given.rdzv_endpoint
            assert got == (str(nodes), "c10d", endpoint)
            assert (given.training_script, bool(given.rdzv_id)) == ("launch/train.py", True)
            assert parser.stdin is not None
            assert parser.stdout is not None
            print(json.dumps(given.training_script_args), file=parser.stdin, flush=True)
            found: dict[str, Any] = json.loads(parser.stdout.readline())
            assert (found["backend"], found["replicas"]) == ("hsdp", nodes)
            return found

        yield checked


def test_a_slurm_job_starts_torchrun_on_each_node_and_resumes(recorded: Any, check: Check) -> None:
    variables = {
        "SLURM_SUBMIT_DIR": str(recorded.place),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    script = LAUNCH / "slurm.sh"
    words = recorded("bash", str(script), "--bf16", **variables)
    assert words[0] == ".venv/bin/torchrun"
    assert check(words[1:], 2, "first:20042")["resume"] in (None, False)
    (recorded.place / "runs/42/average/step-00000010").mkdir(parents=True)
    words = recorded("bash", str(script), **variables)
    assert "--resume" in words
    options = [line.split()[1] for line in script.read_text().splitlines() if "#SBATCH" in line]
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8"} <= set(options)


def test_nodes_without_a_scheduler_meet_at_one_of_them(recorded: Any, check: Check) -> None:
    words = recorded("bash", "launch/nodes.sh", "host7", "2", "--out", "/shared/one", GPUS="4")
    assert check(words, 2, "host7:29400")["out"] == "/shared/one"


def pods(manifest: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(how many, spec) of each kind of pod in a manifest, checked on the way there."""
    assert {"apiVersion", "kind", "metadata", "spec"} == manifest.keys()
    spec = manifest["spec"]
    if manifest["kind"] == "JobSet":
        assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        jobs = [(job["replicas"], job["template"]["spec"]) for job in spec["replicatedJobs"]]
        assert all(job["parallelism"] == job["completions"] for _, job in jobs)
        return [(count * job["completions"], job["template"]["spec"]) for count, job in jobs]
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    kinds = spec["pytorchReplicaSpecs"]
    assert (kinds.keys(), kinds["Master"]["replicas"]) == ({"Master", "Worker"}, 1)
    return [(kind["replicas"], kind["template"]["spec"]) for kind in kinds.values()]


@pytest.mark.parametrize("name", ["jobset", "pytorchjob"])
def test_a_manifest_of_kubernetes_is_whole(name: str, recorded: Any, check: Check) -> None:
    manifest = yaml.safe_load((LAUNCH / f"kubernetes/{name}.yaml").read_text())
    found = pods(manifest)
    nodes = sum(count for count, _ in found)
    for _, pod in found:
        (container,) = pod["containers"]
        if name == "pytorchjob":
            assert container["name"] == "pytorch"
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
        places = [mount["mountPath"] for mount in container["volumeMounts"]]
        words = recorded(*container["command"], *container["args"], MASTER_ADDR="shardema-master-0")
        host = "shardema-master-0" if name == "pytorchjob" else "shardema-node-0-0.shardema"
        flags = check(words, nodes, f"{host}:29400")
        assert "--resume" not in words
        assert any(flags["out"].startswith(f"{place}/") for place in places)
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert words[words.index("--nproc_per_node") + 1] == str(gpus)
        assert 29400 in [port["containerPort"] for port in container["ports"]]
    if name == "jobset":  # <set>-<job>-<index of the job>-<index of the pod>.<subdomain>
        job, network = manifest["spec"]["replicatedJobs"][0], manifest["spec"]["network"]
        set_ = manifest["metadata"]["name"]
        assert host == f"{set_}-{job['name']}-0-0.{network['subdomain']}"
        assert network["enableDNSHostnames"]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("accelerate/*.yaml")), ids=lambda p: p.stem)
def test_a_config_of_accelerate_is_one(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    flags = {action.dest for action in launch_command_parser()._actions}
    fsdp, zero = config.fsdp_config or {}, config.deepspeed_config or {}
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    assert (bool(fsdp), bool(zero)) == (kind == "FSDP", kind == "DEEPSPEED")
    assert set(fsdp) <= flags
    assert set(zero) <= flags
    if fsdp:
        assert path.stem == f"fsdp{fsdp['fsdp_version']}"
    if zero:
        assert path.stem.startswith(f"zero{zero['zero_stage']}")


def test_every_script_of_the_shell_can_be_parsed() -> None:
    for path in LAUNCH.glob("*.sh"):
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), path
