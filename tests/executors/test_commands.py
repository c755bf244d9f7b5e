"""A cluster whose workers die writes the bytes that the commands write alone."""

import argparse
import sys
from pathlib import Path

import pytest
import webdataset
from data_cases import encode, make_image, write_shards
from embedded import SIDE, toy_encoders
from fake_cluster import FakeCluster

from clip_jax import api
from clip_jax.errors import UserError
from clip_jax.evaluation import feature_store
from clip_jax.tools import data_filter, data_shard, embed, evaluate, executor_flags


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def dying(*calls, how="before"):
    """A cluster of three workers, of which some die at their calls."""
    return FakeCluster(3, lambda method, args, n: how if n in calls else "", seed=len(calls))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five shards, among their samples two that cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder, [30, 23, 11], side=SIDE)
    with webdataset.TarWriter(str(folder / "s-00009.tar")) as writer:
        writer.write({"__key__": "x0", "png": b"no image", "txt": "broken"})
        writer.write({"__key__": "x1", "png": encode(make_image("RGB", 15, 12), "PNG")})
    return str(folder)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(api, "load_encoders", lambda model, **options: toy_encoders())
    monkeypatch.setattr(data_filter, "PART_ROWS", 16)


@pytest.fixture
def cluster_of(monkeypatch):
    """Set the executor that `--executor ray` gives."""

    def use(cluster):
        def joined(address, **options):
            cluster.address, cluster.options = address, options
            return cluster

        monkeypatch.setattr("clip_jax.executors.ray_executor.RayExecutor", joined)
        return cluster

    return use


def run_embed(data, out, *flags):
    sizes = ["--batch-size", "8", "--part-size", "16"]
    return embed.main(["--model", "toy", "--data", data, "--out", str(out), *sizes, *flags])


def test_embed_alone_and_on_a_cluster_write_the_same(data, toys, cluster_of, tmp_path, capsys):
    assert run_embed(data, tmp_path / "alone") == 0
    cluster = cluster_of(dying(2, 5, 6))
    assert run_embed(data, tmp_path / "many", "--executor", "ray", "--address", "head:6379") == 0
    assert files(tmp_path / "many") == files(tmp_path / "alone")
    assert cluster.closed and cluster.address == "head:6379" and cluster.started == 6
    out = capsys.readouterr().out.replace("/many", "/alone").splitlines()
    assert out[0] == out[1] and "5 of 5 parts made" in out[0]


def test_embed_goes_on_where_either_was_stopped(data, toys, cluster_of, tmp_path):
    run_embed(data, tmp_path / "alone")

    def interrupt(method, args, n):
        if args == (3,):
            raise KeyboardInterrupt
        return ""

    cluster = cluster_of(FakeCluster(2, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_embed(data, tmp_path / "many", "--executor", "ray")
    assert cluster.closed and cluster.started == cluster.stopped
    assert run_embed(data, tmp_path / "many", "--part-of", "1/3") == 0
    cluster = cluster_of(dying(1, how="after"))
    assert run_embed(data, tmp_path / "many", "--executor", "ray", "--actors", "2") == 0
    assert files(tmp_path / "many") == files(tmp_path / "alone") and cluster.made < 5


def test_filter_alone_and_on_a_cluster_write_the_same(
    data, toys, cluster_of, tmp_path, capsys, monkeypatch
):
    def run(out, *flags):
        flags = ["--model", "toy", "--out", str(out), "--batch-size", "8", "--top", "0.5", *flags]
        monkeypatch.setattr("sys.argv", ["filter", data, *flags, "--per-shard", "9"])
        return data_filter.main()

    assert run(tmp_path / "alone") == 0
    cluster = cluster_of(dying(2, 3, 9, 12))
    assert run(tmp_path / "many", "--executor", "ray") == 0
    assert files(tmp_path / "many") == files(tmp_path / "alone")
    assert cluster.started == cluster.stopped > 6
    out = capsys.readouterr().out.replace("/many", "/alone")
    half = len(out) // 2
    assert out[:half] == out[half:] and "kept" in out


def test_evaluate_alone_and_on_a_cluster_write_the_same(
    data, toys, cluster_of, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(feature_store, "PART_ROWS", 16)

    def run(name, *flags):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        tasks = ["--task", "zeroshot_retrieval,knn", "--neighbors", "3"]
        flags = ["--batch-size", "8", *tasks, *flags]
        train = str(Path(data) / "s-00001.tar")
        return evaluate.main(["--model", "toy", "--data", data, "--train-data", train, *flags])

    assert run("alone") == 0
    cluster = cluster_of(dying(2, 3))
    assert run("many", "--executor", "ray") == 0
    wrong = {
        name
        for name, content in files(tmp_path / "alone").items()
        if files(tmp_path / "many")[name] != content
    }
    assert wrong == set() and files(tmp_path / "alone").keys() == files(tmp_path / "many").keys()
    assert cluster.made >= 5 + 2 and cluster.started == cluster.stopped
    made = cluster.made
    out = capsys.readouterr().out.split("evaluation in")
    assert out[1].partition(":")[2] == out[2].partition(":")[2]
    cluster_of(cluster)
    assert run("again", "--executor", "ray", "--out", str(tmp_path / "many/eval-toy")) == 0
    assert cluster.made == made  # nothing is encoded twice


@pytest.mark.parametrize("how", ["before", "after"])
def test_shard_alone_and_on_a_cluster_write_the_same(data, tmp_path, how):
    options = {"per_shard": 7, "resize": 10}
    alone = data_shard.shard([data], tmp_path / "alone", **options)
    many = data_shard.shard([data], tmp_path / "many", executor=dying(1, 4, 8, how=how), **options)
    assert files(tmp_path / "many") == files(tmp_path / "alone")
    texts = [data_shard.result_text(result) for result in (alone, many)]
    assert texts[0] == texts[1].replace("/many", "/alone")
    (tmp_path / "many" / "00004.tar").unlink()
    again = FakeCluster(3)
    data_shard.shard([data], tmp_path / "many", executor=again, **options)
    assert again.made == 1 and files(tmp_path / "many") == files(tmp_path / "alone")


def test_workers_that_see_another_folder_or_other_data_are_refused(data, tmp_path, monkeypatch):
    real = data_shard.claim_shard_folder
    monkeypatch.setattr(
        data_shard,
        "claim_shard_folder",
        lambda shard_set, options, write=True: write and real(shard_set, options),
    )
    with pytest.raises(UserError, match="is not there: --out must lie on a file system"):
        data_shard.shard([data], tmp_path / "many", executor=FakeCluster(2))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--actors", "2"], "--actors goes with --executor ray"),
        (["--num-gpus", "0"], "--num-gpus goes with --executor ray"),
        (["--executor", "ray", "--actors", "0"], "--actors is 0; it takes 1 or more"),
        (["--executor", "ray", "--num-cpus", "-1"], "--num-cpus and --num-gpus take 0 or more"),
        (["--executor", "ray", "--num-gpus", "-1"], "--num-cpus and --num-gpus take 0 or more"),
    ],
)
def test_wrong_flags_are_one_line(flags, line):
    parser = argparse.ArgumentParser()
    executor_flags.add_executor_flags(parser)
    args = parser.parse_args(flags)
    with (
        pytest.raises(UserError, match=line),
        executor_flags.executor_of(executor_flags.pop_executor_flags(args)),
    ):
        pass
    assert not vars(args)


def test_part_of_and_an_executor_exclude_each_other(data, tmp_path):
    with pytest.raises(UserError, match="--part-of shares parts out by hand"):
        run_embed(data, tmp_path / "out", "--executor", "ray", "--part-of", "0/2")


def test_without_ray_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    from clip_jax.executors.ray_executor import RayExecutor

    with pytest.raises(UserError, match=r"--executor ray needs Ray: pip install '.*\[ray\]'"):
        RayExecutor("auto", actors=None, num_cpus=1, num_gpus=None)
