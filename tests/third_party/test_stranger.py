"""A stranger's package works with the wheel of Quire, in an environment without the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

ROOT = Path(__file__).parents[2]
EXAMPLE = Path(__file__).parent / "quire-example"
PROMPT = "one two three four five six seven eight nine ten one two"
WORDS = ["<unk>", "<end>", *dict.fromkeys(PROMPT.split())]
CONFIG = {
    "architectures": ["ExampleForCausalLM"],
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


class Environment:
    """A virtual environment that borrows what is installed here, but for Quire."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=importlib.util.find_spec("pip") is None)
        self.python = folder / "bin/python"
        [packages] = folder.glob("lib/python*/site-packages")
        installed = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        # Folders named in a .pth file are searched, but .pth files in them are not read: an
        # editable Quire of this environment leaves its metadata there and nothing to import.
        (packages / "borrowed.pth").write_text("\n".join(installed))

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, far from the checkout."""
        hidden = ("PYTHONPATH", "VIRTUAL_ENV")
        done = subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            env={name: value for name, value in os.environ.items() if name not in hidden},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def install(self, *what: Path) -> None:
        """Install folders or wheels without an index."""
        offline = ["--no-deps", "--no-index", "--no-build-isolation"]
        # Never touch what is borrowed, and compile only what is imported.
        alone = ["--ignore-installed", "--no-compile"]
        self.run("python", "-m", "pip", "install", *offline, *alone, *map(str, what))


def build(source: Path, target: str, folder: Path) -> Path:
    """Build a wheel or an sdist of a source tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build Quire's wheel."""
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Install Quire's wheel and the example into a fresh environment."""
    made = Environment(tmp_path_factory.mktemp("stranger"))
    source = tmp_path_factory.mktemp("source") / "quire-example"
    shutil.copytree(EXAMPLE, source)
    made.install(wheel, source)
    return made


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny random checkpoint of the example's architecture."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_weights(), folder / "model.safetensors")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def random_weights() -> dict[str, np.ndarray]:
    """Return float32 tensors with the names that the example's model gives them."""
    random = np.random.default_rng(0)
    hidden, size, kv_size = 32, 48, 16
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.weight": (len(WORDS), hidden),
        "head.weight": (len(WORDS), hidden),
        "norm": (hidden,),
    }
    layer = {
        "norm": (hidden,),
        "attention_gate": (hidden,),
        "mlp_gate": (hidden,),
        "q_proj.weight": (hidden, hidden),
        "k_proj.weight": (kv_size, hidden),
        "v_proj.weight": (kv_size, hidden),
        "o_proj.weight": (hidden, hidden),
        "up_proj.weight": (size, hidden),
        "down_proj.weight": (hidden, size),
    }
    for index in range(CONFIG["num_hidden_layers"]):
        shapes.update({f"layers.{index}.{name}": shape for name, shape in layer.items()})
    return {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def generate(environment: Environment, checkpoint: Path, *options: str) -> dict[str, Any]:
    """Run `quire generate` greedily and return what it prints as JSON."""
    greedy = ["-p", PROMPT, "--max-tokens", "24", "--temperature", "0", "--ignore-eos", "--json"]
    done = environment.run("quire", "generate", str(checkpoint), *greedy, *options)
    return json.loads(done.stdout)


def test_wheel_holds_every_package_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = ["core", "csrc", *(f"plugins/{kind}" for kind in os.listdir(ROOT / "plugins"))]
    expected = {
        path.relative_to(ROOT / folder).as_posix()
        for folder in folders
        for package in (ROOT / folder).glob("quire*")
        for path in package.rglob("*")
        if path.is_file() and not {"__pycache__", ".ruff_cache"} & set(path.parts)
    }

    assert expected - names == set()
    assert {name.split("/")[0] for name in names} == {
        *("quire", "quire_kernels", "quire_attention", "quire_models", "quire_quant"),
        *("quire_sampling", "quire_parsers", "quire_grammar", "quire-0.1.0.dist-info"),
    }


def test_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    for name in ("sdist", "source", "wheel"):
        (tmp_path / name).mkdir()
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "source", filter="data")

    source = tmp_path / "source/quire-0.1.0"
    rebuilt = build(source, "wheel", tmp_path / "wheel")

    assert zipfile.ZipFile(rebuilt).namelist() == zipfile.ZipFile(wheel).namelist()
    assert {"tests", "docs", "LICENSE", "README.md"} <= set(
        os.listdir(tmp_path / "source/quire-0.1.0")
    )


def test_stranger_gets_quire_from_the_wheel(environment: Environment) -> None:
    where = "import quire, quire_kernels; print(quire.__file__, quire_kernels.__file__)"

    paths = environment.run("python", "-c", where).stdout.split()

    assert all(Path(path).is_relative_to(environment.folder) for path in paths), paths


def test_stranger_is_listed_with_its_distribution(environment: Environment) -> None:
    rows = json.loads(environment.run("quire", "plugins", "--json").stdout)

    [backend] = [r for r in rows if (r["kind"], r["name"]) == ("attention", "example")]
    [model] = [r for r in rows if (r["kind"], r["name"]) == ("model", "example")]
    for row in (backend, model):
        assert row["plugin"] == "example"
        assert (row["distribution"], row["version"]) == ("quire-example", "0.1.0")
        assert (row["api_version"], row["usable"], row["why_unusable"]) == ("1.0", True, None)
    assert {r["distribution"] for r in rows} == {"quire", "quire-example"}


def test_stranger_proves_its_backend_with_the_kit(environment: Environment, tmp_path: Path) -> None:
    tests = shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")

    done = environment.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))
    checked = [
        environment.run("quire", "plugins", "check", "example", "--kind", kind).stdout
        for kind in ("attention", "model")
    ]

    assert re.search(r"^\d+ passed, \d skipped", done.stdout, re.MULTILINE), done.stdout
    assert all("example: passed (quick on cpu, seed 0; " in stdout for stdout in checked)


@pytest.mark.parametrize("method", [pytest.param("gptq", marks=pytest.mark.slow), "awq"])
def test_stranger_has_its_model_quantized(
    environment: Environment, checkpoint: Path, tmp_path: Path, method: str
) -> None:
    """Though its layers are not like those of any model of Quire's own."""
    text = tmp_path / "text.txt"
    text.write_text(f"{PROMPT} " * 40)
    given = [
        "--method",
        method,
        "--group-size",
        "16",
        "--calibration",
        str(text),
        "--seq-len",
        "64",
    ]

    done = environment.run(
        "quire", "quantize", str(checkpoint), *given, "--output", str(tmp_path / "out")
    )

    errors = re.findall(r"layers\.(\d)\.(\w+): error ([\d.]+)%", done.stderr)
    assert [(layer, name) for layer, name, _ in errors] == [
        (str(layer), name)
        for layer in range(3)
        for name in ("qkv_proj", "o_proj", "up_proj", "down_proj")
    ]
    assert all(0 < float(error) < 15 for _, _, error in errors)
    [answer] = generate(environment, tmp_path / "out")["outputs"]
    assert len(answer["token_ids"]) == 24


def test_stranger_sees_its_backend_in_the_benchmark(environment: Environment) -> None:
    rows = bench(environment, "example,reference", "--attention-option", "example.tile=5")

    assert [(row["backend"], row["verdict"]) for row in rows] == [
        *(("example", "right"), ("reference", "right")) * 2,
    ]


def bench(environment: Environment, backends: str, *options: str) -> list[dict[str, Any]]:
    """Run `quire bench attention` on tiny shapes and return its rows."""
    sizes = ["--shapes", "decode:2x20,chunk:3@9", "--heads", "2/1", "--head-dim", "16"]
    common = ["--backends", backends, "--num-threads", "1", "--device", "cpu", "--json"]
    done = environment.run("quire", "bench", "attention", *sizes, *common, *options)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


SAVED = re.compile(r"^<!-- saved as: (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def follower(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Install Quire's wheel, and the package that a reader of the document has at its end."""
    folder = tmp_path_factory.mktemp("mine")
    page = (ROOT / "docs/write-an-attention-backend.md").read_text()
    for name, text in SAVED.findall(page):
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("a") as file:
            file.write(text + "\n")
    made = Environment(tmp_path_factory.mktemp("follower"))
    made.install(wheel, folder)
    return made


def test_follower_of_the_document_has_a_kernel_in_the_benchmark(follower: Environment) -> None:
    rows = bench(follower, "mine,reference")

    assert [(row["backend"], row["verdict"]) for row in rows] == [
        *(("mine", "right"), ("reference", "right")) * 2,
    ]


@pytest.mark.slow
def test_follower_of_the_document_serves_with_the_kernel(follower: Environment) -> None:
    common = ["-p", "A latte", "--max-tokens", "2", "--temperature", "0", "--json"]
    answers = [
        json.loads(follower.run("quire", "generate", "demo", *common, *options).stdout)
        for options in (["--attention-backend", "mine"], ["--attention-backend", "reference"])
    ]

    assert answers[0]["outputs"][0]["token_ids"] == answers[1]["outputs"][0]["token_ids"]


def test_stranger_generates_with_its_own_model_and_backend(
    environment: Environment, checkpoint: Path
) -> None:
    own = generate(environment, checkpoint, "--attention-backend", "example")
    tiled = generate(
        environment,
        checkpoint,
        *("--attention-backend", "example", "--attention-option", "example.tile=3"),
        *("--block-size", "4", "--max-num-batched-tokens", "8"),
    )
    reference = generate(environment, checkpoint, "--attention-backend", "reference")

    tokens = own["outputs"][0]["token_ids"]
    assert len(tokens) == 24
    assert len(set(tokens)) > 3, "a model that repeats itself would prove little"
    assert own["outputs"] == tiled["outputs"] == reference["outputs"]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (
            ["--attention-option", "example.tile=0"],
            "--attention-option example.tile=0: 0 tokens are no tile; allowed: whole numbers",
        ),
        (["--kv-cache-dtype", "float16"], "cannot be used: it does not know a KV cache of float16"),
        (["--disable-plugin", "example"], "no installed plugin builds ExampleForCausalLM."),
    ],
)
def test_stranger_is_refused_in_its_own_words(
    environment: Environment, checkpoint: Path, options: list[str], fact: str
) -> None:
    command = ["generate", str(checkpoint), "-p", "one", "--attention-backend", "example"]

    done = environment.run("quire", *command, *options, check=False)

    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert fact in done.stderr
