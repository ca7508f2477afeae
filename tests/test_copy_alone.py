"""Each method file works alone: copied into an empty folder, it runs its demo and adapts any model.

Run as a script, this file is the process that runs the demos: it imports torch once and forks.
"""

import ast
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = Path(__file__).resolve().parents[1] / "minipeft"
FILES = {
    file.name: file
    for file in [PACKAGE / "gpt.py", *sorted((PACKAGE / "methods").glob("[!_]*.py"))]
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
LORA_CONFIG = SimpleNamespace(**LORA, lora_dropout=0.0, use_rslora=False)
NAMES = ["0", "2", "c_attn", "mlp.c_proj", "q_proj", "down_proj"]  # here, in GPT-2, in Llama
SUCCESSOR = SimpleNamespace(**vars(LORA_CONFIG) | {"target_modules": NAMES})
ADALORA = {"init_r": 2, "target_r": 1, "total_step": 9, "target_modules": "all-linear"}
WEIGHT_METHODS: dict[str, Callable[[ModuleType, nn.Module], object]] = {
    "lora": lambda m, model: m.add_lora(model, m.LoraConfig(**LORA)),
    "adalora": lambda m, model: m.add_adalora(model, m.AdaLoraConfig(**ADALORA)),
    "qlora": lambda m, model: m.add_qlora(m.quantize_model(model), LORA_CONFIG),
    "bitfit": lambda m, model: m.add_bitfit(model, m.BitFitConfig()),
    "bottleneck": lambda m, model: m.add_bottleneck(model, m.BottleneckConfig("all-linear")),
    "dora": lambda m, model: m.add_dora(model, SUCCESSOR),
    "pissa": lambda m, model: m.add_pissa(model, SUCCESSOR),
    "vera": lambda m, model: m.add_vera(model, m.VeraConfig(4, NAMES)),
    "ia3": lambda m, model: m.add_ia3(model, m.IA3Config(NAMES, ["2", "mlp.c_proj", "down_proj"])),
}
PROMPT_METHODS: dict[str, Callable[[ModuleType, nn.Module], nn.Module]] = {
    "prompt_tuning": lambda m, model: m.PromptEmbedding(model, m.PromptTuningConfig(3)),
    "p_tuning": lambda m, model: m.PromptEncoder(model, m.PromptEncoderConfig(3)),
    "prefix_tuning": lambda m, model: m.PrefixEncoder(model, m.PrefixTuningConfig(3)),
}


# --- the demos ---


def run_as_main(file: Path) -> None:
    """In a forked child: do what `python file` does in the file's folder. Does not return."""
    status = 1
    try:
        signal.alarm(60)  # kills this child only
        os.chdir(file.parent)
        output = os.open(f"{file.parent}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path.insert(0, str(file.parent))
        sys.modules["minipeft"] = None  # an installed minipeft cannot be imported either
        runpy.run_path(file.name, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_forked(files: list[Path]) -> dict[str, int]:
    """Run each file in a child of its own, one child per core. Returns the exit statuses."""
    waiting, children, statuses = list(files), {}, {}
    while waiting or children:
        if waiting and len(children) < (os.cpu_count() or 1):
            file = waiting.pop(0)
            child = os.fork()
            if child == 0:
                run_as_main(file)
            children[child] = file.name
        else:
            child, status = os.wait()
            statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
    return statuses


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The exit status and the output of every file, each copied into an empty folder."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    folder, copies = tmp_path_factory.mktemp("demos"), []
    for name, file in FILES.items():
        (folder / file.stem).mkdir()
        copies.append(Path(shutil.copy(file, folder / file.stem / name)))
    done = subprocess.run(
        [sys.executable, "-I", __file__, *map(str, copies)],  # -I: no current folder on the path
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {
        name: (status, (folder / f"{Path(name).stem}.txt").read_text())
        for name, status in json.loads(done.stdout).items()
    }


@pytest.mark.parametrize("name", FILES)
def test_a_copied_file_runs_its_demo(name, demos):
    status, output = demos[name]
    assert status == 0, output
    assert output.startswith(f"{name}: "), output
    assert output.count("\n") == 1, output


# --- the source ---


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_torch_and_the_standard_library(name):
    """At module level. A function may import more, but never minipeft. Only the two methods of the
    GPT that read and write folders need another file of ours."""
    tree = ast.parse(FILES[name].read_text())
    everywhere = set(map(first_parts, ast.walk(tree)))
    at_the_top = set(map(first_parts, tree.body))
    assert ("minipeft" in set().union(*everywhere)) is (name == "gpt.py")
    assert set().union(*at_the_top) <= {"torch", *sys.stdlib_module_names}


def first_parts(node: ast.AST) -> frozenset[str]:
    """The packages that a statement imports; a relative import counts as minipeft."""
    if isinstance(node, ast.Import):
        return frozenset(alias.name.partition(".")[0] for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return frozenset(["minipeft" if node.level else node.module.partition(".")[0]])
    return frozenset()


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_and_the_demo_are_short(name):
    tree = ast.parse(FILES[name].read_text())
    docstring, demo = tree.body[0], tree.body[-1]
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value.value, str)
    assert docstring.end_lineno - docstring.lineno + 1 <= 32
    assert isinstance(demo, ast.If)
    assert ast.unparse(demo.test) == "__name__ == '__main__'"
    assert demo.end_lineno - demo.lineno <= 24  # without the `if`


# --- on other people's models ---


@pytest.fixture
def alone(tmp_path, monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a method file from an empty folder, where minipeft cannot be imported."""

    def load(name: str) -> ModuleType:
        file = shutil.copy(FILES[f"{name}.py"], tmp_path)
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    ours = [name for name in sys.modules if name.partition(".")[0] == "minipeft"]
    for name in {"minipeft", *ours}:
        monkeypatch.setitem(sys.modules, name, None)
    return load


def adapt(method: ModuleType, model: nn.Module) -> tuple[Callable, list[nn.Parameter]]:
    """Freeze and adapt a model as a student would. Returns what to call and what to train."""
    model.requires_grad_(False)
    if method.__name__ in PROMPT_METHODS:
        encoder = PROMPT_METHODS[method.__name__](method, model)
        return partial(encoder, model), list(encoder.parameters())
    WEIGHT_METHODS[method.__name__](method, model)
    return model, [p for p in model.parameters() if p.requires_grad]


def train_alone(method: ModuleType, model: nn.Module, loss: Callable[[Callable], Tensor]) -> None:
    """Adapt and train a model for a few steps, and check that only the adapter changes.

    loss: computes the training loss, given the adapted model.
    """
    base = [*model.parameters(), *model.buffers()]
    run, trained = adapt(method, model)
    base += model.buffers()  # QLoRA: the 4-bit weights
    before = [tensor.clone() for tensor in base]
    optimizer, losses = torch.optim.Adam(trained, lr=0.05), []
    for _ in range(8):
        losses.append(loss(run))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, base, before))


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out), like the one in transformers."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_a_copied_weight_method_adapts_linear_and_conv1d_layers(alone, name, layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(6, 8), nn.Tanh(), layer(8, 4))
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    train_alone(alone(name), model, lambda run: F.mse_loss(run(x), y))
    assert [type(m).__name__ for m in model[::2]] != [layer.__name__] * 2


class CausalModel(nn.Module):
    """One attention layer with a cache of keys and values, called like a model in transformers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids=None, inputs_embeds=None, attention_mask=None, labels=None,
        past_key_values=None, use_cache=False,
    ) -> SimpleNamespace:  # fmt: skip
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (b, t, d)
        k = v = x[:, None]  # (b, 1, t, d)
        if past_key_values is not None:
            k, v = (torch.cat((old, x[:, None]), dim=2) for old in past_key_values[0])
        p, t = k.shape[2] - x.shape[1], x.shape[1]
        mask = torch.ones(t, p + t, dtype=torch.bool).tril(p)
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()  # (b, 1, t, p + t)
        logits = self.head(x + F.scaled_dot_product_attention(x[:, None], k, v, mask)[:, 0])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
        return SimpleNamespace(loss=loss, logits=logits, past_key_values=((k, v),))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_a_copied_prompt_method_steers_a_causal_model(alone, name, masked):
    torch.manual_seed(0)
    ids = torch.randint(11, (16, 6))
    batch = {"input_ids": ids, "labels": torch.full_like(ids, 3)}
    if masked:
        batch["attention_mask"] = torch.ones_like(ids)

    def loss(run):
        out = run(**batch)
        assert out.logits.shape == (16, 6, 11)
        return out.loss

    train_alone(alone(name), CausalModel(), loss)


if __name__ == "__main__":
    import torch._dynamo  # the first optimizer step imports it: do so once, before forking

    print(json.dumps(run_forked([Path(file) for file in sys.argv[1:]])))
