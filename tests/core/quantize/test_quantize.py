"""`quire quantize` on a tiny Llama: what it writes is served, stops and goes on, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_model import write_model
from torch import Tensor

from quire.cli.main import INTERRUPTED, main
from quire.execution.checkpoint import Checkpoint
from quire.quantize.folder import STATE_FILE, OutputFolder, locked

# The arguments of each method, and the plugin that serves what it writes.
METHODS: dict[str, tuple[list[str], str]] = {
    "gptq": (["--group-size", "32"], "gptq"),
    "gptq, act order, zero points": (
        ["--group-size", "32", "--act-order", "--no-symmetric", "--damping", "0.05"],
        "gptq",
    ),
    "gptq, 8 bits, whole rows": (["--bits", "8", "--group-size", "-1"], "gptq"),
    "awq": (["--group-size", "32"], "awq"),
    "fp8": ([], "fp8"),
    "int8": ([], "int8"),
    "int4": (["--group-size", "16"], "pack-quantized"),
    "int4, zero points": (["--group-size", "32", "--no-symmetric"], "pack-quantized"),
}
CALIBRATED = ("gptq", "awq")


def quantize(model: Path, output: Path, case: str, calibration: Path | None) -> int:
    method = case.partition(",")[0]
    given = METHODS[case][0] if case in METHODS else []
    if method in CALIBRATED and calibration is not None:
        given = [*given, "--calibration", str(calibration)]
    arguments = ["--method", method, "--output", str(output), "--device", "cpu", *given]
    return main(["quantize", str(model), *arguments, "--num-threads", "1"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("case", METHODS)
def test_what_is_written_is_served_and_near_the_model(
    model: Path, calibration: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, tmp_path / "out", case, calibration) == 0

    told = capsys.readouterr()
    engine = tiny_llama.make_engine(tmp_path / "out")
    assert engine.prepared.quantization.name == METHODS[case][1]
    requests = [tiny_llama.request(i, tiny_llama.prompt(i, 20)) for i in range(3)]
    found, _ = tiny_llama.run_all(engine, requests)
    assert [len(tokens) for tokens in found.values()] == [12, 12, 12]
    assert told.err.count("_proj: error ") == 12  # qkv, o, gate_up, down of three blocks
    worst = float(told.out.split(" at most ")[0].rpartition(" ")[2].rstrip("%"))
    assert 0 < worst < (3 if "8" in case else 25)


@pytest.mark.parametrize("case", ["gptq", "awq", "int8"])
def test_folder_is_a_whole_checkpoint(
    model: Path, calibration: Path, tmp_path: Path, case: str
) -> None:
    assert quantize(model, tmp_path / "out", case, calibration) == 0

    written, given = Checkpoint.open(tmp_path / "out"), Checkpoint.open(model)
    config = json.loads((tmp_path / "out/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    assert quantization["quant_method"] in (case, "compressed-tensors")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.num_bytes < given.num_bytes
    plain = {name for name in given.tensors if "_proj" not in name}
    assert plain <= set(written.tensors)
    assert not any(name.endswith("_proj.weight") for name in written.tensors) or case == "int8"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert STATE_FILE not in names
    assert not any(name.endswith(".partial") for name in names)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return what lets Ctrl-C come once so many shards are written."""

    def stop(count: int) -> None:
        write, left = OutputFolder.write_shard, [count]

        def interrupted(self: OutputFolder, *arguments: Any) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(self, *arguments)

        monkeypatch.setattr(OutputFolder, "write_shard", interrupted)

    return stop


@pytest.mark.parametrize("case", ["gptq", "awq", "fp8"])
@pytest.mark.parametrize("num_done", [0, 2, 3])
def test_interrupted_run_goes_on_to_the_same_bytes(
    model: Path,
    calibration: Path,
    tmp_path: Path,
    case: str,
    num_done: int,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert quantize(model, tmp_path / "whole", case, calibration) == 0
    stop_after(num_done)
    assert quantize(model, tmp_path / "parts", case, calibration) == INTERRUPTED
    shards = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) == num_done
    kept = {shard: shard.stat().st_mtime_ns for shard in shards}
    monkeypatch.undo()

    assert quantize(model, tmp_path / "parts", case, calibration) == 0

    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert {shard: shard.stat().st_mtime_ns for shard in shards} == kept


def test_damaged_shard_of_an_interrupted_run_is_made_again(
    model: Path,
    calibration: Path,
    tmp_path: Path,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert quantize(model, tmp_path / "whole", "gptq", calibration) == 0
    stop_after(2)
    quantize(model, tmp_path / "parts", "gptq", calibration)
    first = sorted((tmp_path / "parts").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-8] + b"damaged!")
    (tmp_path / "parts/model-00003-of-00004.safetensors.partial").write_text("half")
    monkeypatch.undo()

    assert quantize(model, tmp_path / "parts", "gptq", calibration) == 0

    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_other_settings_for_an_interrupted_run_are_refused_by_name(
    model: Path,
    calibration: Path,
    tmp_path: Path,
    stop_after: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(1)
    quantize(model, tmp_path / "out", "gptq", calibration)
    capsys.readouterr()

    assert quantize(model, tmp_path / "out", "fp8", None) == 2

    words = capsys.readouterr().err
    assert "was begun with other settings: " in words
    assert "method was 'gptq' and is 'fp8'" in words


def test_folder_with_other_content_is_refused_and_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    assert quantize(model, tmp_path, "int8", None) == 2

    assert "is not empty (notes.txt); name an empty or new folder" in capsys.readouterr().err
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_output_that_is_a_file_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")

    assert quantize(model, tmp_path / "out", "int8", None) == 2

    assert "out is a file; name a folder." in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("where", ["/proc/out", "/dev/null/out"])
def test_folder_that_cannot_be_made_is_refused(
    model: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, Path(where), "int8", None) == 2

    assert f"--output {where} cannot be written" in capsys.readouterr().err


def test_files_that_cannot_be_written_are_a_sentence(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)

    assert quantize(model, tmp_path / "out", "int8", None) == 2

    assert "cannot be written ([Errno 28] No space left" in capsys.readouterr().err


def test_few_tokens_to_calibrate_with_are_a_warning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello")

    assert quantize(model, tmp_path / "out", "gptq", tmp_path / "a.txt") == 0

    assert "tokens to calibrate with are too few" in capsys.readouterr().err


def test_mixtures_are_refused_by_the_name_of_their_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2}
    transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).save_pretrained(tmp_path / "moe")

    assert quantize(tmp_path / "moe", tmp_path / "out", "int8", None) == 2

    assert "does not quantize experts, such as 'model.layers.0" in capsys.readouterr().err


def test_folder_that_another_process_writes_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "out"):
        assert quantize(model, tmp_path / "out", "int8", None) == 2

    assert "another `quire quantize` writes into it" in capsys.readouterr().err
    assert quantize(model, tmp_path / "out", "int8", None) == 0


def test_finished_folder_is_not_written_again(model: Path, tmp_path: Path) -> None:
    assert quantize(model, tmp_path / "out", "int8", None) == 0
    before = files_of(tmp_path / "out")

    assert quantize(model, tmp_path / "out", "int8", None) == 2

    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_stay_as_they_are(tmp_path: Path, tied: bool) -> None:
    model = write_model(tmp_path / "plain", tie_word_embeddings=tied)

    assert quantize(model, tmp_path / "out", "fp8", None) == 0

    given = load_file(model / "model.safetensors")
    last = load_file(sorted((tmp_path / "out").glob("*.safetensors"))[-1])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(last[name], given[name])
    assert tiny_llama.make_engine(tmp_path / "out").prepared.quantization.name == "fp8"


def with_biases(model: Path, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """Give some projections of a model a bias, and return its tensors."""
    tensors = load_file(model / "model.safetensors")
    for name in [n for n in tensors if n.endswith(tuple(f"{e}.weight" for e in endings))]:
        generator = torch.Generator().manual_seed(len(name))
        bias = torch.randn(tensors[name].shape[0], generator=generator)
        tensors[name.removesuffix("weight") + "bias"] = bias
    save_file(tensors, model / "model.safetensors")
    return tensors


KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "qwen2, bias of q, k and v": (
        {"architectures": ["Qwen2ForCausalLM"]},
        ("q_proj", "k_proj", "v_proj"),
    ),
    "llama, biases everywhere": (
        {"attention_bias": True, "mlp_bias": True},
        ("_proj",),
    ),
    "mistral with a window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, ()),
    "a value head for each": ({"num_key_value_heads": 4}, ()),
}


# How much is left of the logits, as a cosine: weights this large let errors grow from block to
# block, but of nonsense nothing would be left.
NEAR = {"gptq, 8 bits, whole rows": 0.97, "awq": 0.6, "int8": 0.97}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", NEAR)
def test_models_of_every_kind_keep_their_biases_and_much_of_their_logits(
    tmp_path: Path, calibration: Path, kind: str, case: str
) -> None:
    keys, endings = KINDS[kind]
    model = write_model(tmp_path / "plain", **keys)
    given = with_biases(model, endings)

    assert quantize(model, tmp_path / "out", case, calibration) == 0

    written: dict[str, Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(shard)
    biases = [name for name in given if name.endswith(".bias")]
    assert len(biases) == 3 * len(endings) * (7 if endings == ("_proj",) else 1)
    assert all(torch.equal(written[name], given[name]) for name in biases)
    ids = tiny_llama.prompt(5, 40)
    true, found = (logits_of(folder, ids) for folder in (model, tmp_path / "out"))
    assert torch.cosine_similarity(true.flatten(), found.flatten(), dim=0) > NEAR[case]


def logits_of(folder: Path, ids: list[int]) -> Tensor:
    """Return the logits that the engine makes of a prompt."""
    from quire import LLM
    from quire.benchmark import quality

    llm = LLM(str(folder), device="cpu", attention_backend="sdpa", num_threads=1)
    return quality.logits_of(llm, ids)


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown method": (
        ["--method", "gtpq"],
        "--method is 'gtpq'; installed methods that write checkpoints: awq, fp8, gptq, int4, int8. "
        "Did you mean 'gptq'?",
    ),
    "method that writes nothing": (["--method", "none"], "--method is 'none'; installed methods"),
    "no calibration": (["--method", "gptq"], "has no calibration.jsonl; give --calibration FILE"),
    "missing calibration": (
        ["--method", "gptq", "--calibration", "no-such-file.jsonl"],
        "--calibration no-such-file.jsonl cannot be read",
    ),
    "needless calibration": (
        ["--method", "int8", "--calibration", "x.txt"],
        "--method int8 is not calibrated; leave it out",
    ),
    "option that is not taken": (
        ["--method", "fp8", "--bits", "4"],
        "--method fp8 does not take --bits; it takes: none.",
    ),
    "bits": (["--method", "int4", "--bits", "3"], "--bits is 3; --method int4 writes 4."),
    "group size": (
        ["--method", "int4", "--group-size", "12"],
        "--group-size is 12; allowed: -1 or",
    ),
    "groups that do not fit": (
        ["--method", "int4", "--group-size", "64"],
        "--method int4 cannot quantize 'model.layers.0.mlp.down_proj': its inputs must be a "
        "multiple of 64; 96 is not, 64 or 128 would do. Other sizes: --group-size.",
    ),
    "symmetric awq": (
        ["--method", "awq", "--symmetric", "--calibration", __file__],
        "--method awq writes zero points",
    ),
    "damping": (
        ["--method", "gptq", "--damping", "3", "--calibration", __file__],
        "--damping is 3.0; allowed: above 0, up to 1.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = REFUSED[case]

    code = main(["quantize", str(model), *arguments, "--output", str(tmp_path / "out")])

    assert code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "good"}\n{"txt": "bad"}\n', "line 2: neither a list `messages` nor"),
        ("a.jsonl", '{"text": "good"}\nnot JSON\n', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: a list where an object is wanted"),
        ("a.jsonl", '{"messages": [{"role": 3}]}\n', "line 1: "),
        ("a.txt", " \n", "it has no tokens"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused_by_its_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | bytes,
    words: str,
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())

    assert quantize(model, tmp_path / "out", "gptq", file) == 2

    told = capsys.readouterr().err
    assert f"--calibration {file}" in told
    assert words in told


def test_quantized_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(model, tmp_path / "once", "int8", None)

    assert quantize(tmp_path / "once", tmp_path / "twice", "fp8", None) == 2

    assert "is quantized already" in capsys.readouterr().err


def test_weight_that_is_not_finite_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "plain")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][90, 60] = float("nan")
    save_file(tensors, model / "model.safetensors")

    assert quantize(model, tmp_path / "out", "int8", None) == 2

    assert "'model.layers.1.mlp.up_proj.weight' holds NaN" in capsys.readouterr().err
