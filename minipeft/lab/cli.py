"""The commands: their options, and what each does. torch is imported only to do work."""

import argparse
import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import product
from pathlib import Path

from minipeft import __version__
from minipeft.grader.commands import add_parsers as commands_of_build
from minipeft.lab import DATA
from minipeft.lab.recipes import (
    RATE,
    RECIPES,
    TARGETS,
    Bounds,
    Choice,
    RunConfig,
    common_recipe,
    compared_methods,
    swept_methods,
)

ONE_RUN = {  # fields of RunConfig that are options of `finetune`, but not of `compare` and `sweep`
    "learning_rate", "seed", "n_evaluations", "random_base", "shard", "output", "checkpoint_every",
    "resume", "quiet", "lr_end", "beta2",
}  # fmt: skip
NOT_WITH = {  # flags, and those that contradict them
    "--task": {"--train", "--validation", "--test"},
    "--full": {"--base", "--seeds", "--n-generate"},
    "--shard": {"--resume", "--checkpoint-every"},
    "--prompt": {"--chat"},
}
ONLY_WITH = {  # flags, and the one that they need
    "--train": "--validation", "--validation": "--train", "--test": "--train",
    "--decay-to": "--weight-decay", "--max-length": "--train",
}  # fmt: skip
INPUTS = ("base", "adapter", "train", "validation", "test", "text")
WRITTEN = (  # what the commands write into their output folders
    "config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "adapter_config.json", "adapter_model.safetensors", "checkpoint.safetensors", "log.csv",
    "record.json", "minipeft.json", "compare.json", "compare.png", "ranks.png", "sweep.json",
    "sweep.png", "memory.json", "memory.png",
)  # fmt: skip
SIZE, SEEDS = Bounds(int, 1, 1024), Bounds(int, 1, 1000)
SHAPE = {  # of a GPT to pretrain: default, bounds, help
    "vocab-size": (2048, Bounds(int, 257, 65_536), "256 bytes, the end token, and merged tokens"),
    "n-positions": (128, Bounds(int, 2, 1024), "tokens that the context holds"),
    "n-embd": (128, Bounds(int, 1, 1024), "width"),
    "n-layer": (4, Bounds(int, 1, 48), "blocks"),
    "n-head": (4, Bounds(int, 1, 64), "attention heads per block; must divide the width"),
}


EXAMPLES = {  # shown at the end of a command's --help
    "compare": ("--methods full,lora,qlora --seeds 3", "--task sentiment --output out/sentiment"),
    "finetune": ("--output out/lora", "--method qlora --size 16 --steps 300 --output out/qlora",
                 "--base smollm2 --train data/chat/train.jsonl "
                 "--validation data/chat/validation.jsonl --output out/chat"),
    "sweep": ("--method lora --sizes 2,8 --learning-rates 5e-3,1e-2,2e-2",),
    "pretrain": ("--text my_text.txt --output out/base",),
    "generate": ('--adapter out/lora --prompt "The name is Olive Mill. owner is Clara Stone."',
                 '--base smollm2 --chat "When do you open?"'),
    "evaluate": ("--adapter out/lora --test my_test.jsonl", "--base smollm2 --text my_text.txt"),
    "memory": ("--shapes llama-3.1-8b --methods full,lora,qlora --rank 16 --length 1024",),
    "targets": ("--base smollm2",),
    "build": ("start lora my", "check my"),
    "merge": ("--adapter out/lora --output out/merged",),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Flags are written in full and must go together; an error is one line."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def group(self, title: str):
        """The group of options with this title, which a parent may have added."""
        known = {group.title: group for group in self._action_groups}
        return known.get(title) or self.add_argument_group(title)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        try:
            check(found, {word.partition("=")[0] for word in words})
        except ValueError as error:
            self.error(str(error))
        return found, unknown

    def error(self, message: str):
        near = self.suggestion(message)
        hint = f", did you mean {near}?" if near else ""
        self.exit(2, f"{self.prog}: error: {one_line(message)}{hint} (see {self.prog} --help)\n")

    def suggestion(self, message: str) -> str | None:
        """The flag or name that was probably meant, if an error is about an unknown one."""
        wrong = re.search(
            r"(?:unrecognized arguments: |invalid choice: '|, got ')([\w-]+)", message
        )
        if wrong is None:
            return None
        choices = re.search(r"(?:choose from|must be one of) (.*?)(?:\)|, got )", message)
        known = re.findall(r"[\w-]+", choices[1]) if choices else self._option_string_actions
        return next(iter(difflib.get_close_matches(wrong[1], known, 1, 0.7)), None)


def check(args, given: set[str]) -> None:
    """Raises ValueError if the given flags, or their values, do not go together."""
    for flag, others in NOT_WITH.items():
        if flag in given and others & given:
            raise ValueError(f"{flag} cannot be used with {', '.join(sorted(others & given))}")
    for flag, other in ONLY_WITH.items():
        exists = other.strip("-").replace("-", "_") in args  # in this command
        if exists and flag in given and other not in given:
            raise ValueError(f"{flag} needs {other}")
    value = vars(args).get
    if "accumulation" in args:
        run_config(args)
    if "method" in args:
        recipe_of(args)
    methods = value("methods") if value("targets") else None
    if methods and not any(RECIPES[method].has_rank for method in methods):
        raise ValueError(f"--targets needs a method with a rank, got {', '.join(methods)}")
    if "chat" in args and not (args.chat or args.prompt):
        raise ValueError("give a --prompt to continue, or a --chat message to answer")
    if {"test", "text"} <= vars(args).keys() and not (args.test or args.text):
        raise ValueError("give --test examples, --text, or both")
    if value("shard") and os.environ.get("WORLD_SIZE", "1") == "1":
        raise ValueError("--shard needs several processes: start them with torchrun")
    if "learning_rates" in args and len(args.learning_rates) < 3:
        raise ValueError("--learning-rates needs at least three: the best must not be at an edge")
    if value("results") and Path(args.results).suffix != ".json":
        raise ValueError(f"--results must be a .json file, got {args.results}")
    if 0 < (value("temperature") or 0) < 1e-6:
        raise ValueError(f"--temperature must be 0 or at least 1e-6, got {args.temperature}")
    if value("top_k") and not args.temperature:
        raise ValueError("--top-k needs a --temperature above 0: greedy decoding does not sample")
    if "n_head" in args and args.n_embd % args.n_head:
        raise ValueError(f"--n-head must divide --n-embd, got {args.n_head} and {args.n_embd}")


def text(value: str) -> str:
    """A text that is not empty. Raises UnicodeEncodeError if it was not UTF-8."""
    if not value:
        raise ValueError("must not be empty")
    value.encode()
    return value


def listed(kind: Callable) -> Callable[[str], list]:
    """A list: entries of a kind with commas between them, none of them twice."""

    def parse(value: str) -> list:
        entries = [kind(entry.strip()) for entry in value.split(",")]
        if len(set(entries)) < len(entries):
            raise ValueError(f"has an entry twice: {value!r:.200}")
        return entries

    return parse


def add_option(
    parser: argparse.ArgumentParser, flag: str, default, help: str, kind: Callable = text, **more
) -> None:
    """Add an option. `kind` turns its text into a value, or raises ValueError."""

    def parse(value: str):
        try:
            return kind(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from None

    if default is False:
        parser.add_argument(flag, action="store_true", help=help)
        return
    if default is not None:
        help += " (default: %(default)s)"
    if more.get("required"):
        help += " (required)"
    if "choices" in more:
        help, more["metavar"] = f"{help}; one of {', '.join(more['choices'])}", "NAME"
    parser.add_argument(flag, default=default, help=help, type=parse, **more)


def add_fields(parser: argparse.ArgumentParser, names: set[str], **defaults) -> None:
    """Add an option for each of these fields of RunConfig."""
    for field in fields(RunConfig):
        if field.name in names:
            flag, values = f"--{field.name.replace('_', '-')}", field.metadata["values"]
            default, more = defaults.get(field.name, field.default), {}
            if field.name == "output":
                more = {"required": True, "metavar": "FOLDER"}
            kind = values.parse if values else text
            add_option(parser, flag, default, field.metadata["help"], kind, **more)


def parser() -> argparse.ArgumentParser:
    top = Parser("minipeft", description="PEFT methods, trained and measured.")
    top.add_argument("--version", action="version", version=f"minipeft {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, help: str, *parents) -> Parser:
        lines = "".join(f"\n  minipeft {name} {words}" for words in EXAMPLES[name])
        return commands.add_parser(
            name, parents=parents, help=help, description=f"{help.capitalize()}.",
            usage=f"minipeft {name} {'COMMAND …' if name == 'build' else '[options]'}",
            epilog=f"examples:{lines}", formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    base = Parser(add_help=False)
    model = base.group("the base model")
    add_option(model, "--base", str(DATA / "base" / "1m"), "a GPT-2 folder; with transformers, a "
               "folder or GGUF file of any causal model, or a name on the Hugging Face Hub",
               metavar="FOLDER_OR_NAME")  # fmt: skip
    add_option(model, "--dtype", "float32", "of the weights of a transformers model",
               choices=("float32", "bfloat16"))  # fmt: skip
    any_base = Parser(add_help=False, parents=[base])
    add_option(
        any_base.group("the base model"), "--4bit", False, "quantize the base first, as QLoRA does"
    )
    job = Parser(add_help=False, parents=[base])
    data = job.group("the task")
    add_option(data, "--task", None, "a shipped task; without it and --train, describe")
    add_option(data, "--train", None, "your own task: JSONL of prompt and completion, or of "
               "messages", metavar="FILE")  # fmt: skip
    add_option(data, "--validation", None, "its validation examples", metavar="FILE")
    add_option(data, "--test", None, "its test examples; without this file, every second "
               "validation example is kept for the test", metavar="FILE")  # fmt: skip
    add_option(data, "--max-length", None, "leave out examples with more tokens; without it, those "
               "that the context does not hold", Bounds(int, 2, 2**31).parse)  # fmt: skip
    common = {field.name for field in fields(RunConfig)} - ONE_RUN
    add_fields(job.group("training"), common, steps=os.environ.get("MINIPEFT_STEPS") or 100)
    trainable = [method for method in RECIPES if method != "frozen"]
    place, method = Choice(tuple(TARGETS)), Choice(tuple(swept_methods()))

    command = add_command("compare", "methods against full fine-tuning", job)
    add_option(command, "--methods", ",".join(compared_methods()), "a list of methods",
               listed(method.parse))  # fmt: skip
    add_option(command, "--seeds", 1, "seeds per method", SEEDS.parse)
    add_option(command, "--targets", None, "put adapters there, with equal numbers of parameters; "
               f"a list from {', '.join(TARGETS)}", listed(place.parse))  # fmt: skip
    add_option(
        command, "--full", False, "the first edition's run: 3M base, three seeds, the whole test"
    )
    add_option(command, "--output", "out/compare", "the folder to write")
    add_option(command, "--wide", False, "print all columns; they are also in compare.json")

    command = add_command("finetune", "train one method and save the result", job)
    add_option(command, "--method", "lora", "the method", choices=trainable)
    add_option(command, "--size", None, "rank, width or virtual tokens", SIZE.parse)
    add_option(command, "--targets", None, "where a weight method's adapters go", choices=TARGETS)
    add_fields(command.group("training"), ONE_RUN - {"output"})
    add_fields(command, {"output"})

    command = add_command("sweep", "learning rates and sizes of a method, on a grid", job)
    add_option(command, "--method", "lora", "the method", choices=trainable)
    add_option(command, "--learning-rates", "2.5e-3,5e-3,1e-2,2e-2,4e-2", "a list",
               listed(RATE.parse))  # fmt: skip
    add_option(command, "--sizes", None, "a list of ranks, widths or numbers of virtual tokens",
               listed(SIZE.parse))  # fmt: skip
    add_option(command, "--seeds", 1, "seeds per point", SEEDS.parse)
    add_option(command, "--output", "out/sweep", "the folder for sweep.png")
    add_option(command, "--results", None, "add to this .json file; without it, OUTPUT/sweep.json")
    add_fields(command, {"random_base"})

    command = add_command("pretrain", "a small GPT and its tokenizer from a text file")
    add_option(command, "--text", None, "documents with <|endoftext|> between them", required=True)
    add_option(command, "--output", None, "the folder to write", required=True)
    for name, (default, bounds, help) in SHAPE.items():
        add_option(command, f"--{name}", default, help, bounds.parse)
    add_fields(command, {"steps", "seed", "device"}, steps=2000)

    command = add_command("generate", "continue a prompt", any_base)
    add_option(command, "--adapter", None, "an adapter to add to the base", metavar="FOLDER")
    add_option(command, "--prompt", None, "the text to continue")
    add_option(command, "--chat", None, "a message to answer, in the base's chat template",
               metavar="MESSAGE")  # fmt: skip
    add_option(command, "--max-new-tokens", 60, "tokens to generate at most",
               Bounds(int, 0, 1_000_000).parse)  # fmt: skip
    add_option(command, "--temperature", None, "sample; without it or with 0, greedy decoding",
               Bounds(float, 0, 1000).parse)  # fmt: skip
    add_option(command, "--top-k", None, "sample from the k most likely tokens",
               Bounds(int, 1, 1_000_000).parse)  # fmt: skip
    add_fields(command, {"seed", "device"})

    command = add_command(
        "evaluate", "loss, perplexity and answers of a base or an adapter", any_base
    )
    add_option(command, "--adapter", None, "an adapter to add to the base", metavar="FOLDER")
    add_option(command, "--test", None, "examples: JSONL of prompt and completion, or of messages",
               metavar="FILE")  # fmt: skip
    add_option(command, "--text", None, "plain text, to measure what was forgotten: compare the "
               "base's perplexity with the adapter's", metavar="FILE")  # fmt: skip
    add_option(command, "--max-length", None, "leave out examples with more tokens",
               Bounds(int, 2, 2**31).parse)  # fmt: skip
    add_fields(command, {"n_generate", "device"})

    command = add_command("memory", "where the bytes go, by model shape and method")
    add_option(
        command,
        "--shapes",
        None,
        "a list of shapes, or of config.json files; without it, all shapes",
        listed(text),
    )
    add_option(command, "--base", None, "a model's folder, or its name on the Hub: one more shape",
               metavar="FOLDER_OR_NAME")  # fmt: skip
    # the first three: with 8, 12 and 16 bytes per parameter
    methods = ("full-8", "full", "full-16", "lora", "qlora", "dora", "pissa", "vera", "ia3")
    add_option(command, "--methods", None, f"a list from {', '.join(methods)}; without it, the "
               "first five",
               listed(Choice(methods).parse))  # fmt: skip
    add_option(command, "--rank", 8, "of the adapters", SIZE.parse)
    add_option(command, "--batch-size", 1, "sequences", SIZE.parse)
    add_option(command, "--length", 128, "tokens per sequence", Bounds(int, 2, 65_536).parse)
    add_option(command, "--no-checkpointing", False, "keep all activations for the backward pass")
    add_option(command, "--output", "out/memory", "the folder to write")

    add_command("targets", "list the layers of a base that adapters can go on", base)

    build = add_command("build", "write a method's file yourself, and have it graded")
    commands_of_build(build)

    command = add_command("merge", "write a base with an adapter merged into it", any_base)
    add_option(command, "--adapter", None, "the adapter", metavar="FOLDER", required=True)
    add_option(command, "--output", None, "the folder to write", required=True)
    return top


def run_config(args, **changes) -> RunConfig:
    """The RunConfig that the options describe."""
    names = {field.name for field in fields(RunConfig)}
    return RunConfig(**{k: v for k, v in vars(args).items() if k in names} | changes)


def recipe_of(args, recipes=RECIPES.get):
    """The recipe that --method, --size and --targets (or the first of --sizes) name."""
    recipe = recipes(args.method)
    sizes = args.sizes if "sizes" in args else args.size and [args.size]
    recipe = recipe.with_size(sizes[0]) if sizes else recipe
    places = vars(args).get("targets")
    return recipe.placed(places, same_size=False) if places else recipe


def open_job(args):
    """The base and the task that the options name, and the recipes for this base, by method."""
    from minipeft.lab import base, tasks

    opened = base.load_base(args.base, args.dtype)
    recipes = RECIPES.get if opened.is_shipped else common_recipe
    if args.train:
        files = args.train, args.validation, args.test
        return opened, tasks.load_files(opened, *files, args.max_length), recipes
    return opened, tasks.load_task(opened, args.task or "describe"), recipes


def compare(args) -> None:
    from minipeft.lab import compare

    if args.full:
        args.base, args.seeds, args.n_generate = str(DATA / "base" / "3m"), 3, 200
    base, task, recipe_for = open_job(args)
    recipes = []
    for recipe in map(recipe_for, args.methods):
        places = (args.targets or []) if recipe.has_rank else []
        recipes += [recipe.placed(place) for place in places] or [recipe]
    records = compare.compare(base, task, recipes, run_config(args, output=None), args.seeds)
    try:
        print(compare.show_examples(records))
        print(f"\n{compare.table(records, task, args.wide)}\n")
    finally:  # also if nobody reads them
        compare.save(records, task, args.output)
    print(f"wrote {args.output}/compare.json and compare.png")
    if left_out := [method for method in swept_methods() if method not in args.methods]:
        print(f"not compared: {', '.join(left_out)}; name methods with --methods")
    print("next: minipeft finetune --method lora --output out/lora")


def finetune(args) -> None:
    from minipeft.files import write_text
    from minipeft.lab import finetune, parallel

    if not args.resume and (Path(args.output) / "checkpoint.safetensors").exists():
        raise ValueError(
            f"{args.output} has a stopped run: continue it with --resume, or delete "
            "checkpoint.safetensors"
        )
    args.device = parallel.start(args.device)
    base, task, recipe_for = open_job(args)
    base.given_away = True
    record = finetune.finetune(base, task, recipe_of(args, recipe_for), run_config(args))
    text = json.dumps(record.to_json(), indent=1) + "\n"
    if parallel.rank() == 0:
        write_text(Path(args.output) / "record.json", text)
        first, last = (point["loss"] for point in (record.validation[0], record.validation[-1]))
        print(f"validation loss {first:.3f} -> {last:.3f}, test loss {record.test_loss:.3f}")
        print(f"{task.metric} {record.score:.3f}; wrote {args.output}")
        what = "base" if args.method == "full" else "adapter"
        print(f"next: minipeft generate --{what} {shlex.quote(args.output)} --prompt …")
    parallel.stop()


def sweep(args) -> None:
    from minipeft.lab import report, sweep

    results = Path(args.results or Path(args.output) / "sweep.json")
    results.parent.mkdir(parents=True, exist_ok=True)
    sweep.load(results)  # raises ValueError for a file of something else
    base, task, recipe_for = open_job(args)
    run = run_config(args, output=None)
    grid = sweep.Grid(args.learning_rates, args.sizes or [], args.seeds)
    entries = sweep.sweep(base, task, recipe_for(args.method), run, grid)
    try:
        print(sweep.table(entries))
    finally:
        sweep.save(entries, results)
    report.save_figure(report.sweep_figure(entries), Path(args.output) / "sweep.png")
    print(f"wrote {args.output}/sweep.png and {results}")


def memory(args) -> None:
    from minipeft.lab import memory
    from minipeft.lab.base import find

    methods = args.methods or list(memory.METHODS)
    shapes = [*(args.shapes or []), *([str(find(args.base))] if args.base else [])]
    shapes = shapes or list(memory.SHAPES)
    settings = args.rank, args.batch_size, args.length, not args.no_checkpointing
    found, measured = memory.of(shapes, methods, *settings)
    try:
        print(f"{memory.table(found)}\n")
        if measured:
            print(f"the same, measured in one step on the CPU:\n\n{memory.table(measured)}\n")
    finally:
        memory.save(found, measured, args.output)
    print(f"wrote {args.output}/memory.json and memory.png")


def targets(args) -> None:
    from minipeft.lab.base import load_model
    from minipeft.lab.report import markdown_table
    from minipeft.targets import list_targets

    rows = list_targets(load_model(args.base))
    lines = [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    print(markdown_table(rows[0], lines))


def pretrain(args) -> None:
    from minipeft.files import write_file
    from minipeft.gpt import GPTConfig
    from minipeft.lab import base, pretrain, train

    train.pick_device(args.device)
    documents = base.read_text(args.text)
    tokenizer = pretrain.train_tokenizer(documents, args.vocab_size)
    size = {name: getattr(args, name) for name in (flag.replace("-", "_") for flag in SHAPE)}
    run = pretrain.pretraining_run(args.steps, seed=args.seed, device=args.device)
    config = GPTConfig(**size, **pretrain.SETTINGS)
    model, training, _ = pretrain.pretrain(documents, config, tokenizer, run)
    file = Path(args.output) / "tokenizer.json"
    file.unlink(missing_ok=True)  # an old one is not to be used with the new model
    model.save_pretrained(args.output)
    write_file(file, tokenizer.save)
    print(f"last loss {training.losses[-1]:.3f}; wrote {args.output}")


def open_model(args, device: str | None, is_chat: bool | None = None):
    """The base, and its model on a device, quantized and adapted as the options say."""
    from minipeft import PeftModel, quantize_model
    from minipeft.lab import base, finetune, train

    picked, four = train.pick_device(device), vars(args)["4bit"]
    opened = base.load_base(args.base, args.dtype)
    if args.adapter:
        folder, bits = Path(args.adapter), 4 if four else None
        for warning in finetune.check_origin(folder, opened, bits, is_chat):
            print(warning, file=sys.stderr)
    model = opened.pretrained
    model = (quantize_model(model) if four else model).to(picked)
    return opened, PeftModel.from_pretrained(model, args.adapter) if args.adapter else model


def generate(args) -> None:
    import torch

    from minipeft.lab import chat, evaluate
    from minipeft.lab.base import encode_prompt

    base, model = open_model(args, args.device, args.chat is not None)
    if args.chat:
        messages = [{"role": "user", "content": args.chat}]
        prompt = chat.render(base, messages, answer_follows=True)
        ids = base.tokenizer.encode(prompt, add_special_tokens=False).ids
    else:
        ids = encode_prompt(base.tokenizer, args.prompt)
    ids = torch.tensor([ids], device=model.device)
    sampling = {"max_new_tokens": args.max_new_tokens, "top_k": args.top_k}
    if args.temperature:
        torch.manual_seed(args.seed)
        sampling |= {"do_sample": True, "temperature": args.temperature}
    new = evaluate.continue_ids(model, base, ids, torch.ones_like(ids), **sampling)[0]
    print(base.tokenizer.decode([*([] if args.chat else ids[0].tolist()), *new.tolist()]).strip())


def evaluate(args) -> None:
    import math

    from minipeft.lab import evaluate, tasks
    from minipeft.lab.base import context_length, read_windows

    base, model = open_model(args, args.device)

    def show(file: str, loss: float, what: str) -> None:
        perplexity = math.exp(min(loss, 700))  # more would be no float
        print(f"{file}: loss {loss:.3f}, perplexity {perplexity:.2f} ({what})")

    if args.text:
        rows = read_windows(Path(args.text), base.tokenizer, model, base.end)
        show(args.text, evaluate.text_loss(model, rows), f"{rows.numel():,} tokens")
    if not args.test:
        return
    limit = min(args.max_length or math.inf, context_length(model))
    examples, left_out = tasks.fitting(tasks.load_jsonl(args.test, base), limit, args.test)
    if left_out:
        print(left_out)
    loss = evaluate.task_loss(model, examples, base.end)["loss"]
    show(args.test, loss, f"{len(examples)} examples")
    shown = examples[: args.n_generate]
    texts = evaluate.complete(model, base, shown)
    print(f"exact match {tasks.exact_match(shown, texts):.3f} ({len(shown)} examples)")
    for example, text in zip(shown[:3], texts, strict=False):
        print(f"\nprompt     {example.prompt.strip()}\nreference  {example.completion.strip()}")
        print(f"generated  {text.strip()}")


def merge(args) -> None:
    from minipeft.lab.base import copy_tokenizer

    opened, model = open_model(args, "cpu")
    model.merge_and_unload(inplace=True).save_pretrained(args.output)
    copy_tokenizer(opened, args.output)
    print(f"wrote {args.output}")


def build(args) -> None:
    from minipeft.grader import commands

    commands.run(args)


def check_output(output: Path, files: list[Path], inputs: list) -> None:
    """Raises ValueError, before any work, if files could not be written, or are inputs."""
    for folder in {output, *(file.parent for file in files)}:
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise ValueError(f"cannot write to {folder}: {existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write to {folder}: no permission to write to {existing}")
    for file in files:
        if file.is_dir():
            raise ValueError(f"cannot write {file}: it is a folder")
    for source, file in product(inputs, [output, *files]):
        if os.path.exists(source) and os.path.exists(file) and os.path.samefile(source, file):
            raise ValueError(f"{source} would be overwritten: choose another output")


def run(args) -> None:
    """Do what a command says."""
    command, value = globals()[args.command], vars(args).get
    if "output" not in args:
        return command(args)
    output = Path(args.output)
    files = [output / name for name in WRITTEN]
    files += [Path(args.results)] if value("results") else []
    check_output(output, files, [*filter(None, map(value, INPUTS)), *DATA.glob("base/*")])
    if args.command == "finetune":  # which locks the folder itself, for all of its processes
        return command(args)
    from minipeft.lab.checkpoint import locked

    with locked(output):
        command(args)


def one_line(text: str) -> str:
    """A text as one line of at most 1,000 printable characters."""
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:1000]
